"""The comparison of generation with transformers: the same weights give the same tokens, and every figure is there."""

import json

import pytest

from benchmarks.generation import CONTESTANTS, main


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
