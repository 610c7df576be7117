"""Hugging Face formats in and out; one file a format, found by registry.py."""
