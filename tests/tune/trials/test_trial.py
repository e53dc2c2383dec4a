"""One trial: it resumes after an interruption, failures become results, and nothing leaks into the next trial."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ngpt.code.digest import current_code
from ngpt.config.base import flatten, override
from ngpt.data.dataset import DataConfig
from ngpt.training.config import TrainConfig
from tests.helpers import ROOT
from tests.helpers.tiny_run import finish
from tune.trials.trial import (
    CUDA_CONTEXT_BYTES,
    TrialResult,
    TrialSpec,
    describe_machine,
    limit_gpu_memory,
    run_trial,
)

UNTIMED = ("val_loss", "val_bpb", "train_loss", "steps", "tokens", "n_params")


@pytest.fixture
def spec(tiny: TrainConfig, tmp_path: Path) -> TrialSpec:
    return TrialSpec(
        trial_id="t", phase="alpha", arm="alpha=0.2", seed=1, config=tiny, folder=tmp_path / "t", threads=1, attempt=1
    )


def numbers(result: TrialResult) -> dict[str, float | None]:
    return {name: result.metrics[name] for name in UNTIMED}


def weights(folder: Path) -> str:
    newest = max(folder.glob("checkpoints/step_*/model.safetensors"))
    return hashlib.sha256(newest.read_bytes()).hexdigest()


def test_a_finished_trial_has_metrics_and_provenance(spec: TrialSpec) -> None:
    result = finish(run_trial(spec))
    assert (result.status, result.error, result.metrics["steps"]) == ("finished", None, 8)
    assert result.seconds > 0 and result.started_at is not None and result.started_at.endswith("+00:00")
    facts = result.provenance
    assert (facts["device"].split()[0], facts["threads"], facts["code_sha256"]) == ("cpu", 1, current_code().digest)
    assert facts["torch"] == str(torch.__version__) and len(facts["data_sha256"]) == 64 and facts["pid"] > 0
    assert json.loads((spec.folder / "config.json").read_text()) == json.loads(json.dumps(flatten(spec.config)))


def test_an_evaluation_yields_the_result_of_a_trial_that_is_stopped_there(spec: TrialSpec) -> None:
    run = run_trial(spec)
    _, second = next(run), next(run)
    run.close()
    rows = [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]
    assert (second.status, second.error, second.metrics["steps"]) == ("stopped", None, 3)
    kept = ("val_loss", "val_bpb", "train_loss", "tokens")
    assert {name: second.metrics[name] for name in kept} == {name: rows[-1][name] for name in kept}
    assert second.metrics.keys() >= {*UNTIMED, "tokens_per_second", "peak_memory_bytes"}
    assert second.metrics["n_params"] is None and second.seconds > 0
    assert len(second.provenance["data_sha256"]) == 64 and second.provenance["code_sha256"] == current_code().digest


def test_metrics_are_yielded_at_every_evaluation(spec: TrialSpec) -> None:
    assert [interim.metrics["steps"] for interim in run_trial(spec)] == [0, 3, 6, 8]


def test_an_exception_becomes_a_failed_result_with_the_error(spec: TrialSpec) -> None:
    gone = override(spec.config, {"data.corpus": str(spec.folder / "nowhere.txt")})
    result = finish(run_trial(replace(spec, config=gone)))
    assert (result.status, result.metrics) == ("failed", {})
    assert result.error is not None and result.error.startswith("ConfigError: ") and "nowhere.txt" in result.error
    assert result.traceback is not None and result.traceback.startswith("Traceback")
    assert (spec.folder / "error.txt").read_text() == result.traceback
    assert result.provenance["device"] == describe_machine("cpu", 1)["device"]
    assert (spec.folder / "metrics.jsonl").read_text() == ""


def test_the_record_has_the_end_of_a_long_error_and_the_file_all_of_it(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: DataConfig) -> None:
        raise ValueError("x" * 10_000 + " the end")

    monkeypatch.setattr("tune.trials.trial.open_cached_dataset", broken)
    result = finish(run_trial(spec))
    assert result.error is not None and len(result.error) == 4000 and result.error.startswith("ValueError: x")
    assert result.traceback is not None and len(result.traceback) == 4000 and result.traceback.endswith("x the end\n")
    assert len((spec.folder / "error.txt").read_text()) > 10_000


def test_a_trial_on_a_corpus_that_was_edited_meanwhile_fails(spec: TrialSpec) -> None:
    result = finish(run_trial(replace(spec, corpus="0123456789ab")))
    assert result.status == "failed" and not list(spec.folder.glob("checkpoints/*"))
    assert result.error is not None and "has changed since this run began (0123456789ab then, " in result.error


def test_a_folder_that_cannot_be_created_is_a_failed_trial(spec: TrialSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = finish(run_trial(replace(spec, folder=tmp_path / "file" / "t")))
    assert result.status == "failed"
    assert result.error is not None and "NotADirectoryError" in result.error


def test_a_diverged_trial_is_a_result_without_a_loss(spec: TrialSpec) -> None:
    hot = override(spec.config, {"model.residual": "add", "optim.lr": 1e38})
    result = finish(run_trial(replace(spec, config=hot)))
    assert (result.status, result.error, result.metrics["val_loss"]) == ("diverged", None, None)
    assert result.metrics["n_params"]
    assert not (spec.folder / "error.txt").exists()


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_an_interrupted_trial_continues_from_its_checkpoint_to_the_same_end(
    spec: TrialSpec, tmp_path: Path, evaluations: int
) -> None:
    saving = replace(spec, config=override(spec.config, {"checkpoint.every": 2}))
    undisturbed = finish(run_trial(replace(saving, folder=tmp_path / "undisturbed")))
    run = run_trial(saving)
    for _ in range(evaluations):
        next(run)
    run.close()
    kept = [path.name for path in sorted(spec.folder.glob("checkpoints/step_*"))]
    steps = [interim.metrics["steps"] for interim in run_trial(replace(saving, attempt=2))]
    assert kept == [f"step_{step:07d}" for step in ([], [2], [2, 4])[evaluations - 1]]
    assert steps == ([0, 3, 6, 8], [3, 6, 8], [6, 8])[evaluations - 1]
    assert weights(spec.folder) == weights(tmp_path / "undisturbed")
    rows = [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if "val_loss" in row]
    assert evaluated == [0, 3, 6, 8]
    assert rows[-1]["val_loss"] == undisturbed.metrics["val_loss"]


def test_an_interrupted_trial_has_no_error_file(spec: TrialSpec) -> None:
    run = run_trial(spec)
    next(run)
    run.close()
    assert not (spec.folder / "error.txt").exists()


@pytest.mark.slow
def test_a_trial_after_others_equals_one_in_a_fresh_process_bit_for_bit(spec: TrialSpec, tmp_path: Path) -> None:
    different = override(spec.config, {"seed": 9, "dtype": "bfloat16"})
    other = replace(spec, folder=tmp_path / "other", threads=2, config=different)
    broken = override(spec.config, {"data.corpus": "/nowhere.txt"})
    finish(run_trial(other))
    finish(run_trial(replace(spec, folder=tmp_path / "broken", config=broken)))
    torch.manual_seed(1234)
    torch.rand(100)
    warm = finish(run_trial(replace(spec, folder=tmp_path / "warm")))
    fresh = tmp_path / "fresh"
    code = f"""
import json
from pathlib import Path
from ngpt.config.base import build
from ngpt.training.config import TrainConfig
from tune.trials.trial import TrialSpec, run_trial
from tests.tune.trials.test_trial import finish, numbers
config = build(TrainConfig, json.loads({json.dumps(flatten(spec.config))!r}))
result = finish(run_trial(TrialSpec("t", "p", "a", 1, config, Path({str(fresh)!r}), 1, 1)))
print(json.dumps(numbers(result)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == numbers(warm)
    assert weights(fresh) == weights(tmp_path / "warm")


@pytest.mark.slow
def test_a_trial_uses_its_number_of_threads(spec: TrialSpec) -> None:
    run = run_trial(replace(spec, threads=2))
    next(run)
    assert torch.get_num_threads() == 2
    finish(run)
    finish(run_trial(spec))
    assert torch.get_num_threads() == 1


def test_a_corpus_is_opened_once_per_process(spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(run_trial(spec))

    def never(data: DataConfig) -> None:
        pytest.fail("opened again")

    monkeypatch.setattr("tune.trials.trial.open_dataset", never)
    assert finish(run_trial(replace(spec, folder=tmp_path / "second"))).status == "finished"


def test_the_name_has_phase_arm_and_seed(spec: TrialSpec) -> None:
    assert spec.name == "alpha/alpha=0.2 seed 1"


@pytest.mark.parametrize(("packed", "allowed"), [(1, 1.0), (4, 1 / 4 - 0.01), (200, 0.75 / 200)])
def test_trials_that_share_a_gpu_get_their_share_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, packed: int, allowed: float
) -> None:
    """Only the calls that need a driver are replaced, so that torch checks the arguments."""
    given: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100 * CUDA_CONTEXT_BYTES))
    fraction = "_cuda_setMemoryFraction"  # missing in a torch without CUDA
    monkeypatch.setattr(torch._C, fraction, lambda share, device: given.append((share, device)), raising=False)
    limit_gpu_memory(torch.device("cuda"), packed)
    assert given == [(pytest.approx(allowed), 0)]
