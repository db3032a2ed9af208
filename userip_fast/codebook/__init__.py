"""Codewords, the nearest of them, and names of codes."""
