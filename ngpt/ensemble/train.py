"""Trains several runs of one graph in one process, as a single batched program.

This pays off where launching kernels takes longer than computing them: for small models on a GPU, and for very small
steps on a CPU. `python -m ngpt.bench vectorised` measures it for a given shape on this machine.

Only training steps are batched; batching evaluations did not help (docs/benchmarks.md).

Each run has its own folder, metrics, checkpoints and step count. `ngpt.training.loop.train` can resume it, and vice
versa. Results differ from those of single runs only by rounding in batched matrix products.
"""

import contextlib
import math
from collections.abc import Collection, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, flatten
from ngpt.data.dataset import Dataset
from ngpt.ensemble.stack import Stack
from ngpt.model.diagnostics import restore_counts_on_error
from ngpt.system.memory import retry_on_oom
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import batch, count_step, set_schedules, step_metrics, train_run, train_step, update
from ngpt.training.recovery import reduce_batches
from ngpt.training.run import Run, RunResult, set_up
from ngpt.training.state import Metrics, StepMetrics

# Settings and sections that may differ between runs of one graph: they enter it as tensors, or not at all.
FREE_SETTINGS = {
    *("seed", "steps", "project_every", "eval_every", "eval_tokens", "data.order", "data.reservoir"),
    *("model.alpha", "model.alpha_final", "model.logit_scale", "model.scale_trick"),
}
FREE_SECTIONS = {"optim", "schedule", "nonfinite", "checkpoint", "tracker"}

Event = Metrics | RunResult | Exception  # an evaluation, or how a run has ended
Events = dict[int, Event]  # by the index of the run
RunLoop = Generator[Metrics | None, StepMetrics | None, RunResult]  # None: waits for the metrics of a step


def graph_settings(config: TrainConfig) -> dict[str, object]:
    """Returns the settings that runs must share to be trained together, by dotted name."""
    return {
        name: value
        for name, value in flatten(config).items()
        if name not in FREE_SETTINGS and name.partition(".")[0] not in FREE_SECTIONS
    }


def ensemble_incompatibility(configs: Sequence[TrainConfig]) -> str | None:
    """Why the configs cannot be trained together, as one sentence, or None if they can."""
    for config in configs:
        if config.compile:
            return "compile is on: compiled steps are not batched over runs, which was not faster where it was measured"
        if config.activation_checkpointing:
            return "activation_checkpointing is on: several runs as one program cannot compute a block again"
        if config.on_oom == "halve_batch":
            return "on_oom is halve_batch: running out of memory would change the result of every run; use split"
    graphs = list(map(graph_settings, configs))
    for graph in graphs[1:]:
        for name, value in graphs[0].items():
            if graph[name] != value:
                return f"{name} differs, {value!r} and {graph[name]!r}: runs trained together share one graph"
    return None


def train_together(
    configs: Sequence[TrainConfig],
    out_dirs: Sequence[Path],
    *,
    resume: str | None = None,
    dataset: Dataset | None = None,
) -> Generator[Events, Collection[int] | None, None]:
    """Trains a model for each config; yields the events since the last yield, by the index of the run.

    An event is the metrics of an evaluation, a run's result, or the exception that ended a run. A full disk or a
    checkpoint of another config ends only the run concerned. To close runs, send their indices in reply to a yield. The
    last remaining run takes unbatched steps. Arguments are as in `ngpt.training.loop.train`, for each run.

    Raises ConfigError if the configs cannot be trained together, see `ensemble_incompatibility`. A step that fails with
    RuntimeError or MemoryError ends all runs; each can resume from its checkpoints.
    """
    if reason := ensemble_incompatibility(configs):
        raise ConfigError(reason)
    if len({path.resolve() for path in out_dirs}) != len(configs):
        raise ConfigError(f"{len(configs)} runs need as many folders, got {', '.join(map(str, out_dirs))}")
    runs: dict[int, Run] = {}
    events: Events = {}
    for index, (config, folder) in enumerate(zip(configs, out_dirs, strict=True)):
        try:
            runs[index] = set_up(resolved(config), folder, resume=resume, dataset=dataset)
        except Exception as error:  # reported as an event, like every error that ends a single run
            events[index] = error
    if events:
        yield events
    with contextlib.ExitStack() as cleanup:
        loops = {index: train_run(run, _receive_step) for index, run in runs.items()}
        for loop in loops.values():
            cleanup.enter_context(contextlib.closing(loop))
        yield from _train_in_rounds(runs, loops)


def _receive_step(_: Run) -> Generator[None, StepMetrics | None, StepMetrics]:
    """Waits to be sent the metrics of a step."""
    metrics = yield
    assert metrics is not None
    return metrics


def _train_in_rounds(
    runs: dict[int, Run], loops: dict[int, RunLoop]
) -> Generator[Events, Collection[int] | None, None]:
    """Takes a batched step whenever every open run waits for one. Closes and removes loops that end."""
    stack: Stack | None = None
    metrics: dict[int, StepMetrics] = {}  # of the last step, until they are sent to their runs
    waiting: set[int] = set()
    while loops:
        events: Events = {}
        for index in sorted(loops.keys() - waiting):
            event = _advance(loops[index], metrics.pop(index, None))
            if event is None:
                waiting.add(index)
            else:
                events[index] = event
        if events:
            stopped = (yield events) or ()
            ended = {index for index, event in events.items() if not isinstance(event, dict)}
            for index in {*stopped, *ended} & loops.keys():
                loops.pop(index).close()
                waiting.discard(index)
            continue
        members = [runs[index] for index in sorted(waiting)]
        if len(members) == 1:
            results = [train_step(members[0])]
        else:
            if stack is None or [id(run.model) for run in members] != [id(model) for model in stack.models]:
                stack = Stack([run.model for run in members])
            results = train_step_together(stack, members)
        metrics = dict(zip(sorted(waiting), results, strict=True))
        waiting.clear()


def _advance(loop: RunLoop, metrics: StepMetrics | None) -> Event | None:
    """Continues a run until its next event, which it returns, or until it waits for a step (None)."""
    try:
        return loop.send(metrics)
    except StopIteration as stop:
        return stop.value
    except Exception as error:  # reported as an event, like every error that ends a single run
        return error


def train_step_together(stack: Stack, runs: Sequence[Run]) -> list[StepMetrics]:
    """Takes one step of every run, like `ngpt.training.loop.train_step`; returns the metrics of each."""
    with contextlib.ExitStack() as clocks:
        for run in runs:
            clocks.enter_context(run.clock.step(run.config.tokens_per_step))
            set_schedules(run)
        computed = retry_on_oom(lambda: _gradients(stack, runs), lambda: reduce_batches(runs), runs[0].device)
        for run, (loss, _) in zip(runs, computed, strict=True):
            count_step(run, loss)
        if finite := [run for run, numbers in zip(runs, computed, strict=True) if all(map(math.isfinite, numbers))]:
            update(finite)
    return [step_metrics(run, loss, norm) for run, (loss, norm) in zip(runs, computed, strict=True)]


def _gradients(stack: Stack, runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Accumulates the gradients over micro-batches and clips them; returns each run's loss and norm before clipping."""
    _prefetch_batches(runs, steps_ahead=0)
    batches = [run.upcoming[1] for run in runs if run.upcoming]
    idx, targets = (torch.stack(parts) for parts in zip(*batches, strict=True))
    with contextlib.ExitStack() as counts:
        for run in runs:
            counts.enter_context(restore_counts_on_error(run.model))
        stack.begin()
        size = min(run.micro_batch_size for run in runs)
        total = torch.zeros(len(runs), device=runs[0].device)
        for idx_part, targets_part in zip(idx.split(size, 1), targets.split(size, 1), strict=True):
            with runs[0].autocast:
                losses = stack.losses(idx_part, targets_part)
            share = idx_part.shape[1] / idx.shape[1]
            (losses.sum() * share).backward()
            total += losses.detach() * share
        norms = stack.norms()
        _prefetch_batches(runs, steps_ahead=1)  # while the GPU computes
        numbers: list[list[float]] = torch.stack((total, norms)).tolist()
        stack.clip(numbers[1], [run.config.optim.grad_clip or math.inf for run in runs])
    return list(zip(*numbers, strict=True))


def _prefetch_batches(runs: Sequence[Run], *, steps_ahead: int) -> None:
    """Loads the batch that each run needs `steps_ahead` steps from now. Runs that read the same batch share it."""
    batches: dict[object, tuple[Tensor, Tensor]] = {}
    for run in runs:
        data, number = run.config.data, run.state.step + run.state.skipped_batches + steps_ahead
        if run.upcoming is None or run.upcoming[0] != number:
            key = run.config.seed, number, data.order, data.reservoir
            if key not in batches:
                batches[key] = batch(run, number)
            run.upcoming = number, batches[key]
