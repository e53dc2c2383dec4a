"""Generates text with a trained model, from the command line or with the function `generate`.

python -m ngpt.generate runs/first --prompt "The file is" --temperature 0.8 --top-p 0.9
python -m ngpt.generate results/quickstart/trials/ID --prompt-file - < draft.txt

The continuation is streamed to stdout, the speed goes to stderr. Several prompts or samples are batched, and printed
one after another, each below a line with its number.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import sys
import time
from pathlib import Path
from typing import Any, overload

from ngpt.config.base import ConfigError, build, unknown_message
from ngpt.config.visible import visible
from ngpt.data.text.progress import Meter, TerminalLog, silent
from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer
from ngpt.generation.batch import BatchDecoder
from ngpt.generation.plain import generate_tokens as generate_tokens
from ngpt.generation.sampling import Sampling
from ngpt.generation.sampling import probabilities as probabilities
from ngpt.generation.speculative import SpeculativeDecoder
from ngpt.generation.text import Continuation, continue_all, encode_prompt, slots_for
from ngpt.model.gpt import GPT
from ngpt.system.cli import ArgumentParser, exit_process, print_line, run_command, use_plugins, whole_number
from ngpt.system.device import DTYPES
from ngpt.system.timing import slow_dtype_note
from ngpt.training.load_model import (
    LoadedModel,
    add_model_arguments,
    load_model,
    parse_model_changes,
    tokenizer_origin,
)

LAYOUT = "\n\t\xa0\u2002\u2003\u2009\u202f\u3000"  # what text is laid out with: harmless on a terminal


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


@overload
def generate(
    model: LoadedModel | GPT,
    prompt: str = ...,
    *,
    max_tokens: int = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int | None = ...,
    tokenizer: Tokenizer | str | None = ...,
    dtype: str | None = ...,
    cache: bool = ...,
    compile: bool = ...,
    draft: LoadedModel | GPT | None = ...,
    draft_tokens: int = ...,
) -> str: ...
@overload
def generate(
    model: LoadedModel | GPT,
    prompt: list[str],
    *,
    max_tokens: int = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int | None = ...,
    tokenizer: Tokenizer | str | None = ...,
    dtype: str | None = ...,
    cache: bool = ...,
    compile: bool = ...,
    draft: LoadedModel | GPT | None = ...,
    draft_tokens: int = ...,
) -> list[str]: ...
def generate(
    model: LoadedModel | GPT,
    prompt: str | list[str] = "",
    *,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    tokenizer: Tokenizer | str | None = None,
    dtype: str | None = None,
    cache: bool = True,
    compile: bool = False,
    draft: LoadedModel | GPT | None = None,
    draft_tokens: int = 4,
) -> str | list[str]:
    """Returns the text with which a model continues the prompt, without the prompt; for a list, a list of texts.

    The text ends after `max_tokens` tokens, or with the document. Prompts of any lengths are generated together.

    Args:
        model: what `load_model` returns, or a model alone, which needs a `tokenizer`.
        prompt: an empty one starts a document.
        temperature, top_k, top_p: see `probabilities`; temperature 0 means greedy decoding.
        seed: the same seed gives the same text; None draws one. Each prompt of a list has random numbers of its own, by
            the seed and its place in the list, so that a text does not depend on the other prompts.
        tokenizer: to be used instead of that of the checkpoint; a text is a spec, as for `python -m ngpt.data`.
        dtype: of matrix products; None: as in training, for a model alone float32.
        cache: whether to cache keys and values; the text is the same.
        compile: compile the decoding of a token, which takes a while at first; the text is the same.
        draft: a smaller model with the same tokenizer that proposes `draft_tokens` tokens at a time. Greedy texts are
            the same, sampled ones have the same distribution (`ngpt.generation.speculative`).

    Raises:
        ConfigError: an argument is out of range or does not go with another one, there is no tokenizer, or the draft
            has another one; a ValueError.
    """
    sampling = build(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
    _check(max_tokens=max_tokens, seed=seed, dtype=dtype, draft_tokens=draft_tokens)
    check_combination(cache=cache, compile=compile, draft=draft is not None)
    saved_dtype, loaded = "float32", model
    if isinstance(model, LoadedModel):
        tokenizer, saved_dtype = tokenizer or model.tokenizer, saved_dtype_of(model)
        model = model.model
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer: name it with `tokenizer`, such as tokenizer='gpt2'")
    tokenizer = load_tokenizer(tokenizer, None) if isinstance(tokenizer, str) else tokenizer
    dtype = dtype or saved_dtype
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = [Continuation(encode_prompt(text, tokenizer), tokenizer) for text in prompts]
    how = {"max_tokens": max_tokens, "sampling": sampling, "seed": seed, "dtype": dtype, "cache": cache}
    proposing = {"draft": checked_draft(loaded, draft), "draft_tokens": draft_tokens}
    if texts and cache:
        how["decoder"] = decoder_of(model, tokenizer, len(texts), dtype=dtype, compiled=compile, **proposing)
    _advise_on_dtype(model, dtype)
    for _ in continue_all(model, tokenizer, texts, **how):
        pass
    return texts[0].unprinted if isinstance(prompt, str) else [each.unprinted for each in texts]


def _check(*, max_tokens: object, seed: object, dtype: str | None, draft_tokens: object) -> None:
    """Raises ConfigError if an argument is out of range."""
    for name, value in (("max_tokens", max_tokens), ("draft_tokens", draft_tokens)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise ConfigError(f"seed must be a whole number of at least 0, got {seed!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(unknown_message("dtype", dtype, DTYPES))


def check_combination(*, cache: bool, compile: bool, draft: bool, marks: str = "") -> None:
    """Raises ConfigError for options that exclude each other; `marks` precede the names of compile and draft."""
    if compile and draft:
        raise ConfigError(f"{marks}compile does not go with {marks}draft: give one of them")
    if not cache and (compile or draft):
        name = "compile" if compile else "draft"
        raise ConfigError(f"{marks}{name} needs the cache of keys and values, which was turned off")


def checked_draft(model: LoadedModel | GPT, draft: LoadedModel | GPT | None) -> GPT | None:
    """Returns the model of a draft; ConfigError if it has another vocabulary or tokenizer than the model."""
    if draft is None:
        return None
    own, other = (each.model if isinstance(each, LoadedModel) else each for each in (model, draft))
    sizes = [len(each.wte.weight) for each in (own, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the draft has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}")
    if isinstance(model, LoadedModel) and isinstance(draft, LoadedModel):
        origins = [tokenizer_origin(each.checkpoint) for each in (model, draft)]
        hashes = {origin.sha256 for origin in origins} - {None}
        specs = {origin.spec for origin in origins} - {None}
        if len(hashes) > 1 or (len(specs) > 1 and not hashes):
            names = " and ".join(str(each.checkpoint.path) for each in (draft, model))
            raise ConfigError(f"the draft was trained with another tokenizer than the model: {names}")
    return other


def decoder_of(
    model: GPT,
    tokenizer: Tokenizer,
    texts: int,
    *,
    dtype: str,
    compiled: bool = False,
    draft: GPT | None = None,
    draft_tokens: int = 4,
) -> BatchDecoder:
    """Builds the decoder that the options ask for, with a slot for each text, or as many as are worth it."""
    how = {"slots": min(texts, slots_for(model, dtype)), "dtype": dtype, "vocab_size": tokenizer.vocab_size}
    if draft is None:
        return BatchDecoder(model, **how, compiled=compiled)
    return SpeculativeDecoder(model, draft, **how, draft_tokens=draft_tokens)


def saved_dtype_of(loaded: LoadedModel) -> str:
    """The dtype of matrix products in the training of a model."""
    return loaded.checkpoint.identity.get("dtype", "float32")


def _advise_on_dtype(model: GPT, dtype: str) -> None:
    """Says so if this device is slower in `dtype` than in float32."""
    if note := slow_dtype_note(next(model.parameters()).device, dtype, advice="choose --dtype float32"):
        print_line(note)


def continue_prompts(loaded: LoadedModel, options: argparse.Namespace, draft: LoadedModel | None = None) -> int:
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
    how = {"max_tokens": options.max_tokens, "seed": options.seed, "cache": not options.no_cache}
    how |= {"sampling": build(Sampling, _sampling_of(options)), "dtype": options.dtype or saved_dtype_of(loaded)}
    if how["cache"]:
        kind = {"dtype": how["dtype"], "compiled": options.compile, "draft": checked_draft(loaded, draft)}
        how["decoder"] = decoder_of(model, tokenizer, len(continuations), **kind, draft_tokens=options.draft_tokens)
    remaining, count, total = list(continuations), 0, options.max_tokens * len(continuations)
    # On a terminal, the text itself shows the progress.
    meter = Meter(silent if sys.stdout.isatty() else TerminalLog(), "generating")
    _advise_on_dtype(model, how["dtype"])
    for n_tokens in continue_all(model, tokenizer, continuations, **how):
        print_ready(remaining)
        count += n_tokens
        meter.update(count, "tokens", fraction=count / total)
    if isinstance(decoder := how.get("decoder"), SpeculativeDecoder) and decoder.acceptance_rate is not None:
        print_line(f"{decoder.acceptance_rate:.0%} of {decoder.proposed} drafted tokens were accepted")
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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _generate(options), path=options.checkpoint)


def _generate(options: argparse.Namespace) -> int:
    use_plugins(options.plugin)
    build(Sampling, _sampling_of(options))  # checks the options before it loads the model
    source = {"best": options.best, "tokenizer": options.tokenizer, "device": options.device}
    check_combination(cache=not options.no_cache, compile=options.compile, draft=options.draft is not None, marks="--")
    loaded = load_model(options.checkpoint, **source, **parse_model_changes(options.set))
    draft = None if options.draft is None else load_model(options.draft, best=options.best, device=options.device)
    start = time.perf_counter()
    count = continue_prompts(loaded, options, draft)
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
    compiling = "compile the decoding of a token: slow at first, then faster, with the same text"
    parser.add_argument("--compile", action="store_true", help=compiling)
    drafting = "a smaller model with the same tokenizer, which proposes tokens that the model accepts or corrects"
    parser.add_argument("--draft", metavar="CHECKPOINT", help=drafting)
    parser.add_argument(
        "--draft-tokens", type=whole_number(1, 64), default=4, metavar="N", help="proposed at a time, default 4"
    )
    parser.add_argument("--no-cache", action="store_true", help="recompute keys and values for every token")
    return parser


if __name__ == "__main__":
    exit_process(main())
