"""Scores per image: batched, exact, on the maps' device."""
