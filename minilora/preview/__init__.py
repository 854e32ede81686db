"""Data as training will see it, token by token, and the command that shows it."""
