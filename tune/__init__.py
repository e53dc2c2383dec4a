"""The campaign engine: plans, runs and judges many trials in parallel."""
