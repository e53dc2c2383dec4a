"""Validation loss of a trained model, in nats per token and in bits per byte of the text.

python -m ngpt.evaluate runs/first
python -m ngpt.evaluate runs/first --set block_size=512 rope_scaling=yarn rope_factor=4 --corpus shakespeare
"""

import argparse
import math
import os
import sys
from typing import Any

from ngpt.config.base import ConfigError, build
from ngpt.data.dataset import DataConfig, Dataset, open_dataset
from ngpt.data.loader import eval_set
from ngpt.data.sources import CORPORA
from ngpt.model.gpt import GPT
from ngpt.system.cli import ArgumentParser, print_line, run_command
from ngpt.system.device import mixed_precision
from ngpt.system.timing import print_metrics, slow_dtype_note
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.evaluation import evaluate
from ngpt.training.load_model import (
    add_model_arguments,
    build_model,
    find_checkpoint,
    parse_model_changes,
    saved_tokenizer,
    tokenizer_origin,
)
from ngpt.training.tracker import finite_or_none

SPLITS = ("train", "val", "test")
MAX_EVAL_TOKENS = 10**9
EVAL_TOKENS = 16_384  # if neither the command line nor the checkpoint sets a number


def evaluate_checkpoint(
    model: GPT,
    checkpoint: Checkpoint,
    dataset: Dataset,
    *,
    eval_tokens: int | None,
    dtype: str | None,
    split: str = "val",
) -> dict[str, Any]:
    """Returns `val_loss`, `val_bpb` and `perplexity` (per token) of a split, and describes model and data behind them.

    `eval_tokens` and `dtype` default to those of the training run. Raises ConfigError if the corpus was tokenized with
    another tokenizer than the model's.
    """
    corpus_tokenizer = dataset.manifest["tokenizer"]
    hashes = {tokenizer_origin(checkpoint).sha256, corpus_tokenizer["sha256"]} - {None}
    if dataset.vocab_size > model.wte.num_embeddings or len(hashes) > 1:
        raise ConfigError(
            f"{dataset.folder} was tokenized with another {corpus_tokenizer['spec']} than {checkpoint.path} was "
            "trained with; leave out --tokenizer, or prepare the corpus with the tokenizer in the checkpoint"
        )
    identity, block_size = checkpoint.identity, model.cfg.block_size
    # As many tokens at once as in training, which fit into memory. A converted model has no training run.
    trained_rows = identity.get("micro_batch_size") or identity.get("batch_size") or 1
    batch_size = max(1, trained_rows * identity["model.block_size"] // block_size)
    tokens = eval_tokens or identity.get("eval_tokens") or EVAL_TOKENS
    data = eval_set(dataset, tokens=tokens, batch_size=batch_size, block_size=block_size, split=split)
    device = next(model.parameters()).device
    dtype = dtype or str(identity.get("dtype", "float32"))
    if note := slow_dtype_note(device, dtype, advice="choose --dtype float32"):
        print_line(note)
    autocast = mixed_precision(device, dtype)
    scores = {name: finite_or_none(value) for name, value in evaluate(model, data, autocast=autocast).items()}
    loss = scores["val_loss"]
    return scores | {
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,  # exp(710) overflows
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "block_size": block_size,
        "rope_scaling": model.cfg.rope_scaling,
        "rope_factor": model.cfg.rope_factor,
        "trained_on_corpus": identity.get("data.fingerprint") == dataset.manifest["fingerprint"],
        "split": split,
        "eval_tokens": data.n_tokens,
        "eval_sha256": data.sha256,
    }


def data_config(checkpoint: Checkpoint, *, corpus: str | None, source: str | None, tokenizer: str | None) -> DataConfig:
    """Returns the config of `corpus` with the model's tokenizer. The default is the corpus of the training run."""
    settings = dict(checkpoint.data.get("settings") or {})
    if corpus is None and not settings:
        raise ConfigError(f"{checkpoint.path} does not say what it was trained on: name it with --corpus")
    if corpus is not None and not (settings and is_same_corpus(corpus, settings["corpus"])):
        spec = saved_tokenizer(checkpoint) or tokenizer_origin(checkpoint).spec
        settings = {"corpus": corpus} | ({"tokenizer": spec} if spec else {})
    overrides = {"path": source, "tokenizer": tokenizer}
    return build(DataConfig, settings | {name: value for name, value in overrides.items() if value is not None})


def is_same_corpus(name: str, other: str) -> bool:
    """Whether two names mean the same corpus. Paths are resolved first; names in `CORPORA` are compared literally."""
    if CORPORA.keys() & {name, other}:
        return name == other
    return os.path.realpath(os.path.expanduser(name)) == os.path.realpath(os.path.expanduser(other))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    about = "The validation loss of a trained model, also on a longer context."
    parser = ArgumentParser(prog="python -m ngpt.evaluate", description=about)
    add_model_arguments(parser)
    parser.add_argument("--corpus", metavar="C", help="as for python -m ngpt.data; default: what it was trained on")
    parser.add_argument("--tokenizer", metavar="T", help="of the corpus, if it is not the checkpoint's own")
    parser.add_argument("--from", dest="source", metavar="PATH", help="local copy of a corpus that is downloaded")
    splits = "of the corpus (default val); test is what files are named for, nothing is trained on it"
    parser.add_argument("--split", choices=SPLITS, default="val", help=splits)
    parser.add_argument("--eval-tokens", type=int, metavar="N", help="of the split; default: as in training")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options), path=options.checkpoint)


def _evaluate(options: argparse.Namespace) -> int:
    if options.eval_tokens is not None and not 1 <= options.eval_tokens <= MAX_EVAL_TOKENS:
        limits = f"at least 1 and at most {MAX_EVAL_TOKENS:,}"
        raise ConfigError(f"--eval-tokens must be {limits}, got {options.eval_tokens}")
    checkpoint = find_checkpoint(options.checkpoint, best=options.best)
    model = build_model(checkpoint, device=options.device, **parse_model_changes(options.set))
    config = data_config(checkpoint, corpus=options.corpus, source=options.source, tokenizer=options.tokenizer)
    dataset = open_dataset(config)
    how: dict[str, Any] = {"eval_tokens": options.eval_tokens, "dtype": options.dtype, "split": options.split}
    metrics = evaluate_checkpoint(model, checkpoint, dataset, **how)
    print_metrics(metrics, as_json=options.json, width=18, digits=6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
