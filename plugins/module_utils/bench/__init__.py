"""What the benchmarks do in dom0: trees, guests, policy, measurements."""
