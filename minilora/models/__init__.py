"""The decoder, and loading and saving of checkpoints."""
