"""Floor 5: how and where. Platforms, ops (signature + reference body), kernels."""
