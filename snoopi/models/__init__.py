"""Networks: one network, one file."""
