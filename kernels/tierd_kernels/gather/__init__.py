"""Records from one memory to another, many at once."""
