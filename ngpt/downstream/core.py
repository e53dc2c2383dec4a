"""CORE, the metric of nanochat for base models: the mean centred accuracy of 22 tasks (DCLM, arXiv 2406.11794).

Centred accuracy is 0 for guessing and 1 for no mistake: (accuracy - baseline) / (1 - baseline). The model's choice is
the continuation with the lowest mean loss per token. A language modeling example is right if greedy decoding gives the
continuation.
"""

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from ngpt.config.base import ConfigError
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.downstream.bundle import CoreTask
from ngpt.downstream.scoring import Score, Scored, score
from ngpt.downstream.special_tokens import prefix_token
from ngpt.system.device import mixed_precision
from ngpt.training.load_model import LoadedModel

GROUP = 64  # examples that are scored together


class TaskScore(NamedTuple):
    """The accuracy of a task, from 0 to 1, and the same after centring; `stderr` is that of the centred one.

    `truncated` counts examples with a prompt that did not fit the context, of which the start was cut off.
    """

    label: str
    accuracy: float
    centred: float
    stderr: float | None
    examples: int
    truncated: int


class CoreScore(NamedTuple):
    """CORE with its standard error, None with one example in a task, and the tasks that it is the mean of."""

    core: float
    stderr: float | None
    tasks: list[TaskScore]


def evaluate_core(
    loaded: LoadedModel,
    tasks: Sequence[CoreTask],
    *,
    dtype: str | None = None,
    batch_size: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
    after_task: Callable[[TaskScore], None] = lambda score: None,
) -> CoreScore:
    """Scores a model on all tasks of CORE.

    Args:
        dtype: of matrix products; None: as in training.
        batch_size: sequences at once; None: as many as memory is likely to hold.
        after_batch, after_task: called after each batch, and with the score of each task.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.checkpoint.path} has no tokenizer, and the tasks of CORE are text")
    device = next(loaded.model.parameters()).device
    how: dict[str, Any] = {
        "autocast": mixed_precision(device, dtype or loaded.checkpoint.identity.get("dtype", "float32")),
        "batch_size": batch_size,
        "after_batch": lambda count: after_batch(),
    }
    found = []
    for task in tasks:
        found.append(_evaluate_task(loaded, loaded.tokenizer, task, how))
        after_task(found[-1])
    errors = [each.stderr for each in found if each.stderr is not None]
    stderr = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
    return CoreScore(sum(each.centred for each in found) / len(found), stderr, found)


def _evaluate_task(loaded: LoadedModel, tokenizer: Tokenizer, task: CoreTask, how: dict[str, Any]) -> TaskScore:
    n, right, truncated = len(task.examples), 0, 0
    size = loaded.model.cfg.block_size
    for start in range(0, n, GROUP):
        indices = range(start, min(n, start + GROUP))
        options = [_requests(task.kind, _encode(tokenizer, task.prompts(index))) for index in indices]
        truncated += sum(any(len(each.tokens) > size for each in group) for group in options)
        cut = [[_cut(each, size) for each in group] for group in options]
        # What has nothing to score is identical with the start of another choice, and never chosen.
        scores = iter(score(loaded.model, [each for group in cut for each in group if each.n_scored], **how))
        for index, group in zip(indices, cut, strict=True):
            found = [next(scores) if each.n_scored else None for each in group]
            right += _is_right(task.kind, task.examples[index], group, found)
    accuracy, scale = right / n, 1 - task.baseline
    stderr = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) / scale if n > 1 else None
    return TaskScore(task.label, accuracy, (accuracy - task.baseline) / scale, stderr, n, truncated)


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, each after the document separator, or a newline if the tokenizer has none."""
    first = prefix_token(tokenizer)
    return [[first, *map(int, ids)] for ids in tokenizer.encode_batch(prompts, threads=1)]


def _requests(kind: str, prompts: Sequence[list[int]]) -> list[Scored]:
    """What is scored of the prompts of one example.

    Choices are scored after the tokens that all of them share, a schema in the tokens that its prompts share at the
    end. Of language modeling, the continuation is what the prompt with it has more.
    """
    if kind == "schema":
        shared = _common(*(tokens[::-1] for tokens in prompts))
        return [Scored(tokens, min(shared, len(tokens) - 1)) for tokens in prompts]
    shared = _common(*prompts)
    scored = prompts if kind == "multiple_choice" else prompts[1:]
    return [Scored(tokens, len(tokens) - shared) for tokens in scored]


def _common(*sequences: Sequence[int]) -> int:
    """How many tokens all sequences start with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def _cut(request: Scored, size: int) -> Scored:
    """Keeps the last `size` tokens, the last of which is only a target."""
    tokens = request.tokens[-size:]
    return Scored(tokens, min(request.n_scored, len(tokens) - 1))


def _is_right(kind: str, example: Any, requests: Sequence[Scored], scores: Sequence[Score | None]) -> bool:
    if kind == "language_modeling":
        return all(each is not None and each.is_greedy for each in scores)
    losses = [
        math.inf if each is None else -each.loglikelihood / request.n_scored
        for request, each in zip(requests, scores, strict=True)
    ]
    return losses.index(min(losses)) == example["gold"]
