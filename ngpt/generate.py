"""Text from a checkpoint.

python -m ngpt.generate runs/first --prompt "The file is" --temperature 0.8 --top-p 0.9
python -m ngpt.generate results/quickstart/trials/ID --prompt-file - < draft.txt

The continuation is streamed to stdout, the speed goes to stderr. Several prompts or samples are computed together and
printed one after another, each below a line with its number.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ngpt.config.base import Config, ConfigError, build
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.model.config import Count
from ngpt.model.gpt import GPT
from ngpt.model.layers import KVCache
from ngpt.system.cli import run_command
from ngpt.system.device import mixed_precision
from ngpt.training.load_model import LoadedModel, add_model_arguments, load_model, parse_model_changes

REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are not, or not yet, valid UTF-8


class Sampling(Config):
    """How the next token is drawn, see `probabilities`."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) of the next token for logits (B, V). At temperature 0 the most probable token is certain.

    The temperature is applied first. Then the `top_k` most probable tokens are kept, and of those the nucleus: the
    fewest tokens whose probability reaches `top_p`, at least one (Holtzman et al., arXiv 1904.09751). All others get 0.
    Ties are broken by the lower id.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Subtracting the maximum before dividing keeps the result finite at any small temperature.
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

    Of a prompt longer than `block_size` the last tokens are read. When the context is full, its newer half is read in
    again and the older half is dropped, with or without a cache. Single tokens cannot be dropped from a cache, because
    the keys and values of later tokens depend on them.

    Args:
        model: in evaluation mode.
        idx: the prompts, (B, T) int64 with T >= 1, on the model's device.
        temperature, top_k, top_p: see `probabilities`.
        generator: draws the tokens; a CPU generator draws the same ones on every device.
        cache: whether to keep keys and values. Without, each token computes the whole window again.
        vocab_size: ids from this one on are never drawn, for a tokenizer smaller than the model's vocabulary.

    Raises:
        ConfigError: the temperature is negative, or no token is left to draw from.
    """
    sampling = build(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
    size = model.cfg.block_size
    window, new, kept = idx[:, -size:], idx, None
    for _ in range(max_tokens):
        if window.shape[1] > size:
            window, kept = window[:, -max(1, size // 2) :], None
        if kept is None:
            kept, new = KVCache(model.cfg, len(idx), device=idx.device) if cache else None, window
        x = model.features(new, kept)[:, -1:]  # only the last position goes through the head
        p = probabilities(model.logits(x)[:, -1, :vocab_size], sampling)
        drawn = torch.multinomial(p if generator is None else p.to(generator.device), 1, generator=generator)
        new = drawn.to(idx.device)
        yield new[:, 0]
        window = torch.cat([window, new], dim=1)


class Continuation:
    """One continuation of a prompt: its text that has not been printed yet, and whether it has ended.

    A character spread over several tokens waits for the last of them. Some tokenizers treat the start of a text
    differently, so new tokens are decoded after those shown last.
    """

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, title: str = "") -> None:
        self.prompt, self.unprinted, self.ended = prompt, title, False
        self._decode, self._end_token = tokenizer.decode, tokenizer.document_separator
        self._shown, self._waiting = prompt[-1:], list[int]()

    def add(self, token: int) -> None:
        """Adds a token. The document mark ends the text; later tokens are ignored."""
        if token == self._end_token:
            self.end()
        elif not self.ended:
            self._waiting.append(token)
            self._show_waiting(even_incomplete=False)

    def end(self) -> None:
        """Ends the text. Bytes that never became a character are shown as U+FFFD."""
        if not self.ended:
            self._show_waiting(even_incomplete=True)
            self.ended = True

    def _show_waiting(self, *, even_incomplete: bool) -> None:
        text = self._decode([*self._shown, *self._waiting])
        if even_incomplete or not text.endswith(REPLACEMENT):
            self.unprinted += text[len(self._decode(self._shown)) :]
            self._shown, self._waiting = self._waiting, []


def print_ready(continuations: list[Continuation]) -> None:
    """Prints the new text of the first continuation, and of later ones once those before it have ended and left."""
    while continuations:
        current = continuations[0]
        text, current.unprinted = current.unprinted, ""
        print(text, end="\n" if current.ended else "", flush=True)
        if not current.ended:
            return
        del continuations[0]


def continue_prompts(loaded: LoadedModel, options: argparse.Namespace) -> int:
    """Prints continuations of every prompt, as the command line asks for; returns how many tokens were computed.

    Prompts of equal length form one batch, which is exact and needs no padding.
    """
    model, tokenizer, checkpoint = loaded
    if tokenizer is None:
        raise ConfigError(f"{checkpoint.path} has no tokenizer: name it with --tokenizer")
    prompts = [encode_prompt(text, tokenizer) for text in read_prompts(options)]
    title = "--- prompt {} of {}, sample {} of {}\n" if len(prompts) * options.samples > 1 else ""
    continuations = [
        Continuation(prompt, tokenizer, title.format(p, len(prompts), s, options.samples))
        for p, prompt in enumerate(prompts, start=1)
        for s in range(1, options.samples + 1)
    ]
    device = next(model.parameters()).device
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    remaining, count = list(continuations), 0
    for length in sorted({len(prompt) for prompt in prompts}):
        batch = [each for each in continuations if len(each.prompt) == length]
        tokens = generate(
            model,
            torch.tensor([each.prompt for each in batch], device=device),
            options.max_tokens,
            **_sampling_of(options),
            generator=generator,
            cache=not options.no_cache,
            vocab_size=tokenizer.vocab_size,
        )
        with mixed_precision(device, options.dtype or checkpoint.identity.get("dtype", "float32")):
            for drawn in tokens:
                for each, token in zip(batch, drawn.tolist(), strict=True):
                    each.add(token)
                print_ready(remaining)
                count += len(batch)
                if all(each.ended for each in batch):
                    break
        for each in batch:
            each.end()
        print_ready(remaining)
    return count


def _sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Sampling.model_fields}


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then the one from the file. Without any, a single empty prompt."""
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


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt. An empty one becomes the document mark, or a newline if the tokenizer has no mark."""
    try:
        text.encode()
    except UnicodeEncodeError:  # the command line held bytes that are not UTF-8
        raise ConfigError(f"the prompt {text!r} is not UTF-8 text") from None
    if not text and tokenizer.document_separator is not None:
        return [tokenizer.document_separator]
    ids = np.asarray(tokenizer.encode(text or "\n")).tolist()
    if not ids:
        raise ConfigError(f"{tokenizer.name} has no tokens for the prompt {text!r}: give another")
    return ids


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _generate(options), path=options.checkpoint, prints_only=True)


def _generate(options: argparse.Namespace) -> int:
    build(Sampling, _sampling_of(options))  # checks the options before it loads the model
    where = {"best": options.best, "tokenizer": options.tokenizer, "device": options.device}
    loaded = load_model(options.checkpoint, **where, **parse_model_changes(options.set))
    start = time.perf_counter()
    count = continue_prompts(loaded, options)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ngpt.generate", description="Continue text with a trained model.")
    add_model_arguments(parser)
    tokenizers = "PATH.model, gpt2 or gpt2:DIR, if the checkpoint does not have its own"
    parser.add_argument("--tokenizer", metavar="SPEC", help=tokenizers)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--prompt-file", metavar="FILE", help="read a prompt from a file; - is stdin")
    parser.add_argument("--max-tokens", type=_at_least_one, default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens whose mass reaches P")
    parser.add_argument("--seed", type=_seed, metavar="S", help="the same seed gives the same text")
    parser.add_argument("--samples", type=_at_least_one, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument("--no-cache", action="store_true", help="recompute keys and values for every token")
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
