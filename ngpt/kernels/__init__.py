"""Compiled kernels: cross-entropy of the head, attention and the fused residual; and how they are built."""
