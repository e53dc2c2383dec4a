"""Several runs of one graph, trained at once in one process as one batched program.

It is worth it where a step is bound by the launches of its operations and not by their work: small models on a GPU, and
very small steps on a CPU. `python -m ngpt.bench vectorised` says what it brings for a shape on this machine.

Only steps are batched. Evaluations are not, though they are 13 to 32 % of such a trial: on a CPU eight models took
1.13 s one by one and 1.14 s batched (2 x 32, 128 batches of 128 tokens), and 1.17 and 1.15 s in 16 batches of 1,024.

A run here is what it is alone: its own folder, metrics and checkpoints, its own place in its steps; each can be resumed
by `ngpt.train.train`, and the other way round. The numbers are equal but for the rounding of batched products.
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
from ngpt.ensemble.update import update_together
from ngpt.model.diagnostics import restore_counts_on_error
from ngpt.optim.optimizers import set_learning_rates
from ngpt.optim.schedule import lr_multiplier
from ngpt.system.memory import retry_smaller
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import batch, rates, reduce_batch, train_step, train_until_rollback
from ngpt.training.run import Run, RunResult, set_up
from ngpt.training.state import AVERAGED, Metrics

# What may differ between runs of one graph: it reaches the graph as a tensor, or is a variable of the loop.
FREE = ("seed", "steps", "project_every", "eval_every", "eval_tokens", "data.order", "data.reservoir")
FREE_SECTIONS = ("optim", "schedule", "nonfinite", "checkpoint", "tracker")
FREE_IN_MODEL = ("model.alpha", "model.alpha_final", "model.logit_scale", "model.scale_trick")

Event = Metrics | RunResult | Exception  # an evaluation; or how a run has ended
RunStep = Generator[Metrics | None, dict[str, float] | None, RunResult]


# ---- which runs --------------------------------------------------------------------------------


def graph_settings(config: TrainConfig) -> dict[str, object]:
    """The settings that runs must share to be trained at once, by dotted name."""
    free = {*FREE, *FREE_IN_MODEL}
    values = flatten(config).items()
    return {name: v for name, v in values if name not in free and name.partition(".")[0] not in FREE_SECTIONS}


def ensemble_incompatibility(configs: Sequence[TrainConfig]) -> str | None:
    """Why the configs cannot be trained at once, as one sentence; None: they can.

    Seeds, steps, optimizers with their rates, schedules, alpha, the logit scale, the projection period and what
    happens now and then may differ; the rest must be equal, or its tensors do not fit into one graph.
    """
    for config in configs:
        if config.compile:
            return (
                "compile is on: compiled steps are not batched over runs, it has brought nothing where it was measured"
            )
        if config.on_oom == "halve_batch":
            return "on_oom is halve_batch: memory that runs out for all would change the result of each; use split"
    graphs = [graph_settings(config) for config in configs]
    for graph in graphs[1:]:
        for name, value in graphs[0].items():
            if graph[name] != value:
                return f"{name} differs, {value!r} and {graph[name]!r}: runs trained at once have one graph"
    return None


# ---- the loop ----------------------------------------------------------------------------------


def train_together(
    configs: Sequence[TrainConfig],
    out_dirs: Sequence[Path],
    *,
    resume: str | None = None,
    dataset: Dataset | None = None,
) -> Generator[dict[int, Event], Collection[int] | None, None]:
    """Trains a model for each config; yields what has happened since the last time, by the index of the run.

    An event is the metrics of an evaluation, as `ngpt.train.train` yields them, a run's result, or the exception that
    has ended a run: a full disk or a checkpoint of another config ends one run and not the others. Runs whose indices
    are sent in answer to a yield are closed there. It ends when no run is left; a last one goes on by itself.

    Args:
        configs, out_dirs, resume: of each run, as `ngpt.train.train` has them.
        dataset: the opened corpus of all, where the caller has it.

    Raises:
        ConfigError: the configs cannot be trained at once, see `ensemble_incompatibility`.
        RuntimeError, MemoryError: what has gone wrong in a step is of all runs; each can go on from its checkpoints.
    """
    if reason := ensemble_incompatibility(configs):
        raise ConfigError(reason)
    if len({path.resolve() for path in out_dirs}) != len(configs):
        raise ConfigError(f"{len(configs)} runs need as many folders, got {', '.join(map(str, out_dirs))}")
    runs: dict[int, Run] = {}
    with contextlib.ExitStack() as cleanup:
        events: dict[int, Event] = {}
        for index, (config, folder) in enumerate(zip(configs, out_dirs, strict=True)):
            try:
                runs[index] = set_up(resolved(config), folder, resume=resume, dataset=dataset)
            except Exception as error:  # the caller's to judge, as all that ends a single run
                events[index] = error
        if events:
            yield events
        lanes = {index: cleanup.enter_context(contextlib.closing(_lane(run))) for index, run in runs.items()}
        yield from _rounds(runs, lanes)


def _rounds(
    runs: dict[int, Run], lanes: dict[int, RunStep]
) -> Generator[dict[int, Event], Collection[int] | None, None]:
    """Steps for all that wait for one, until no lane is left."""
    stack: Stack | None = None
    answers: dict[int, dict[str, float]] = {}  # what their last step has given to the runs that do not know it yet
    ready: set[int] = set()
    while lanes:
        events: dict[int, Event] = {}
        for index in lanes.keys() - ready:
            event = _advance(lanes[index], answers.pop(index, None))
            if event is None:
                ready.add(index)
            else:
                events[index] = event
        if events:
            stopped = (yield {index: events[index] for index in sorted(events)}) or ()
            for index in {*stopped, *(i for i, event in events.items() if not isinstance(event, dict))} & lanes.keys():
                lanes.pop(index).close()
                ready.discard(index)
            continue
        members = [runs[index] for index in sorted(ready)]
        if len(members) == 1:
            results = [train_step(members[0])]
        else:
            if stack is None or [id(run.model) for run in members] != [id(model) for model in stack.models]:
                stack = Stack([run.model for run in members])
            results = train_step_together(stack, members)
        answers = dict(zip(sorted(ready), results, strict=True))
        ready.clear()


def _advance(lane: RunStep, answer: dict[str, float] | None) -> Event | None:
    """Lets a lane go on to its next event; None: it waits for a step."""
    try:
        return lane.send(answer)
    except StopIteration as stop:
        return stop.value
    except Exception as error:  # the caller's to judge, as all that ends a single run
        return error


def _lane(run: Run) -> RunStep:
    """A run's side of it: yields its evaluations, and None where it waits to be sent the metrics of a step."""
    while (
        result := (yield from train_until_rollback(run, together=True))
    ) is None:  # it has gone back to an earlier step
        pass
    return result


# ---- a step ------------------------------------------------------------------------------------


def train_step_together(stack: Stack, runs: Sequence[Run]) -> list[dict[str, float]]:
    """One optimizer update of each run, as `ngpt.train.train_step`; returns the metrics of each.

    A gradient that is not finite is not applied, and does not reach another run's.
    """
    with contextlib.ExitStack() as clocks:
        for run in runs:
            clocks.enter_context(run.clock.step(run.config.tokens_per_step))
            state, config = run.state, run.config
            run.model.prepare_step(state.step, config.steps, seed=config.seed)
            set_learning_rates(run.optimizers, lr_multiplier(state.step, config.steps, config.schedule))
        found = retry_smaller(
            lambda: _gradients(stack, runs),
            lambda: any([reduce_batch(run) for run in runs]),  # a list: all of them give way
            runs[0].device,
        )
        for run, (loss, _) in zip(runs, found, strict=True):
            run.state.step += 1
            run.state.recent = [*run.state.recent, loss][-AVERAGED:]
        sound = [run for run, values in zip(runs, found, strict=True) if all(map(math.isfinite, values))]
        update_together(sound)
    return [{"train_loss": loss, "grad_norm": norm} | rates(run) for run, (loss, norm) in zip(runs, found, strict=True)]


def _make_batches(runs: Sequence[Run], *, ahead: int) -> None:
    """Makes the batch of so many steps ahead each run's upcoming one; paired arms, which read the same, share it."""
    made: dict[object, tuple[Tensor, Tensor]] = {}
    for run in runs:
        data, number = run.config.data, run.state.step + run.state.skipped_batches + ahead
        if run.upcoming is None or run.upcoming[0] != number:
            key = run.config.seed, number, data.order, data.reservoir
            if key not in made:
                made[key] = batch(run, number)
            run.upcoming = number, made[key]


def _batches(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """(idx, targets) of the runs' next steps, (K, B, T)."""
    _make_batches(runs, ahead=0)
    idx, targets = zip(*(run.upcoming[1] for run in runs if run.upcoming), strict=True)
    return torch.stack(idx), torch.stack(targets)


def _gradients(stack: Stack, runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Fills all gradients, one micro-batch at a time, and clips them; each run's loss, and its norm before that.

    As in `ngpt.train.gradients`, the one place of a step that waits for a GPU.
    """
    idx, targets = _batches(runs)
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
        _make_batches(runs, ahead=1)  # while a GPU computes
        found: list[list[float]] = torch.stack((total, norms)).tolist()
        stack.clip(found[1], [run.config.optim.grad_clip or math.inf for run in runs])
    return list(zip(*found, strict=True))
