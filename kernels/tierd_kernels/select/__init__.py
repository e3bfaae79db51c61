"""Which blocks are skipped, and which are promoted to their originals."""
