"""Evaluates a run: validation loss, distance from the sphere, step lengths alpha and divisors r.

Also scores windows of a text of any length, for the command `evaluate`. `METRICS` holds further metrics, functions
(model, eval_set) -> number that every evaluation calls; a plug-in adds to it.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from ngpt.config.base import printable
from ngpt.data.loader import EvalSet
from ngpt.data.windows import Window
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.model import diagnostics
from ngpt.model.gpt import GPT
from ngpt.optim.projection import project
from ngpt.system.memory import retry_on_oom
from ngpt.training.recovery import reduce_eval_batch
from ngpt.training.run import Run, progress
from ngpt.training.state import Metrics
from ngpt.training.text_blocks import sum_over_blocks
from ngpt.training.tracker import finite_or_none

log = logging.getLogger(__name__)
Item = TypeVar("Item")

Goal = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class EvalMetric:
    """A metric of a model on the validation tokens, and whether lower or higher is better.

    `compute` gets the model in evaluation mode and the tokens (ngpt/data/loader.py) in batches on the CPU; it is called
    without gradients, under the run's precision. It returns a number, or a tensor with one element.
    """

    compute: Callable[[GPT, EvalSet], float | Tensor]
    goal: Goal = "minimize"

    def __post_init__(self) -> None:
        if self.goal not in get_args(Goal):
            raise ValueError(f"the goal of a metric is {' or '.join(get_args(Goal))}, got {self.goal!r}")


METRICS: dict[str, EvalMetric] = {}  # logged with `val_loss`, by name; none is built in
# What a run measures itself, so that no entry of METRICS has this name.
BUILT_IN_METRICS = (
    *("step", "tokens", "tokens_per_second", "train_loss", "val_loss", "val_bpb", "initial_val_loss", "steps"),
    *("weight_norm_error", "activation_norm_error", "r_mean", "r_min", "r_max", "r_replaced", "grad_norm"),
    *("peak_memory_bytes", "n_params", "batch_size", "micro_batch_size", "skipped_steps", "rollbacks"),
    *("lr", "lr_embedding", "lr_head", "lr_scales", "flops", "seconds", "train_seconds"),
)
SORTED_BATCHES = 16  # as many windows as fill these batches are sorted by length, so that few inputs are padding


@torch.no_grad()
def evaluate(
    model: GPT,
    eval_set: EvalSet,
    *,
    autocast: torch.autocast,
    by_token: list[Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """Returns `val_loss` (nats per token) and `val_bpb` (bits per byte; None if the bytes per token are unknown).

    If `by_token` is a list, the losses of all tokens are appended to it, batch by batch; this takes one more pass
    through the head and changes no number. Several ranks share the batches, and all of them return the whole result.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    own_batches = eval_set.batches[ranks.index :: ranks.count]
    with autocast, ranks.agreement_on_memory() as agree:
        losses = [_loss(model, idx.to(device), targets.to(device), by_token) for idx, targets in own_batches]
        numbers: list[float] = torch.stack(losses).tolist() if losses else []  # a single transfer
        agree()
    model.train(was_training)
    if by_token is not None:
        by_token[:] = _in_turn(ranks.gather([each.cpu() for each in by_token]))
    counts = [targets.numel() for _, targets in eval_set.batches]
    # A float64 sum on the CPU, because MPS has no float64.
    nats = sum(loss * n for loss, n in zip(_in_turn(ranks.gather(numbers)), counts, strict=True))
    bpb = nats / math.log(2) / eval_set.n_bytes if eval_set.n_bytes else None
    return {"val_loss": nats / eval_set.n_tokens, "val_bpb": bpb}


def _in_turn(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first item of each list, then the second ones, and so on; later lists may be one item shorter."""
    return [each[turn] for turn in range(len(lists[0])) for each in lists if turn < len(each)]


def _loss(model: GPT, idx: Tensor, targets: Tensor, by_token: list[Tensor] | None) -> Tensor:
    if by_token is None:
        return model(idx, targets)
    x = model.features(idx)
    by_token.append(model.token_losses(x, targets))
    return model.loss(x, targets)


@torch.no_grad()
def sum_losses(
    model: GPT, windows: Iterable[Window], *, rows: int, autocast: torch.autocast
) -> Iterator[tuple[int, float]]:
    """Scores windows, and yields how many tokens each batch scored and the sum of their losses in nats.

    A batch has at most as many inputs as `rows` windows of `block_size`. Shorter windows are padded at their end, which
    changes no loss, because attention is causal.
    """
    windows = iter(windows)
    device, size = next(model.parameters()).device, rows * model.cfg.block_size
    was_training = model.training
    model.eval()
    try:
        while group := list(islice(windows, rows * SORTED_BATCHES)):
            for batch in _batches(sorted(group, key=lambda window: len(window.tokens)), size):
                tokens = torch.zeros(len(batch), len(batch[-1].tokens), dtype=torch.long)
                is_scored = torch.zeros_like(tokens, dtype=torch.bool)
                for row, window in enumerate(batch):
                    end = len(window.tokens)
                    tokens[row, :end] = torch.from_numpy(window.tokens)
                    is_scored[row, end - window.n_scored : end] = True
                tokens, is_scored = tokens.to(device), is_scored[:, 1:].to(device)
                with autocast:
                    x = model.features(tokens[:, :-1])[is_scored]  # (N, D)
                    losses = model.token_losses(x, tokens[:, 1:][is_scored])
                yield len(losses), float(losses.cpu().double().sum())  # on the CPU, because MPS has no float64
    finally:
        model.train(was_training)


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Groups windows, shortest first, into batches of at most `size` inputs with their padding."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * (len(window.tokens) - 1) > size:
            yield batch
            batch = []
        batch.append(window)
    yield batch


def evaluate_run(run: Run, *, last: bool) -> dict[str, Tensor]:
    """Stores the metrics in `state.last_eval`; returns the alphas and divisors by name, for histograms.

    At the last step the weights are projected, after the distance from the sphere has been measured. Numbers that are
    not finite become None. If memory runs out, the evaluation is repeated with half the batch size.
    """
    distance, r = retry_on_oom(lambda: _distance_and_divisors(run), lambda: reduce_eval_batch(run), run.device)
    if last:  # the final weights lie on the sphere, whatever `project_every` is
        project(run.replica.sphere_weights())
    scores = retry_on_oom(lambda: _validation_scores(run, last=last), lambda: reduce_eval_batch(run), run.device)
    metrics = progress(run) | {"train_loss": run.state.train_loss} | scores | distance | _replaced_divisors(run)
    run.state.last_eval = {name: finite_or_none(value) for name, value in metrics.items()}
    if run.state.step == 0:
        run.state.initial_val_loss = run.state.last_eval["val_loss"]
    with run.replica.whole_weights():
        return diagnostics.effective_alphas(run.model) | r


def _validation_scores(run: Run, *, last: bool) -> Metrics:
    """Evaluates the run; at the last step, also stores the loss of each block of the text in the state."""
    by_token: list[Tensor] | None = [] if last else None
    with run.replica.whole_weights(), diagnostics.restore_counts_on_error(run.model):
        batches = run.validation.cut(run.eval_batch_size)
        scores = evaluate(run.model, batches, autocast=run.autocast, by_token=by_token, ranks=run.ranks)
        scores |= compute_metrics(run, batches)
    if by_token:
        losses = torch.cat(by_token).cpu().double().numpy()
        run.state.eval_blocks = sum_over_blocks(losses, run.validation.starts)
    return scores


@torch.no_grad()
def compute_metrics(run: Run, eval_set: EvalSet) -> Metrics:
    """Returns the metrics in `METRICS` by name.

    Random numbers in them depend on the seed and the step only, and leave those of the process as they were.

    Raises:
        TypeError: a metric does not return a number.
    """
    model, was_training, found = run.model, run.model.training, Metrics()
    devices = [run.device] if run.device.type == "cuda" else []
    model.eval()
    try:
        for name, metric in METRICS.items():
            with diagnostics.restore_counts(model), run.autocast, torch.random.fork_rng(devices):
                torch.manual_seed(run.config.seed + run.state.step)
                value = metric.compute(model, eval_set)
            if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
                raise TypeError(f"metric {name} must return a number, got {printable(repr(value))}")
            found[name] = float(value)
    finally:
        model.train(was_training)
    return found


def _distance_and_divisors(run: Run) -> tuple[Metrics, dict[str, Tensor]]:
    """Returns the distance of weights and activations from the sphere, and the divisors, on one validation sequence."""
    idx = run.validation.batches[0][0][:1].to(run.device)
    with run.replica.whole_weights():
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
    counts = run.model.normalizer.replaced
    run.replica.collect_counts()
    replaced = run.ranks.from_first(lambda: int(counts))
    if replaced > (run.state.last_eval.get("r_replaced") or 0):
        log.warning("step %d: %d divisors r were not finite and became 1", run.state.step, replaced)
    return {"r_replaced": replaced}
