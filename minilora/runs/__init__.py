"""What one does with runs: show them elsewhere, draw them, search over their options."""
