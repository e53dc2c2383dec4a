"""The train loop: it learns, it repeats itself to the last bit, and an interruption leaves no trace."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import ngpt.train
from ngpt.checkpoint import checkpoint_folders
from ngpt.config import ConfigError, content_hash, flatten, override
from ngpt.data.corpora import Dataset
from ngpt.data.loader import train_batch
from ngpt.train import (
    Metrics,
    Run,
    RunResult,
    TrainConfig,
    backward,
    due,
    main,
    pick_device,
    resolved,
    set_up,
    train,
    train_step,
)

TIMING = ("tokens_per_second", "peak_memory_bytes")  # what may differ between two equal runs
AWKWARD = {  # nothing divides anything: 8 steps
    "project_every": 3,
    "eval_every": 3,
    "tracker.log_every": 2,
    "checkpoint.every": 1,
    "schedule.warmup_steps": 2,
    "optim.weight_decay": 0.1,
}
MODELS = {
    "ngpt-adamw": {"optim.name": "adamw"},
    "ngpt-muon": {"optim.name": "muon", "optim.lr_other": 0.02, "model.norm_mode": "ema"},
    "gpt": {"model.residual": "add", "model.mlp": "relu2", "model.softcap": 15.0, "data.order": "reservoir"},
    # Everything that changes from step to step without being learned, and all that a checkpoint must carry besides.
    "scheduled": {
        "optim.name": "geodesic_muon",
        "model.alpha": 0.15,
        "model.alpha_final": 0.3,
        "model.norm_probability": 0.5,
        "model.norm_mode": "dotprod",
        "data.order": "shards",
    },
}


class Killed(Exception):
    """Stands for the end of the process."""


def run(
    config: TrainConfig, out: Path, dataset: Dataset, *, resume: str | None = None
) -> tuple[list[Metrics], RunResult]:
    loop, seen = train(config, out, resume=resume, dataset=dataset), []
    while True:
        try:
            seen.append(dict(next(loop)))
        except StopIteration as stop:
            return seen, stop.value


def untimed(row: Metrics) -> Metrics:
    return {name: value for name, value in row.items() if name not in TIMING}


def log(out: Path) -> list[Metrics]:
    return [untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, step: int) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(out / "checkpoints" / f"step_{step:07d}" / "model.safetensors")


def optimizer_states(out: Path, step: int) -> list[Any]:
    path = out / "checkpoints" / f"step_{step:07d}" / "state.pt"
    return torch.load(path, weights_only=True)["optimizers"]


def assert_equal_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def assert_equal_states(one: Any, other: Any) -> None:
    """Nested lists and dicts of tensors, numbers and names, equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal_states(left, right)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture
def awkward(tiny: TrainConfig) -> TrainConfig:
    return override(tiny, AWKWARD)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_falls_by_more_than_a_nat(kind: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    longer = {"steps": 120, "batch_size": 8, "eval_every": 60, "optim.lr": 0.02, "model.logit_scale": 5.0}
    seen, result = run(override(tiny, longer | MODELS[kind]), tmp_path, dataset)
    losses = [row["val_loss"] for row in seen if row["val_loss"] is not None]
    assert len(losses) == 3 and losses[0] > math.log(400) - 0.2
    assert losses[2] < losses[0] - 1
    assert result.status == "finished" and result.metrics["val_loss"] == losses[2]


def test_a_result_holds_what_a_record_needs(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    seen, result = run(tiny, tmp_path, dataset)
    assert [row["step"] for row in seen] == [0, 3, 6, 8]
    metrics = result.metrics
    assert result.steps == metrics["steps"] == 8 and metrics["tokens"] == 8 * 4 * 16
    assert metrics["n_params"] == sum(tensor.size for tensor in weights(tmp_path, 8).values())
    assert all(isinstance(metrics[name], float) for name in ("val_loss", "val_bpb", "train_loss", "tokens_per_second"))
    assert (metrics["peak_memory_bytes"] or 0) > 50_000_000


@pytest.mark.parametrize("kind", MODELS)
def test_two_runs_are_equal_to_the_last_bit(kind: str, awkward: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    config = override(awkward, MODELS[kind])
    results = [run(config, tmp_path / name, dataset)[1] for name in "ab"]
    assert untimed(results[0].metrics) == untimed(results[1].metrics)
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert_equal_weights(weights(tmp_path / "a", 8), weights(tmp_path / "b", 8))


def test_another_seed_is_another_run(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    one, other = (run(override(tiny, {"seed": seed}), tmp_path / str(seed), dataset)[1] for seed in (1, 2))
    assert one.metrics["val_loss"] != other.metrics["val_loss"]


def killed_after_save(step: int, patch: pytest.MonkeyPatch) -> None:
    """The process ends as soon as the checkpoint of `step` is on disk."""
    real = ngpt.train.save_checkpoint

    def save(*arguments: Any, **named: Any) -> Path:
        path = real(*arguments, **named)
        if named["step"] == step:
            raise Killed
        return path

    patch.setattr(ngpt.train, "save_checkpoint", save)


def killed_in_step(step: int, patch: pytest.MonkeyPatch) -> None:
    """The process ends in the middle of `step`, after rows that no checkpoint covers."""

    def batch(*arguments: Any, **named: Any) -> Any:
        if named["step"] == step - 1:
            raise Killed
        return train_batch(*arguments, **named)

    patch.setattr(ngpt.train, "train_batch", batch)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("kill", "every"), [(killed_after_save, 1), (killed_in_step, 3)])
def test_a_run_that_was_killed_anywhere_ends_as_if_it_had_not_been(
    kind: str,
    kill: Callable[[int, pytest.MonkeyPatch], None],
    every: int,
    awkward: TrainConfig,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    config = override(awkward, MODELS[kind] | {"checkpoint.every": every})
    _, straight = run(config, tmp_path / "straight", dataset)
    expected = weights(tmp_path / "straight", 8)
    for step in range(1, 9):
        out = tmp_path / str(step)
        with pytest.MonkeyPatch.context() as patch:
            kill(step, patch)
            with pytest.raises(Killed):
                run(config, out, dataset)
        torch.manual_seed(step)  # another process
        _, resumed = run(config, out, dataset, resume="latest")
        assert resumed.status == "finished", step
        assert untimed(resumed.metrics) == untimed(straight.metrics), step
        assert log(out) == log(tmp_path / "straight"), step
        assert_equal_weights(weights(out, 8), expected)
        assert_equal_states(optimizer_states(out, 8), optimizer_states(tmp_path / "straight", 8))
        kept = [sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (out, tmp_path / "straight")]
        assert kept[0] == kept[1]  # the last few and the best so far


def test_a_process_that_is_killed_for_real_loses_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    """SIGKILL while it trains, as soon as some checkpoint is there, and once more further on."""
    steps = {"steps": 240, "eval_every": 80, "checkpoint.every": 9, "project_every": 7, "optim.name": "muon"}
    config = override(tiny, steps)
    code = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from ngpt.config import build; from ngpt.train import TrainConfig, train;"
        "list(train(build(TrainConfig, json.loads(sys.argv[1])), Path(sys.argv[2]), resume='latest'))"
    )
    out = tmp_path / "killed"
    for at_least in (9, 90):
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(flatten(config)), str(out)])
        while process.poll() is None:
            if any(int(path.name[5:]) >= at_least for path in checkpoint_folders(out / "checkpoints")):
                process.kill()
                process.wait()
            time.sleep(0.002)
        assert process.returncode == -signal.SIGKILL
        assert max(int(path.name[5:]) for path in checkpoint_folders(out / "checkpoints")) < 240
    list(train(config, out, resume="latest"))
    list(train(config, tmp_path / "straight"))
    assert log(out) == log(tmp_path / "straight")
    assert_equal_weights(weights(out, 240), weights(tmp_path / "straight", 240))
    assert_equal_states(optimizer_states(out, 240), optimizer_states(tmp_path / "straight", 240))


def test_a_run_that_is_dropped_at_each_evaluation_ends_as_if_it_had_not_been(
    awkward: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    _, straight = run(awkward, tmp_path / "straight", dataset)
    for count in range(1, 5):
        loop = train(awkward, tmp_path / str(count), dataset=dataset)
        for _ in range(count):
            next(loop)
        loop.close()
        _, resumed = run(awkward, tmp_path / str(count), dataset, resume="latest")
        assert untimed(resumed.metrics) == untimed(straight.metrics)
        assert log(tmp_path / str(count)) == log(tmp_path / "straight")


def test_a_finished_run_that_is_resumed_has_the_same_result_and_does_nothing(
    awkward: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    _, first = run(awkward, tmp_path, dataset)
    before = (tmp_path / "metrics.jsonl").read_text()
    seen, second = run(awkward, tmp_path, dataset, resume="latest")
    assert seen == [] and (tmp_path / "metrics.jsonl").read_text() == before
    assert {**second.metrics, "peak_memory_bytes": 0} == {**first.metrics, "peak_memory_bytes": 0}


def test_resuming_goes_past_a_damaged_checkpoint(awkward: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    _, straight = run(awkward, tmp_path, dataset)
    (tmp_path / "checkpoints" / "step_0000008" / "state.pt").write_bytes(b"")
    _, resumed = run(awkward, tmp_path, dataset, resume="latest")
    assert untimed(resumed.metrics) == untimed(straight.metrics)


def test_resuming_where_there_is_nothing_starts_at_the_beginning(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    seen, _ = run(tiny, tmp_path, dataset, resume="latest")
    assert seen[0]["step"] == 0


def test_a_fresh_run_does_not_overwrite_an_earlier_one(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(tiny, tmp_path, dataset)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run: resume it, or choose another folder"):
        run(tiny, tmp_path, dataset)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_config_is_refused(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(tiny, tmp_path, dataset)
    with pytest.raises(ConfigError, match=r"was made with optim\.lr = 0\.01, this run has 0\.02"):
        run(override(tiny, {"lr": 0.02}), tmp_path, dataset, resume="latest")
    with pytest.raises(ConfigError, match="resume must be 'latest', got 'best'"):
        run(tiny, tmp_path, dataset, resume="best")


def test_other_data_under_the_same_name_are_refused_but_may_move(
    tiny: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(corpus.read_bytes())
    list(train(tiny, tmp_path / "out"))
    moved = override(tiny, {"data.corpus": str(copy)})
    assert list(train(moved, tmp_path / "out", resume="latest")) == []
    copy.write_text(corpus.read_text()[:-1])
    with pytest.raises(ConfigError, match=r"was made with data\.fingerprint"):
        list(train(moved, tmp_path / "out", resume="latest"))


def test_how_often_to_look_does_not_change_what_is_learnt(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    looks = [
        {},
        {"tracker.log_every": 1, "eval_every": 1, "checkpoint.every": 2},
        {"eval_every": 100},
        {"eval_tokens": 64},
    ]
    for number, look in enumerate(looks):
        run(override(tiny, look), tmp_path / str(number), dataset)
        assert_equal_weights(weights(tmp_path / str(number), 8), weights(tmp_path / "0", 8))


def test_the_train_loss_is_the_mean_of_the_last_ten_steps_however_often_it_is_logged(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    real = ngpt.train.backward

    def listen(each: ngpt.train.Run, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = real(each, idx, targets)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(ngpt.train, "backward", listen)
    for log_every in (1, 5):
        losses.clear()
        out = tmp_path / str(log_every)
        _, result = run(override(tiny, {"tracker.log_every": log_every, "steps": 14}), out, dataset)
        logged = {row["step"]: row["train_loss"] for row in log(out) if "grad_norm" in row}
        assert logged[5] == pytest.approx(np.mean(losses[:5]))
        assert logged[14] == result.metrics["train_loss"] == pytest.approx(np.mean(losses[4:14]))


def test_the_learning_rate_follows_the_schedule(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(override(tiny, {"tracker.log_every": 1, "schedule.warmup_steps": 4, "steps": 12}), tmp_path, dataset)
    rates = [row["lr"] for row in log(tmp_path) if "lr" in row]
    wave = 0.01 * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, *wave])


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(resolved(tiny), {"schedule.warmup_steps": 4, "optim.name": "muon", "lr_other": 0.04})
    each = set_up(config, tmp_path, resume=None, dataset=dataset)
    for step in range(1, 4):
        assert train_step(each)["lr"] == 0.01 * step / 4
        rates = {group["lr"] for optimizer in each.optimizers for group in optimizer.param_groups}
        assert rates == {0.01 * step / 4, 0.04 * step / 4}


def test_a_checkpoint_has_a_validation_loss_where_these_weights_were_evaluated(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    often = {"checkpoint.every": 1, "checkpoint.keep_last": 9}
    seen, _ = run(override(tiny, often), tmp_path, dataset)
    saved = {}
    for path in (tmp_path / "checkpoints").iterdir():
        manifest = json.loads((path / "MANIFEST.json").read_text())
        saved[manifest["step"]] = manifest["val_loss"]
    assert {step: loss for step, loss in saved.items() if loss is not None} == {
        row["step"]: row["val_loss"] for row in seen if row["step"]
    }
    assert sorted(saved) == list(range(1, 9))


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_have_the_loss_and_gradients_of_the_whole(
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


def test_the_gradient_is_clipped_and_its_norm_before_that_is_logged(
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


def test_lazy_projection_leaves_the_sphere_in_between_and_returns_at_the_end(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    seen, _ = run(override(tiny, {"project_every": 3, "eval_every": 1}), tmp_path, dataset)
    errors = {int(row["step"] or 0): float(row["weight_norm_error"] or 0) for row in seen}
    assert all((errors[step] < 1e-6) == (step % 3 == 0) for step in range(9))
    assert all(errors[step] > 1e-3 for step in (1, 2, 4, 5))
    assert errors[2] > errors[1]  # it adds up
    final = weights(tmp_path, 8)
    rows = np.linalg.norm(final["lm_head.weight"].astype(np.float64), axis=1)
    columns = np.linalg.norm(final["blocks.0.mlp.down.weight"].astype(np.float64), axis=0)
    np.testing.assert_allclose(np.concatenate([rows, columns]), 1, atol=1e-6)


def test_projection_at_every_step_is_what_keeps_the_sphere(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    seen, _ = run(override(tiny, {"eval_every": 1}), tmp_path, dataset)
    assert max(float(row["weight_norm_error"] or 0) for row in seen) < 1e-6
    assert max(float(row["activation_norm_error"] or 0) for row in seen) < 1e-5


def test_bfloat16_learns_like_float32(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    config = override(tiny, {"steps": 30, "logit_scale": 5.0, "optim.lr": 0.02})
    full, low = (
        run(override(config, {"dtype": kind}), tmp_path / kind, dataset)[1] for kind in ("float32", "bfloat16")
    )
    assert low.metrics["val_loss"] != full.metrics["val_loss"]
    assert low.metrics["val_loss"] == pytest.approx(full.metrics["val_loss"], abs=0.05)
    assert all(tensor.dtype == np.float32 for tensor in weights(tmp_path / "bfloat16", 30).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, when it is first loaded
@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_run_in_bfloat16_ends_where_an_eager_one_in_float32_does(
    kind: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(tiny, MODELS[kind] | {"steps": 60, "batch_size": 16})
    _, eager = run(config, tmp_path / "eager", dataset)
    _, fast = run(override(config, {"dtype": "bfloat16", "compile": True}), tmp_path / "compiled", dataset)
    assert fast.metrics["val_loss"] == pytest.approx(eager.metrics["val_loss"], abs=0.02)


@pytest.mark.parametrize("name", ["--norm-mode", "--norm_mode"])
def test_the_norm_mode_is_a_flag_of_its_own(
    name: str, settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(settings_file), name, "dotprod", "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["r_mean"] != 1 and result["r_replaced"] == 0
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "MANIFEST.json").read_text())["identity"]["model.norm_mode"] == "dotprod"


def test_an_unknown_norm_mode_is_a_value_error_that_lists_the_choices(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "unknown norm mode 'dotprd', did you mean 'dotprod'? Allowed: baseline, dotprod, ema"
    with pytest.raises(ValueError, match=re.escape(message)):
        override(tiny, {"norm_mode": "dotprd"})
    assert main(["--norm-mode", "dotprd", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"model.norm_mode: {message}\n"


def test_alphas_and_divisors_are_logged_as_histograms(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(override(tiny, {"norm_mode": "dotprod", "eval_every": 8}), tmp_path, dataset)
    rows = [json.loads(line) for line in (tmp_path / "histograms.jsonl").read_text().splitlines()]
    sublayers = [f"{name}.{layer}" for layer in range(2) for name in ("attention", "mlp")]
    expected = {(step, f"{kind}/{name}") for step in (0, 8) for kind in ("alpha", "r") for name in sublayers}
    assert {(row["step"], row["name"]) for row in rows} == expected
    alpha = next(row for row in rows if (row["step"], row["name"]) == (0, "alpha/mlp.1"))
    assert sum(alpha["counts"]) == 16 and min(alpha["edges"]) < 0.05 < max(alpha["edges"])


def test_divisors_that_are_not_finite_are_counted_logged_and_reported(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Infinite weights make answers whose direction is not a number."""
    start = set_up(resolved(override(tiny, {"norm_mode": "dotprod"})), tmp_path, resume=None, dataset=dataset)
    with torch.no_grad():
        start.model.get_parameter("blocks.0.mlp.down.weight").fill_(math.inf)
    ngpt.train.measure(start, last=False)
    assert (start.progress.last_eval["r_replaced"] or 0) > 0
    assert "divisors r were not finite and became 1" in caplog.text


@pytest.mark.parametrize("optimizer", ["geodesic_muon", "riemannian_adamw"])
def test_an_optimizer_that_the_model_has_no_sphere_for_is_refused_at_once(optimizer: str, tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=f"optim.name: optimizer {optimizer} .*add"):
        override(tiny, {"optim.name": optimizer, "residual": "add"})


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run_and_is_not_taken(
    broken: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []

    def remember(*arguments: Any, **named: Any) -> Run:
        runs.append(set_up(*arguments, **named))
        return runs[-1]

    def break_down(each: Run, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = backward(each, idx, targets)
        if each.progress.step < 4:
            return loss
        if broken == "loss":
            return torch.tensor(math.nan)
        first = next(each.model.parameters())
        assert first.grad is not None
        first.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(ngpt.train, "set_up", remember)
    monkeypatch.setattr(ngpt.train, "backward", break_down)
    _, result = run(override(tiny, {"checkpoint.every": 1, "eval_every": 2}), tmp_path, dataset)
    assert (result.status, result.steps) == ("diverged", 5)
    assert result.metrics["val_loss"] is None and result.metrics["val_bpb"] is None
    assert "NaN" not in json.dumps(result.metrics, allow_nan=False)
    now = {name: tensor.numpy() for name, tensor in runs[0].model.state_dict().items()}
    assert_equal_weights(now, weights(tmp_path, 4))
    last = log(tmp_path)[-1]
    assert last["step"] == 5 and last["train_loss" if broken == "loss" else "grad_norm"] is None


@pytest.mark.parametrize("steps", [1, 20])
def test_a_far_too_large_learning_rate_is_reported_as_divergence(
    steps: int, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(tiny, {"model.residual": "add", "optim.lr": 1e38, "steps": steps})
    seen, result = run(config, tmp_path, dataset)
    assert result.status == "diverged" and result.metrics["val_loss"] is None
    assert all(value is None or math.isfinite(value) for row in seen for value in row.values())
    if steps == 1:  # the step itself was finite, what it led to was not
        assert seen[-1]["val_loss"] is None and seen[-1]["step"] == 1
    assert log(tmp_path)


def test_the_vocabulary_is_the_tokenizers_or_larger(tiny: TrainConfig) -> None:
    assert resolved(tiny).model.vocab_size == 400
    assert resolved(override(tiny, {"vocab_size": 512})).model.vocab_size == 512
    with pytest.raises(ConfigError, match=r"model\.vocab_size 399 is smaller than the 400 tokens of the data"):
        resolved(override(tiny, {"vocab_size": 399}))


def test_a_batch_that_cannot_be_cut_into_micro_batches_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size: batch_size 4 is not a multiple of micro_batch_size 3"):
        override(tiny, {"micro_batch_size": 3})


def test_where_a_run_takes_place_does_not_decide_what_it_computes(tiny: TrainConfig) -> None:
    other = {"device": "auto", "tracker.wandb": "offline", "tracker.log_every": 3, "checkpoint.every": 7}
    assert content_hash(override(tiny, other)) == content_hash(tiny)
    assert content_hash(override(tiny, {"project_every": 2})) != content_hash(tiny)


def test_due_is_every_so_often_and_at_the_last() -> None:
    assert [step for step in range(10) if due(step, 4, last=step == 9)] == [0, 4, 8, 9]


def test_a_device_is_there_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device 'cuda' is not available here; this machine has cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings_file(tiny: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"data: {{corpus: {tiny.data.corpus}, tokenizer: 'sentencepiece:400'}}\n"
        "model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}\n"
        "device: cpu\n"
        "steps: 4\n"
        "batch_size: 2\n"
        "eval_every: 2\n"
        "eval_tokens: 64\n"
        "optim:\n"
        "  lr: 1e-2\n"
        "  betas: [0.9, 0.99]\n"
    )
    return path


def test_the_command_line_trains_and_prints_one_json_object(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--config", str(settings_file), "--set", "alpha=0.2", "steps=3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(printed.out, parse_constant=pytest.fail)
    assert result["status"] == "finished" and result["steps"] == 3 and 4 < result["val_loss"] < 8
    shown = [line.split()[:2] for line in printed.err.splitlines()]
    assert shown == [["step", "0"], ["step", "2"], ["step", "3"]]
    manifest = json.loads((tmp_path / "out" / "checkpoints" / "step_0000003" / "MANIFEST.json").read_text())
    assert manifest["identity"]["model.alpha"] == 0.2 and manifest["identity"]["optim.betas"] == [0.9, 0.99]


def test_the_command_line_resumes(settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(settings_file), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(arguments) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert main([*arguments, "--resume", "latest"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert untimed(again) == untimed(first)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 1e-2", "  lrr: 1e-2", "{file}:9:3: optim.lrr: unknown setting, did you mean 'lr'?"),
        ("  lr: 1e-2", "  lr: '1e-2'", "{file}:9:3: optim.lr: input should be a valid number, got '1e-2'"),
        ("0.99]", "1.5]", "{file}:10:16: optim.betas[1]: input should be less than 1, got 1.5"),
        ("n_head: 2", "n_head: 3", "{file}:2:21: model.n_head: n_embd 16 cannot be divided into n_head 3 heads"),
        ("steps: 4", "sceptre: 4", "{file}:4:1: sceptre: unknown setting; choose one of batch_size, checkpoint.every"),
        ("steps: 4", "steps: 4\nsteps: 5", "{file}:5:1: duplicate key 'steps'"),
        ("steps: 4", "steps: 4\nlr: 0.1", "{file}:10:3: optim.lr: optim.lr is given twice"),
        ("steps: 4", "steps: [4", "{file}:5:11: not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_answered_with_its_position(
    old: str, new: str, message: str, settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_file.write_text(settings_file.read_text().replace(old, new))
    assert main(["--config", str(settings_file), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not (tmp_path / "out").exists()
    (line,) = printed.err.splitlines()
    assert line.startswith(message.format(file=settings_file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "alhpa=1"], "alhpa: unknown setting, did you mean 'alpha'?"),
        (["--set", "alpha=-1"], "model.alpha: input should be greater than 0, got -1"),
        (["--set", "alpha"], "--set alpha: expected NAME=VALUE"),
        (["--set", "corpus=shakespear"], "unknown corpus 'shakespear', did you mean 'shakespeare'?"),
        (["--config", "missing.yaml"], "missing.yaml: No such file or directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not (tmp_path / "out").exists()
    (line,) = printed.err.splitlines()
    assert line.startswith(message)


def test_all_mistakes_of_a_file_are_shown_at_once_in_one_line_each(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_file.write_text(settings_file.read_text().replace("n_layer: 1", "n_layer: 0").replace("1e-2", "-1"))
    assert main(["--config", str(settings_file), "--out", str(tmp_path / "out")]) == 2
    lines = [line.removeprefix(f"{settings_file}:").split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(lines) == ["2", "9"]


def test_a_run_that_diverged_has_exit_code_4(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--config", str(settings_file), "--set", "residual=add", "lr=1e38", "--out", str(tmp_path / "out")])
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert code == 4 and result["status"] == "diverged" and result["val_loss"] is None


def test_a_folder_that_cannot_be_written_has_exit_code_74(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["--config", str(settings_file), "--out", str(tmp_path / "out")]) == 74
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path / 'out'}: File exists"]
