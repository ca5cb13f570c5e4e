"""Losses: one equation, one function. Networks come as arguments; no files, no ranks."""
