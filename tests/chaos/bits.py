"""F15, F24: flips single bits in checkpoints and shards; each must be detected."""

import random
from collections.abc import Callable
from pathlib import Path

from ngpt.data.dataset import open_dataset
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.training.checkpoint import checkpoint_folders, verify_checkpoint
from tests.chaos.outcome import Options, Outcome
from tests.chaos.world import world
from tune.campaign import load_campaign


def run(options: Options) -> Outcome:
    """Flips `options.bits` bits in checkpoints and as many in shards, one at a time."""
    outcome = Outcome()
    with world(keep=options.case is not None) as made:
        folders = [
            path for trial in made.reference.glob("trials/*") for path in checkpoint_folders(trial / "checkpoints")
        ]
        files = sorted(file for folder in folders for file in folder.iterdir())
        flip(outcome, "checkpoint", files, options, lambda file: verify_checkpoint(file.parent))
        data = load_campaign(made.file).base.data
        dataset = open_dataset(data)
        names = [shard["name"] for split in dataset.manifest["splits"].values() for shard in split["shards"]]
        shards = [dataset.folder / name for name in names]
        flip(outcome, "shard", shards, options, lambda _: open_dataset(data, recheck=True))
    return outcome


def flip(outcome: Outcome, kind: str, files: list[Path], options: Options, check: Callable[[Path], object]) -> None:
    """Flips random bits, all equally likely; `check` must raise exactly while a file is damaged."""
    draw = random.Random(options.seed)
    contents = {file: file.read_bytes() for file in files}
    for file, content in contents.items():
        check(file)
        assert content, f"{file} is empty"
    for number in range(options.bits):
        file = draw.choices(files, weights=[len(contents[each]) for each in files])[0]
        at, bit = draw.randrange(len(contents[file])), draw.randrange(8)
        damaged = bytearray(contents[file])
        damaged[at] ^= 1 << bit
        if options.case in (None, f"{kind}@{number}"):
            outcome.add(f"{kind}@{number}", _unnoticed(file, bytes(damaged), check, f"bit {bit} of byte {at}"))
            outcome.count(f"{kind} bits")
            file.write_bytes(contents[file])
    for file in files:
        check(file)


def _unnoticed(file: Path, damaged: bytes, check: Callable[[Path], object], where: str) -> list[str]:
    file.write_bytes(damaged)
    try:
        check(file)
    except (ValueError, CorruptShardError):
        return []
    return [f"F15 {where} of {file.name} was flipped, and nothing detected it"]
