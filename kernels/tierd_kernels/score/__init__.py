"""Scores of every visible token and the statistics of every block."""
