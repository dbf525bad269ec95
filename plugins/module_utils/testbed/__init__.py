"""What the controller does to stand up a nested Xen host: image, virtual machine, lock, checks."""
