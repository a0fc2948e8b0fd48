"""Training small models from end to end: data, loop, checkpoints, comparison with stock."""
