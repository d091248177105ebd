"""Decoders that transformers implements and Octavo does not: its modules, our pages, attention kernels and scheduler.

Needs the extra ``[hf]``. Weights are read by our own strict reader; no code of a model repository is executed.
"""
