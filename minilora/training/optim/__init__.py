"""How the parameters move: the optimisers, the learning rate of each step, noise on the way in."""
