"""Grammars in the engine half: compiled beside the loop, asked for a mask a token."""
