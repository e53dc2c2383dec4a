"""Validation: mean loss in nats per token, and bits per byte of the real text, on the same tokens for every trial."""

import math

import torch

from ngpt.data.loader import EvalSet
from ngpt.model import GPT


@torch.no_grad()
def evaluate(model: GPT, eval_set: EvalSet, *, autocast: torch.autocast) -> dict[str, float | None]:
    """`val_loss` (nats per token) and `val_bpb` (bits per byte; None where the corpus has no tokenizer to count bytes with)."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    with autocast:
        for idx, targets in eval_set.batches:
            total += model(idx.to(device), targets.to(device)).double() * targets.numel()
    nats = float(total)
    bpb = nats / math.log(2) / eval_set.n_bytes if eval_set.n_bytes else None
    return {"val_loss": nats / eval_set.n_tokens, "val_bpb": bpb}
