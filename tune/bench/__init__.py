"""Benchmarks of campaign overhead, parallel speedup and device sharing: `python -m tune.bench NAME`.

They run real campaigns and real training steps in a temporary folder.
"""
