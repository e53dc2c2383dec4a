"""Hands out thousands of trials to fake workers, as a large cluster would ask for them."""

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from tune.campaign import load_campaign
from tune.machine import environment
from tune.machine.spawn import hide_main_module
from tune.results.status import read_snapshot
from tune.session.datasets import describe_data
from tune.session.executor_info import ExecutorInfo
from tune.session.remote import RemoteSession
from tune.session.session import Session
from tune.trials.trial import TrialResult, TrialSpec

SEEDS = 20  # of every arm
FILE = """
campaign: dispatch
seeds: {seeds}
base:
  model: {{n_layer: 2, n_head: 2, n_embd: 64, block_size: 64, mlp: relu2}}
  data: {{corpus: python-docs, tokenizer: "sentencepiece:1024"}}
  device: cpu
  batch_size: 16
  steps: 100
  eval_every: 50
  eval_tokens: 1024
resources: {{cpus_per_trial: 1}}
phases:
{phases}
"""
PHASE = "  - {{name: phase{number}, vary: {{alpha: {alphas}}}}}"


def dispatch(*, trials: int = 10_000, workers: int = 400, phases: int = 10) -> dict[str, Any]:
    """Measures how fast a campaign's process hands out about `trials` trials, with workers that train nothing.

    The workers live in a process of their own, as Ray does, and call the real session through a pipe. Each trial is
    asked for, reports one evaluation, and ends. trials_per_second: of the whole run. slowest_tenth_per_second: of the
    slowest tenth of the trials. resident_megabytes: of the campaign's process, libraries included, at the end of the
    run. status_seconds: time of `status` on the results; resume_seconds: time to read the journal again and plan the
    campaign.
    """
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        file, root = _write_file(Path(folder), trials, phases), Path(folder, "results")
        ended = list[float]()
        with _session(file, root) as session:
            session.executor = ExecutorInfo(workers=workers)
            session.begin(describe_data(session.campaign.base))
            began = time.perf_counter()
            _serve(session, workers, ended)
            seconds = time.perf_counter() - began
            session.end()
        resident = psutil.Process().memory_info().rss
        began = time.perf_counter()
        read_snapshot(root)
        status_seconds = time.perf_counter() - began
        began = time.perf_counter()
        with _session(file, root) as session:
            left = session.has_work()
        resume_seconds = time.perf_counter() - began
        journal = (root / "journal.jsonl").stat().st_size
    assert not left, "all trials have ended"
    trials = len(ended)
    tenth = max(1, trials // 10)
    slowest = max(late - early for early, late in zip([0.0, *ended], ended[tenth - 1 :], strict=False))
    return {
        "trials": trials,
        "workers": workers,
        "phases": phases,
        "trials_per_second": trials / seconds,
        "slowest_tenth_per_second": tenth / slowest,
        "resident_megabytes": resident / 2**20,
        "journal_megabytes": journal / 2**20,
        "status_seconds": status_seconds,
        "resume_seconds": resume_seconds,
    }


def _write_file(folder: Path, trials: int, phases: int) -> Path:
    """A campaign of about `trials` trials; a phase has a baseline besides the values that it varies."""
    arms = trials // (phases * SEEDS)
    texts = []
    for number in range(phases):
        alphas = [round(0.01 + 0.001 * (number * arms + i), 6) for i in range(arms)]
        texts.append(PHASE.format(number=number, alphas=alphas))
    path = folder / "dispatch.yaml"
    path.write_text(FILE.format(seeds=list(range(1, SEEDS + 1)), phases="\n".join(texts)))
    return path


def _session(file: Path, root: Path) -> Session:
    return Session(load_campaign(file), root, command="tune.bench", environment=environment.describe("cpu"))


def _serve(session: Session, workers: int, ended: list[float]) -> None:
    """Answers the calls of the process with the workers until it ends; notes when each trial did."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_workers, args=(theirs, workers), daemon=True)
    with hide_main_module():
        process.start()
    theirs.close()
    began = time.perf_counter()
    with contextlib.suppress(EOFError):
        while True:
            name, *arguments = ours.recv()
            value = getattr(session, name)(*arguments)
            if name == "tell":
                ended.append(time.perf_counter() - began)
            ours.send((value, session.stop_requested))
    process.join()


def run_workers(connection: Connection, workers: int) -> None:
    """Main function of the process with the fake workers."""
    session, busy = RemoteSession(connection), deque[TrialSpec]()
    while not session.is_over():
        while len(busy) < workers and (specs := session.ask()):
            busy.extend(specs)
        assert busy, "the session has trials left and hands out none"
        spec = busy.popleft()
        session.should_stop(spec.trial_id, _result(spec))
        session.tell(spec.trial_id, _result(spec))
    connection.close()


def _result(spec: TrialSpec) -> TrialResult:
    alpha = spec.config.model.alpha
    assert isinstance(alpha, float), "the file varies single numbers"
    loss = 5.0 - alpha + 0.01 * (spec.seed % 7)
    tokens = spec.config.steps * spec.config.tokens_per_step
    metrics: dict[str, float | None] = {"val_loss": loss, "val_bpb": loss / 2, "train_loss": loss}
    metrics |= {"steps": spec.config.steps, "tokens": tokens, "tokens_per_second": 1e4, "n_params": 1000}
    return TrialResult("finished", metrics, seconds=2.0, provenance={"device": "cpu", "pid": os.getpid()})
