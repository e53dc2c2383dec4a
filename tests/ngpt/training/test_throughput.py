"""The speed of a training step: its figures agree, and the schedule of the measured run does not end."""

import pytest

from ngpt.config.base import override
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import benchmark_run, measure_step

CONTRACT = {"tokens_per_second", "step_ms", "gemm_tflops", "mfu", "peak_memory_bytes", "device", "dtype", "compiled"}


def test_the_figures_of_a_step_agree_with_each_other(tiny: TrainConfig) -> None:
    config = resolved(tiny)
    figures = measure_step(config, warmup=1, steps=3)
    assert figures.keys() >= CONTRACT
    assert figures["tokens_per_second"] * figures["step_ms"] / 1000 == pytest.approx(config.tokens_per_step)
    flops = figures["tokens_per_second"] * flops_per_token(config.model)
    assert figures["mfu"] == pytest.approx(flops / (figures["gemm_tflops"] * 1e12))
    assert figures["compiled"] is False


def test_a_benchmark_run_trains_past_the_steps_of_its_config(tiny: TrainConfig) -> None:
    run = benchmark_run(resolved(override(tiny, {"schedule.name": "cosine"})))
    losses = [train_step(run)["train_loss"] for _ in range(20)]  # tiny has 8 steps
    assert min(losses[-3:]) < losses[0]
