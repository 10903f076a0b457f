"""Models, test functions and matrix problems for training and for comparing optimizers."""
