"""Generates text with a trained model.

python -m ngpt.generate runs/first --prompt "The file is" --temperature 0.8 --top-p 0.9
python -m ngpt.generate results/quickstart/trials/ID --prompt-file - < draft.txt

The continuation is streamed to stdout, the speed goes to stderr. Several prompts or samples are batched, and printed
one after another, each below a line with its number.
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
from ngpt.config.visible import visible
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.model.config import Count
from ngpt.model.gpt import GPT
from ngpt.model.layers import KVCache
from ngpt.system.cli import ArgumentParser, print_line, run_command, whole_number
from ngpt.system.device import mixed_precision
from ngpt.system.timing import slow_dtype_note
from ngpt.training.load_model import LoadedModel, add_model_arguments, load_model, parse_model_changes

LAYOUT = "\n\t\xa0\u2002\u2003\u2009\u202f\u3000"  # what text is laid out with: harmless on a terminal
REPLACEMENT = "\ufffd"  # decoded from bytes that are not, or not yet, valid UTF-8


class Sampling(Config):
    """How the next token is sampled, see `probabilities`."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the distribution (B, V) of the next token for logits (B, V). Temperature 0 means greedy decoding.

    The temperature is applied first, then `top_k`, then `top_p`: nucleus sampling, which keeps the smallest set of most
    probable tokens whose total probability reaches `top_p` (Holtzman et al., arXiv 1904.09751). All other tokens get 0.
    In a tie, the lower id comes first.
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

    A prompt longer than `block_size` is truncated to its last tokens. When the context is full, its older half is
    dropped and the newer half is encoded again, with or without a cache. Dropping tokens from the cache is not enough,
    because the keys and values of later tokens depend on them.

    Args:
        model: in evaluation mode.
        idx: the prompts, (B, T) int64 with T >= 1, on the model's device.
        temperature, top_k, top_p: see `probabilities`; ConfigError if one is out of range.
        generator: a CPU generator samples the same tokens on every device.
        cache: whether to cache keys and values. Otherwise each token recomputes the whole context.
        vocab_size: ids at or above it are never sampled, for a tokenizer smaller than the model's vocabulary.
    """
    sampling = build(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
    size = model.cfg.block_size
    context, new, kv_cache = idx[:, -size:], idx, None
    for _ in range(max_tokens):
        if context.shape[1] > size:
            context, kv_cache = context[:, -max(1, size // 2) :], None
        if kv_cache is None:
            kv_cache, new = KVCache(model.cfg, len(idx), device=idx.device) if cache else None, context
        x = model.features(new, kv_cache)[:, -1:]  # only the last position goes through the head
        p = probabilities(model.logits(x)[:, -1, :vocab_size], sampling)
        sampled = torch.multinomial(p if generator is None else p.to(generator.device), 1, generator=generator)
        new = sampled.to(idx.device)
        yield new[:, 0]
        context = torch.cat([context, new], dim=1)


class Continuation:
    """One continuation of a prompt, decoded while it is generated.

    A character that spans several tokens is added to the text with its last token. Some tokenizers decode the start of
    a text differently, so new tokens are decoded together with those decoded last.
    """

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, title: str = "") -> None:
        self.prompt, self.unprinted, self.ended = prompt, title, False
        self._decode, self._end_token = tokenizer.decode, tokenizer.document_separator
        self._decoded, self._pending = prompt[-1:], list[int]()  # tokens

    def add(self, token: int) -> None:
        """Adds a token. The document separator token ends the text; later tokens are ignored."""
        if token == self._end_token:
            self.end()
        elif not self.ended:
            self._pending.append(token)
            self._decode_pending(allow_incomplete=False)

    def end(self) -> None:
        """Ends the text. Bytes of an incomplete character become U+FFFD."""
        if not self.ended:
            self._decode_pending(allow_incomplete=True)
            self.ended = True

    def _decode_pending(self, *, allow_incomplete: bool) -> None:
        text = self._decode([*self._decoded, *self._pending])
        if allow_incomplete or not text.endswith(REPLACEMENT):
            self.unprinted += text[len(self._decode(self._decoded)) :]
            self._decoded, self._pending = self._pending, []


def print_ready(continuations: list[Continuation]) -> None:
    """Prints the new text of the first continuation; once that has ended, removes it and goes on to the next.

    A terminal gets the text in visible form, since a model generates what it was trained on. A file gets it raw.
    """
    while continuations:
        current = continuations[0]
        text, current.unprinted = current.unprinted, ""
        shown = visible(text, keep=LAYOUT) if sys.stdout.isatty() else text
        print(shown, end="\n" if current.ended else "", flush=True)
        if not current.ended:
            return
        del continuations[0]


def continue_prompts(loaded: LoadedModel, options: argparse.Namespace) -> int:
    """Prints the continuations that the command line asks for; returns the number of generated tokens."""
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
    dtype = options.dtype or checkpoint.identity.get("dtype", "float32")
    if note := slow_dtype_note(device, dtype, advice="choose --dtype float32"):
        print_line(note)
    remaining, count = list(continuations), 0
    for length in sorted({len(prompt) for prompt in prompts}):  # prompts of equal length need no padding
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
        with mixed_precision(device, dtype):
            for sampled in tokens:
                for each, token in zip(batch, sampled.tolist(), strict=True):
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
    """Returns the prompts of --prompt, then the one of --prompt-file; one empty prompt if neither is given."""
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
    """Encodes a prompt. An empty one becomes the document separator token, or a newline if the tokenizer has none."""
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
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _generate(options), path=options.checkpoint, prints_only=True)


def _generate(options: argparse.Namespace) -> int:
    build(Sampling, _sampling_of(options))  # checks the options before it loads the model
    source = {"best": options.best, "tokenizer": options.tokenizer, "device": options.device}
    loaded = load_model(options.checkpoint, **source, **parse_model_changes(options.set))
    start = time.perf_counter()
    count = continue_prompts(loaded, options)
    seconds = time.perf_counter() - start
    print_line(f"{count} tokens in {seconds:.2f} s: {count / seconds:.0f} tokens/s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m ngpt.generate", description="Continue text with a trained model.")
    add_model_arguments(parser)
    tokenizers = "as for python -m ngpt.data, if the checkpoint does not have its own"
    parser.add_argument("--tokenizer", metavar="SPEC", help=tokenizers)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--prompt-file", metavar="FILE", help="read a prompt from a file; - is stdin")
    parser.add_argument("--max-tokens", type=whole_number(1, 10**9), default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 means greedy decoding")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    nucleus = "sample from the smallest set of most probable tokens whose total probability reaches P"
    parser.add_argument("--top-p", type=float, metavar="P", help=nucleus)
    parser.add_argument(
        "--seed", type=whole_number(0, 2**63 - 1), metavar="S", help="the same seed gives the same text"
    )
    parser.add_argument(
        "--samples", type=whole_number(1, 10_000), default=1, metavar="N", help="continuations of each prompt"
    )
    parser.add_argument("--no-cache", action="store_true", help="recompute keys and values for every token")
    return parser


if __name__ == "__main__":
    sys.exit(main())
