"""Studies: each a folder with its commands and its results."""
