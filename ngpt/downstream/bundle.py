"""The tasks of CORE: reads nanochat's bundle, and writes the prompts of its three types of tasks.

A bundle is a folder, or a .zip of it, with `core.yaml` (the tasks), `eval_meta_data.csv` (what guessing scores) and
`eval_data/` (the examples, as JSON lines). It comes from DCLM (arXiv 2406.11794) and MosaicML's evaluation gauntlet.
"""

import csv
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, printable
from ngpt.config.yaml_reader import parse_yaml
from ngpt.data.text.progress import Log, silent
from ngpt.downstream.bundle_files import DOWNLOAD, TASKS, BundleFiles, fetch_bundle

BASELINES, EXAMPLES = "eval_meta_data.csv", "eval_data"
FIELDS = {  # of an example, by type of task
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
LISTS = ("choices", "context_options")  # of texts, of which `gold` says which one is right
SHUFFLE_SEED, EXAMPLE_SEED = 1337, 1234  # of the order of examples, and, plus its index, of those shown before one

Example = Mapping[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task: how its prompts are written, and `baseline`, the accuracy of guessing, from 0 to below 1."""

    label: str
    kind: str  # a key of FIELDS
    examples: tuple[Example, ...]  # in the order of nanochat
    n_shots: int
    delimiter: str  # between question and answer
    baseline: float

    def content(self) -> str:
        """The SHA-256 of all that its score depends on, besides the model."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def shots(self, index: int) -> list[Example]:
        """The examples that are shown before example `index`: as nanochat draws them, never itself."""
        others = [i for i in range(len(self.examples)) if i != index]
        return [self.examples[i] for i in random.Random(EXAMPLE_SEED + index).sample(others, self.n_shots)]

    def prompts(self, index: int) -> list[str]:
        """The texts that the model compares for an example, each with its answer.

        Multiple choice has one for each choice, a schema one for each context. Language modeling has two: without the
        continuation, without white space at its end, and with it.
        """
        example, shots = self.examples[index], self.shots(index)
        shown = "".join(f"{self._question(each)}{self.delimiter}{self._answer(each)}\n\n" for each in shots)
        if self.kind == "multiple_choice":
            return [f"{shown}{example['query']}{self.delimiter}{choice}" for choice in example["choices"]]
        if self.kind == "schema":
            end = f"{self.delimiter}{example['continuation']}"
            return [f"{shown}{context}{end}" for context in example["context_options"]]
        prompt = f"{shown}{self._question(example)}{self.delimiter}"
        return [prompt.strip(), f"{prompt}{example['continuation']}"]

    def _question(self, example: Example) -> str:
        if self.kind == "multiple_choice":
            return example["query"]
        if self.kind == "schema":
            return example["context_options"][example["gold"]]
        return example["context"].strip()

    def _answer(self, example: Example) -> str:
        return example["choices"][example["gold"]] if self.kind == "multiple_choice" else example["continuation"]


def read_bundle(path: str | Path, *, limit: int | None = None, log: Log = silent) -> list[CoreTask]:
    """Reads the tasks of a bundle, with the first `limit` examples of each, after they are shuffled.

    Args:
        path: a folder or a .zip; `download`: nanochat's, which is downloaded unless the cache has it.
        log: prints lines about the download.

    Raises:
        ConfigError: there is no bundle, or a file of it is not what it should be; the message names the file.
    """
    files = BundleFiles(fetch_bundle(log) if path == DOWNLOAD else Path(path).expanduser())
    tasks = parse_yaml(files.read(TASKS), Path(files.name(TASKS))).data
    listed = tasks.get("icl_tasks") if isinstance(tasks, Mapping) else None
    if not isinstance(listed, Sequence) or not listed:
        raise ConfigError(f"{files.name(TASKS)} has no list `icl_tasks:`")
    rows = csv.DictReader(io.StringIO(files.read(BASELINES)))
    baselines = {row.get("Eval Task"): row.get("Random baseline") for row in rows}
    return [_read_task(raw, baselines, files, limit) for raw in listed]


def _read_task(raw: Any, baselines: Mapping[Any, Any], files: BundleFiles, limit: int | None) -> CoreTask:
    try:
        label, kind, uri = raw["label"], raw["icl_task_type"], raw["dataset_uri"]
        n_shots, delimiter = raw["num_fewshot"][0], raw.get("continuation_delimiter", " ")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{files.name(TASKS)}: a task lacks {error}: {printable(repr(raw))}") from None
    where = f"{files.name(TASKS)}: {printable(str(label))}"
    if kind not in FIELDS:
        raise ConfigError(f"{where}: the type is one of {', '.join(FIELDS)}, got {printable(repr(kind))}")
    try:
        baseline = 0.01 * float(baselines[label])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{files.name(BASELINES)} has no `Random baseline` of {printable(str(label))}") from None
    if not 0 <= baseline < 1:
        raise ConfigError(f"{files.name(BASELINES)}: {printable(str(label))}: guessing scores {baseline}, not below 1")
    name = f"{EXAMPLES}/{uri}"
    examples = [_read_example(line, kind, files.name(name)) for line in files.read(name).split("\n") if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(examples)
    examples = examples[:limit]
    if len(examples) <= n_shots:
        raise ConfigError(f"{where}: {len(examples)} examples are too few to show {n_shots} before each")
    return CoreTask(str(label), kind, tuple(examples), n_shots, str(delimiter), baseline)


def _read_example(line: str, kind: str, name: str) -> Example:
    try:
        example = json.loads(line)
        missing = [field for field in FIELDS[kind] if field not in example]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} is not JSON lines: {error}") from None
    if missing:
        raise ConfigError(f"{name}: an example has no {', '.join(missing)}: {printable(line)}")
    if wrong := [field for field in FIELDS[kind] if not _is_valid(field, example)]:
        raise ConfigError(f"{name}: an example has a {wrong[0]} that cannot be used: {printable(line)}")
    return example


def _is_valid(field: str, example: Any) -> bool:
    """Whether a field is a text, a list of texts, or the place of one in the list."""
    if field == "gold":
        texts = next(example[name] for name in LISTS if name in example)
        return type(example[field]) is int and isinstance(texts, list) and 0 <= example[field] < len(texts)
    texts = example[field] if field in LISTS else [example[field]]
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)
