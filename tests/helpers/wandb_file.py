"""What Weights & Biases has written offline, read back; and a fresh interpreter to write it in."""

import importlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes; a record's parts do not cross blocks
LAST = (1, 4)  # kinds of a part: whole, first, middle, last
ROOT = str(Path(__file__).parents[2])


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes. wandb has no public reader."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # made while it is imported
    data, at, body = path.read_bytes(), 7, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too few for a part's header
            at += left
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in LAST:
            yield record.FromString(body)
            body = b""


def named(items: Any) -> dict[str, Any]:
    """Values by name, of a record's items; parts of a nested name are joined by dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def python(code: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs `code` in a fresh interpreter that knows no home and no network, and in which a warning is an error."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, kept.get("PYTHONPATH")]))
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=kept | nowhere | {"HOME": str(folder), "FOLDER": str(folder / "run")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done
