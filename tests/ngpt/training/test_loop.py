"""The train loop learns, repeats itself bit for bit, and ends a run that is no longer finite."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ngpt.training.loop
from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.data.loader import train_batch
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import backward, train_step
from ngpt.training.run import Run, set_up
from tests.helpers.tiny_run import AWKWARD, MODELS, assert_equal_weights, rows, run, untimed, watch, weights


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_falls_by_more_than_a_nat(kind: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    longer = {"steps": 120, "batch_size": 8, "eval_every": 60, "optim.lr": 0.02, "model.logit_scale": 5.0}
    seen, result = watch(override(tiny, longer | MODELS[kind]), tmp_path, dataset)
    losses = [row["val_loss"] for row in seen if row["val_loss"] is not None]
    assert len(losses) == 3 and losses[0] > math.log(400) - 0.2
    assert losses[2] < losses[0] - 1
    assert result.status == "finished" and result.metrics["val_loss"] == losses[2]


@pytest.mark.parametrize("kind", MODELS)
def test_two_runs_of_one_config_agree_bit_for_bit(
    kind: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(tiny, AWKWARD | MODELS[kind])
    results = [run(config, tmp_path / name, dataset) for name in "ab"]
    assert untimed(results[0].metrics) == untimed(results[1].metrics)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert_equal_weights(weights(tmp_path / "a", 8), weights(tmp_path / "b", 8))


def test_another_seed_gives_another_result(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    one, other = (run(override(tiny, {"seed": seed}), tmp_path / str(seed), dataset) for seed in (1, 2))
    assert one.metrics["val_loss"] != other.metrics["val_loss"]


def test_logging_and_evaluation_do_not_change_the_weights(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    settings = [
        {},
        {"tracker.log_every": 1, "eval_every": 1, "checkpoint.every": 2},
        {"eval_every": 100},
        {"eval_tokens": 64},
    ]
    for number, changes in enumerate(settings):
        run(override(tiny, changes), tmp_path / str(number), dataset)
        assert_equal_weights(weights(tmp_path / str(number), 8), weights(tmp_path / "0", 8))


def test_the_train_loss_is_the_mean_of_the_last_ten_steps(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    def record(each: Run, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = backward(each, idx, targets)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(ngpt.training.loop, "backward", record)
    for log_every in (1, 5):
        losses.clear()
        out = tmp_path / str(log_every)
        result = run(override(tiny, {"tracker.log_every": log_every, "steps": 14}), out, dataset)
        logged = {row["step"]: row["train_loss"] for row in rows(out) if "grad_norm" in row}
        assert logged[5] == pytest.approx(np.mean(losses[:5]))
        assert logged[14] == result.metrics["train_loss"] == pytest.approx(np.mean(losses[4:14]))


def test_the_learning_rate_follows_the_schedule(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(override(tiny, {"tracker.log_every": 1, "schedule.warmup_steps": 4, "steps": 12}), tmp_path, dataset)
    rates = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    wave = 0.01 * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, *wave])


def test_the_logged_learning_rate_is_the_one_in_use(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    config = override(resolved(tiny), {"schedule.warmup_steps": 4, "optim.name": "muon", "lr_other": 0.04})
    each = set_up(config, tmp_path, resume=None, dataset=dataset)
    for step in range(1, 4):
        assert train_step(each)["lr"] == 0.01 * step / 4
        rates = {group["lr"] for optimizer in each.optimizers for group in optimizer.param_groups}
        assert rates == {0.01 * step / 4, 0.04 * step / 4}


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_add_up_to_the_loss_and_gradients_of_the_batch(
    micro: int, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    batch = train_batch(dataset, seed=0, step=0, batch_size=4, block_size=16)
    runs = [
        set_up(override(resolved(tiny), {"micro_batch_size": size}), tmp_path, resume=None, dataset=dataset)
        for size in (None, micro)
    ]
    whole, parts = (backward(each, *batch) for each in runs)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=0)


def test_the_gradient_is_clipped_and_its_unclipped_norm_is_logged(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    norms = []
    for clip in (None, 1e-3):
        each = set_up(override(resolved(tiny), {"grad_clip": clip}), tmp_path, resume=None, dataset=dataset)
        norms.append(train_step(each)["grad_norm"])
        gradients = [parameter.grad for parameter in each.model.parameters() if parameter.grad is not None]
        left = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        assert left == pytest.approx(clip or norms[0], rel=1e-3)
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.01


def test_lazy_projection_leaves_the_sphere_and_returns_at_the_end(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    seen, _ = watch(override(tiny, {"project_every": 3, "eval_every": 1}), tmp_path, dataset)
    errors = {int(row["step"] or 0): float(row["weight_norm_error"] or 0) for row in seen}
    assert all((errors[step] < 1e-6) == (step % 3 == 0) for step in range(9))
    assert all(errors[step] > 1e-3 for step in (1, 2, 4, 5))
    assert errors[2] > errors[1]  # the error accumulates
    final = weights(tmp_path, 8)
    rows = np.linalg.norm(final["lm_head.weight"].astype(np.float64), axis=1)
    columns = np.linalg.norm(final["blocks.0.mlp.down.weight"].astype(np.float64), axis=0)
    np.testing.assert_allclose(np.concatenate([rows, columns]), 1, atol=1e-6)


def test_projection_at_every_step_keeps_the_weights_on_the_sphere(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    seen, _ = watch(override(tiny, {"eval_every": 1}), tmp_path, dataset)
    assert max(float(row["weight_norm_error"] or 0) for row in seen) < 1e-6
    assert max(float(row["activation_norm_error"] or 0) for row in seen) < 1e-5


def test_bfloat16_learns_like_float32(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    config = override(tiny, {"steps": 30, "logit_scale": 5.0, "optim.lr": 0.02})
    full, low = (run(override(config, {"dtype": kind}), tmp_path / kind, dataset) for kind in ("float32", "bfloat16"))
    assert low.metrics["val_loss"] != full.metrics["val_loss"]
    assert low.metrics["val_loss"] == pytest.approx(full.metrics["val_loss"], abs=0.05)
    assert all(tensor.dtype == np.float32 for tensor in weights(tmp_path / "bfloat16", 30).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised while torch's compiler loads
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_bfloat16_ends_where_eager_float32_does(
    kind: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(tiny, MODELS[kind] | {"steps": 60, "batch_size": 16})
    eager = run(config, tmp_path / "eager", dataset)
    fast = run(override(config, {"dtype": "bfloat16", "compile": True}), tmp_path / "compiled", dataset)
    assert fast.metrics["val_loss"] == pytest.approx(eager.metrics["val_loss"], abs=0.02)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run_and_is_not_applied(
    broken: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []

    def remember(*arguments: Any, **named: Any) -> Run:
        runs.append(set_up(*arguments, **named))
        return runs[-1]

    def broken_backward(each: Run, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = backward(each, idx, targets)
        if each.state.step < 4:
            return loss
        if broken == "loss":
            return torch.tensor(math.nan)
        first = next(each.model.parameters())
        assert first.grad is not None
        first.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(ngpt.training.loop, "set_up", remember)
    monkeypatch.setattr(ngpt.training.loop, "backward", broken_backward)
    result = run(override(tiny, {"checkpoint.every": 1, "eval_every": 2}), tmp_path, dataset)
    assert (result.status, result.steps) == ("diverged", 5)
    assert result.metrics["val_loss"] is None and result.metrics["val_bpb"] is None
    assert "NaN" not in json.dumps(result.metrics, allow_nan=False)
    now = {name: tensor.numpy() for name, tensor in runs[0].model.state_dict().items()}
    assert_equal_weights(now, weights(tmp_path, 4))
    last = rows(tmp_path)[-1]
    assert last["step"] == 5 and last["train_loss" if broken == "loss" else "grad_norm"] is None


@pytest.mark.parametrize("steps", [1, 20])
def test_a_far_too_large_learning_rate_is_a_divergence(
    steps: int, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(tiny, {"model.residual": "add", "optim.lr": 1e38, "steps": steps})
    seen, result = watch(config, tmp_path, dataset)
    assert result.status == "diverged" and result.metrics["val_loss"] is None
    assert all(value is None or math.isfinite(value) for row in seen for value in row.values())
    if steps == 1:  # the step was finite, but the weights after it are not
        assert seen[-1]["val_loss"] is None and seen[-1]["step"] == 1
    assert rows(tmp_path)
