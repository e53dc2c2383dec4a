"""The step benchmark: its figures belong together, and the command prints them as documented."""

import json
from pathlib import Path

import pytest
import torch

from ngpt.bench import gemm_flops, main, step
from ngpt.flops import flops_per_token
from ngpt.train import TrainConfig, resolved

CONTRACT = {"tokens_per_second", "step_ms", "gemm_tflops", "mfu", "peak_memory_bytes", "device", "dtype", "compiled"}
TINY = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16", "batch_size=2", "eval_tokens=64"]


@pytest.fixture
def options(corpus: Path) -> list[str]:
    return [*TINY, f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"]


def test_the_figures_of_a_step_agree_with_each_other(tiny: TrainConfig) -> None:
    config = resolved(tiny)
    figures = step(config, warmup=1, steps=3)
    assert figures.keys() >= CONTRACT
    assert figures["tokens_per_second"] * figures["step_ms"] / 1000 == pytest.approx(config.tokens_per_step)
    flops = figures["tokens_per_second"] * flops_per_token(config.model)
    assert figures["mfu"] == pytest.approx(flops / (figures["gemm_tflops"] * 1e12))


def test_the_matrix_product_rate_is_that_of_a_real_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("ngpt.bench.time.perf_counter", lambda: float(next(clock)))  # every product takes a second
    assert gemm_flops(torch.device("cpu"), torch.float32, size=64) == 2 * 64**3


def test_the_command_prints_one_json_object(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--json", "--set", *options]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= CONTRACT


def test_an_unknown_setting_is_answered_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--set", "model.alhpa=1"]) == 2
    assert "did you mean 'model.alpha'?" in capsys.readouterr().err
