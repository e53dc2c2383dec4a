"""The code of a run: what it reaches, and whether that has changed since an earlier run."""
