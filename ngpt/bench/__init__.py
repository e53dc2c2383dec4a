"""How fast it is on this machine: `python -m ngpt.bench NAME --json`.

Every figure stands beside a plain torch formulation that took turns with it, and beside what a large matrix product or
a copy reaches in the same run, so that it means something on another machine and on a busy one.
"""
