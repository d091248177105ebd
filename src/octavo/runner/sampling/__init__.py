"""From logits to tokens: what a request may ask of the draw, each part in its own file."""
