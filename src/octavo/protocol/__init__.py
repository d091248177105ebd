"""The messages between Octavo's halves: plain msgspec types, no behaviour, no torch."""
