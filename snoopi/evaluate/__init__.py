"""Measurements of generated pictures: distances in a feature space, and what a judge reads."""
