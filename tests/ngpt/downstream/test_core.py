"""CORE equals a float64 computation that takes one prompt at a time, by the rules of nanochat."""

import json
import random
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from ngpt.config.base import ConfigError, build
from ngpt.data.dataset import Dataset
from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer
from ngpt.downstream import bundle_files
from ngpt.downstream.__main__ import main
from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.core import CoreScore, evaluate_core
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import LoadedModel
from tests.helpers import core_bundle, numpy_gpt, tiny_run
from tests.helpers.core_bundle import write_bundle

SHOTS = "{% for shot in shots %}{{ QUESTION }}{{ delimiter }}{{ ANSWER }}\n\n{% endfor %}"
TEMPLATES = {
    "multiple_choice": SHOTS.replace("QUESTION", "shot.query").replace("ANSWER", "shot.choices[shot.gold]")
    + "{{ item.query }}{{ delimiter }}{{ choice }}",
    "schema": SHOTS.replace("QUESTION", "shot.context_options[shot.gold]").replace("ANSWER", "shot.continuation")
    + "{{ choice }}{{ delimiter }}{{ item.continuation }}",
    "language_modeling": SHOTS.replace("QUESTION", "shot.context|trim").replace("ANSWER", "shot.continuation")
    + "{{ item.context|trim }}{{ delimiter }}{% if choice %}{{ item.continuation }}{% endif %}",
}
TASKS = {  # label: file, type, examples before each one, delimiter, accuracy of guessing
    "answers": ("reading/answers", "multiple_choice", 2, "\nAnswer: ", 0.25),
    "contexts": ("contexts", "schema", 0, " ", 0.5),
    "endings": ("endings", "language_modeling", 1, " ", 0.0),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def tokenizer(dataset: Dataset) -> Tokenizer:
    return load_tokenizer("sentencepiece:400", dataset.folder)


def loaded_model(tokenizer: Tokenizer, *, block_size: int = 192, **changes: Any) -> LoadedModel:
    """A random model whose most probable tokens are those that end the examples, so that some are right."""
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": block_size, "vocab_size": tokenizer.vocab_size}
    model = GPT(build(ModelConfig, size | {"logit_scale": 8.0} | changes), seed=1).eval()
    with torch.no_grad():
        for letter in "aei":
            token = int(tokenizer.encode(f" {letter}")[-1])
            model.lm_head.weight[token] *= 3  # pyright: ignore[reportOptionalMemberAccess]
    return LoadedModel(model, tokenizer, Checkpoint.__new__(Checkpoint))


def reference(loaded: LoadedModel, bundle: Path, *, most: int = 10**6) -> dict[str, tuple[float, int]]:
    """The accuracy of each task, and how many of its examples do not fit into `most` tokens."""
    assert loaded.tokenizer is not None
    newline = int(loaded.tokenizer.encode("\n")[0])  # this tokenizer has no document separator
    found = {}
    for label, (file, kind, n_shots, delimiter, _) in TASKS.items():
        data = [json.loads(line) for line in (bundle / "eval_data" / f"{file}.jsonl").read_text().split("\n")[:-1]]
        random.Random(1337).shuffle(data)
        right, too_long = 0, 0
        for index, item in enumerate(data):
            shots = random.Random(1234 + index).sample(data[:index] + data[index + 1 :], n_shots)
            choices = {"multiple_choice": item.get("choices"), "schema": item.get("context_options")}.get(kind)
            template = jinja2.Template(TEMPLATES[kind])
            texts = [
                template.render(item=item, shots=shots, delimiter=delimiter, choice=choice)
                for choice in choices or [False, True]
            ]
            texts = texts if choices else [texts[0].strip(), texts[1]]
            prompts = [[newline, *map(int, loaded.tokenizer.encode(text))] for text in texts]
            too_long += any(len(prompt) > most for prompt in (prompts if choices else prompts[1:]))
            right += judge(loaded.model, kind, item, prompts, most)
        found[label] = right / len(data), too_long
    return found


def judge(model: GPT, kind: str, item: dict[str, Any], prompts: list[list[int]], most: int) -> bool:
    if kind == "language_modeling":
        start = next(i for i in range(len(prompts[1])) if prompts[0][i : i + 1] != prompts[1][i : i + 1])
        logits, cut = logits_of(model, prompts[1], most)
        return all(logits[i - cut - 1].argmax() == prompts[1][i] for i in range(start, len(prompts[1])))
    sign = 1 if kind == "multiple_choice" else -1
    columns = zip(*(prompt[::sign] for prompt in prompts), strict=False)
    shared = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    means = []
    for prompt in prompts:
        logits, cut = logits_of(model, prompt, most)
        first = shared if sign == 1 else len(prompt) - shared
        losses = [
            np.log(np.exp(logits[i - cut - 1]).sum()) - logits[i - cut - 1][prompt[i]]
            for i in range(first, len(prompt))
        ]
        means.append(np.mean(losses))
    return int(np.argmin(means)) == item["gold"]


def logits_of(model: GPT, prompt: list[int], most: int) -> tuple[np.ndarray, int]:
    """The logits of the last `most` tokens, and how many were cut off before them."""
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    kept = prompt[-most:]
    return numpy_gpt.logits(model.cfg, weights, np.array([kept]))[0], len(prompt) - len(kept)


def core_of(loaded: LoadedModel, bundle: Path, **options: Any) -> CoreScore:
    return evaluate_core(loaded, read_bundle(bundle, **options), dtype="float32")


def test_every_task_has_the_accuracy_of_one_prompt_at_a_time(tokenizer: Tokenizer, bundle: Path) -> None:
    loaded = loaded_model(tokenizer)
    found = core_of(loaded, bundle)
    assert {each.label: (each.accuracy, each.truncated) for each in found.tasks} == reference(loaded, bundle)
    centred = [(each.accuracy - TASKS[each.label][-1]) / (1 - TASKS[each.label][-1]) for each in found.tasks]
    assert [each.centred for each in found.tasks] == pytest.approx(centred)
    assert found.core == pytest.approx(sum(centred) / 3)
    # The standard error of a mean of n answers that are right or wrong, and of the mean of independent tasks.
    errors = [
        np.std([1.0] * round(12 * each.accuracy) + [0.0] * round(12 * (1 - each.accuracy)), ddof=1)
        / 12**0.5
        / (1 - TASKS[each.label][-1])
        for each in found.tasks
    ]
    assert found.stderr == pytest.approx(float(np.sqrt(np.sum(np.square(errors)))) / 3)
    assert all(0 < each.accuracy < 1 for each in found.tasks)


def test_prompts_that_do_not_fit_lose_their_start_and_are_counted(tokenizer: Tokenizer, bundle: Path) -> None:
    loaded = loaded_model(tokenizer, block_size=40)
    found = core_of(loaded, bundle)
    expected = reference(loaded, bundle, most=40)
    assert {each.label: (each.accuracy, each.truncated) for each in found.tasks} == expected
    assert found.tasks[0].truncated > 0


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"query": "a", "choices": ["b", "c"], "gold": 2}, "an example has a gold that cannot be used"),
        ({"query": "a", "choices": "bc", "gold": 0}, "an example has a choices that cannot be used"),
        ({"query": None, "choices": ["b"], "gold": 0}, "an example has a query that cannot be used"),
        ({"query": "a", "gold": 0}, "an example has no choices"),
        (7, "is not JSON lines"),
    ],
)
def test_an_example_that_cannot_be_scored_is_refused(tmp_path: Path, example: object, message: str) -> None:
    folder = write_bundle(tmp_path)
    (folder / "eval_data" / "reading" / "answers.jsonl").write_text(json.dumps(example))
    with pytest.raises(ConfigError, match=f"answers.jsonl:? {message}"):
        read_bundle(folder)


def test_the_command_scores_a_run_with_the_bundle_in_the_cache_or_another(
    tiny: TrainConfig, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.run(tiny, tmp_path / "run")
    monkeypatch.setattr(bundle_files, "SHA256", "0" * 64)  # so that the cache has it in a folder of its own
    bundle_files.downloaded_bundle().parent.mkdir(parents=True)
    core_bundle.pack(bundle, bundle_files.downloaded_bundle())
    assert main(["core", str(tmp_path / "run"), "--limit", "5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["core"] == pytest.approx(np.mean([printed[f"core/{label}"] for label in TASKS]))
    assert [printed["tasks"][label]["examples"] for label in TASKS] == [5, 5, 5]
    # Both compute in a batch and alone the same, since padding changes nothing.
    assert main(["core", str(tmp_path / "run"), "--bundle", str(bundle), "--limit", "5", "--batch-size", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"core {printed['core']:.4f} +- {printed['core_stderr']:.4f}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "icl_tasks: []\n"}, "core.yaml has no list `icl_tasks:`"),
        ({"tasks": core_bundle.TASKS.replace("schema", "schema_task")}, "contexts: the type is one of multiple_choice"),
        ({"tasks": core_bundle.TASKS.replace("  label: contexts\n", "")}, "a task lacks 'label'"),
        ({"tasks": core_bundle.TASKS.replace("contexts.jsonl", "others.jsonl")}, "others.jsonl is missing"),
        ({"baselines": core_bundle.BASELINES.replace("50.0", "100")}, "contexts: guessing scores 1.0, not below 1"),
        ({"baselines": core_bundle.BASELINES.replace("contexts", "context")}, "no `Random baseline` of contexts"),
        ({"tasks": core_bundle.TASKS.replace("contexts.jsonl", "../x")}, "names eval_data/../x, which is not inside"),
        ({"n": 2}, "answers: 2 examples are too few to show 2 before each"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bundle_that_is_none_is_refused_by_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_bundle(write_bundle(tmp_path, **change))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
