"""The model as transformers loads it; these files are copied beside the weights."""
