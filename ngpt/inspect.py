"""Shows the shape, vector lengths, time and statistics of each intermediate result of a pass on a real batch.

python -m ngpt.inspect --set residual=add_normalize alpha=0.15 --backward
python -m ngpt.inspect --checkpoint runs/first
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, build, flatten, override
from ngpt.config.overrides import named_settings
from ngpt.config.visible import visible
from ngpt.config.yaml_reader import parse_assignment
from ngpt.data.dataset import open_dataset
from ngpt.model.config import ModelConfig
from ngpt.model.flops import flops_per_token, matrix_params
from ngpt.model.gpt import GPT
from ngpt.model.trace import Recorder, Stage, amplitude, record_stages
from ngpt.optim.optimizers import parameters_by_kind
from ngpt.system.cli import ArgumentParser, add_plugin_option, add_set_option, exit_process, run_command, use_plugins
from ngpt.system.device import mixed_precision, pick_device
from ngpt.training.config import TrainConfig, read_config, resolved
from ngpt.training.load_model import build_model, find_checkpoint, tokenizer_origin
from ngpt.training.loop import read_batch


@dataclass(frozen=True)
class Inspection:
    """Stages of a forward pass, gradients in backward order, and a summary of loss and cost."""

    forward: list[Stage]
    backward: list[Stage]
    summary: dict[str, Any]


def inspect_model(
    model: GPT, idx: Tensor, targets: Tensor, *, dtype: str = "float32", backward: bool = False
) -> Inspection:
    """Records one pass of `model` on idx and targets (B, T), after a warm-up pass.

    Leaves the model in evaluation mode and, with `backward`, with gradients of the mean loss.
    """
    model.eval()
    device = model.wte.weight.device
    recorder = Recorder(device, backward=backward)
    with mixed_precision(device, dtype), nullcontext() if backward else torch.no_grad():
        model(idx, targets)
        with record_stages(model, recorder):
            loss = model(idx, targets)
        recorder.record("loss", loss, lambda: {"ln_V": math.log(model.wte.num_embeddings)})
        with torch.no_grad():  # the fused loss never materializes all logits, so compute them separately
            logits = model.logits(recorder.stream)
        recorder.record("logits (apart)", logits, lambda: amplitude(logits))
    if backward:
        model.zero_grad(set_to_none=True)
        recorder.resume()
        loss.backward()
    return Inspection(recorder.stages, recorder.gradients, summary(model, float(loss.detach())))


def summary(model: GPT, loss: float) -> dict[str, Any]:
    """Returns loss, ln V, parameter counts, FLOPs per token and, after a backward pass, gradient norms by kind."""
    groups = parameters_by_kind(model)
    norms = {kind: [p.grad.norm() for p in members if p.grad is not None] for kind, members in groups.items()}
    return {
        "loss": loss,
        "ln_V": math.log(model.wte.num_embeddings),
        "n_params": sum(p.numel() for p in model.parameters()),
        **{f"n_params/{kind}": sum(p.numel() for p in members) for kind, members in groups.items()},
        "matrix_params_per_token": matrix_params(model.cfg),
        "flops_per_token": flops_per_token(model.cfg),
        **{f"grad_norm/{kind}": float(torch.stack(each).norm()) for kind, each in norms.items() if each},
    }


def inspect(config: TrainConfig, *, checkpoint: Path | None = None, backward: bool = False) -> Inspection:
    """Inspects the model of a config or checkpoint on the first training batch; ConfigError if the data do not fit."""
    config = resolved(config)
    device = pick_device(config.device)
    dataset = open_dataset(config.data)
    if checkpoint is None:
        model = GPT(config.model, seed=config.seed).to(device)
        model.prepare_step(0, config.steps, seed=config.seed)
    else:
        trained = find_checkpoint(checkpoint)
        tokenizer = dataset.manifest["tokenizer"]
        if len({tokenizer_origin(trained).sha256, tokenizer["sha256"]} - {None}) > 1:
            raise ConfigError(
                f"{dataset.folder} was tokenized with another {tokenizer['spec']} than {trained.path} was trained with;"
                " choose the corpus and its tokenizer with --set data.corpus=... tokenizer=..."
            )
        settings = flatten(config.model).items()
        # A checkpoint leaves out settings that are newer than it, and those of them that have their defaults.
        saved = {f"model.{name}": value for name, value in flatten(ModelConfig()).items()} | trained.identity
        changes = {name: value for name, value in settings if saved[f"model.{name}"] != value}
        model = build_model(trained, device=config.device, **changes)
    rows = config.micro_batch_size or config.batch_size
    batch = read_batch(config.model_copy(update={"batch_size": rows}), dataset, 0)
    idx, targets = (part.to(device) for part in batch)
    return inspect_model(model, idx, targets, dtype=config.dtype, backward=backward)


def checkpoint_config(path: Path, assignments: list[str]) -> TrainConfig:
    """Returns the settings of a checkpoint, overridden by `name=value`; ConfigError if it or its data are unknown."""
    checkpoint = find_checkpoint(path)
    named, problems = named_settings(TrainConfig, dict(map(parse_assignment, assignments)))
    if problems:
        raise ConfigError(problems)
    changes = {name: value for name, (value, _) in named.items()}
    settings = {name: value for name, value in checkpoint.identity.items() if not name.startswith("data.")}
    data = checkpoint.data.get("settings") or {}
    if not data and "data.corpus" not in changes:
        raise ConfigError(f"{checkpoint.path} does not say what it was trained on: name it with --set data.corpus=...")
    return override(build(TrainConfig, settings | {f"data.{name}": value for name, value in data.items()}), changes)


def table(stages: list[Stage]) -> str:
    """Formats one line per stage, at most 120 columns wide."""
    rows = [("stage", "shape", "length: mean min..max", "sphere", "type", "ms", "")]
    for stage in stages:
        mean, low, high = stage.length
        shape = "x".join(map(str, stage.shape)) or "1"
        length = f"{mean:8.3g} {low:.3g}..{high:.3g}"
        dtype = {"float32": "f32", "bfloat16": "bf16"}.get(stage.dtype, stage.dtype)
        rows.append((stage.name, shape, length, stage.sphere, dtype, f"{stage.ms:.2f}", _facts(stage.facts)))
    return "\n".join("{:22} {:13} {:27} {:6} {:4} {:>6}  {}".format(*row).rstrip() for row in rows)


def _facts(facts: dict[str, float]) -> str:
    """Formats each fact with its minimum and maximum, if any, as in `degrees 3.1 (2.2..4.1)`."""
    texts = []
    for name in (name for name in facts if not name.endswith(("_min", "_max"))):
        span = f" ({facts[f'{name}_min']:.2g}..{facts[f'{name}_max']:.2g})" if f"{name}_min" in facts else ""
        texts.append(f"{name} {facts[name]:.3g}{span}")
    return " ".join(texts)


def print_inspection(inspection: Inspection, *, as_json: bool) -> None:
    """Prints one JSON object, or tables followed by one line per summary value, to stdout."""
    if as_json:  # strict JSON has no NaN or infinity, so they become null
        print(json.dumps(json.loads(json.dumps(asdict(inspection)), parse_constant=lambda _: None)))
        return
    print(visible(table(inspection.forward), keep="\n"))
    if inspection.backward:
        print("\nbackward: the gradient of the loss for each stage, in the order computed")
        print(visible(table(inspection.backward), keep="\n"))
    print()
    for name, value in inspection.summary.items():
        print(visible(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value:,}"))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    about = "Each stage of one pass on real data: shapes, lengths, times."
    parser = ArgumentParser(prog="python -m ngpt.inspect", description=about)
    model_source = parser.add_mutually_exclusive_group()
    model_source.add_argument("--config", type=Path, help="YAML file of settings; shows the untrained model")
    trained = "a trained model: a checkpoint, run or trial"
    model_source.add_argument("--checkpoint", type=Path, metavar="PATH", help=trained)
    add_set_option(parser)
    add_plugin_option(parser)
    parser.add_argument("--backward", action="store_true", help="show the gradients too")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)

    def command() -> int:
        """Inspects the model that the options name, and prints what was found."""
        use_plugins(options.plugin)
        if options.checkpoint is None:
            config = read_config(options.config, options.set)
        else:
            config = checkpoint_config(options.checkpoint, options.set)
        result = inspect(config, checkpoint=options.checkpoint, backward=options.backward)
        print_inspection(result, as_json=options.json)
        return 0

    return run_command(command, path=options.checkpoint)


if __name__ == "__main__":
    exit_process(main())
