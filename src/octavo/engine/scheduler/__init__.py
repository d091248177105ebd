"""Which sequences run next: one loop over sequences and resources, no phases, no features by name."""
