"""The model `ngpt` of lm-evaluation-harness: checkpoints of this package as one of its models.

lm_eval finds it by the entry point `lm_eval.models` from version 0.4.14 on; `python -m ngpt.downstream lm_eval`
registers it for any version. Truncation, rolling windows and batches are those of the harness's `hf` model.
"""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ngpt.config.base import ConfigError, build, printable, unknown_message
from ngpt.data.tokens.end_tokens import end_tokens
from ngpt.downstream.scoring import Score, Scored, score
from ngpt.downstream.special_tokens import prefix_token, puts_prefix
from ngpt.generation.batch import BatchDecoder
from ngpt.generation.sampling import Sampling
from ngpt.generation.text import slots_for
from ngpt.system.device import DEVICES, DTYPES, mixed_precision
from ngpt.training.load_model import LoadedModel, load_model

AUTO = "auto"
MAX_GEN_TOKS = 256  # of a task that says nothing, as in the harness's `hf` model
SAMPLING = ("temperature", "top_k", "top_p")
IGNORED = ("do_sample", "use_cache")  # what `normalize_gen_kwargs` has settled, and what changes no token


class HarnessModel(TemplateLM):
    """A trained or converted model with its tokenizer, for the tasks of lm-evaluation-harness.

    Args:
        pretrained: a checkpoint, the folder of a run or trial, or what `load_model` returns.
        best: use the checkpoint with the lowest validation loss.
        tokenizer: spec of a tokenizer, if it is not the checkpoint's own.
        device, dtype: as for `python -m ngpt.evaluate`; `dtype` defaults to that of the training.
        batch_size: sequences at once; `auto`: as many as memory is likely to hold.
        max_length: context in tokens, at most and by default the model's block_size.
        max_gen_toks: new tokens, if a task does not say how many.
        add_bos_token: put the document separator before every text; default: if the tokenizer's own program does.
        after_batch: called after each batch.
        changes: settings of the model, such as `rope_scaling=yarn`.

    Raises:
        ConfigError: an argument is unknown or out of range, or there is no checkpoint or tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Path | LoadedModel,
        *,
        best: bool = False,
        tokenizer: str | None = None,
        device: str = AUTO,
        dtype: str | None = None,
        batch_size: int | str = AUTO,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        after_batch: Callable[[], None] = lambda: None,
        **changes: Any,
    ) -> None:
        super().__init__()
        _avoid_stuck_pool()
        if not isinstance(pretrained, LoadedModel):
            settings = {f"model.{name.removeprefix('model.')}": value for name, value in changes.items()}
            how: dict[str, Any] = {"best": best, "tokenizer": tokenizer, "device": _device(device)}
            pretrained = load_model(Path(pretrained), **how | settings)
        elif changes:
            raise ConfigError(f"settings change while a model is loaded, not afterwards, got {', '.join(changes)}")
        if pretrained.tokenizer is None:
            raise ConfigError(f"{pretrained.checkpoint.path} has no tokenizer: name it with tokenizer=SPEC")
        self.loaded, self._model, self._tokenizer = pretrained, pretrained.model, pretrained.tokenizer
        self._dtype = dtype or pretrained.checkpoint.identity.get("dtype", "float32")
        if self._dtype not in DTYPES:
            raise ConfigError(unknown_message("dtype", self._dtype, DTYPES))
        self._device = next(self._model.parameters()).device
        self._autocast = mixed_precision(self._device, self._dtype)
        self.batch_size = _batch_size(batch_size)
        if self.batch_size is None and max_batch_size is not None:
            self.batch_size = max_batch_size
        self.max_length = _max_length(max_length, self._model.cfg.block_size)
        self.max_gen_toks, self._after_batch = max_gen_toks, after_batch
        self._prefix, self._ends = prefix_token(self._tokenizer), end_tokens(self._tokenizer)
        self._adds_bos = puts_prefix(self._tokenizer) if add_bos_token is None else add_bos_token

    @property
    def eot_token_id(self) -> int:
        """The document separator, or a newline if the tokenizer has none."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness's cache of requests."""
        return f"{self._tokenizer.name} {self._tokenizer.sha256}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Refuses a template, since a base model has none; ConfigError."""
        if chat_template:
            raise ConfigError("the model has no chat template: leave out apply_chat_template")
        return ""

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the results say about the model: checkpoint, digest of the weights, parameters, precision."""
        checkpoint = self.loaded.checkpoint
        return {
            "model_checkpoint": str(checkpoint.path),
            "model_step": checkpoint.step,
            "model_sha": checkpoint.weights_sha256,
            "model_num_parameters": sum(parameter.numel() for parameter in self._model.parameters()),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Returns the tokens of a text, after the document separator if every text has it."""
        has_bos = self._adds_bos if add_special_tokens is None else add_special_tokens
        return [self._prefix] * has_bos + [int(token) for token in self._tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        scored = [self._scored(*request) for request in requests]
        with tqdm(total=len(scored), disable=disable_tqdm, desc="scoring") as bar:
            scores = [(each.loglikelihood, each.is_greedy) for each in self._score(scored, bar)]
        for (texts, _, _), answer in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return scores

    def _scored(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Scored:
        """The tokens of a request, cut from the left to what fits."""
        shown = "" if texts is None else f" {printable(repr(texts[1]), 60)}"
        if not continuation:
            raise ConfigError(f"the continuation{shown} has no tokens of its own")
        if len(continuation) > self.max_length:
            size = f"{len(continuation)} tokens, more than the context of {self.max_length}"
            raise ConfigError(f"the continuation{shown} has {size}")
        return Scored([*context, *continuation][-(self.max_length + 1) :], len(continuation))

    def _score(self, scored: Sequence[Scored], bar: Any) -> list[Score]:
        def after_batch(count: int) -> None:
            bar.update(count)
            self._after_batch()

        how: dict[str, Any] = {"autocast": self._autocast, "batch_size": self.batch_size}
        return score(self._model, scored, after_batch=after_batch, **how)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text in nats, each token with as much context as fits."""
        windows, owners = list[Scored](), list[int]()
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self._prefix, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append(Scored(context + continuation, len(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        with tqdm(total=len(windows), disable=disable_tqdm, desc="scoring windows") as bar:
            for owner, each in zip(owners, self._score(windows, bar), strict=True):
                totals[owner] += each.loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the text with which the model continues each prompt, up to the first stop sequence.

        Prompts of any lengths and options are decoded together; when a text ends, the next one takes its place.
        """
        if not requests:
            return []
        waiting = [self._generation(index, request) for index, request in enumerate(requests)][::-1]
        slots = min(len(requests), self.batch_size or slots_for(self._model, self._dtype))
        decoder = BatchDecoder(self._model, slots=slots, dtype=self._dtype, vocab_size=self._tokenizer.vocab_size)
        running: dict[int, Generation] = {}
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            while waiting or running:
                while waiting and decoder.free_slots:
                    each = waiting.pop()
                    # The harness seeds torch's random numbers.
                    seed = int(torch.randint(2**62, (1,)))
                    running[decoder.add(each.prompt, each.sampling, seed)] = each
                for slot, token, *_ in decoder.step():
                    each = running[slot]
                    if not self._ends_with(each, token):
                        continue
                    decoder.free(slot)
                    del running[slot]
                    bar.update()
                    text = postprocess_generated_text(self._tokenizer.decode(each.new), list(each.until), None)
                    texts[each.index] = text
                    self.cache_hook.add_partial("generate_until", requests[each.index].args, text)
                self._after_batch()
        return texts

    def _generation(self, index: int, request: Instance) -> "Generation":
        """A request with its options under one name each; ConfigError for one that this model does not have."""
        text, given = cast("tuple[str, dict[str, Any]]", request.args)
        known: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until = handle_stop_sequences(known.pop("until", None), eos=None)
        if foreign := known.keys() - {"max_gen_toks", *SAMPLING, *IGNORED}:
            names, possible = ", ".join(sorted(foreign)), ", ".join((*SAMPLING, "do_sample", "until", "max_gen_toks"))
            raise ConfigError(f"generation_kwargs: {names} cannot be used with this model, only {possible}")
        given_sampling = {name: known[name] for name in SAMPLING if known.get(name) is not None}
        sampling = build(Sampling, given_sampling if known["do_sample"] else {"temperature": 0.0})
        most = known["max_gen_toks"]
        if (room := self.max_length - most) <= 0:
            advice = "give max_gen_toks in model_args or in the task's generation_kwargs"
            limit = f"must be less than the context of {self.max_length} tokens"
            raise ConfigError(f"max_gen_toks {limit}, got {most}; {advice}")
        prompt = (self.tok_encode(text) or [self._prefix])[-room:]
        return Generation(index, prompt, sampling, most, tuple(filter(None, until)))

    def _ends_with(self, each: "Generation", token: int) -> bool:
        """Adds a token to a text; returns whether it was the last one."""
        if token in self._ends:
            return True
        each.new.append(token)
        if len(each.new) == each.most:
            return True
        # A stop sequence that this token has completed has at most its number of bytes in tokens before.
        tail = self._tokenizer.decode(each.new[-max((len(stop.encode()) for stop in each.until), default=1) - 1 :])
        return any(stop in tail for stop in each.until)


@dataclass(frozen=True)
class Generation:
    """A request for text, and its `new` tokens so far."""

    index: int
    prompt: list[int]
    sampling: Sampling
    most: int  # new tokens
    until: tuple[str, ...]
    new: list[int] = field(default_factory=list)


def _avoid_stuck_pool() -> None:
    """Keeps the harness's bootstrap in this process if it ignores SIGTERM, as children of some launchers do.

    The pool of processes that computes it otherwise ends its workers by SIGTERM, and waits for them for ever.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        os.environ.setdefault("DISABLE_MULTIPROC", "1")


def _device(name: str) -> str:
    """A device as this package calls it; `cuda:0`, which people give to the harness, is the one that `cuda` means."""
    name = "cuda" if name == "cuda:0" else name
    if name not in DEVICES:
        raise ConfigError(unknown_message("device", name, DEVICES))
    return name


def _batch_size(given: int | str) -> int | None:
    text = str(given)
    if text.startswith(AUTO):
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1, or {AUTO}, got {printable(repr(given))}")
    return int(text)


def _max_length(given: int | None, block_size: int) -> int:
    if given is not None and not 1 <= given <= block_size:
        raise ConfigError(f"max_length must be from 1 to the model's block_size of {block_size}, got {given}")
    return block_size if given is None else given
