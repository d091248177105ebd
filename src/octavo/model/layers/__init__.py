"""The torch execution of the blocks: each layer allocates its tensors, names them for the loader, and computes."""
