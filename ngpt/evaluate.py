"""Loss of a trained model on a text: nats per token, bits per byte, and perplexity per token, word and byte.

python -m ngpt.evaluate runs/first
python -m ngpt.evaluate runs/first --corpus book.txt --stride 64
python -m ngpt.evaluate runs/first --corpus articles.parquet --by-document
python -m ngpt.evaluate runs/first --set block_size=512 rope_scaling=yarn rope_factor=4 --corpus shakespeare
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.data.counts import ScoredCounts
from ngpt.data.passages import ALL, TextPassages
from ngpt.data.text.progress import Log, Meter, TerminalLog, silent
from ngpt.data.windows import Window, take, windows
from ngpt.model.gpt import GPT
from ngpt.runs.eval_text import Text, data_config, open_text
from ngpt.system.cli import ArgumentParser, exit_process, print_line, run_command, use_plugins, whole_number
from ngpt.system.device import mixed_precision
from ngpt.system.timing import print_metrics, slow_dtype_note
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.evaluation import sum_losses
from ngpt.training.load_model import add_model_arguments, build_model, find_checkpoint, parse_model_changes
from ngpt.training.tracker import finite_or_none

SPLITS = ("train", "val", "test", ALL)
MAX_EVAL_TOKENS = 10**9
MOST_TOKENS = 16_384  # at once, unless training had more
LAYER_BYTES = 1 << 28  # memory for what one layer computes of them; without gradients, only one layer's is kept
LAYER_FLOATS = 20  # times n_embd, about, of a token
MAX_LOG = 700.0  # exp(710) overflows


def score(
    model: GPT, checkpoint: Checkpoint, text: Text, *, stride: int, dtype: str | None, log: Log = silent
) -> dict[str, Any]:
    """Returns the loss of a model on a text in the usual units, and describes what was scored with what.

    `val_loss` is in nats per token, `val_bpb` and `bits_per_byte` in bits per UTF-8 byte. `perplexity`,
    `word_perplexity` and `byte_perplexity` are exp(nats / tokens, words or bytes), as in lm-evaluation-harness. Those
    of bytes and words are None without the tokenizer, or if it changes the text. Raises ConfigError without a token.
    """
    identity, block_size = checkpoint.identity, model.cfg.block_size
    device = next(model.parameters()).device
    dtype = dtype or str(identity.get("dtype", "float32"))
    if note := slow_dtype_note(device, dtype, advice="choose --dtype float32"):
        print_line(note)
    vocab_size = model.wte.num_embeddings
    counts = ScoredCounts(vocab_size=vocab_size, token_bytes=text.token_bytes, tokenizer=text.tokenizer)
    passages = text.passages if text.limit is None else take(text.passages, text.limit)
    cut = _counted(windows(passages, block_size=block_size, stride=stride), counts)
    nats, done, meter = 0.0, 0, Meter(log, "scoring")
    for n_tokens, loss in sum_losses(
        model, cut, rows=_rows(model, checkpoint), autocast=mixed_precision(device, dtype)
    ):
        nats, done = nats + loss, done + n_tokens
        meter.update(done, "tokens", fraction=done / text.limit if text.limit else text.passages.fraction())
    if not done:
        raise ConfigError(f"nothing to score in {text.describe()}: the first token of a text has none before it")
    return _units(nats, counts, text) | {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "block_size": block_size,
        "rope_scaling": model.cfg.rope_scaling,
        "rope_factor": model.cfg.rope_factor,
        "trained_on_corpus": text.trained_on,
        "split": text.split,
        "stride": stride,
        "by_document": text.by_document,
        "eval_tokens": counts.tokens,
        "eval_bytes": counts.bytes if text.passages.lossless else None,
        "eval_words": counts.words if text.passages.lossless else None,
        "eval_documents": _documents(counts, text),
        "eval_sha256": counts.sha256,
    }


def _rows(model: GPT, checkpoint: Checkpoint) -> int:
    """How many windows to score at once: as many as in training, which fit into memory, or more if they are small."""
    identity, block_size = checkpoint.identity, model.cfg.block_size
    # A converted model has no training run.
    trained = (identity.get("micro_batch_size") or identity.get("batch_size") or 1) * identity["model.block_size"]
    small = min(MOST_TOKENS, LAYER_BYTES // (LAYER_FLOATS * 4 * model.cfg.n_embd))
    return max(1, trained // block_size, small // block_size)


def _counted(cut: Iterable[Window], counts: ScoredCounts) -> Iterator[Window]:
    for window in cut:
        counts.add(window)
        yield window


def _units(nats: float, counts: ScoredCounts, text: Text) -> dict[str, float | None]:
    """The loss per token, byte and word, finite or None."""
    if not text.passages.lossless:
        print_line(f"the tokenizer changes {text.name}: no bits per byte, no perplexity of words")

    def per(count: int | None) -> float | None:
        return finite_or_none(nats / count) if count and text.passages.lossless else None

    def perplexity(loss: float | None) -> float | None:
        return None if loss is None or loss > MAX_LOG else math.exp(loss)

    loss, by_byte = finite_or_none(nats / counts.tokens), per(counts.bytes)
    bits = None if by_byte is None else by_byte / math.log(2)
    return {
        "val_loss": loss,
        "val_bpb": bits,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits,
        "byte_perplexity": perplexity(by_byte),
        "word_perplexity": perplexity(per(counts.words)),
    }


def _documents(counts: ScoredCounts, text: Text) -> int | None:
    """How many documents were scored; None if they are not marked."""
    if text.by_document:
        return counts.documents
    if isinstance(text.passages, TextPassages):
        return text.passages.documents
    return counts.documents if text.tokenizer and text.tokenizer.document_separator is not None else None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    about = "The loss of a trained model on a text: bits per byte, and perplexity per token, word and byte."
    parser = ArgumentParser(prog="python -m ngpt.evaluate", description=about)
    add_model_arguments(parser)
    parser.add_argument("--corpus", metavar="C", help="as for python -m ngpt.data; default: what it was trained on")
    parser.add_argument("--tokenizer", metavar="T", help="of the corpus, if it is not the checkpoint's own")
    parser.add_argument("--from", dest="source", metavar="PATH", help="local copy of a corpus that is downloaded")
    parser.add_argument("--text-column", metavar="C", help="column of the documents in the corpus (default text)")
    widths = "width of token files without a header, such as uint32"
    parser.add_argument("--token-dtype", metavar="D", help=widths)
    splits = "what to score: of the corpus it was trained on, val (default) is what its training evaluated; another "
    splits += "corpus is scored whole (all), or its val split if files are named for one. Nothing is trained on test"
    parser.add_argument("--split", choices=SPLITS, help=splits)
    stride = "tokens from one window to the next (default block_size): with less, each token has at least block_size "
    stride += "minus N tokens of context, and is still scored once"
    parser.add_argument("--stride", type=whole_number(1, MAX_EVAL_TOKENS), metavar="N", help=stride)
    alone = "score each document from its own start, without context from another; of a text, each file"
    parser.add_argument("--by-document", action="store_true", help=alone)
    first = "score the first N tokens only; default: all; of the val split that its training evaluated, as many as then"
    parser.add_argument("--eval-tokens", type=_eval_tokens, metavar="N", help=first)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options), path=options.checkpoint)


def _eval_tokens(text: str) -> int | str:
    try:
        return ALL if text == ALL else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or {ALL}, got {text!r}") from None


def _evaluate(options: argparse.Namespace) -> int:
    if isinstance(options.eval_tokens, int) and not 1 <= options.eval_tokens <= MAX_EVAL_TOKENS:
        limits = f"at least 1 and at most {MAX_EVAL_TOKENS:,}"
        raise ConfigError(f"--eval-tokens must be {limits}, got {options.eval_tokens}; {ALL} is all there is")
    use_plugins(options.plugin)
    checkpoint = find_checkpoint(options.checkpoint, best=options.best)
    model = build_model(checkpoint, device=options.device, **parse_model_changes(options.set))
    block_size = model.cfg.block_size
    if (stride := options.stride or block_size) > block_size:
        raise ConfigError(f"--stride must be at most the block_size of {block_size:,}, got {stride:,}")
    given = {name: getattr(options, name) for name in ("corpus", "source", "tokenizer", "text_column", "token_dtype")}
    config, is_own = data_config(checkpoint, **given)
    part = {"split": options.split, "by_document": options.by_document, "eval_tokens": options.eval_tokens}
    how: dict[str, Any] = {"tokenizer": options.tokenizer, "block_size": block_size}
    log = TerminalLog(quiet=options.json)
    text = open_text(config, checkpoint, is_own=is_own, log=log, **part, **how)
    if not any(given.values()) and not text.trained_on and "data.fingerprint" in checkpoint.identity:
        print_line(f"warning: {config.corpus} has changed since the training: this is another text than then")
    metrics = score(model, checkpoint, text, stride=stride, dtype=options.dtype, log=log)
    counted = [(metrics[f"eval_{unit}"], unit) for unit in ("tokens", "bytes", "words", "documents")]
    amount = ", ".join(f"{count:,} {unit[:-1] if count == 1 else unit}" for count, unit in counted if count is not None)
    print_line(f"scored {text.describe()}: {amount}")
    print_metrics(metrics, as_json=options.json, width=18, digits=6)
    return 0


if __name__ == "__main__":
    exit_process(main())
