"""Benchmarks against other implementations and of one GPU. They are not part of the installed package."""
