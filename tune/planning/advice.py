"""Which settings of a campaign's arms are likely to be a mistake, each kind said once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.data.dataset import has_tokenizer, known_manifest
from ngpt.runs.advice import advice
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.planning.plan import PlannedPhase

Facts = Mapping[str, Any]  # about a corpus, as far as they are known: arguments of `advice`
MOST = 5  # sentences; a sweep may make a mistake in many ways


def advice_on_phases(phases: Iterable[PlannedPhase]) -> list[str]:
    """Returns a sentence for each likely mistake, without a period, from the sizes of the corpora that are prepared."""
    arms = [(f"{phase.name}/{arm.name}", arm.trials[0].config) for phase in phases for arm in phase.arms if arm.trials]
    return advice_on_arms(arms, _prepared_facts)


def advice_on_arms(arms: Iterable[tuple[str, TrainConfig]], facts: Callable[[TrainConfig], Facts]) -> list[str]:
    """Returns a sentence for each likely mistake, without a period, and which arms it is about unless it is all.

    `arms` are pairs of a name and a config; `facts` says what is known of a corpus.
    """
    found: dict[str, list[str]] = {}
    arms = list(arms)
    for name, config in arms:
        for sentence in advice(config, **facts(config)):
            found.setdefault(sentence, []).append(name)
    lines = []
    for sentence, names in found.items():
        about = "" if len(names) == len(arms) else f" ({fmt.listing(names, most=2)})"
        lines.append(f"{sentence}{about}")
    more = len(lines) - MOST
    return lines if more <= 1 else [*lines[:MOST], f"{more} more like these in other arms"]


def _prepared_facts(config: TrainConfig) -> Facts:
    try:
        manifest = known_manifest(config.data)
    except (ConfigError, OSError):  # reported when the corpus is prepared
        return {}
    if manifest is None:
        return {}
    tokens = {name: counts["tokens"] for name, counts in manifest["splits"].items()}
    return {
        "train_tokens": tokens["train"],
        "eval_tokens": tokens["val"],
        "has_tokenizer": has_tokenizer(manifest),
    }
