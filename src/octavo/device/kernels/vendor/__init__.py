"""Kernels of other packages behind our ops; bound only where a measurement on this card found them faster."""
