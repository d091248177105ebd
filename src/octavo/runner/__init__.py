"""Floor 3: executes one plan on one device."""
