"""Trains small models on several ranks, or on one, in processes of their own: python rank_cases.py OUT CASES.json

Writes OUT/results.json: for each case the losses at every evaluation, and how it ended.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ngpt.config.base import build, flatten, override
from ngpt.distributed.join import joined_ranks
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train

ROOT = Path(__file__).parents[2]
SMALL = {"steps": 6, "batch_size": 8, "eval_every": 3, "eval_tokens": 512}
Cases = Mapping[str, Mapping[str, Any]]


def main(out: Path, cases: Cases) -> None:
    torch.set_num_threads(1)
    found = {}
    with joined_ranks() as ranks:
        for name, settings in cases.items():
            run = train(resolved(build(TrainConfig, settings)), out / name, ranks=ranks)
            losses: list[float | None] = []
            try:
                while True:
                    losses.append(next(run)["val_loss"])
            except StopIteration as end:
                found[name] = {"losses": losses, "train_loss": end.value.metrics["train_loss"]}
        if ranks.is_first:
            (out / "results.json").write_text(json.dumps(found))


def train_cases(
    tiny: TrainConfig, out: Path, cases: Cases, *, ranks: int, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Trains `tiny` with the settings of each case on `ranks` ranks, which torchrun starts; returns results by name."""
    out.mkdir(parents=True)
    configs = {name: override(tiny, SMALL | dict(settings) | dict(changes)) for name, settings in cases.items()}
    (out / "cases.json").write_text(json.dumps({name: flatten(config) for name, config in configs.items()}))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(start if ranks > 1 else [sys.executable]), __file__, str(out), str(out / "cases.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((out / "results.json").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
