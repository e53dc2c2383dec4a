"""Validation: mean loss in nats per token, and bits per byte of the real text, on the same tokens for every trial."""

import math

import torch

from ngpt.data.loader import EvalSet
from ngpt.model import GPT


@torch.no_grad()
def evaluate(model: GPT, eval_set: EvalSet, *, autocast: torch.autocast) -> dict[str, float | None]:
    """`val_loss` (nats per token) and `val_bpb` (bits per byte; None where the corpus cannot count its bytes)."""
    device = next(model.parameters()).device
    with autocast:
        losses = [model(idx.to(device), targets.to(device)) for idx, targets in eval_set.batches]
    counts = [targets.numel() for _, targets in eval_set.batches]
    # Summed in float64 on the CPU, since MPS has none; one transfer, not one per batch.
    nats = sum(loss * n for loss, n in zip(torch.stack(losses).tolist(), counts, strict=True))
    bpb = nats / math.log(2) / eval_set.n_bytes if eval_set.n_bytes else None
    return {"val_loss": nats / eval_set.n_tokens, "val_bpb": bpb}
