"""How much memory a run takes, from config.json alone; what fits a card."""
