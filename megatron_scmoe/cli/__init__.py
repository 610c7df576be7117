"""The commands: one module each, all of them behind the console program ``scmoe`` (``program.py``)."""
