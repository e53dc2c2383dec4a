"""Downstream tasks: a model for lm-evaluation-harness, nanochat's CORE metric, and what campaigns run of both."""
