"""Ops: each is a signature, a reference body in plain torch (the semantics) and a list of implementations."""
