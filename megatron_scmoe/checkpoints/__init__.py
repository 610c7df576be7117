"""Checkpoints in and out: formats are mappings between dictionaries of tensors read when needed."""
