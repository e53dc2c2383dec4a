"""Evaluates a run: validation loss, distance from the sphere, step lengths alpha and divisors r."""

import logging
import math

import torch
from torch import Tensor

from ngpt.data.loader import EvalSet
from ngpt.model import diagnostics
from ngpt.model.gpt import GPT
from ngpt.optim.projection import project_weights
from ngpt.system.memory import retry_on_oom
from ngpt.training.recovery import reduce_eval_batch
from ngpt.training.run import Run, progress
from ngpt.training.state import Metrics
from ngpt.training.text_blocks import sum_over_blocks
from ngpt.training.tracker import finite_or_none

log = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: GPT, eval_set: EvalSet, *, autocast: torch.autocast, by_token: list[Tensor] | None = None
) -> dict[str, float | None]:
    """Returns `val_loss` (nats per token) and `val_bpb` (bits per byte; None if the bytes per token are unknown).

    If `by_token` is a list, the losses of all tokens are appended to it, batch by batch; this takes one more pass
    through the head and changes no number.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with autocast:
        losses = [_loss(model, idx.to(device), targets.to(device), by_token) for idx, targets in eval_set.batches]
    model.train(was_training)
    counts = [targets.numel() for _, targets in eval_set.batches]
    # A single transfer, then a float64 sum on the CPU, because MPS has no float64.
    nats = sum(loss * n for loss, n in zip(torch.stack(losses).tolist(), counts, strict=True))
    bpb = nats / math.log(2) / eval_set.n_bytes if eval_set.n_bytes else None
    return {"val_loss": nats / eval_set.n_tokens, "val_bpb": bpb}


def _loss(model: GPT, idx: Tensor, targets: Tensor, by_token: list[Tensor] | None) -> Tensor:
    if by_token is None:
        return model(idx, targets)
    x = model.features(idx)
    by_token.append(model.token_losses(x, targets))
    return model.loss(x, targets)


def evaluate_run(run: Run, *, last: bool) -> dict[str, Tensor]:
    """Stores the metrics in `state.last_eval`; returns the alphas and divisors by name, for histograms.

    At the last step the weights are projected, after the distance from the sphere has been measured. Numbers that are
    not finite become None. If memory runs out, the evaluation is repeated with half the batch size.
    """
    distance, r = retry_on_oom(lambda: _distance_and_divisors(run), lambda: reduce_eval_batch(run), run.device)
    if last:  # the final weights lie on the sphere, whatever `project_every` is
        project_weights(run.model)
    scores = retry_on_oom(lambda: _validation_scores(run, last=last), lambda: reduce_eval_batch(run), run.device)
    metrics = progress(run) | {"train_loss": run.state.train_loss} | scores | distance | _replaced_divisors(run)
    run.state.last_eval = {name: finite_or_none(value) for name, value in metrics.items()}
    if run.state.step == 0:
        run.state.initial_val_loss = run.state.last_eval["val_loss"]
    return diagnostics.effective_alphas(run.model) | r


def _validation_scores(run: Run, *, last: bool) -> Metrics:
    """Evaluates the run; at the last step, also stores the loss of each block of the text in the state."""
    by_token: list[Tensor] | None = [] if last else None
    with diagnostics.restore_counts_on_error(run.model):
        scores = evaluate(run.model, run.validation.cut(run.eval_batch_size), autocast=run.autocast, by_token=by_token)
    if by_token:
        losses = torch.cat(by_token).cpu().double().numpy()
        run.state.eval_blocks = sum_over_blocks(losses, run.validation.starts)
    return scores


def _distance_and_divisors(run: Run) -> tuple[Metrics, dict[str, Tensor]]:
    """Returns the distance of weights and activations from the sphere, and the divisors, on one validation sequence."""
    idx = run.validation.batches[0][0][:1].to(run.device)
    r = diagnostics.divisors(run.model, idx)
    distance: Metrics = {
        "weight_norm_error": diagnostics.weight_norm_error(run.model),
        "activation_norm_error": diagnostics.activation_norm_error(run.model, idx),
    }
    return distance | diagnostics.divisor_statistics(r), r


def _replaced_divisors(run: Run) -> Metrics:
    """Returns `r_replaced`, the number of divisors so far that were not finite; logs a warning if it has grown."""
    if run.model.normalizer is None:
        return {}
    replaced = int(run.model.normalizer.replaced)
    if replaced > (run.state.last_eval.get("r_replaced") or 0):
        log.warning("step %d: %d divisors r were not finite and became 1", run.state.step, replaced)
    return {"r_replaced": replaced}
