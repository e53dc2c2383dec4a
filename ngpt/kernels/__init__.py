"""Compiled code: the loss of the head, attention, the fused residual, and how they are built."""
