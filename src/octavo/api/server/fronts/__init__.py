"""Several front processes of one server: what they share, and how they ask each other for it."""
