"""Floor 4: what is computed. ``arch``, ``blocks`` and ``families`` describe (no torch); ``layers`` execute (torch)."""
