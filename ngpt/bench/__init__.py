"""Benchmarks of one training run on this machine: `python -m ngpt.bench NAME --json`.

Each part is timed in turns with a plain torch formulation of it, and beside a ceiling of the machine: the rate of a
large matrix product, or of a copy. So metrics can be compared between machines, and they hold on a busy one.
"""
