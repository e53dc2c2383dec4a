"""The command `python -m ngpt.bench`: its output, its help and its error messages."""

import json
from pathlib import Path

import pytest

from ngpt.bench.__main__ import BENCHMARKS, main

CONTRACT = {"tokens_per_second", "step_ms", "gemm_tflops", "mfu", "peak_memory_bytes", "device", "dtype", "compiled"}
TINY = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16", "batch_size=2", "eval_tokens=64"]


@pytest.fixture
def options(corpus: Path) -> list[str]:
    return [*TINY, f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400", "device=cpu"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_prints_one_json_object_with_documented_fields(
    name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    budget = [] if name == "step" else ["--seconds", "0"]
    assert main([name, "--json", "--threads", "1", *budget, "--set", *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert name != "step" or figures.keys() >= CONTRACT
    with pytest.raises(SystemExit):
        main(["--help"])
    documented = capsys.readouterr().out
    sizes = {"rows", "vocab_size", "n_embd", "tokens"}  # they describe the workload
    assert [field for field in figures if field not in documented and field not in sizes] == []


@pytest.mark.slow
def test_without_json_each_figure_is_a_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--seconds", "0", "--dtype", "bfloat16", "--set", *options]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines["dtype"] == "bfloat16"
    assert float(lines["ratio"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--set", "model.alhpa=1"], "did you mean 'model.alpha'?"),
        (["step", "--seconds", "1"], "step takes a fixed number of steps"),
        (["projection", "--set", "model.residual=add"], "a model of residual rule add has nothing to project"),
    ],
)
def test_a_user_error_is_one_line(
    arguments: list[str], message: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--set", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
