"""The campaign file: its schema, sweeps, search spaces and checks."""
