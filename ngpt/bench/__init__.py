"""Benchmarks of one training run on this machine: `python -m ngpt.bench NAME --json`.

Each part is timed in alternation with a plain torch formulation, and compared with a hardware limit: the rate of a
large matrix product, or of a copy. So results can be compared between machines, even busy ones.
"""
