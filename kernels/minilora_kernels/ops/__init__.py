"""Operations of a model: reference PyTorch, autograd and dispatch."""
