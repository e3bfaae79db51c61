"""Blocks of originals into hot records, with everything that a bound needs measured at write time.

`reference` says what is meant, in float64; `cpu` does it for many blocks at once.
"""
