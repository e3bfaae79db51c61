"""Attention over the originals: the truth, and the last rungs of the ladder."""
