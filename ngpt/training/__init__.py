"""One training run: loop, evaluation, checkpoints, recovery and trackers."""
