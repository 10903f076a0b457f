"""Everything between the command line and the tensors: configuration, data, training, analysis."""
