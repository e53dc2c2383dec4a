"""A model that two ranks have saved in parts: its files, and what every command makes of them."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from ngpt.config.base import ConfigError, override
from ngpt.convert import convert
from ngpt.runs.pruning import prunable_bytes, prune_state
from ngpt.training.checkpoint import newest_checkpoint, read_weights, verify_checkpoint, weight_shapes
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.load_model import check_initial_weights, load_model
from ngpt.training.loop import train
from tests.helpers.rank_cases import SMALL, train_cases

CASE = {"optim.name": "geodesic_muon", "optim.lr": 0.02, "optim.lr_other": 0.01, "model.norm_mode": "dotprod"}
CASE |= {"checkpoint.every": 3}


@pytest.fixture(scope="module")
def runs(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `one` on one device, and `two` on two ranks with parts of the model."""
    root = tmp_path_factory.mktemp("runs")
    one = train_cases(tiny, root / "one", {"run": CASE}, ranks=1)
    two = train_cases(tiny, root / "two", {"run": CASE}, ranks=2, changes={"distributed.strategy": "fsdp"})
    assert two["run"]["losses"] == pytest.approx(one["run"]["losses"], abs=1e-5)
    return root


@pytest.fixture
def two(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run on two ranks."""
    return shutil.copytree(runs / "two" / "run", tmp_path / "two")


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_0000006"


def assembled(folder: Path) -> dict[str, np.ndarray]:
    """Puts the shards of a folder together, by what the header of each says; in NumPy."""
    parts: dict[str, list[tuple[list[int], np.ndarray]]] = {}
    for path in folder.iterdir():
        with safetensors.safe_open(path, framework="np") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((places[name]["saved_offsets"], file.get_tensor(name)))
    whole = {}
    for name, pieces in parts.items():
        shape = np.max([np.add(start, piece.shape) for start, piece in pieces], axis=0)
        whole[name] = np.full(shape.astype(int), -9, dtype=pieces[0][1].dtype)
        for start, piece in pieces:
            whole[name][tuple(slice(a, a + n) for a, n in zip(start, piece.shape, strict=True))] = piece
    return whole


@pytest.mark.slow
def test_each_rank_writes_half_and_together_they_are_the_weights_and_moments_of_one_device(runs: Path) -> None:
    one, two = newest(runs / "one" / "run"), newest(runs / "two" / "run")
    expected = safetensors.torch.load_file(one / "model.safetensors")
    found = assembled(two / "model")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight.numpy(), atol=2e-5, rtol=0, err_msg=name)
    first, second = sorted(path.stat().st_size for path in (two / "model").iterdir())
    assert 0.7 < first / second <= 1, "one rank has written most of it"
    saved = (torch.load(path / "state.pt", weights_only=True)["optimizers"] for path in (one, two))
    moments, count = assembled(two / "optimizer"), 0
    for whole, parts in zip(*saved, strict=True):
        for index, key in ((index, key) for index, values in whole["state"].items() for key in values):
            part, value = parts["state"][index][key], whole["state"][index][key]
            if isinstance(part, str):
                np.testing.assert_allclose(moments[part], value.numpy(), atol=2e-5, rtol=0, err_msg=part)
                count += 1
            else:
                assert torch.as_tensor(part).equal(torch.as_tensor(value))
    assert count == len(moments) > 10


def test_one_device_loads_the_model_and_goes_on_with_it(runs: Path, tiny: TrainConfig, two: Path) -> None:
    model, tokenizer, checkpoint = load_model(two)
    expected = load_model(runs / "one" / "run").model.state_dict()
    torch.testing.assert_close(model.state_dict(), expected, atol=2e-5, rtol=0)
    assert tokenizer is not None and checkpoint.is_sharded and not checkpoint.is_pruned
    check_initial_weights(model.cfg, str(two), checkpoint.weights_sha256)
    shutil.rmtree(newest(two))  # so that it resumes at step 3
    config = resolved(override(tiny, SMALL | CASE))
    *_, last = itertools.chain([], train(config, two, resume="latest"))
    rows = [json.loads(line) for line in (runs / "one" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last["val_loss"] == pytest.approx([row["val_loss"] for row in rows if "val_loss" in row][-1], abs=1e-5)
    assert (newest(two) / "model.safetensors").is_file()


def test_convert_makes_one_file_of_it_from_which_new_runs_start(two: Path, tmp_path: Path) -> None:
    folder = convert(None, two, out=tmp_path / "out", options={"n_head": None})
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.testing.assert_close(weights, read_weights(verify_checkpoint(newest(two))), atol=0, rtol=0)
    assert load_model(tmp_path / "out").checkpoint.is_pruned and (folder / "tokenizer.model").is_file()
    with pytest.raises(ConfigError, match="--n-head is for models of other programs"):
        convert(None, two, out=tmp_path / "other", options={"n_head": 2})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit of a weight": lambda path: flip(path / "model" / "shard-00002-model-00001-of-00001.safetensors"),
    "a flipped bit of a moment": lambda path: flip(path / "optimizer" / "shard-00001-model-00001-of-00001.safetensors"),
    "a lost shard": lambda path: (path / "optimizer" / "shard-00002-model-00001-of-00001.safetensors").unlink(),
    "a shard too many": lambda path: shutil.copyfile(
        path / "model" / "shard-00001-model-00001-of-00001.safetensors", path / "model" / "more.safetensors"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_noticed_and_the_checkpoint_before_is_used(damage: str, two: Path) -> None:
    DAMAGES[damage](newest(two))
    with pytest.raises((OSError, ValueError), match=r"shard-0000|more\.safetensors"):
        verify_checkpoint(newest(two))
    found = newest_checkpoint(two / "checkpoints")
    assert found is not None and found.step == 3


@pytest.mark.parametrize("places", ["", "{}", '{"wte.weight": {"saved_offsets": 3}}', '{"wte.weight": []}'])
def test_a_shard_that_does_not_say_where_it_belongs_is_refused_in_one_line(places: str, two: Path) -> None:
    checkpoint = verify_checkpoint(newest(two))
    path = next((newest(two) / "model").iterdir())
    safetensors.torch.save_file({"wte.weight": torch.ones(2, 2)}, path, metadata={"DCP_SHARDING_INFO": places or "{"})
    for read in (weight_shapes, read_weights):
        with pytest.raises(ConfigError, match=r"cannot read model: a shard does not say where its parts belong .*\S"):
            read(checkpoint)


def test_pruning_removes_the_moments_of_all_ranks_and_a_kill_leaves_what_the_next_call_finishes(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = newest(two)
    digest = hashlib.sha256(b"".join(sorted(each.read_bytes() for each in (path / "model").iterdir()))).digest()
    size = sum(each.stat().st_size for each in (path / "state.pt", *(path / "optimizer").iterdir()))
    assert prunable_bytes(path) == size
    removed, unlink = [], Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(self.stat().st_size)
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_state(path)
    assert verify_checkpoint(path).is_pruned and prunable_bytes(path) == size - sum(removed) > 0
    prune_state(path)
    assert verify_checkpoint(path).is_pruned and prunable_bytes(path) == 0 and not os.listdir(path / "optimizer")
    after = hashlib.sha256(b"".join(sorted(each.read_bytes() for each in (path / "model").iterdir()))).digest()
    assert after == digest and load_model(two).checkpoint.step == 6


def test_shards_behind_a_link_are_not_pruned(two: Path, tmp_path: Path) -> None:
    path = newest(two)
    (path / "optimizer").rename(tmp_path / "elsewhere")
    (path / "optimizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="optimizer is a link"):
        prunable_bytes(path)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
