"""How well a model does: the loss of a batch, which training learns from, and answers against their references."""
