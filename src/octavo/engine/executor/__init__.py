"""Carries plans to the runners and results back: inline (same process), multiproc (workers), null (no maths)."""
