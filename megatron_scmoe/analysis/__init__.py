"""What a schedule costs: simulated, measured at start-up, read from a trace, drawn."""
