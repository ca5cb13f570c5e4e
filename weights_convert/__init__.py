"""Checkpoints people have to snoopi's model folders, and back. snoopi never imports this."""
