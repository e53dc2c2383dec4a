"""The folder of a single run: its settings, and the checkpoint that it continues from.

runs/first/   config.json  metrics.jsonl  checkpoints/  run.lock
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ngpt.config.base import ConfigError, build, flatten, settings
from ngpt.data.dataset import fingerprint
from ngpt.optim.schedule import lr_multiplier
from ngpt.plugins.records import remember_plugins, used_plugins
from ngpt.system.atomic_files import commit_folder, make_folder, write_json
from ngpt.training.checkpoint import (
    Checkpoint,
    check_has_state,
    check_identity,
    checkpoint_folders,
    newest_checkpoint,
)
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import find_checkpoint
from ngpt.training.run import HISTORY, identity, refuse_earlier_run

CONFIG_FILE = "config.json"
PLUGINS = "plugins"  # beside the settings: the records of the plug-ins that the run uses
CHECKPOINTS = "checkpoints"
DEFAULT_OUT = Path("runs/default")
LATEST, BEST = "latest", "best"


def locate(resume: str | None, out: Path | None) -> tuple[Path, Checkpoint | None]:
    """Returns the folder of a run, and the checkpoint that it continues from; None if it starts at step 0.

    Raises ConfigError if there is no intact checkpoint, or the folder belongs to a campaign.

    Args:
        resume: `latest` or `best`, in `out`; or the folder of a run or checkpoint, where the run goes on if `out` is
            None.
    """
    checkpoint, folder = None, out or DEFAULT_OUT
    if resume is None:
        refuse_earlier_run(folder)
    elif resume in (LATEST, BEST):
        if resume == BEST or checkpoint_folders(folder / CHECKPOINTS):
            checkpoint = find_checkpoint(folder, best=resume == BEST)
    elif out is None and (Path(resume) / CONFIG_FILE).is_file() and not checkpoint_folders(Path(resume) / CHECKPOINTS):
        folder = Path(resume)  # a run that was stopped before its first checkpoint
    else:
        checkpoint = find_checkpoint(Path(resume))
        if out is None and (folder := run_folder(checkpoint)) is None:
            raise ConfigError(f"{checkpoint.path} is not in the folder of a run: say with --out where to continue")
    if (folder.absolute().parent.parent / "journal.jsonl").is_file() and folder.absolute().parent.name == "trials":
        raise ConfigError(f"{folder} is a trial of a campaign, which trains it itself: choose another --out")
    return folder, checkpoint


def saved_config(folder: Path, checkpoint: Checkpoint | None) -> TrainConfig | None:
    """Returns the settings of the run that saved a checkpoint, or of the one in `folder`; None if there are none.

    They are in `config.json`. A run of an older version has no such file; its checkpoints have all settings but those
    that change no result, which get their defaults.
    """
    path = ((run_folder(checkpoint) or folder) if checkpoint else folder) / CONFIG_FILE
    if path.is_file():
        return read_config_file(path)
    if checkpoint is None:
        return None
    saved = {f"data.{name}": value for name, value in checkpoint.data.get("settings", {}).items()}
    values = {name: value for name, value in (checkpoint.identity | saved).items() if name in settings(TrainConfig)}
    return build(TrainConfig, values)


def read_config_file(path: Path) -> TrainConfig:
    """Reads the settings of a run from its `config.json`; ConfigError names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(f"{path} does not hold the settings of a run: {error}") from None
    remember_plugins(values.pop(PLUGINS, None))
    try:
        return build(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_config_file(folder: Path, config: TrainConfig) -> None:
    """Writes `config.json`, so that the run resumes without its settings, and says which plug-ins it needs."""
    values, used = flatten(config), used_plugins(flatten(config))
    write_json(folder / CONFIG_FILE, values | ({PLUGINS: used} if used else {}))


def continue_from(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Makes a checkpoint the newest of the run in `folder`, and returns what there is to say about it.

    A checkpoint of another folder is copied with the metrics up to its step. Newer checkpoints of the same folder
    keep their files under another name, since the run takes their steps again. The caller holds the lock.
    """
    root = folder / CHECKPOINTS
    if checkpoint.path.resolve().parent != root.resolve():
        _copy(checkpoint, folder)
        return [f"continuing {checkpoint.path} in {folder}"]
    newest_checkpoint(root)  # sets damaged ones aside
    newer = [path for path in checkpoint_folders(root) if int(path.name.removeprefix("step_")) > checkpoint.step]
    for path in newer:
        path.rename(root / f"superseded-{path.name}-{uuid.uuid4().hex[:6]}")
    return [f"{root}: newer checkpoints are kept as superseded-{path.name}-..." for path in newer]


def check_continues(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raises ConfigError if a run with these settings cannot continue from a checkpoint; only `steps` may differ."""
    check_has_state(checkpoint)
    check_identity(checkpoint, identity(config, fingerprint(config.data)), leave_out=HISTORY)
    if config.steps != checkpoint.identity["steps"] and config.steps <= checkpoint.step:
        trained = f"{checkpoint.path} has trained {checkpoint.step} steps already"
        raise ConfigError(f"{trained}: give more than that, got steps={config.steps}")


def start_lines(config: TrainConfig, folder: Path, checkpoint: Checkpoint | None) -> Iterator[str]:
    """Yields where a resumed run goes on, and what other steps mean for its learning rate."""
    if checkpoint is None:
        yield f"{folder} has no checkpoint yet: starting at step 0"
        return
    step, planned = checkpoint.step, checkpoint.identity.get("steps", config.steps)
    yield f"continuing {folder} at step {step} of {config.steps}"
    if config.steps != planned:
        before, after = (lr_multiplier(step, steps, config.schedule) for steps in (planned, config.steps))
        text = f"at step {step} the learning rate goes from {before:.0%} to {after:.0%} of its peak"
        name = config.schedule.name
        yield f"{config.steps} steps instead of {planned}: the {name} schedule is stretched to them, so {text}"


def run_folder(checkpoint: Checkpoint) -> Path | None:
    """Returns the folder of the run that a checkpoint is in; None if it is elsewhere."""
    root = checkpoint.path.parent
    return root.parent if root.name == CHECKPOINTS else None


def _copy(checkpoint: Checkpoint, folder: Path) -> None:
    root, source = folder / CHECKPOINTS, run_folder(checkpoint)
    refuse_earlier_run(folder)
    make_folder(root)
    temp = root / f".tmp-{uuid.uuid4().hex}"
    shutil.copytree(checkpoint.path, temp)
    commit_folder(temp, root / checkpoint.path.name)
    for name in ("metrics.jsonl", "histograms.jsonl"):  # later rows are dropped when the run starts
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
