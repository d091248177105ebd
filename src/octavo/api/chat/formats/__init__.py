"""How model families write tool calls (and thoughts), chosen from the model's own chat template."""
