"""What only benchmarks need: the floor, a server with no filesystem behind it."""
