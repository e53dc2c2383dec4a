"""Text from a checkpoint.

python -m ngpt.generate runs/first --prompt "The file is" --temperature 0.8 --top-p 0.9
python -m ngpt.generate results/quickstart/trials/ID --prompt-file - < draft.txt

The continuation goes to stdout as it comes, a whole character at a time; what it cost goes to stderr. Several prompts
or samples are computed together and shown one after the other, each below a line with its number.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ngpt.config.base import Config, ConfigError, build
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.model.gpt import GPT, Count, KVCache
from ngpt.system.device import mixed_precision
from ngpt.training.load_model import LoadedModel, add_model_arguments, load_model, parse_model_changes

REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are not UTF-8, or not yet
EXIT_USAGE = 2
EXIT_IO = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 130


class Sampling(Config):
    """How the next token is drawn, see `probabilities`."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) that the next token is drawn from, for logits (B, V); at temperature 0 the best has all.

    First the temperature, then the `top_k` most probable tokens, then of these the nucleus: the fewest whose mass
    reaches `top_p`, at least one (Holtzman et al., arXiv 1904.09751). The others get 0; of equals the first comes
    first.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The largest becomes 0 before the division, so that no small temperature makes it infinite.
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, dim=-1)
    if sampling.top_k is None and sampling.top_p in (None, 1):
        return p
    p, order = p.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        p[:, sampling.top_k :] = 0
        p /= p.sum(-1, keepdim=True)
    if sampling.top_p is not None:
        p = p.where(p.cumsum(-1) - p < sampling.top_p, 0)
        p /= p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, p)


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) int64, `max_tokens` times.

    Of a prompt that is too long the newest block_size tokens are read. Once that many are there the window slides: its
    newest half is read in again and the older half forgotten, with a cache or without. Single tokens cannot be dropped
    from a cache, because what it holds of the newer ones has seen the older ones.

    Args:
        model: in evaluation mode.
        idx: the prompts, (B, T) int64 with T >= 1, on the model's device.
        temperature, top_k, top_p: see `probabilities`.
        generator: draws the tokens; one of the CPU draws alike on every device.
        cache: whether keys and values are kept; without, every token computes the whole window again.
        vocab_size: ids from here on are never drawn: the tokenizer's size, where the model's is larger.

    Raises:
        ConfigError: a negative temperature, no token left to draw from.
    """
    sampling = build(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
    size = model.cfg.block_size
    window, new, kept = idx[:, -size:], idx, None
    for _ in range(max_tokens):
        if window.shape[1] > size:
            window, kept = window[:, -max(1, size // 2) :], None
        if kept is None:
            kept, new = KVCache(model.cfg, len(idx), device=idx.device) if cache else None, window
        x = model.features(new, kept)[:, -1:]  # of a whole prompt the head reads the last position only
        p = probabilities(model.logits(x)[:, -1, :vocab_size], sampling)
        drawn = torch.multinomial(p if generator is None else p.to(generator.device), 1, generator=generator)
        new = drawn.to(idx.device)
        yield new[:, 0]
        window = torch.cat([window, new], dim=1)


class TextStream:
    """Turns tokens into text as they come: a character whose bytes are spread over several tokens waits for the last.

    Some tokenizers treat the start of a text differently, so new tokens are decoded behind those that were shown last.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._decode = tokenizer.decode
        self._shown, self._waiting = prompt[-1:], list[int]()

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is not whole."""
        self._waiting.append(token)
        text = self._decode([*self._shown, *self._waiting])
        return "" if text.endswith(REPLACEMENT) else self._take(text)

    def close(self) -> str:
        """What is left at the end; bytes that never became a character are shown as U+FFFD."""
        return self._take(self._decode([*self._shown, *self._waiting])) if self._waiting else ""

    def _take(self, text: str) -> str:
        before = self._decode(self._shown)
        self._shown, self._waiting = self._waiting, []
        return text[len(before) :]


class Row:
    """One continuation: text that nobody has seen yet, and whether there will be more."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, title: str) -> None:
        self.prompt, self.title = prompt, title
        self.unseen, self.ended = "", False
        self._stream, self._end = TextStream(tokenizer, prompt), tokenizer.document_mark

    def add(self, token: int) -> None:
        """Takes one more token; the document mark ends the text and what comes after it does not count."""
        if token == self._end:
            self.end()
        elif not self.ended:
            self.unseen += self._stream.add(token)

    def end(self) -> None:
        """No more tokens."""
        if not self.ended:
            self.unseen, self.ended = self.unseen + self._stream.close(), True


class Screen:
    """Shows rows on stdout one after the other: the first as it grows, each next one once those before it are done."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows, self._headed = list(rows), len(rows) > 1
        self._open_next()

    def refresh(self) -> None:
        """Writes what is new of the row that is being shown, and of those whose turn has come."""
        while self._rows:
            row = self._rows[0]
            text, row.unseen = row.unseen, ""
            print(text, end="\n" if row.ended else "", flush=True)
            if not row.ended:
                return
            del self._rows[0]
            self._open_next()

    def _open_next(self) -> None:
        if self._headed and self._rows:
            print(self._rows[0].title)


def run(loaded: LoadedModel, options: argparse.Namespace) -> int:
    """Continues every prompt as the command line says, on stdout; returns how many tokens were computed.

    Prompts of one length are one batch: exact, and without padding.
    """
    model, tokenizer, checkpoint = loaded
    if tokenizer is None:
        raise ConfigError(f"{checkpoint.path} has no tokenizer with it: name it with --tokenizer")
    prompts = [start_of(text, tokenizer) for text in read_prompts(options)]
    rows = [
        Row(prompt, tokenizer, f"--- prompt {p} of {len(prompts)}, sample {s} of {options.samples}")
        for p, prompt in enumerate(prompts, start=1)
        for s in range(1, options.samples + 1)
    ]
    device = next(model.parameters()).device
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    screen, count = Screen(rows), 0
    for _, group in groupby(sorted(rows, key=lambda row: len(row.prompt)), key=lambda row: len(row.prompt)):
        batch = list(group)
        tokens = generate(
            model,
            torch.tensor([row.prompt for row in batch], device=device),
            options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
            cache=not options.no_cache,
            vocab_size=tokenizer.vocab_size,
        )
        with mixed_precision(device, options.dtype or checkpoint.identity.get("dtype", "float32")):
            for drawn in tokens:
                for row, token in zip(batch, drawn.tolist(), strict=True):
                    row.add(token)
                screen.refresh()
                count += len(batch)
                if all(row.ended for row in batch):
                    break
        for row in batch:
            row.end()
        screen.refresh()
    return count


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then that of the file; none is the same as an empty one.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
    """
    prompts = list(options.prompt)
    if (source := options.prompt_file) is not None:
        try:
            data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
            prompts.append(data.decode())
        except FileNotFoundError:
            raise ConfigError(f"no such file: {source}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return prompts or [""]


def start_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt; for an empty one the document mark, or a line end where the tokenizer has none.

    Raises:
        ConfigError: the text cannot be encoded, or stands for no token.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes on the command line that are not UTF-8
        raise ConfigError(f"the prompt {text!r} is not UTF-8 text") from None
    if not text and tokenizer.document_mark is not None:
        return [tokenizer.document_mark]
    ids = np.asarray(tokenizer.encode(text or "\n")).tolist()
    if not ids:
        raise ConfigError(f"{tokenizer.name} has no tokens for the prompt {text!r}: give another")
    return ids


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        build(Sampling, {name: getattr(options, name) for name in Sampling.model_fields})
        loaded = load_model(
            options.checkpoint,
            best=options.best,
            tokenizer=options.tokenizer,
            device=options.device,
            **parse_model_changes(options.set),
        )
        start = time.perf_counter()
        count = run(loaded, options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:  # whoever reads, such as head, has enough; the interpreter would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{error.filename or options.checkpoint}: {error.strerror or error}", file=sys.stderr)
        return EXIT_IO
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ngpt.generate", description="Continue text with a trained model.")
    add_model_arguments(parser)
    tokenizers = "PATH.model, gpt2 or gpt2:DIR, where the checkpoint does not have its own"
    parser.add_argument("--tokenizer", metavar="SPEC", help=tokenizers)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--prompt-file", metavar="FILE", help="the same from a file, - is stdin")
    parser.add_argument("--max-tokens", type=_at_least_one, default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens whose mass reaches P")
    parser.add_argument("--seed", type=_seed, metavar="S", help="the same seed gives the same text")
    parser.add_argument("--samples", type=_at_least_one, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument("--no-cache", action="store_true", help="compute keys and values again for every token")
    return parser


def _at_least_one(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
