"""The benchmark: speed and memory of the operator, the model, the loader and the training loop."""
