"""Command lines: what they share, and the programs besides inference.py."""
