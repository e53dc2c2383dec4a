"""Reads the weights that other programs write: safetensors, and what `torch.save` writes, without running its code.

A path is a file, or a folder as Hugging Face's libraries write it: `config.json` with one file of weights, or with
several that an index names. What a file is, its first bytes say, since suffixes vary: `.pt`, `.pth`, `.bin`, `.ckpt`.
"""

import json
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ngpt.config.base import ConfigError, printable

CONFIG_FILE = "config.json"
# What a folder is searched for, in this order.
WHOLE = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What trainers write beside the weights.
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|adapter|consolidated).*")
# Under which name a training checkpoint holds its weights; the first that there is.
ENTRIES = ("model", "state_dict", "model_state_dict", "module")
MAGIC = {  # what is not a checkpoint, but takes the place of one
    b"version https://git-lfs": "is a Git LFS pointer instead of the weights: fetch them with `git lfs pull`",
    b"GGUF": "is a GGUF file of llama.cpp: give the model in Hugging Face's format instead",
    b"\x89HDF": "is an HDF5 file of Keras or TensorFlow: give the model's safetensors or PyTorch weights instead",
    b"<!DOCTYPE": "is a web page instead of the weights",
    b"<html": "is a web page instead of the weights",
}


@dataclass(frozen=True)
class WeightsFile:
    """The contents of a file or folder of weights.

    `state` has the tensors by the name that they have there; `entries` what a training checkpoint holds besides them;
    `config` the content of the config.json beside it, None if there is none.
    """

    path: Path
    state: dict[str, Tensor]
    entries: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def read_weights(path: Path) -> WeightsFile:
    """Reads a file or folder of weights; never unpickles anything but tensors, numbers and plain containers.

    Raises ConfigError with one line if it is no such file or not whole, and OSError if it cannot be read.
    """
    if not path.is_dir():
        config = read_json(path.with_name(CONFIG_FILE)) if path.with_name(CONFIG_FILE).is_file() else None
        if path.name.endswith(".index.json"):
            return WeightsFile(path, _read_shards(path), config=config)
        return WeightsFile(path, *_split(path, _read_file(path)), config=config)
    found = _weights_in(path)
    config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else None
    if found.name.endswith(".index.json"):
        return WeightsFile(path, _read_shards(found), config=config)
    return WeightsFile(path, *_split(found, _read_file(found)), config=config)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ConfigError if the file holds none."""
    content = path.read_bytes()
    _refuse_known(path, content)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}, not settings by name")
    return found


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder, or its index."""
    names = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for whole in WHOLE:
        for name in (whole, f"{whole}.index.json"):
            if name in names:
                return names[name]
    others = [name for name in names if name.endswith(SUFFIXES) and not NOT_WEIGHTS.fullmatch(name)]
    if len(others) == 1:
        return names[others[0]]
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise ConfigError(f"{folder} has several files of weights ({shown}): name one of them")
    if "adapter_config.json" in names:
        raise ConfigError(f"{folder} holds a LoRA adapter: merge it into its model first, and give that")
    nested = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _holds_model(path)]
    hint = f": give one of its folders, such as {folder / nested[-1]}" if nested else f" ({', '.join(WHOLE)}, ckpt.pt)"
    raise ConfigError(f"{folder} has no file of weights{hint}")


def _holds_model(folder: Path) -> bool:
    return any((folder / f"{whole}{end}").is_file() for whole in WHOLE for end in ("", ".index.json"))


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Reads the files that an index names, and checks that they hold the weights that it lists."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{index} has no weight_map, which says where each weight is")
    state: dict[str, Tensor] = {}
    for name in sorted({*places.values()}):
        if Path(name).name != name:
            raise ConfigError(f"{index} names a file of another folder: {printable(name)}")
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index} names {printable(name)}, which is missing")
        shard, _ = _split(index.parent / name, _read_file(index.parent / name))
        if twice := next((weight for weight in shard if weight in state), None):
            raise ConfigError(f"{index.parent / name} holds {printable(twice)}, as another file does")
        state |= shard
    if missing := [weight for weight in places if weight not in state]:
        lacking, weight = index.parent / places[missing[0]], printable(missing[0])
        raise ConfigError(f"{lacking} lacks {weight}, which {index.name} lists")
    return state


def _read_file(path: Path) -> Mapping[str, Any]:
    """Reads what a file holds by name: tensors, or a training checkpoint."""
    with path.open("rb") as file:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a regular file")
        head = file.read(32)
    _refuse_known(path, head)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{path} is incomplete or damaged: {printable(str(error))}") from None
        except KeyError as error:  # a dtype that torch does not have
            raise ConfigError(f"{path} has weights of the dtype {error}") from None
    return _load(path)


def _refuse_known(path: Path, content: bytes) -> None:
    for start, what in MAGIC.items():
        if content.startswith(start):
            raise ConfigError(f"{path} {what}")


def _load(path: Path) -> Mapping[str, Any]:
    """Loads what `torch.save` wrote, without running its code."""
    try:
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_types()):
            warnings.simplefilter("ignore")  # torch's advice for programs
            loaded = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # which error is raised for a non-pickle depends on its first bytes
        raise ConfigError(f"{path} is not a checkpoint that can be read safely: {_reason(str(error))}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not weights by name")
    return loaded


def _numpy_types() -> list[Any]:
    """NumPy's arrays and numbers, such as the random state in NVIDIA's checkpoints; NumPy 1 had them elsewhere."""
    array, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    old = [(array, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    kinds = (np.float64, np.float32, np.int64, np.uint32)
    return [np.ndarray, np.dtype, array, scalar, *old, *(type(np.dtype(kind)) for kind in kinds)]


def _reason(text: str) -> str:
    """The part of torch's message that is about the file. The rest is advice for programs."""
    if pickled := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds the Python object {pickled[1]}, which would run code; save the model's state_dict() instead"
    if "PytorchStreamReader" in text or "central directory" in text:
        return "it is incomplete, damaged or another kind of archive"
    if "TorchScript" in text:
        return "it is a TorchScript archive; save the model's state_dict() instead"
    return "it is neither safetensors nor a whole file of torch.save"


def _split(path: Path, loaded: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights of a loaded file, and its other entries."""
    for name in ENTRIES:
        if isinstance(weights := loaded.get(name), Mapping) and any(_tensors(weights)):
            return dict(_tensors(weights)), {key: value for key, value in loaded.items() if key != name}
    state = dict(_tensors(loaded))
    if not state:
        names = ", ".join(printable(str(name)) for name in list(loaded)[:5]) or "nothing"
        raise ConfigError(f"{path} holds no weights by name; it holds {names}")
    return state, {key: value for key, value in loaded.items() if key not in state}


def _tensors(loaded: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((str(name), value) for name, value in loaded.items() if isinstance(value, Tensor))
