"""`compile_for` compiles once per key, and later processes reuse the compiled code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ngpt.config.base import ConfigError
from ngpt.kernels.compile import CACHE_VARIABLE, check_compiler, compile_for, use_disk_cache
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from tests.helpers import ROOT


def power(x: Tensor, exponent: int, *, negative: bool = False) -> Tensor:
    value = x**exponent
    return -value if negative else value


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # from torch's compiler
def test_one_function_can_be_compiled_for_more_keys_than_torch_allows() -> None:
    x = torch.arange(4.0)
    for exponent in range(12):
        value = compile_for(("power", exponent), power)(x, exponent, negative=True)
        torch.testing.assert_close(value, -(x**exponent))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_second_model_of_the_same_shape_compiles_nothing() -> None:
    """Seeds and swept hyperparameters do not change the graph."""
    idx = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    changes: list[dict[str, Any]] = [{}, {}, {"alpha": 0.3}, {"alpha": (0.1, 0.3)}, {"logit_scale": 10.0}]
    changes += [{"rope_base": 500.0}, {"alpha": 0.1, "alpha_final": 0.3}]
    for seed, change in enumerate(changes):
        stance = "fail_on_recompile" if seed else "default"
        model = GPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=64, **change), seed=seed)
        model.prepare_step(3, 10, seed=1)
        eager = model(idx[:, :-1], idx[:, 1:])
        model.compile_parts()
        with torch.compiler.set_stance(stance):
            loss = model(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
        loss.backward()


def test_each_key_is_compiled_once() -> None:
    assert compile_for("a", power) is compile_for("a", power)
    assert compile_for("a", power) is not compile_for("b", power)


def test_compiled_code_goes_to_the_cache_folder_unless_the_user_sets_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert use_disk_cache() == tmp_path / "compiled"
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "compiled")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert use_disk_cache() == tmp_path / "own"


def test_compiled_code_that_others_could_have_written_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    (tmp_path / "cache" / "compiled").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o777)
    assert not use_disk_cache().is_relative_to(tmp_path)
    assert os.environ[CACHE_VARIABLE] == str(use_disk_cache())


def test_default_folder_of_torch_does_not_count_as_set_by_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("NGPT_CACHE", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())
    assert use_disk_cache() == tmp_path / "compiled"


RUN = """
import json, sys, warnings
from pathlib import Path
from torch._dynamo.utils import counters
from ngpt.config.base import build
from ngpt.training.loop import TrainConfig, train
warnings.simplefilter("ignore")
corpus, out, alpha, seed = sys.argv[1:]
small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "mlp_ratio": 2.0, "alpha": float(alpha)}
settings = {f"model.{name}": value for name, value in small.items()} | {"data.corpus": corpus, "seed": int(seed)}
settings |= {"data.tokenizer": "sentencepiece:400", "device": "cpu", "compile": True, "steps": 2, "batch_size": 4}
run = train(build(TrainConfig, settings | {"eval_tokens": 256, "eval_every": 2}), Path(out))
losses = [metrics["val_loss"] for metrics in run]
inductor, ahead = counters["inductor"], counters["aot_autograd"]
print(json.dumps({
    "losses": losses,
    "made": inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"] + ahead["autograd_cache_miss"],
    "found": inductor["fxgraph_cache_hit"] + ahead["autograd_cache_hit"],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_second_process_reuses_compiled_code(corpus: Path, tmp_path: Path) -> None:
    """Another seed and alpha, as in the next worker or a repeated campaign."""
    kept = os.environ | {"NGPT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    kept.pop(CACHE_VARIABLE, None)

    def trial(name: str, alpha: float, seed: int, env: dict[str, str]) -> dict[str, Any]:
        command = [sys.executable, "-c", RUN, str(corpus), str(tmp_path / name), str(alpha), str(seed)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = trial("first", 0.05, 1, kept)
    assert first["made"] > 0
    assert any((tmp_path / "cache" / "compiled").rglob("*.so"))
    second = trial("second", 0.3, 2, kept)
    assert second["made"] == 0 and second["found"] >= first["made"]
    # Cached code gives the same losses as fresh code.
    alone = trial("alone", 0.3, 2, kept | {CACHE_VARIABLE: str(tmp_path / "another")})
    assert alone["made"] > 0 and alone["losses"] == second["losses"]


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    check_compiler(torch.device("cuda"))  # Triton brings what it needs
    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(
        ConfigError, match=r"^compile: true needs a C\+\+ compiler: install g\+\+ or name a compiler .*$"
    ):
        check_compiler(torch.device("cpu"))
    cpp_builder.cpp_compiler_search.cache_clear()
