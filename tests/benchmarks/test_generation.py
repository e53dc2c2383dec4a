"""The comparison of generation with transformers: the same weights give the same tokens, and every figure is there."""

import json
from pathlib import Path

import pytest

from benchmarks.generation import CONTESTANTS, main
from ngpt.training.config import TrainConfig
from tests.helpers import tiny_run


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize("family", ["Llama", "NanoChat"])
def test_all_contestants_generate_the_same_tokens(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    contestants = [name for name in CONTESTANTS if name != "compiled"]
    sizes = ["--layers", "2", "--width", "128", "--vocabulary", "90", "--prompt", "5", "--tokens", "8"]
    assert main([family, *sizes, "--batch", "1", "3", "--seconds", "0", "--json", "--contestants", *contestants]) == 0
    figures = json.loads(capsys.readouterr().out)
    for batch in (1, 3):
        found = figures[f"batch_{batch}"]
        assert found["equal"] and found["rounds"] == 3 and found["ratio"] > 0
        assert all(found[name]["cpu_ms"] > 0 for name in contestants)


def test_a_pair_gives_the_tokens_of_the_model_alone(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.run(tiny, tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    run = str(tmp_path / "run")
    capsys.readouterr()
    how = ["--prompt", "4", "--tokens", "4", "--batch", "2", "--draft-tokens", "2", "--seconds", "0", "--json"]
    assert main(["--pair", run, run, "--text", str(text), *how]) == 0
    found = json.loads(capsys.readouterr().out)["batch_2"]
    assert found["equal"] and found["speculative_2"]["acceptance_rate"] > 0.9  # a model accepts what it proposes itself
    assert main(["--pair", run, run]) == 2
    assert "give the name of a family, or --pair with --text" in capsys.readouterr().err
