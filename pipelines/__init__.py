"""Configuration, data, training and analysis: what the command line calls."""
