"""Checkpoints are whole or absent, any damage is detected, and the last few and the best are kept."""

import contextlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ngpt.config.base import ConfigError
from ngpt.system import atomic_files
from ngpt.training import checkpoint
from ngpt.training.checkpoint import (
    CheckpointConfig,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

IDENTITY = {"seed": 3, "optim.betas": (0.9, 0.95), "optim.lr": 0.1, "model.softcap": None}
FILES = ["MANIFEST.json", "model.safetensors", "state.pt"]


def model(fill: float = 0.0) -> nn.Module:
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(15.0).view(3, 5) + fill)
        layer.bias.fill_(fill)
    return layer


def save(root: Path, step: int, *, val_loss: float | None = None, keep_last: int = 3, **changes: Any) -> Path:
    state = {"step": step, "moments": torch.full((4,), float(step)), "history": [1.5, None, "x"]}
    return save_checkpoint(
        root,
        weights=model(float(step)).state_dict(),
        state=state,
        step=step,
        val_loss=val_loss,
        identity=IDENTITY | changes,
        keep_last=keep_last,
    )


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint_folders(root)]


def test_weights_and_state_survive_saving_and_loading(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 7, val_loss=1.25)
    assert path == tmp_path / "new" / "folder" / "step_0000007" and sorted(os.listdir(path)) == FILES
    found = newest_checkpoint(path.parent)
    assert found is not None
    assert (found.path, found.step, found.val_loss) == (path, 7, 1.25)
    fresh = model()
    state = load_checkpoint(found, fresh, identity=IDENTITY)
    for name, tensor in model(7.0).state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    assert torch.equal(state.pop("moments"), torch.full((4,), 7.0))
    assert state == {"step": 7, "history": [1.5, None, "x"]}


def test_an_empty_folder_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_the_newest_checkpoint_has_the_highest_step(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000, 5):
        save(tmp_path, step)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 10_000_000


def test_the_last_few_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, None, 3.0, 6.0]
    for step, loss in enumerate(losses, start=1):
        save(tmp_path, step, val_loss=loss, keep_last=2)
    assert steps(tmp_path) == [2, 5, 6]  # the first of the two best
    save(tmp_path, 7, val_loss=1.0, keep_last=2)
    assert steps(tmp_path) == [6, 7]


def test_without_validation_losses_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=1)
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 1, val_loss=2.5) / name
    content, draw = file.read_bytes(), random.Random(0)
    offsets = {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(60))}
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError):
            verify_checkpoint(file.parent)
    file.write_bytes(content)
    assert verify_checkpoint(file.parent).step == 1


def test_200_of_200_bits_flipped_at_random_are_detected(tmp_path: Path) -> None:
    path, draw = save(tmp_path, 1, val_loss=2.5, tiny=1e-05), random.Random(6)
    files = [(file, file.read_bytes()) for file in sorted(path.iterdir())]
    for file, content in draw.choices(files, weights=[len(content) for _, content in files], k=200):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError):
            verify_checkpoint(path)
        file.write_bytes(content)
    assert verify_checkpoint(path).step == 1


def test_an_equal_number_in_another_notation_is_detected(tmp_path: Path) -> None:
    file = save(tmp_path, 1, tiny=1e-05) / "MANIFEST.json"
    file.write_text(file.read_text().replace("1e-05", "1E-05"))
    with pytest.raises(ValueError, match="not as it was written"):
        verify_checkpoint(file.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_detected(tmp_path: Path, name: str, kept: int) -> None:
    file = save(tmp_path, 1) / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError):
        verify_checkpoint(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(OSError, match=name):
        verify_checkpoint(path)


def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_0000003" / "state.pt").write_bytes(b"")
    (tmp_path / "step_0000002" / "MANIFEST.json").unlink()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1
    assert steps(tmp_path) == [1]
    aside = sorted(path.name[:20] for path in tmp_path.glob("damaged-*"))
    assert aside == ["damaged-step_0000002", "damaged-step_0000003"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "step_0000003" in caplog.text and "state.pt" in caplog.text
    assert newest_checkpoint(tmp_path) == newest


def test_a_damaged_old_checkpoint_does_not_stop_a_save(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_0000001" / "MANIFEST.json").write_text("{")
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("call", ["rename", "fsync", "save"])
def test_a_crash_while_saving_leaves_only_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save(tmp_path, 1)

    def crash(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = {"rename": Path, "fsync": atomic_files.os, "save": checkpoint.torch}[call]
        patch.setattr(target, call, crash)
        with pytest.raises(OSError, match="No space left") as caught:
            save(tmp_path, 2)
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert os.listdir(tmp_path) == ["step_0000001"]
    assert verify_checkpoint(tmp_path / "step_0000001").step == 1


def test_the_next_save_removes_half_written_checkpoints(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / ".tmp-0123")
    assert newest_checkpoint(tmp_path) is not None
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step_0000001", "step_0000002"]


def test_resuming_removes_half_written_checkpoints(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / ".tmp-0123")
    assert newest_checkpoint(tmp_path) is not None
    assert os.listdir(tmp_path) == ["step_0000001"]


@pytest.mark.parametrize("killed_at", range(8))
def test_a_process_killed_while_removing_a_checkpoint_leaves_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    save(tmp_path, 1)
    calls = iter(range(9))

    def killing(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            if ".tmp-" not in str(arguments[0]) and next(calls) == killed_at:
                raise KeyboardInterrupt
            real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, killing(getattr(os, name)))
        with contextlib.suppress(KeyboardInterrupt):
            save(tmp_path, 2, keep_last=1)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 2
    save(tmp_path, 3, keep_last=1)
    assert os.listdir(tmp_path) == ["step_0000003"], "nothing is set aside as damaged"


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_folder", refuse)
        save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [1, 2] and "cannot be removed" in caplog.text
    save(tmp_path, 3, keep_last=1)
    assert steps(tmp_path) == [3]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    fresh = model()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ConfigError, match=r"step_0000001 was made with optim\.lr = 0\.1, this run has 0\.2"):
        load_checkpoint(found, fresh, identity=IDENTITY | {"optim.lr": 0.2, "model.softcap": 3.0})
    with pytest.raises(ConfigError, match=r"optim\.betas = \[0\.9, 0\.95\], this run has \[0\.9, 0\.9\]"):
        load_checkpoint(found, fresh, identity=IDENTITY | {"optim.betas": (0.9, 0.9)})
    # A setting that only the checkpoint has.
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.1, this run has None"):
        load_checkpoint(found, fresh, identity={name: IDENTITY[name] for name in IDENTITY if name != "optim.lr"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def reseal(path: Path, **changes: Any) -> None:
    """Gives a tampered checkpoint a matching manifest, as an attacker would."""
    manifest = json.loads((path / "MANIFEST.json").read_text()) | changes
    del manifest["sha256"]
    manifest["files"] = {name: checkpoint._digest(path / name) for name in manifest["files"]}
    manifest["sha256"] = checkpoint._manifest_digest(manifest)
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_inside_a_checkpoint_never_runs(tmp_path: Path, writer: str) -> None:
    path, marker = save(tmp_path, 1), tmp_path / "it-ran"
    with (path / "state.pt").open("wb") as file:
        torch.save({"x": Bomb(marker)}, file) if writer == "torch" else pickle.dump(
            {"x": Bomb(marker)}, file, protocol=2
        )
    reseal(path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(found, model(), identity=IDENTITY)
    assert not marker.exists()


def test_an_unknown_format_is_refused_and_not_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    reseal(save(tmp_path, 2), format=99)
    with pytest.raises(ConfigError, match=r"step_0000002: checkpoint format 99, this version reads 1"):
        newest_checkpoint(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_a_saved_step_is_not_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path, 1, val_loss=1.0)
    with pytest.raises(OSError):
        save(tmp_path, 1, val_loss=2.0)
    assert verify_checkpoint(path).val_loss == 1.0


def test_checkpoint_settings_are_not_part_of_the_identity() -> None:
    extras = [field.json_schema_extra for field in CheckpointConfig.model_fields.values()]
    assert extras == [{"identity": False}] * 2
