"""Files of weights are read whatever their suffix and layout; what is no such file is refused in one line."""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ngpt.config.base import ConfigError
from ngpt.conversion.weights_file import read_weights

WEIGHTS = {"first.weight": torch.arange(6.0).view(2, 3), "second.bias": torch.arange(40.0)}


def check(path: Path) -> None:
    state = read_weights(path).state
    assert state.keys() == WEIGHTS.keys() and all(torch.equal(state[name], WEIGHTS[name]) for name in state)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "last.ckpt", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_content_and_not_the_suffix_says_what_a_file_is(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "safetensors":
        safetensors.torch.save_file(WEIGHTS, tmp_path / name)
    else:
        torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=kind == "zip")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    torch.save({"lr": 0.1}, tmp_path / "optimizer.pt")
    check(tmp_path / name)
    check(tmp_path)  # the only file of weights in its folder


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", "module"])
def test_training_checkpoints_are_read_with_their_numbers(entry: str, tmp_path: Path) -> None:
    others = {"epoch": 3, "loss": np.float64(1.5), "best": np.float32(1), "rng": np.random.get_state(), "lrs": [0.1]}
    torch.save(others | {entry: OrderedDict(WEIGHTS), "ema": {"decay": 0.9}}, tmp_path / "last.ckpt")
    check(tmp_path / "last.ckpt")
    assert read_weights(tmp_path / "last.ckpt").entries["epoch"] == 3


def write_shards(folder: Path, **changes: Any) -> None:
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        safetensors.torch.save_file({name: weight}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{number}.safetensors" for number, name in enumerate(WEIGHTS)}
    index = {"metadata": {"total_size": 184}, "weight_map": places | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_joined(tmp_path: Path) -> None:
    write_shards(tmp_path)
    check(tmp_path)
    check(tmp_path / "model.safetensors.index.json")


def cut(name: str, size: int) -> Callable[[Path], Path]:
    """Writes a file of weights, and keeps its first bytes only."""

    def write(folder: Path) -> Path:
        path = folder / name
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(WEIGHTS, path)
        else:
            torch.save(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:size])
        return path

    return write


def holding(content: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "ckpt.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    return write


def shards(**changes: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_shards(folder, **changes)
        return folder

    return write


def scripted(folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), folder / "model.pt")
    return folder / "model.pt"


def trainer_output(folder: Path) -> Path:
    for step in (500, 1000):
        (folder / f"checkpoint-{step}").mkdir()
        safetensors.torch.save_file(WEIGHTS, folder / f"checkpoint-{step}" / "model.safetensors")
    return folder


def two_files(folder: Path) -> Path:
    return holding(WEIGHTS)(folder).rename(folder / "a.pt") and holding(WEIGHTS)(folder).parent


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
CASES: list[tuple[Callable[[Path], Path], str]] = [
    (holding(LFS), "is a Git LFS pointer instead of the weights: fetch them with `git lfs pull`"),
    (holding(b"<!DOCTYPE html><title>Sign in</title>"), "is a web page instead of the weights"),
    (holding(b"GGUF\3\0\0\0"), "is a GGUF file of llama.cpp"),
    (holding(b""), "neither safetensors nor a whole file of torch.save"),
    (holding(b"hello world"), "neither safetensors nor a whole file of torch.save"),
    (cut("ckpt.pt", 900), "it is incomplete, damaged or another kind of archive"),
    (cut("model.safetensors", 250), "is incomplete or damaged"),
    (cut("model.safetensors", 60), "is incomplete or damaged"),
    (holding(torch.nn.Linear(2, 2)), "it holds the Python object torch.nn.modules.linear.Linear, which would run code"),
    (holding({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}), "the Python object argparse.Namespace"),
    (holding([torch.ones(2)]), "holds a list, not weights by name"),
    (holding({"epoch": 3, "args": {"lr": 0.1}}), "holds no weights by name; it holds epoch, args"),
    (scripted, "it is a TorchScript archive"),
    (shards(third="model-2.safetensors"), "names model-2.safetensors, which is missing"),
    (shards(third="model-1.safetensors"), "model-1.safetensors lacks third, which model.safetensors.index.json lists"),
    (shards(third="../model-1.safetensors"), "names a file of another folder: ../model-1.safetensors"),
    (shards(third=3), "has no weight_map"),
    (trainer_output, "checkpoint-500"),
    (two_files, "has several files of weights (a.pt, ckpt.pt): name one of them"),
    (lambda folder: folder, "has no file of weights (model.safetensors, pytorch_model.bin, ckpt.pt)"),
]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(("write", "message"), CASES)
def test_what_is_no_file_of_weights_is_refused_in_one_line(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert text.startswith(str(path)) and "weights_only" not in text


def test_settings_beside_the_weights_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    for content, message in ((b"{", "is not JSON"), (b"[]", "holds a list"), (LFS, "is a Git LFS pointer")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_weights(tmp_path).config == read_weights(tmp_path / "model.safetensors").config
    assert read_weights(tmp_path).config == {"model_type": "llama"}
