"""Floor 5: loops run a scheme, knowing no method by name. The only home of optimizers and accelerate."""
