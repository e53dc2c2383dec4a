"""What a run does when memory runs out, and when a loss or gradient is not finite."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ngpt.training.loop
from ngpt.config.base import ConfigError, content_hash, flatten, override
from ngpt.data.dataset import Dataset
from ngpt.model.gpt import GPT
from ngpt.training.config import NONFINITE, ON_OOM, TrainConfig
from ngpt.training.loop import backward, train
from ngpt.training.run import Run, halved
from tests.helpers.tiny_run import LimitedMemory, rows, run, untimed, weight_difference, weights

OPTIMIZERS = {"adamw": {}, "muon": {"optim.name": "muon", "optim.lr_other": 0.02}}


def break_forward(patch: pytest.MonkeyPatch) -> LimitedMemory:
    """A training pass over more than one sequence runs out of memory at its start."""
    real = GPT.forward
    full = LimitedMemory(real, fails=lambda model, idx, targets=None: len(idx) > 1 and torch.is_grad_enabled())
    patch.setattr(GPT, "forward", lambda *arguments: full(*arguments))
    return full


def break_backward(patch: pytest.MonkeyPatch) -> LimitedMemory:
    """A training pass over more than one sequence runs out of memory after the gradients of some layers."""
    real, last_pass = GPT.forward, {"rows": 0}
    full = LimitedMemory(lambda gradient: gradient, fails=lambda gradient: last_pass["rows"] > 1)

    def forward(model: Any, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        last_pass["rows"] = len(idx)
        if torch.is_grad_enabled() and not model.wte.weight._backward_hooks:
            model.wte.weight.register_hook(full)  # its gradient is computed last
        return real(model, idx, targets)

    patch.setattr(GPT, "forward", forward)
    return full


BREAKS = {"forward": break_forward, "backward": break_backward}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_a_step_out_of_memory_gives_the_result_of_small_micro_batches(
    where: str, optimizer: str, watched: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(watched, OPTIMIZERS[optimizer])
    small = run(override(config, {"micro_batch_size": 1}), tmp_path / "small", dataset)
    with pytest.MonkeyPatch.context() as patch:
        full = BREAKS[where](patch)
        result = run(config, tmp_path / "full", dataset)
    assert full.failures == 2  # 4 sequences, 2, 1; not again in later steps
    assert result.status == "finished"
    assert (result.metrics["micro_batch_size"], result.metrics["batch_size"]) == (1, 4)
    assert result.metrics["tokens"] == small.metrics["tokens"]
    for name in ("val_loss", "train_loss", "val_bpb"):
        assert result.metrics[name] == pytest.approx(small.metrics[name], abs=1e-6)
    assert weight_difference(tmp_path / "full", tmp_path / "small") < 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("failing_step", [0, 5])
def test_an_optimizer_out_of_memory_rolls_the_run_back(
    failing_step: int, optimizer: str, watched: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Memory runs out when some weights have changed. The run returns to its checkpoint at step 4, or to the start."""
    config = override(watched, OPTIMIZERS[optimizer] | {"micro_batch_size": 2})
    half = run(override(config, {"micro_batch_size": 1}), tmp_path / "half", dataset)
    real, broken = ngpt.training.loop.train_step, []

    def failing_step_of(each: Run) -> Callable[[], None]:
        step = each.optimizers[-1].step

        def step_halfway() -> None:
            step()
            with torch.no_grad():
                next(each.model.parameters()).add_(1.0)
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return step_halfway

    def record(each: Run) -> dict[str, float]:
        if each.state.step == failing_step and not broken:
            broken.append(each.state.step)
            each.optimizers[-1].step = failing_step_of(each)  # type: ignore[method-assign]
        return real(each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngpt.training.loop, "train_step", record)
        result = run(config, tmp_path / "broken", dataset)
    assert broken == [failing_step] and result.metrics["micro_batch_size"] == 1
    assert result.metrics["val_loss"] == pytest.approx(half.metrics["val_loss"], abs=1e-6)
    assert weight_difference(tmp_path / "broken", tmp_path / "half") < 1e-6
    steps = [row["step"] for row in rows(tmp_path / "broken")]
    assert steps == [row["step"] for row in rows(tmp_path / "half")]  # rows of undone steps are dropped


def test_an_evaluation_out_of_memory_gives_the_same_loss(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    plain = run(watched, tmp_path / "plain", dataset)
    real = GPT.forward
    full = LimitedMemory(real, fails=lambda model, idx, targets=None: len(idx) > 2 and not torch.is_grad_enabled())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", lambda *arguments: full(*arguments))
        result = run(watched, tmp_path / "full", dataset)
    assert full.failures == 1
    assert result.metrics["micro_batch_size"] == 4  # training did not run out
    assert result.metrics["val_loss"] == pytest.approx(plain.metrics["val_loss"], abs=1e-6)
    assert weight_difference(tmp_path / "full", tmp_path / "plain") == 0


@pytest.mark.parametrize("where", BREAKS)
def test_policy_fail_raises_at_once(where: str, watched: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full = BREAKS[where](patch)
        with pytest.raises(torch.OutOfMemoryError):
            run(override(watched, {"on_oom": "fail"}), tmp_path, dataset)
    assert full.failures == 1


def test_a_single_sequence_that_does_not_fit_raises(watched: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full = LimitedMemory(None, fails=lambda *_: True)  # type: ignore[arg-type]
        patch.setattr(ngpt.training.loop, "backward", full)
        with pytest.raises(torch.OutOfMemoryError):
            run(watched, tmp_path, dataset)
    assert full.failures == 3  # 4, 2, 1


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes; on a busy machine more than the usual limit of five
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised while torch's compiler loads
def test_a_compiled_run_may_use_more_batch_sizes_than_torch_recompiles(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Three batch sizes in training and three in evaluation, where torch raises at the third graph of a function."""
    settings = {"batch_size": 4, "compile": True, "steps": 3, "eval_every": 1, "n_layer": 1}
    config, real, steps = override(tiny, settings), GPT.forward, iter(range(99))

    def step(each: Run) -> dict[str, float]:
        limit["rows"] = 4 >> next(steps)  # half of the step before
        return train_step(each)

    def forward(model: Any, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        loss = real(model, idx, targets)
        if torch.is_grad_enabled() and len(idx) > limit["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    limit, train_step = {"rows": 4}, ngpt.training.loop.train_step
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=2):
        patch.setattr(GPT, "forward", forward)
        patch.setattr(ngpt.training.loop, "train_step", step)
        result = run(config, tmp_path / "compiled", dataset)
    assert result.status == "finished" and result.metrics["micro_batch_size"] == 1
    small = run(override(config, {"compile": False}), tmp_path / "eager", dataset)
    assert result.metrics["val_loss"] == pytest.approx(small.metrics["val_loss"], abs=1e-5)


def test_other_errors_in_a_step_pass_through(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ngpt.training.loop, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(watched, tmp_path, dataset)


def test_halve_batch_halves_the_batch_and_reports_it(watched: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    """From step 5 on, training uses the first two sequences of each batch."""
    seen: list[tuple[int, int]] = []

    def record(each: Run, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if each.state.step >= 4 and len(idx) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append((each.state.step, len(idx)))
        return backward(each, idx, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngpt.training.loop, "backward", record)
        result = run(override(watched, {"on_oom": "halve_batch"}), tmp_path, dataset)
    assert seen == [(step, 4 if step < 4 else 2) for step in range(8)]
    assert (result.metrics["batch_size"], result.metrics["micro_batch_size"]) == (2, 2)
    assert result.metrics["tokens"] == 16 * (4 * 4 + 4 * 2)
    assert [row["tokens"] for row in rows(tmp_path) if "grad_norm" in row] == [64, 128, 192, 256, 288, 320, 352, 384]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_micro_batch_that_fits(watched: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        BREAKS["forward"](patch)
        straight = run(watched, tmp_path / "straight", dataset)
        loop = train(watched, tmp_path / "killed", dataset=dataset)
        next(loop)
        next(loop)
        loop.close()
    resumed = run(watched, tmp_path / "killed", dataset, resume="latest")  # although memory would suffice now
    assert untimed(resumed.metrics) == untimed(straight.metrics)
    assert weight_difference(tmp_path / "killed", tmp_path / "straight") == 0


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from ngpt.config.base import build
from ngpt.training.loop import train
from ngpt.training.config import TrainConfig

torch.set_num_threads(1)
loop = train(build(TrainConfig, json.loads(sys.argv[1])), Path(sys.argv[3]))
next(loop)  # so that all libraries are loaded
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + int(sys.argv[2]), resource.RLIM_INFINITY))
while True:
    try:
        next(loop)
    except StopIteration as stop:
        print(json.dumps(stop.value.metrics))
        break
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are Linux'")
def test_a_host_out_of_memory_gives_the_result_of_small_micro_batches(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """A batch of 256 needs about 170 MB for its activations; 60 MB are left."""
    wide = {"batch_size": 256, "model.n_embd": 64, "model.block_size": 64, "steps": 2, "eval_every": 9}
    config = override(tiny, wide | {"eval_tokens": 64, "checkpoint.every": 9})
    command = [sys.executable, "-c", LIMITED, json.dumps(flatten(config)), str(60 << 20), str(tmp_path / "limited")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 1 <= result["micro_batch_size"] < 256 and result["batch_size"] == 256
    expected = run(override(config, {"micro_batch_size": 16}), tmp_path / "small", dataset).metrics
    assert result["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)
    assert result["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-6)


# ---- not finite -----------------------------------------------------------------------------------------------------


def break_batches(patch: pytest.MonkeyPatch, *bad: int, what: str = "gradient") -> list[int]:
    """Makes the loss or a gradient of the `bad` batches not finite; returns a list of all batches trained on."""
    seen: list[int] = []
    real_gradients, real = ngpt.training.loop.gradients, ngpt.training.loop.backward

    def gradients(each: Run, number: int) -> tuple[float, float]:
        seen.append(number)
        return real_gradients(each, number)

    def broken(each: Run, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = real(each, idx, targets)
        if seen[-1] not in bad:
            return loss
        if what == "loss":
            return torch.tensor(math.nan)
        gradient = each.model.get_parameter("blocks.1.mlp.down.weight").grad
        assert gradient is not None
        gradient[0, 0] = -math.inf
        return loss

    patch.setattr(ngpt.training.loop, "gradients", gradients)
    patch.setattr(ngpt.training.loop, "backward", broken)
    return seen


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_no_weight_and_is_counted(
    optimizer: str, what: str, watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(watched, OPTIMIZERS[optimizer] | {"nonfinite.policy": "skip", "checkpoint.every": 1})
    config = override(config, {"checkpoint.keep_last": 9, "project_every": 1})
    seen = break_batches(monkeypatch, 2, 5, what=what)
    result = run(config, tmp_path, dataset)
    assert seen == list(range(8))
    assert (result.status, result.metrics["skipped_steps"], result.metrics["rollbacks"]) == ("finished", 2, 0)
    for step in range(1, 9):
        if step > 1:
            before, after = weights(tmp_path, step - 1), weights(tmp_path, step)
            assert all(np.array_equal(before[name], after[name]) for name in before) == (step in (3, 6))
    logged = {row["step"]: row for row in rows(tmp_path) if "grad_norm" in row}
    assert [step for step, row in logged.items() if row["train_loss" if what == "loss" else "grad_norm"] is None] == [
        3,
        6,
    ]
    assert result.metrics["train_loss"] is not None and result.metrics["val_loss"] is not None


def test_too_many_skipped_steps_are_a_divergence(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_batches(monkeypatch, 1, 3, 4)
    result = run(override(watched, {"nonfinite.policy": "skip", "nonfinite.max": 2}), tmp_path, dataset)
    assert (result.status, result.steps, result.metrics["val_loss"]) == ("diverged", 5, None)


def test_a_rollback_restores_the_checkpoint_and_skips_the_batches_since(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 5 fails in step 6. The run returns to step 4, continues with batch 6, and fails again at batch 7."""
    seen = break_batches(monkeypatch, 5, 7)
    result = run(override(watched, {"nonfinite.policy": "rollback"}), tmp_path, dataset)
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert (result.status, result.steps, result.metrics["rollbacks"]) == ("finished", 8, 2)
    logged = [row["step"] for row in rows(tmp_path) if "grad_norm" in row]
    assert logged == list(range(1, 9))
    plain = run(override(watched, {"steps": 8}), tmp_path / "plain", dataset)
    assert plain.metrics["val_loss"] != result.metrics["val_loss"]


def test_a_rollback_without_a_checkpoint_returns_to_the_start(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(watched, {"nonfinite.policy": "rollback", "checkpoint.every": 100})
    seen = break_batches(monkeypatch, 1)
    result = run(config, tmp_path, dataset)
    assert seen == list(range(10)) and result.status == "finished"
    assert [row["step"] for row in rows(tmp_path) if "val_bpb" in row] == [0, 4, 8]


def test_too_many_rollbacks_are_a_divergence(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = break_batches(monkeypatch, *range(4, 100))
    result = run(override(watched, {"nonfinite.policy": "rollback", "nonfinite.max": 3}), tmp_path, dataset)
    assert (result.status, result.metrics["rollbacks"], result.metrics["val_loss"]) == ("diverged", 3, None)
    assert seen == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_resumed_after_a_recovery_ends_as_an_undisturbed_one(
    policy: str, watched: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(watched, {"nonfinite.policy": policy, "eval_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        break_batches(patch, 3)
        straight = run(config, tmp_path / "straight", dataset)
        for count in range(1, 11 if policy == "rollback" else 10):
            out = tmp_path / str(count)
            loop = train(config, out, dataset=dataset)
            for _ in range(count):
                next(loop)
            loop.close()
            assert untimed(run(config, out, dataset, resume="latest").metrics) == untimed(straight.metrics), count
            assert rows(out) == rows(tmp_path / "straight"), count
            assert weight_difference(out, tmp_path / "straight") == 0


def test_an_evaluation_that_is_not_finite_rolls_the_run_back(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights after a step may be infinite although its gradient was not."""
    real, broken = ngpt.training.loop.update, []

    def update(runs: list[Run]) -> None:
        real(runs)
        (each,) = runs
        if each.state.step == 4 and not broken:
            broken.append(True)
            with torch.no_grad():
                each.model.get_parameter("blocks.0.mlp.down.weight").fill_(math.inf)

    monkeypatch.setattr(ngpt.training.loop, "update", update)
    result = run(override(watched, {"nonfinite.policy": "rollback"}), tmp_path / "back", dataset)
    assert (result.status, result.metrics["rollbacks"]) == ("finished", 1)
    broken.clear()
    result = run(override(watched, {"nonfinite.policy": "skip"}), tmp_path / "skip", dataset)
    assert (result.status, result.metrics["val_loss"]) == ("diverged", None)


# ---- the settings ----------------------------------------------------------------------------------------------------


def test_policies_with_equal_results_have_the_same_hash(tiny: TrainConfig) -> None:
    for change in ({"on_oom": "split"}, {"on_oom": "fail"}, {"nonfinite.policy": "fail"}, {"nonfinite.max": 10}):
        assert content_hash(override(tiny, change)) == content_hash(tiny)
    others = [{"on_oom": "halve_batch"}, {"nonfinite.policy": "skip"}, {"nonfinite.policy": "rollback"}]
    assert len({content_hash(override(tiny, change)) for change in [{}, *others]}) == 4


def test_an_unknown_policy_lists_the_choices(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"on_oom: unknown policy 'halve', did you mean 'halve_batch'"):
        override(tiny, {"on_oom": "halve"})
    with pytest.raises(ConfigError, match=r"nonfinite\.policy: unknown policy 'skp', did you mean 'skip'"):
        override(tiny, {"nonfinite.policy": "skp"})
    assert set(ON_OOM) == {"split", "halve_batch", "fail"} and set(NONFINITE) == {"fail", "skip", "rollback"}


@pytest.mark.parametrize("size", range(1, 20))
def test_halving_ends_at_one(size: int) -> None:
    sizes = [halved(size, times) for times in range(7)]
    assert sizes[0] == size and sizes[-1] == 1
    assert all(one / 2 <= other <= max(1, one - 1) for one, other in itertools.pairwise(sizes))
