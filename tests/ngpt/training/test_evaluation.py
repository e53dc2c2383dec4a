"""Evaluation logs histograms, and counts and reports divisors that are not finite."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.data.loader import EvalSet
from ngpt.data.windows import Window
from ngpt.model.gpt import GPT
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import BUILT_IN_METRICS, METRICS, EvalMetric, evaluate_run, sum_losses
from ngpt.training.run import set_up
from tests.helpers.tiny_run import rows, run, watch


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
    evaluate_run(start, last=False)
    assert (start.state.last_eval["r_replaced"] or 0) > 0
    assert "divisors r were not finite and became 1" in caplog.text


def test_the_loss_of_windows_depends_neither_on_their_batch_nor_on_the_padding_of_others(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    model = set_up(resolved(tiny), tmp_path, resume=None, dataset=dataset).model
    draw = np.random.default_rng(0)
    sizes = [(2, 1), (17, 16), (9, 3), (17, 1), (5, 4), (17, 5), (3, 1)] * 3
    windows = [Window(draw.integers(0, dataset.vocab_size, length), scored, False) for length, scored in sizes]
    autocast = torch.autocast("cpu", enabled=False)
    expected = 0.0
    for window in windows:
        idx = torch.from_numpy(window.tokens)[None]
        with torch.no_grad():
            log_odds = model(idx[:, :-1]).double().log_softmax(-1)[0]
        expected -= log_odds.gather(1, idx[0, 1:, None])[-window.n_scored :].sum().item()
    for size in (1, 2, 7, 100):
        batches = list(sum_losses(model, iter(windows), rows=size, autocast=autocast))
        assert sum(count for count, _ in batches) == sum(scored for _, scored in sizes)
        assert sum(nats for _, nats in batches) == pytest.approx(expected, rel=1e-5)
    assert model.training and len(batches) == 1


def accuracy(model: GPT, eval_set: EvalSet) -> torch.Tensor:
    """Share of the tokens that the model predicts, from its logits."""
    assert not model.training and not torch.is_grad_enabled()
    right = [(model(idx).argmax(-1) == targets).sum() for idx, targets in eval_set.batches]
    return torch.stack(right).sum() / eval_set.n_tokens


def test_a_metric_of_the_table_is_logged_at_each_evaluation_and_changes_no_other_number(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(tiny, {"norm_mode": "dotprod", "eval_every": 4})
    run(config, tmp_path / "without", dataset)
    monkeypatch.setitem(METRICS, "accuracy", EvalMetric(accuracy, "maximize"))
    monkeypatch.setitem(METRICS, "noise", EvalMetric(lambda model, eval_set: torch.rand(()).item()))
    seen, result = watch(config, tmp_path / "with", dataset)
    logged = rows(tmp_path / "with")
    shares = [row["accuracy"] for row in logged if "accuracy" in row]
    assert shares == [row["accuracy"] for row in seen] and len(shares) == 3
    assert result.metrics["accuracy"] == shares[-1] and 0 < (shares[-1] or 0) < 1
    assert len({row["noise"] for row in seen}) == 3  # drawn anew at each step
    assert watch(config, tmp_path / "again", dataset)[0][1]["noise"] == seen[1]["noise"]
    without = [{name: row[name] for name in row if name not in METRICS} for row in logged]
    assert without == rows(tmp_path / "without")


def test_a_metric_that_returns_no_number_is_named(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "odd", EvalMetric(lambda model, eval_set: torch.zeros(2)))
    with pytest.raises(TypeError, match=r"metric odd must return a number, got tensor\(\[0., 0.\]\)"):
        run(tiny, tmp_path, dataset)


def test_a_diverged_run_has_no_metric_from_before(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "one", EvalMetric(lambda model, eval_set: 1))
    monkeypatch.setattr("ngpt.training.loop.train_step", lambda run: {"train_loss": math.nan, "grad_norm": 1.0})
    seen, result = watch(tiny, tmp_path, dataset)
    assert (seen[0]["one"], result.status, result.metrics["one"]) == (1.0, "diverged", None)


def test_every_metric_of_a_run_has_a_reserved_name(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    result = run(override(tiny, {"norm_mode": "dotprod"}), tmp_path, dataset)
    assert {*result.metrics, *(name for row in rows(tmp_path) for name in row)} <= set(BUILT_IN_METRICS)
