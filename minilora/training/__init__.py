"""Training: the loop, and what it uses, one file each."""
