"""Evaluation logs histograms, and counts and reports divisors that are not finite."""

import json
import math
from pathlib import Path

import pytest
import torch

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import evaluate_run
from ngpt.training.run import set_up
from tests.helpers.tiny_run import run


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
