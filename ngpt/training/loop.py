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
from ngpt.model.diagnostics import restore_counts_on_error
from ngpt.optim.optimizers import set_learning_rates
from ngpt.optim.projection import project_weights
from ngpt.optim.schedule import is_due, lr_multiplier
from ngpt.system.heartbeat import Heartbeat
from ngpt.system.memory import is_out_of_memory, retry_smaller
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import evaluate_run
from ngpt.training.recovery import NONFINITE, ON_OOM
from ngpt.training.run import (
    Run,
    RunResult,
    checkpoint_on_stop,
    finish,
    progress,
    rollback_to_checkpoint,
    set_up,
    try_save_checkpoint,
)
from ngpt.training.state import AVERAGED, Metrics
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
    while (result := (yield from train_until_rollback(run))) is None:  # it has gone back to an earlier step
        pass
    return result


def train_until_rollback(run: Run, *, together: bool = False) -> Generator[Any, Any, RunResult | None]:
    """Trains from where the run is to its end; or until it has gone back to an earlier step, and then returns None.

    The rows of steps that are gone go with them, as after a kill. It yields the metrics of evaluations. If its steps
    are made `together` with those of other runs (ngpt/ensemble/train.py), it yields None for each and is sent its metrics.
    """
    config, state = run.config, run.state
    resumed_at = state.step or None

    tracker = Tracker(config.tracker, run.out_dir, settings=flatten(config), keep_until=resumed_at)
    heartbeat = Heartbeat(run.out_dir, began=state.step)
    with tracker, heartbeat, checkpoint_on_stop(run, tracker, heartbeat):
        if skipped := run.dataset.manifest["skipped"]:
            tracker.note({"skipped_shards": [f"{shard['name']}: {shard['reason']}" for shard in skipped]})
        while True:
            # ---- now and then ------------------------------------------------------------------
            last = state.step == config.steps  # one turn more than steps, so that the end is evaluated and saved
            if state.step != resumed_at:
                if is_due(state.step, config.eval_every, last=last):
                    histograms = evaluate_run(run, last=last)
                    tracker.log(state.last_eval)
                    tracker.log_histograms(state.step, histograms)
                    yield state.last_eval
                    if state.last_eval["val_loss"] is None:  # only an earlier state can help
                        goes_back = config.nonfinite.policy == "rollback" and handle_nonfinite(run)
                        return None if goes_back else finish("diverged", run)
                if state.step and is_due(state.step, config.checkpoint.every, last=last):
                    try_save_checkpoint(run, tracker, last=last)
            if last:
                return finish("finished", run)
            heartbeat.beat(state.step)
            if heartbeat.stop_requested():  # whoever asked drives this run, and closes it here
                yield state.last_eval

            # ---- one step ----------------------------------------------------------------------
            before = state.step
            step_metrics = (yield None) if together else train_step(run)
            is_finite = all(math.isfinite(value) for value in step_metrics.values())
            diverged = not is_finite and not handle_nonfinite(run)
            if state.step <= before:
                return None
            if not is_finite or is_due(state.step, config.tracker.log_every, last=state.step == config.steps):
                mean = {"train_loss": state.train_loss} if is_finite else {}
                tracker.log(progress(run) | step_metrics | mean)
            if diverged:
                return finish("diverged", run)


def handle_nonfinite(run: Run) -> bool:
    """What the policy says to a loss or gradient that is not finite; it may send the run back to an earlier step."""
    policy = run.config.nonfinite
    return NONFINITE[policy.policy](run.state, policy.max, lambda: rollback_to_checkpoint(run))


def train_step(run: Run) -> dict[str, float]:
    """One optimizer update; a gradient that is not finite is never applied. Returns loss, gradient norm and rates.

    Where memory runs out it is tried again with half as many sequences at once.
    """
    config, state = run.config, run.state
    with run.clock.step(run.batch_size * config.model.block_size):
        run.model.prepare_step(state.step, config.steps, seed=config.seed)
        set_learning_rates(run.optimizers, lr_multiplier(state.step, config.steps, config.schedule))
        number = state.step + state.skipped_batches
        loss, norm = retry_smaller(lambda: gradients(run, number), lambda: reduce_batch(run), run.device)
        state.step += 1
        state.dropped_sequences += config.batch_size - run.batch_size
        state.recent = [*state.recent, loss][-AVERAGED:]
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
    with restore_counts_on_error(run.model):
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
    state = run.state
    try:
        with run.autocast:  # Muon's matrix products are in the precision of the others
            for optimizer in run.optimizers:
                optimizer.step()
        if is_due(state.step, run.config.project_every):
            project_weights(run.model)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not reduce_batch(run):
            raise
    microbatch_halvings, batch_halvings = state.microbatch_halvings, state.batch_halvings
    log.warning("no memory for the optimizer's step %d: going back to the newest checkpoint", state.step)
    rollback_to_checkpoint(run)
    state.microbatch_halvings, state.batch_halvings = microbatch_halvings, batch_halvings


def reduce_batch(run: Run) -> bool:
    """Does what the policy says when memory has run out in training; False if that is nothing."""
    give_way, rows = ON_OOM[run.config.on_oom], run.micro_batch_size
    if give_way is None or rows == 1:
        return False
    give_way(run.state)
    run.model.zero_grad(set_to_none=True)
    run.clock.leave_out()
    now = f"{run.micro_batch_size} sequences at once, in batches of {run.batch_size}"
    log.warning("step %d: out of memory with %d sequences at once; from here on %s", run.state.step, rows, now)
    return True
