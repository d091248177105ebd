"""From a model's name to its opened files: local path, our cache, catalogue, hub, in this order."""
