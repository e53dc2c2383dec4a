"""Weights are recognised by their names; a format that cannot be converted is refused in one line that says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.convert import main

State = dict[str, torch.Tensor]
WIDTH, LAYERS = 32, 12


def nanogpt(bias: bool) -> State:
    """The state dict of model.py in karpathy/nanoGPT, with the masks that it has under old versions of torch."""
    state = {"transformer.wte.weight": torch.ones(61, WIDTH), "transformer.wpe.weight": torch.ones(16, WIDTH)}
    matrices = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    for layer in range(LAYERS):
        shapes = {name: (rows * WIDTH, columns * WIDTH) for name, (rows, columns) in matrices.items()}
        for name, shape in (shapes | {"ln_1": (WIDTH,), "ln_2": (WIDTH,)}).items():
            state[f"transformer.h.{layer}.{name}.weight"] = torch.ones(shape)
            if bias:
                state[f"transformer.h.{layer}.{name}.bias"] = torch.ones(shape[0])
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    state |= {"transformer.ln_f.weight": torch.ones(WIDTH), "lm_head.weight": state["transformer.wte.weight"]}
    return state | ({"transformer.ln_f.bias": torch.ones(WIDTH)} if bias else {})


def training_checkpoint(state: State, **args: Any) -> dict[str, Any]:
    """As train.py of nanoGPT saves it."""
    sizes = {"n_layer": LAYERS, "n_head": 4, "n_embd": WIDTH, "block_size": 16, "vocab_size": 61, "dropout": 0.0}
    return {
        "model": state,
        "optimizer": torch.optim.AdamW([torch.ones(2, requires_grad=True)]).state_dict(),
        "model_args": sizes | args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.1),
        "config": {"dataset": "openwebtext", "compile": True, "grad_clip": 1.0},
    }


def refusal(path: Path, capsys: pytest.CaptureFixture[str], *source: str) -> str:
    """The one line with which the command refuses a path."""
    out = path.parent / "out"
    assert main([*source, str(path), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ") and not out.exists()
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("source", [(), ("nvidia",), ("nanochat",)])
def test_checkpoint_of_nanogpt_is_refused_in_one_line(
    prefix: str, bias: bool, source: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {prefix + name: weight for name, weight in nanogpt(bias).items()}
    torch.save(training_checkpoint(state, bias=bias), tmp_path / "ckpt.pt")
    biases = ", biases" if bias else ""
    right = (
        "nanoGPT's GPT (GPT-2) cannot be converted: GPT and nGPT here have no learned positions (wpe), LayerNorm, GELU"
    )
    assert refusal(tmp_path / "ckpt.pt", capsys, *source) == right + biases


OTHERS: list[tuple[Callable[[], State], tuple[str, ...], str]] = [
    (lambda: {"layers.0.attention.wq.weight": torch.ones(4, 4)}, (), "Meta's Llama cannot be converted: convert it to"),
    (lambda: {"gpt_neox.layers.0.attention.dense.bias": torch.ones(4)}, (), "GPT-NeoX (Pythia) cannot be converted: "),
    (lambda: {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, ("hf",), "has its settings in config.json,"),
    (lambda: {"base_model.model.x.lora_A.weight": torch.ones(4, 4)}, (), "merge it into its model first"),
    (lambda: {"blocks.0.attention.query.weight": torch.ones(4, 4)}, (), "a checkpoint of this program cannot be"),
    (
        lambda: {"conv1.weight": torch.ones(4)},
        (),
        "no known format: its weights have names like _orig_mod.conv1.weight; known",
    ),
    (lambda: {"conv1.weight": torch.ones(4)}, ("hf",), "no known format"),
    (
        lambda: {"transformer.h.0.attn.c_q.weight": torch.ones(4, 4)},
        ("nvidia",),
        "these are weights of nanochat's GPT, not of NVIDIA's nGPT or its GPT baseline: leave out 'nvidia'",
    ),
]


@pytest.mark.parametrize(("state", "source", "message"), OTHERS)
def test_other_formats_are_named(
    state: Callable[[], State],
    source: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({f"_orig_mod.{name}": weight for name, weight in state().items()}, tmp_path / "weights.pth")
    assert message in refusal(tmp_path / "weights.pth", capsys, *source)
