"""The models and functions that the optimizers are compared on."""
