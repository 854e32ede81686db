"""What moves a run that asks for more: moments in 8 bits, several processes. Opened by the options that name them."""
