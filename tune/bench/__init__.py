"""Benchmarks of campaigns: what they cost besides training, and how fast many trials are: `python -m tune.bench NAME`.

They run real campaigns and real training steps, in a temporary folder.
"""
