"""What `--plan` says about the memory of trials."""

from pathlib import Path

import pytest

from ngpt.training.config import TrainConfig, read_config
from tune.machine.gpu_memory import memory_notes
from tune.spec.schema import Resources

MODEL = Path(__file__).parents[3] / "experiments" / "models" / "0.5B.yaml"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ngpt.system.gpus.is_available", lambda: False)


def config(*settings: str) -> TrainConfig:
    return read_config(None, [f"model={MODEL}", "dtype=bfloat16", *settings])


def test_the_largest_trial_is_compared_with_common_gpus() -> None:
    needs, gpus = memory_notes([config("batch_size=8"), config("batch_size=32")], Resources())
    assert needs.startswith("memory: the largest trial needs at most 8") and "activations 7" in needs  # GB
    assert gpus == "memory: a GPU of 141 GB would hold it; this machine has none"


def test_a_trial_that_no_gpu_holds_is_told_what_would_help() -> None:
    resources = Resources(ranks_per_trial=2, strategy="fsdp")
    *_, warning = memory_notes([config("batch_size=128")], resources)
    assert warning.startswith("warning: GPUs of 80 GB and 141 GB do not hold it with 10% kept free")
    assert warning.endswith("with activation_checkpointing: true they would")
    *_, warning = memory_notes([config("batch_size=4096", "activation_checkpointing=true")], resources)
    assert warning.endswith("with micro_batch_size: 512 they would")


def test_small_trials_and_trials_on_the_cpu_need_no_line() -> None:
    small = read_config(None, ["vocab_size=256"])
    assert memory_notes([small], Resources()) == []
    assert memory_notes([config("device=cpu")], Resources()) == memory_notes([], Resources()) == []


@pytest.mark.parametrize(("total", "warns"), [(150e9, False), (40e9, True)])
def test_the_gpu_that_is_there_counts(total: float, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ngpt.system.gpus.is_available", lambda: True)
    monkeypatch.setattr("ngpt.system.gpus.memory", lambda device: (0, int(total)))
    monkeypatch.setattr("ngpt.system.gpus.name", lambda device: "Test GPU")
    lines = memory_notes([config("batch_size=16")], Resources())
    assert [line for line in lines if line.startswith("warning: the Test GPU of this machine, 40 GB, does")] == lines[
        1:
    ]
    assert bool(lines[1:]) is warns
