"""Trains several runs that share one graph as a single batched program."""
