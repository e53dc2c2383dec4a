"""Figures of a step belong together; ours and a peer are measured on the same shape and data."""

from pathlib import Path

import pytest
from test_bench_peers import NANOGPT

from ngpt.config.base import override
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import against_peer, prepared, step

CONTRACT = {"tokens_per_second", "step_ms", "gemm_tflops", "mfu", "peak_memory_bytes", "device", "dtype", "compiled"}


def test_the_figures_of_a_step_agree_with_each_other(tiny: TrainConfig) -> None:
    config = resolved(tiny)
    figures = step(config, warmup=1, steps=3)
    assert figures.keys() >= CONTRACT
    assert figures["tokens_per_second"] * figures["step_ms"] / 1000 == pytest.approx(config.tokens_per_step)
    flops = figures["tokens_per_second"] * flops_per_token(config.model)
    assert figures["mfu"] == pytest.approx(flops / (figures["gemm_tflops"] * 1e12))
    assert figures["compiled"] is False


def test_a_prepared_run_trains_and_its_schedule_does_not_end(tiny: TrainConfig) -> None:
    run = prepared(resolved(override(tiny, {"schedule.name": "cosine"})))
    losses = [train_step(run)["train_loss"] for _ in range(20)]  # tiny has 8 steps
    assert min(losses[-3:]) < losses[0]


@pytest.mark.slow
def test_a_peer_takes_turns_with_ours_and_its_memory_is_that_of_its_own_process(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "model.py"
    path.write_text(NANOGPT)
    figures = against_peer(tiny, path, modes=["eager"], seconds=0.0)
    assert figures.keys() >= CONTRACT | {"ratio_eager", "memory_ratio_eager"}
    assert "ratio_compiled" not in figures
    ours, theirs = (figures["contestants"][f"{who}_eager"] for who in ("ours", "peer"))
    assert figures["tokens_per_second"] == ours["tokens_per_second"]
    assert figures["memory_ratio_eager"] == ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    for contestant in (ours, theirs):
        assert contestant["best_ms"] <= contestant["step_ms"]
        assert contestant["peak_memory_bytes"] > 50e6  # an interpreter with torch
