"""A training run: what it loads, what is checked before it starts, the loop."""
