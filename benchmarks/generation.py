"""Compares the speed of generation with that of transformers, on the same weights, or with that of a draft's help.

python -m benchmarks.generation Llama --batch 1 16 --threads 1 --json
python -m benchmarks.generation --pair runs/large runs/small --text FILE --threads 1 --json

A model of transformers gets random weights, and `ngpt.convert` makes ours of it. All contestants generate greedily from
the same prompts and take turns; their tokens have to be the same. With `--pair`, two trained models generate after
prompts from a text: the first one alone, and the first one with the second one as its draft.
"""

import argparse
import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError
from ngpt.conversion.huggingface import from_huggingface
from ngpt.generation.batch import BatchDecoder
from ngpt.generation.plain import generate_tokens
from ngpt.generation.sampling import Sampling
from ngpt.generation.speculative import SpeculativeDecoder
from ngpt.model.gpt import GPT
from ngpt.system.cli import ArgumentParser, run_command, whole_number
from ngpt.system.timing import interleave, machine_info, print_metrics, speed_ratio
from ngpt.training.load_model import load_model

FAMILIES = ("Llama", "NanoChat")
CONTESTANTS = ("ours", "plain", "transformers", "compiled", "speculative")
GREEDY = Sampling(temperature=0.0)
SPREAD = 0.05  # standard deviation of the weights, so that the tokens are not all the same
Generate = Callable[[Tensor], list[list[int]]]


def compare_generation(
    family: str,
    *,
    layers: int = 4,
    width: int = 256,
    vocabulary: int = 4096,
    prompt: int = 32,
    tokens: int = 64,
    batches: Sequence[int] = (1, 16),
    contestants: Sequence[str] = CONTESTANTS[:3],
    seconds: float = 30.0,
) -> dict[str, Any]:
    """Times the generation of `tokens` tokens after prompts of `prompt` tokens, for each size of batch.

    Contestants: ours (BatchDecoder, built anew each time), plain (generate_tokens), transformers (its generate with a
    cache, not compiled), compiled (ours with a compiled step, compiled before), speculative (ours with a draft of the
    model's first layer). Other programs on the machine change CPU time less than wall time; both are measured.

    Returns n_params and for each batch: ratio (CPU time of transformers over ours, the median over the rounds),
    wall_ratio, rounds, equal (whether all tokens are the same), acceptance_rate (of speculative), and per contestant
    cpu_ms and ms (medians) and, but for ours, ratio (its speed over ours).
    """
    theirs = peer(family, layers=layers, width=width, vocabulary=vocabulary, length=prompt + tokens)
    ours = from_huggingface(theirs.state_dict(), theirs.config.to_dict()).eval()
    functions: dict[str, Generate] = {
        "ours": lambda idx: decoded(BatchDecoder(ours, slots=len(idx)), idx, tokens),
        "plain": lambda idx: torch.stack(list(generate_tokens(ours, idx, tokens, temperature=0.0)), dim=1).tolist(),
        "transformers": functools.partial(their_tokens, theirs, tokens),
        "compiled": lambda idx: decoded(BatchDecoder(ours, slots=len(idx), compiled=True), idx, tokens),
        "speculative": lambda idx: decoded(SpeculativeDecoder(ours, shallow(ours), slots=len(idx)), idx, tokens),
    }
    metrics: dict[str, Any] = {"family": family, "layers": layers, "width": width, "vocabulary": vocabulary}
    metrics |= {"prompt": prompt, "tokens": tokens, "n_params": sum(each.numel() for each in ours.parameters())}
    for batch in batches:
        idx = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        chosen = {name: functools.partial(functions[name], idx) for name in dict.fromkeys(("ours", *contestants))}
        metrics[f"batch_{batch}"] = compare(chosen, seconds=seconds)
        if "speculative" in contestants:
            decoder = SpeculativeDecoder(ours, shallow(ours), slots=batch)
            decoded(decoder, idx, tokens)
            metrics[f"batch_{batch}"]["acceptance_rate"] = decoder.acceptance_rate
    return metrics | machine_info(torch.device("cpu"), "float32")


def compare_pair(
    pair: Sequence[str],
    *,
    text: str,
    prompt: int = 32,
    tokens: int = 64,
    batches: Sequence[int] = (1, 16),
    draft_tokens: Sequence[int] = (1, 2, 4),
    seconds: float = 30.0,
) -> dict[str, Any]:
    """Times greedy generation of a trained model alone, and with a draft that proposes so many tokens in each step.

    Prompts are parts of the file `text`, evenly spaced. Returns n_params, draft_params, and for each batch what
    `compare` returns and the acceptance_rate of each speculative contestant.
    """
    loaded, draft = (load_model(path) for path in pair)
    if loaded.tokenizer is None or draft.tokenizer is None or loaded.tokenizer.sha256 != draft.tokenizer.sha256:
        raise ConfigError(f"{pair[0]} and {pair[1]} need the same tokenizer")
    model, ids = loaded.model, loaded.tokenizer.encode(Path(text).read_text(encoding="utf-8")).tolist()
    metrics: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "text": text}
    metrics |= {"n_params": sum(each.numel() for each in model.parameters())}
    metrics |= {"draft_params": sum(each.numel() for each in draft.model.parameters())}
    for batch in batches:
        step = (len(ids) - prompt) // batch
        if step < 1:
            raise ConfigError(f"{text} has {len(ids)} tokens, too few for {batch} prompts of {prompt}")
        idx = torch.tensor([ids[start : start + prompt] for start in range(0, batch * step, step)])
        found: dict[int, SpeculativeDecoder] = {}

        def speculative(count: int, idx: Tensor = idx, found: dict[int, SpeculativeDecoder] = found) -> Any:
            found[count] = SpeculativeDecoder(model, draft.model, slots=len(idx), draft_tokens=count)
            return decoded(found[count], idx, tokens)

        chosen: dict[str, Callable[[], list[list[int]]]] = {
            "ours": lambda idx=idx: decoded(BatchDecoder(model, slots=len(idx)), idx, tokens)
        }
        chosen |= {f"speculative_{count}": functools.partial(speculative, count) for count in draft_tokens}
        result = compare(chosen, seconds=seconds)
        for count, decoder in found.items():
            result[f"speculative_{count}"]["acceptance_rate"] = decoder.acceptance_rate
        metrics[f"batch_{batch}"] = result
    return metrics | machine_info(torch.device("cpu"), "float32")


def compare(functions: dict[str, Callable[[], list[list[int]]]], *, seconds: float) -> dict[str, Any]:
    """Times the functions in turns, by CPU and by wall time, and compares their results with those of the first."""
    found = {name: function() for name, function in functions.items()}
    first = next(iter(found))
    walls: dict[str, list[float]] = {name: [] for name in functions}

    def timed(name: str, function: Callable[[], object]) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls[name].append(time.perf_counter() - wall)
        return time.process_time() - cpu

    variants = {name: functools.partial(timed, name, function) for name, function in functions.items()}
    times = interleave(variants, seconds=seconds, warmup=0)
    equal = all(each == found[first] for each in found.values())
    result: dict[str, Any] = {"equal": equal, "rounds": len(times[first])}
    if "transformers" in functions:
        result["ratio"] = speed_ratio(times[first], times["transformers"])
        result["wall_ratio"] = speed_ratio(walls[first], walls["transformers"])
    for name, taken in times.items():
        result[name] = {"cpu_ms": statistics.median(taken) * 1000, "ms": statistics.median(walls[name]) * 1000}
        result[name] |= {} if name == first else {"ratio": speed_ratio(taken, times[first])}
    return result


def peer(family: str, *, layers: int, width: int, vocabulary: int, length: int) -> Any:
    """Builds a model of transformers with random weights, heads of width 64 and half as many for keys and values."""
    try:
        import transformers  # takes seconds
    except ImportError:
        raise ConfigError("this benchmark needs transformers: pip install transformers") from None

    heads = max(2, width // 64)
    hidden = 4 * width if family == "NanoChat" else 8 * width // 3 // 8 * 8
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": hidden}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": length}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=SPREAD)
    return model


@torch.no_grad()
def their_tokens(model: Any, count: int, idx: Tensor) -> list[list[int]]:
    """Generates greedily with transformers, without an end of the text."""
    length = {"max_new_tokens": count, "min_new_tokens": count}
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(idx)}
    return model.generate(idx, **length, **how)[:, idx.shape[1] :].tolist()


def decoded(decoder: BatchDecoder, idx: Tensor, count: int) -> list[list[int]]:
    """Generates `count` tokens after each prompt with a decoder."""
    found: dict[int, list[int]] = {decoder.add(row, GREEDY): [] for row in idx.tolist()}
    while min(map(len, found.values())) < count:
        for result in decoder.step():
            found[result.slot].append(result.token)
    return [tokens[:count] for tokens in found.values()]


def shallow(model: GPT) -> GPT:
    """Returns a draft: embedding, first block and head of a model, with its weights."""
    draft = GPT(model.cfg.model_copy(update={"n_layer": 1})).eval()
    names = draft.state_dict()
    draft.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in names})
    return draft


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m benchmarks.generation",
        description=f"{__doc__}\n{inspect.getdoc(compare_generation)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="?", choices=FAMILIES, help="of models of transformers")
    parser.add_argument(
        "--pair", nargs=2, metavar=("MODEL", "DRAFT"), help="two trained models instead, as checkpoints"
    )
    parser.add_argument("--text", metavar="FILE", help="with --pair: what prompts are taken from")
    parser.add_argument("--draft-tokens", type=whole_number(1, 64), nargs="+", default=[1, 2, 4], help="with --pair")
    for name, default in (("layers", 4), ("width", 256), ("vocabulary", 4096), ("prompt", 32), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=whole_number(1, 10**6), default=default, help=f"default {default}")
    parser.add_argument("--batch", type=whole_number(1, 1024), nargs="+", default=[1, 16], help="default 1 16")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS[:3]))
    parser.add_argument("--threads", type=whole_number(1, 4096), help="CPU threads; default: torch's")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure each batch; default 30")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    return run_command(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    if (options.family is None) == (options.pair is None) or (options.pair is None) != (options.text is None):
        raise ConfigError("give the name of a family, or --pair with --text")
    if options.pair is not None:
        shared = {name: getattr(options, name) for name in ("text", "prompt", "tokens", "draft_tokens", "seconds")}
        print_metrics(compare_pair(options.pair, **shared, batches=options.batch), as_json=options.json)
        return 0
    names = ("layers", "width", "vocabulary", "prompt", "tokens", "contestants", "seconds")
    how = {name: getattr(options, name) for name in names}
    print_metrics(compare_generation(options.family, **how, batches=options.batch), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
