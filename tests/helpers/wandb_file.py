"""Reads offline files of Weights & Biases, and runs code in a new interpreter to write them."""

import importlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes; no part of a record crosses a block
LAST = (1, 4)  # of the kinds whole, first, middle and last
ROOT = str(Path(__file__).parents[2])


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, which is LevelDB's log format after 7 bytes. wandb has no public reader."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # the module creates it on import
    data, at, body = path.read_bytes(), 7, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # less than the header of a part
            at += left
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in LAST:
            yield record.FromString(body)
            body = b""


def named(items: Any) -> dict[str, Any]:
    """The values of a record by name; nested names are joined with dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def python(code: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs `code` in a new interpreter without the user's home and without a network. Warnings are errors."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, kept.get("PYTHONPATH")]))
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=kept | no_network | {"HOME": str(folder), "FOLDER": str(folder / "run")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done
