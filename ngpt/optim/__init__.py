"""Optimizers, learning-rate schedules and the projection onto the sphere."""
