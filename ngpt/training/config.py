"""The settings of a training run, read from defaults, a YAML file and `name=value` assignments."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ngpt.config.base import (
    Config,
    ConfigError,
    added_setting,
    build,
    invalid_setting,
    one_of,
    override,
    runtime_setting,
)
from ngpt.config.overrides import located, named_settings
from ngpt.config.yaml_reader import parse_assignment, read_yaml
from ngpt.data.dataset import DataConfig, vocab_size
from ngpt.data.sources import CORPORA
from ngpt.data.tokens.tokenizer import with_path
from ngpt.distributed.strategies import DistributedConfig
from ngpt.model.config import Count, ModelConfig, Width
from ngpt.optim.optimizers import OptimConfig, incompatibility
from ngpt.optim.schedule import ScheduleConfig
from ngpt.system.device import DEVICES, DTYPES
from ngpt.trackers.config import TrackerConfig, absolute_address
from ngpt.training.checkpoint import CheckpointConfig
from ngpt.training.load_model import weights_digest

ON_OOM = ("split", "halve_batch", "fail")
MAX_TOKENS_PER_STEP = 2**30  # ten times the largest published batches
NONFINITE = ("fail", "skip", "rollback")
LOCATIONS = ("init_from",)  # settings that say where something is; another one holds the digest of it


class NonfiniteConfig(Config):
    """Policy for steps whose loss or gradient is not finite, which is never applied (ngpt/training/recovery.py)."""

    policy: Annotated[str, one_of(NONFINITE, "policy")] = added_setting("fail")
    """Loss or gradient not finite: `fail`, `skip` the step, or `rollback` to the last checkpoint."""
    max: Count = added_setting(10)
    """Skipped steps or rollbacks before the run counts as diverged."""


class TrainConfig(Config, frozen=True):
    """All settings of a run. Each section is defined in the file that implements it."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights and of the order of the data; a campaign sets it from `seeds:`."""
    init_from: str | None = added_setting(None)
    """Run, trial or checkpoint whose weights a new run starts from."""
    init_sha256: str | None = added_setting(None)
    """Digest of the weights of `init_from`; filled in, or given to insist on it."""
    steps: Count = 200
    """Optimizer updates."""
    batch_size: Width = 16
    """Sequences per optimizer update."""
    micro_batch_size: Width | None = None
    """Sequences in one pass (gradient accumulation); null: the whole batch."""
    project_every: Count = 1
    """Steps between projections of the weights onto the sphere."""
    eval_every: Count = 50
    """Steps between evaluations; the first and the last step are always evaluated."""
    eval_tokens: Count = 16_384
    """Validation tokens, from the start of the split, the same for every trial."""
    on_oom: Annotated[str, one_of(ON_OOM, "policy")] = added_setting("split", same_as_default=("fail",))
    """Out of memory: `split` the micro-batch, `halve_batch` (changes the result, as the report says), or `fail`."""
    dtype: Annotated[str, one_of(DTYPES, "dtype")] = "float32"
    """Precision of matrix products; weights and norms stay float32."""
    compile: bool = False
    """Whether torch.compile compiles blocks and loss; it takes half a minute, so it pays off in long runs."""
    activation_checkpointing: bool = runtime_setting(False)
    """Whether the backward pass computes each block again instead of keeping its activations: less memory, a third more
    computation, the same numbers."""
    device: Annotated[str, one_of(DEVICES, "device")] = runtime_setting("auto")
    """Where to train; auto: a GPU if there is one."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    nonfinite: NonfiniteConfig = NonfiniteConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    tracker: TrackerConfig = TrackerConfig()

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in a step. A run that halved its batch (`on_oom: halve_batch`) predicts fewer."""
        return self.batch_size * self.model.block_size

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            text = f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            raise invalid_setting(text, "micro_batch_size", "batch_size")
        if self.tokens_per_step > MAX_TOKENS_PER_STEP:
            given = f"batch_size {self.batch_size} with block_size {self.model.block_size}"
            limit = f"at most {MAX_TOKENS_PER_STEP:,} are possible"
            text = f"{given} makes {self.tokens_per_step:,} tokens per step; {limit}"
            raise invalid_setting(text, "batch_size", "model.block_size")
        carried = self.model.value_residual or self.model.norm_mode != "baseline"
        if self.compile and self.activation_checkpointing and carried:
            name = "value_residual" if self.model.value_residual else f"norm_mode {self.model.norm_mode}"
            text = f"compile with activation_checkpointing is not possible with {name}, which blocks hand to later ones"
            raise invalid_setting(text, "activation_checkpointing", "compile")
        if reason := incompatibility(self.optim, self.model):
            raise invalid_setting(reason, "optim.name", "model.residual")
        return self


def resolved(config: TrainConfig) -> TrainConfig:
    """Fills in what follows from data and files: `model.vocab_size` from the tokenizer, `init_sha256` from the weights.

    Raises ConfigError if the configured vocabulary is too small, or the weights do not exist.
    """
    digest = config.init_from and (config.init_sha256 or weights_digest(config.init_from))
    if digest != config.init_sha256:
        config = config.model_copy(update={"init_sha256": digest})
    needed = vocab_size(config.data)
    configured = config.model.vocab_size
    if configured is not None and configured < needed:
        raise ConfigError(f"model.vocab_size {configured} is smaller than the {needed} tokens of the data")
    return override(config, {"model.vocab_size": needed}) if configured is None else config


def rollback_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that determine where a run can roll back to, by dotted name; empty if it never does."""
    return {"checkpoint.every": config.checkpoint.every} if config.nonfinite.policy == "rollback" else {}


def read_config(path: Path | None, assignments: list[str], *, start: TrainConfig | None = None) -> TrainConfig:
    """Reads defaults, overridden by a YAML file and then by `name=value` assignments. ConfigError lists all errors.

    Without a file, `start` replaces the defaults.
    """
    config = start or TrainConfig()
    if path is not None:
        document = read_yaml(path)
        given, problems = named_settings(TrainConfig, document.data, folder=path.parent)
        if problems:
            raise ConfigError("\n".join(map(document.describe, problems)))
        try:
            config = build(TrainConfig, {name: value for name, (value, _) in given.items()})
        except ConfigError as error:
            problems = [located(problem, given) for problem in error.problems]
            raise ConfigError("\n".join(map(document.describe, problems))) from None
    given, problems = named_settings(TrainConfig, dict(map(parse_assignment, assignments)))
    if problems:
        raise ConfigError(problems)
    return override(config, {name: value for name, (value, _) in given.items()})


def with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the paths among settings absolute: Ray changes the working directory, and a run may resume in another.

    Other values, such as the name of a corpus or `gpt2`, are unchanged.
    """
    return {name: PATHS[name](value) if name in PATHS and value else value for name, value in values.items()}


def _corpus(value: Any) -> Any:
    """A name in CORPORA takes precedence over a folder; a value that is neither is unchanged, and rejected later."""
    if not isinstance(value, str) or value in CORPORA:
        return value
    return _absolute(value) if value.startswith("~") or os.path.exists(value) else value


def _tokenizer(value: Any) -> Any:
    try:
        return with_path(value, Path.absolute) if isinstance(value, str) else value
    except ConfigError:
        return value


def _absolute(value: Any) -> Any:
    # Path.expanduser would raise for an unknown user.
    return str(Path(os.path.expanduser(value)).absolute()) if isinstance(value, str) else value


PATHS: dict[str, Callable[[Any], Any]] = {
    "data.corpus": _corpus,
    "data.path": _absolute,
    "data.tokenizer": _tokenizer,
    "init_from": _absolute,
    "tracker.mlflow": absolute_address,
}
