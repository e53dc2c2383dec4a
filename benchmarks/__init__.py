"""Benchmarks against other people's code. They are not part of the installed package."""
