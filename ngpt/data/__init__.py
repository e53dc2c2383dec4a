"""Corpora, tokenizers, shards and the loader; `python -m ngpt.data CORPUS` prepares one."""
