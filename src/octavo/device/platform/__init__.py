"""What differs between devices, in one object each; found by name, imported lazily."""
