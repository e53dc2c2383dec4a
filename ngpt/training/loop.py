"""The train loop: one generator that yields its metrics at each evaluation."""

import logging
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import flatten
from ngpt.data.dataset import Dataset
from ngpt.data.loader import Batch, train_batch
from ngpt.model.diagnostics import counted_once
from ngpt.optim.optimizers import set_rates
from ngpt.optim.projection import project_weights
from ngpt.optim.schedule import due, multiplier
from ngpt.system.heartbeat import Pulse
from ngpt.system.memory import is_out_of_memory, retry_smaller
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import measure
from ngpt.training.recovery import AVERAGED, NONFINITE, ON_OOM, Metrics
from ngpt.training.run import (
    Run,
    RunResult,
    finish,
    go_back,
    position,
    save_or_go_without,
    saved_when_stopped,
    set_up,
)
from ngpt.training.tracker import Tracker

log = logging.getLogger(__name__)


def train(
    config: TrainConfig, out_dir: Path, *, resume: str | None = None, dataset: Dataset | None = None
) -> Generator[Metrics, None, RunResult]:
    """Trains one model; yields its metrics at each evaluation and returns the result.

    Two runs of one config on one CPU with one number of threads agree bit for bit, and so do a run and one that was
    stopped at any step and resumed: weights and order of the data depend on (seed, step) only.

    Args:
        config: what to do.
        out_dir: gets `metrics.jsonl` and `checkpoints/`.
        resume: `"latest"` continues from the newest intact checkpoint in `out_dir`, if there is one.
        dataset: the opened corpus, where the caller has it; else it is opened, and prepared if need be.

    Raises:
        ConfigError: the data do not fit the model, or the checkpoint is of another config.
        RuntimeError, MemoryError: there is not enough memory for a single sequence, or `on_oom` is fail.
    """
    run = set_up(resolved(config), out_dir, resume=resume, dataset=dataset)
    while (result := (yield from stretch(run))) is None:  # it has gone back to an earlier step
        pass
    return result


def stretch(run: Run, *, together: bool = False) -> Generator[Any, Any, RunResult | None]:
    """Trains from where the run is to its end; or until it has gone back to an earlier step, and then returns None.

    The rows of steps that are gone go with them, as after a kill. It yields the metrics of evaluations. If its steps
    are made `together` with those of other runs (ngpt/ensemble/train.py), it yields None for each and is sent its metrics.
    """
    config, progress = run.config, run.progress
    resumed_at = progress.step or None

    tracker = Tracker(config.tracker, run.out_dir, settings=flatten(config), keep_until=resumed_at)
    pulse = Pulse(run.out_dir, began=progress.step)
    with tracker, pulse, saved_when_stopped(run, tracker, pulse):
        if skipped := run.dataset.manifest["skipped"]:
            tracker.note({"skipped_shards": [f"{shard['name']}: {shard['reason']}" for shard in skipped]})
        while True:
            # ---- now and then ------------------------------------------------------------------
            last = progress.step == config.steps  # one turn more than steps, so that the end is evaluated and saved
            if progress.step != resumed_at:
                if due(progress.step, config.eval_every, last=last):
                    histograms = measure(run, last=last)
                    tracker.log(progress.last_eval)
                    tracker.log_histograms(progress.step, histograms)
                    yield progress.last_eval
                    if progress.last_eval["val_loss"] is None:  # only an earlier state can help
                        goes_back = config.nonfinite.policy == "rollback" and may_go_on(run)
                        return None if goes_back else finish("diverged", run)
                if progress.step and due(progress.step, config.checkpoint.every, last=last):
                    save_or_go_without(run, tracker, last=last)
            if last:
                return finish("finished", run)
            pulse.beat(progress.step)
            if pulse.is_asked_to_stop():  # whoever asked drives this run, and closes it here
                yield progress.last_eval

            # ---- one step ----------------------------------------------------------------------
            before = progress.step
            step_metrics = (yield None) if together else train_step(run)
            is_finite = all(math.isfinite(value) for value in step_metrics.values())
            diverged = not is_finite and not may_go_on(run)
            if progress.step <= before:
                return None
            if not is_finite or due(progress.step, config.tracker.log_every, last=progress.step == config.steps):
                mean = {"train_loss": progress.train_loss} if is_finite else {}
                tracker.log(position(run) | step_metrics | mean)
            if diverged:
                return finish("diverged", run)


def may_go_on(run: Run) -> bool:
    """What the policy says to a loss or gradient that is not finite; it may send the run back to an earlier step."""
    policy = run.config.nonfinite
    return NONFINITE[policy.policy](run.progress, policy.max, lambda: go_back(run))


def train_step(run: Run) -> dict[str, float]:
    """One optimizer update; a gradient that is not finite is never applied. Returns loss, gradient norm and rates.

    Where memory runs out it is tried again with half as many sequences at once.
    """
    config, progress = run.config, run.progress
    with run.clock.step(run.batch_size * config.model.block_size):
        run.model.prepare_step(progress.step, config.steps, seed=config.seed)
        set_rates(run.optimizers, multiplier(progress.step, config.steps, config.schedule))
        number = progress.step + progress.passed_over
        loss, norm = retry_smaller(lambda: gradients(run, number), lambda: shrink(run), run.device)
        progress.step += 1
        progress.left_out += config.batch_size - run.batch_size
        progress.recent = [*progress.recent, loss][-AVERAGED:]
        if math.isfinite(loss) and math.isfinite(norm):
            update(run)
    return {"train_loss": loss, "grad_norm": norm} | rates(run)


def rates(run: Run) -> dict[str, float]:
    """The learning rate of each kind of parameter in this step, by the name of its setting."""
    groups = (group for optimizer in run.optimizers for group in optimizer.param_groups)
    return {"lr" if group["kind"] == "matrices" else f"lr_{group['kind']}": group["lr"] for group in groups}


def gradients(run: Run, number: int) -> tuple[float, float]:
    """Fills the gradients for a batch of the data, clips them, and returns the loss and their norm before that.

    The one place of a step that waits for a GPU: no gradient is applied before it is known to be finite.
    """
    idx, targets = run.upcoming[1] if run.upcoming and run.upcoming[0] == number else batch(run, number)
    with counted_once(run.model):
        # A halved batch is the first half, so that the order of the data stays what it is.
        loss = backward(run, idx[: run.batch_size], targets[: run.batch_size])
        given = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm(given)
        run.upcoming = number + 1, batch(run, number + 1)  # made while a GPU computes
        loss, norm = torch.stack((loss, total)).tolist()
        largest = run.config.optim.grad_clip or math.inf
        if norm > largest:  # seldom: else a pass over all gradients would multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), largest, total)
        return loss, norm


def batch(run: Run, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T) of a step, on the device."""
    parts = read_batch(run.config, run.dataset, number)
    if run.device.type == "cuda":  # only from pinned memory does a copy go on beside the computation
        parts = (part.pin_memory() for part in parts)
    idx, targets = (part.to(run.device, non_blocking=True) for part in parts)
    return idx, targets


def read_batch(config: TrainConfig, dataset: Dataset, number: int) -> Batch:
    """Tokens and targets (B, T) of a step, int64, in the order that the settings say."""
    return train_batch(
        dataset,
        seed=config.seed,
        step=number,
        batch_size=config.batch_size,
        block_size=config.model.block_size,
        order=config.data.order,
        reservoir=config.data.reservoir,
    )


def backward(run: Run, idx: Tensor, targets: Tensor) -> Tensor:
    """Fills the gradients of the mean loss over the batch, one micro-batch at a time, and returns that loss."""
    run.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    size = run.micro_batch_size
    for idx_part, targets_part in zip(idx.split(size), targets.split(size), strict=True):
        with run.autocast:
            loss = run.model(idx_part, targets_part)
        share = len(idx_part) / len(idx)
        (loss * share).backward()
        total += loss.detach() * share
    return total


def update(run: Run) -> None:
    """Lets the optimizers take their steps, and projects where it is due.

    An optimizer that memory runs out in has changed some weights and moments and not others. Nothing is left to try
    the step again with, so the run goes back to its newest checkpoint, with smaller micro-batches.
    """
    progress = run.progress
    try:
        with run.autocast:  # Muon's matrix products are in the precision of the others
            for optimizer in run.optimizers:
                optimizer.step()
        if due(progress.step, run.config.project_every):
            project_weights(run.model)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not shrink(run):
            raise
    splits, halvings = progress.splits, progress.halvings
    log.warning("no memory for the optimizer's step %d: going back to the newest checkpoint", progress.step)
    go_back(run)
    progress.splits, progress.halvings = splits, halvings


def shrink(run: Run) -> bool:
    """Does what the policy says when memory has run out in training; False if that is nothing."""
    give_way, rows = ON_OOM[run.config.on_oom], run.micro_batch_size
    if give_way is None or rows == 1:
        return False
    give_way(run.progress)
    run.model.zero_grad(set_to_none=True)
    run.clock.leave_out()
    now = f"{run.micro_batch_size} sequences at once, in batches of {run.batch_size}"
    log.warning("step %d: out of memory with %d sequences at once; from here on %s", run.progress.step, rows, now)
    return True
