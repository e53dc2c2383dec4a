"""The benchmark of one GPU: its shapes, its handling of failed parts, and a tiny run on a CPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part, experiments, half_billion, production
from ngpt.system.cgroups import usable_cpus
from tests.helpers.fake_gpus import FakeGpus
from tune.bench import __main__ as tune_bench
from tune.planning.plan import preview


def test_the_shapes_are_those_of_the_targets() -> None:
    small, large = production(False), half_billion(False)
    assert (small.batch_size, small.model.block_size, small.project_every) == (48, 128, 7)
    assert (small.model.n_layer, small.model.n_embd, small.model.vocab_size) == (8, 384, 50257)
    assert (small.model.alpha, small.model.alpha_kind, small.model.logit_scale) == (0.28, "scalar", 15)
    assert (large.batch_size, large.model.block_size, large.model.n_layer) == (8, 1024, 24)
    assert {(config.dtype, config.compile) for config in (small, large)} == {("bfloat16", True)}
    trials = {trial.trial_id: trial.config for phase in preview(experiments(False)) for trial in phase.trials}
    assert len(trials) == 39 and {config.steps for config in trials.values()} == {200}


@pytest.mark.slow
def test_a_small_gpu_benchmark_returns_the_figures_of_its_targets(
    monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    """All parts except the packed one and the campaign, which start processes."""
    monkeypatch.setattr(gpu, "TEXT", (f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"))
    for name in ("single", "half_billion", "projection"):
        assert PARTS[name].metric in PARTS[name].measure(True), name


def test_a_part_that_fails_leaves_an_error_and_the_others_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part is a small program: one answers, one dies, one hangs, one raises."""
    programs = {
        "answers": "print('{\"seconds\": 3.0}')",
        "dies": "import os; os.kill(os.getpid(), 9)",
        "hangs": "import time; time.sleep(60)",
        "breaks": "raise ValueError('no such kernel')",
    }
    parts = {name: Part(lambda tiny: {}, 20.0, "seconds", 5.0, is_maximum=True) for name in programs}
    parts["hangs"] = Part(lambda tiny: {}, 0.5, "seconds", 5.0, is_maximum=True)
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "_command", lambda name, tiny: [sys.executable, "-c", programs[name]])
    figures = gpu.measure_all()
    assert figures["answers"] == {"seconds": 3.0}
    assert figures["dies"]["error"] == "exit code -9"
    assert figures["hangs"]["error"] == "timed out after 0 s"
    assert "no such kernel" in figures["breaks"]["stderr"]
    assert {name: row["met"] for name, row in figures["targets"].items()} == {
        "answers": True, "dies": False, "hangs": False, "breaks": False
    }  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "gpu 1/4: answers ..."
    assert lines[1].startswith("gpu 1/4: answers seconds 3 (at most 5: met), ")
    assert lines[3].startswith("gpu 2/4: dies failed (exit code -9), ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [0, 2])
def test_the_whole_gpu_benchmark_runs_at_a_small_size(
    capsys: pytest.CaptureFixture[str], fake_gpus: Callable[..., FakeGpus], count: int
) -> None:
    """On a CPU, and on two GPUs that do not exist, as `python -m tune.bench gpu`."""
    fake_gpus(count=count)
    assert tune_bench.main(["gpu", "--tiny", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    errors = {name: figures[name] for name in PARTS if "error" in figures[name]}
    assert errors == {}
    assert figures["experiments"]["trials"]["finished"] >= 39
    assert all(row["value"] is not None for row in figures["targets"].values())
    assert ("Fake GPU" in figures["packed"]["device"]) is bool(count)
    # Trials share a GPU only if each of them has a core; where one fits, there is no choice to make.
    assert bool(figures["experiments"]["packing"]) is (usable_cpus() >= 2 * count > 0)
