"""Speed, measured: each module is a command (`python -m benchmarks.NAME`) run from the root."""
