"""One code object per key: see ngpt/compiling.py."""

import pytest
import torch
from torch import Tensor

from ngpt.compiling import compile_for
from ngpt.model import GPT, ModelConfig


def power(x: Tensor, exponent: int, *, negative: bool = False) -> Tensor:
    value = x**exponent
    return -value if negative else value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, when it is first loaded
def test_a_process_may_compile_more_graphs_of_a_function_than_torch_keeps_for_one() -> None:
    x = torch.arange(4.0)
    for exponent in range(12):
        value = compile_for(("power", exponent), power)(x, exponent, negative=True)
        torch.testing.assert_close(value, -(x**exponent))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_second_model_of_a_kind_compiles_nothing() -> None:
    config = ModelConfig(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=64)
    idx = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    for seed, stance in enumerate(("default", "fail_on_recompile", "fail_on_recompile")):
        model = GPT(config, seed=seed)
        eager = model(idx[:, :-1], idx[:, 1:])
        model.compile_parts()
        with torch.compiler.set_stance(stance):
            loss = model(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
        loss.backward()


def test_a_key_is_compiled_once() -> None:
    assert compile_for("a", power) is compile_for("a", power)
    assert compile_for("a", power) is not compile_for("b", power)
