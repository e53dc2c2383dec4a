"""A campaign of a second, for the tests of the engine: its file, a session on it, and results that cost nothing."""

import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from ngpt.code.digest import Code, current_code
from ngpt.plugins.records import plugins_in_brief
from tune.campaign import load_campaign
from tune.executors.local import run_inline
from tune.machine import environment
from tune.session.datasets import describe_data
from tune.session.executor_info import ExecutorInfo
from tune.session.session import Session
from tune.storage.summaries import CampaignSummary
from tune.trials.trial import TrialResult, TrialSpec

# `projection` lists its seeds, so that the trials of its baseline are those that won `alpha`.
PHASES = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
  - name: projection
    inherit: alpha
    seeds: SEEDS
    grid: {project_every: [1, 3]}
"""

FILE = """\
campaign: tiny
seeds: SEEDS
base:
  model: {n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, mlp_ratio: 2.0}
  data: {corpus: CORPUS, tokenizer: "sentencepiece:400"}
  optim: {lr: RATE}
  device: cpu
  batch_size: 4
  steps: STEPS
  eval_every: EVERY
  eval_tokens: 128
  checkpoint: CHECKPOINT
  tracker: {log_every: LOG}
resources: {cpus_per_trial: 1, workers: 2}
phases:PHASES
"""


def write_corpus(folder: Path) -> Path:
    """Writes sixty kilobytes of English about Python into `folder`, as one file."""
    path = folder / "topics.txt"
    text = "\n".join(topics[name] for name in sorted(topics))
    path.write_text("".join(filter(str.isascii, text))[:60_000])
    return path


def write_file(
    folder: Path,
    corpus: Path,
    *,
    phases: str = PHASES,
    seeds: str = "[1, 2]",
    steps: int = 6,
    every: int = 3,
    lr: str = "1e-2",
    checkpoint: str = "{every: EVERY}",
    log_every: int = 1,
    vectorise: int = 1,
) -> Path:
    """Writes `tiny.yaml` into `folder`; `every` is the steps between evaluations, and between checkpoints."""
    words = {"PHASES": phases, "RATE": lr, "CHECKPOINT": checkpoint, "LOG": str(log_every), "EVERY": str(every)}
    words |= {"CORPUS": str(corpus), "SEEDS": seeds, "STEPS": str(steps)}
    text = FILE
    for word, value in words.items():
        text = text.replace(word, value)
    if vectorise > 1:
        text = text.replace("workers: 2}", f"workers: 2, vectorise: {vectorise}}}")
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def session_on(
    file: Path,
    root: Path,
    assignments: tuple[str, ...] = (),
    *,
    timer: Callable[..., Any] | None = None,
    code: Code | None = None,
) -> Session:
    """A session that has not taken its lock yet."""
    campaign = load_campaign(file, assignments)
    about = machine() | ({"plugins": plugins} if (plugins := plugins_in_brief()) else {})
    return Session(campaign, root, command="the same command", environment=about, timer=timer, code=code)


@cache
def machine() -> dict[str, Any]:
    """What sessions record about this machine, described once, since that takes five calls of git."""
    return {name: value for name, value in environment.describe("cpu").items() if name != "plugins"}


def begun(session: Session, **executor: Any) -> Session:
    """The session, begun with an executor that has these fields of `ExecutorInfo`."""
    session.executor = ExecutorInfo(**executor)
    session.begin(describe_data(session.campaign.base))
    return session


def next_trial(session: Session) -> TrialSpec | None:
    """The one trial that the session starts next, or None if none may start now."""
    specs = session.ask()
    assert len(specs) <= 1, "this campaign trains trials in groups"
    return specs[0] if specs else None


def train_all(file: Path, root: Path) -> CampaignSummary:
    """Trains what is missing, for real, and returns the summary."""
    with session_on(file, root) as session:
        run_inline(begun(session))
        return session.end()


def pretend(spec: TrialSpec, *, status: str = "finished", gain: float = 1.0) -> TrialResult:
    """A result without training: a longer alpha is better by `gain` times its length, a seed moves all arms alike."""
    noise = zlib.crc32(spec.trial_id.encode()) / 2**32
    loss = 5.0 - gain * spec.config.model.alpha + 0.1 * (spec.seed % 10) + 1e-4 * noise
    tokens = spec.config.steps * spec.config.tokens_per_step
    metrics: dict[str, float | None] = {"val_loss": loss, "val_bpb": loss / 2, "train_loss": loss}
    metrics |= {"steps": spec.config.steps, "tokens": tokens, "tokens_per_second": 1e4}
    metrics |= {"peak_memory_bytes": 1 << 20, "n_params": 1000}
    if status == "diverged":
        metrics |= {"val_loss": None, "val_bpb": None}
    if status == "failed":
        return TrialResult("failed", error="Traceback ...\nValueError: it broke", seconds=0.5)
    about = {"device": "cpu", "code_sha256": current_code().digest, "data_sha256": "da7a"}
    return TrialResult(status, metrics, started_at="2026-11-21T00:00:00.000+00:00", seconds=2.0, provenance=about)


def drive(
    session: Session, result_of: Callable[[TrialSpec], TrialResult] = pretend, *, most: int | None = None
) -> list[TrialSpec]:
    """Lets a session hand out trials, at most so many, and reports `result_of` each; returns what was handed out."""
    given: list[TrialSpec] = []
    while (most is None or len(given) < most) and (spec := next_trial(session)) is not None:
        given.append(spec)
        session.tell(spec.trial_id, result_of(spec))
    return given


def records(root: Path) -> list[dict[str, Any]]:
    """The records of all phases, as another program would read them."""
    files = sorted(root.glob("*/trials.jsonl"))
    return [strict(line) for file in files for line in file.read_text().splitlines()]


def losses(root: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """What must not depend on how often a campaign was interrupted, by phase and trial."""
    found = {(r["phase"], r["trial_id"]): (r["metrics"]["val_loss"], r["metrics"]["train_loss"]) for r in records(root)}
    assert found, f"no records in {root}"
    return found


def strict(text: str) -> Any:
    """Parses JSON as every other language would: NaN and Infinity are errors."""

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=no_constant)
