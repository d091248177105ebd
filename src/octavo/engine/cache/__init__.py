"""Pages: which are needed (spec), how layers share them (layout), who holds them (pool), what they contain (prefix)."""
