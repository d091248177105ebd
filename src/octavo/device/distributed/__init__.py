"""Ranks that compute one model together: where they meet, and what they exchange."""
