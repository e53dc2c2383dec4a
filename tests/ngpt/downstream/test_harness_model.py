"""In lm-evaluation-harness, our model and the harness's own `hf` model agree on the same weights, sample by sample."""

import tomllib
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ngpt.config.base import override
from ngpt.convert import main as convert
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import load_model
from tests.helpers import tiny_run
from tests.helpers.harness_tasks import TASKS, write_tasks
from tests.helpers.vocabularies import ENGLISH

pytestmark = pytest.mark.slow  # imports transformers and the harness, and needs the extra `lm-eval`
ROOT = Path(__file__).parents[3]
CONTEXT = 64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
MODELS = {"llama": ("Llama", {"num_key_value_heads": 2}), "nanochat": ("NanoChat", {"num_key_value_heads": 4})}


def write_tokenizer(folder: Path, *, begins: bool) -> int:
    """Writes a byte-level tokenizer: as Llama's, with `<s>` before each text, or as GPT-2's, without."""
    from transformers import PreTrainedTokenizerFast  # takes a second, also where slow tests are only collected

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>"] if begins else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how: dict[str, Any] = {"vocab_size": 300, "special_tokens": names, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(ENGLISH.splitlines(), trainers.BpeTrainer(**how, show_progress=False))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": names[0], "eos_token": names[-1]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_model(folder: Path, family: str, *, begins: bool) -> tuple[Path, Path]:
    """Writes a random model of transformers, sharp enough that greedy decoding has no ties, and converts it."""
    import transformers

    vocab_size = write_tokenizer(folder, begins=begins)
    kind, settings = MODELS[family]
    torch.manual_seed(4)
    sizes = SIZES | settings | {"vocab_size": vocab_size, "max_position_embeddings": CONTEXT}
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=int(begins))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0 * weight if name.endswith("norm.weight") else 0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    out = folder.with_name(f"{folder.name}-ours")
    assert convert([str(folder), "--out", str(out)]) == 0
    return folder, out


def evaluate(
    model: str, path: Path, include: Path, tasks: Sequence[str] = tuple(TASKS), **options: Any
) -> dict[str, Any]:
    """What the harness measures and logs of every sample."""
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import model_registry
    from lm_eval.tasks import TaskManager

    import_module("lm_eval.models")  # the harness's own, such as `hf`
    if "ngpt" not in model_registry:
        model_registry.register("ngpt", target=entry_point())
    found = simple_evaluate(
        model=model,
        model_args={"pretrained": str(path), "dtype": "float32", **options},
        tasks=list(tasks),
        batch_size=options.pop("batch_size", 4),
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
    )
    assert found is not None
    return found


def entry_point() -> EntryPoint:
    """The one that pyproject.toml declares, and lm_eval looks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return EntryPoint("ngpt", project["entry-points"]["lm_eval.models"]["ngpt"], "lm_eval.models")


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize(("family", "begins"), [("llama", True), ("nanochat", False)])
def test_both_routes_agree_on_every_sample_of_every_kind_of_task(
    tmp_path: Path, include: Path, family: str, begins: bool
) -> None:
    theirs_path, ours_path = write_model(tmp_path / "model", family, begins=begins)
    theirs, ours = evaluate("hf", theirs_path, include), evaluate("ngpt", ours_path, include)
    flags, generated = compare(theirs, ours, list(TASKS))
    assert flags == {True, False}
    assert len(generated) > 3 and any(generated)


def test_an_exported_ngpt_scores_as_the_run_that_it_comes_from(
    tiny: TrainConfig, tmp_path: Path, include: Path
) -> None:
    from ngpt.export.__main__ import main as export

    tiny_run.run(override(tiny, {"block_size": 64}), tmp_path / "run")
    assert export([str(tmp_path / "run"), "--to", "hf", str(tmp_path / "exported")]) == 0
    tasks = ["endings", "last_word", "texts"]
    tokenizer = load_model(tmp_path / "run").tokenizer
    assert tokenizer is not None
    newline = int(tokenizer.encode("\n")[0])  # what this tokenizer without special tokens starts a text with
    options = {"trust_remote_code": True, "prefix_token_id": newline}
    theirs = evaluate("hf", tmp_path / "exported", include, tasks, **options)
    compare(theirs, evaluate("ngpt", tmp_path / "run", include, tasks), tasks)


def compare(theirs: dict[str, Any], ours: dict[str, Any], tasks: list[str]) -> tuple[set[bool], set[str]]:
    """Compares all samples and scores; returns the greedy flags and the generated texts that occurred."""
    flags, generated = set[bool](), set[str]()
    for name in tasks:
        for their, our in zip(theirs["samples"][name], ours["samples"][name], strict=True):
            assert our["arguments"] == their["arguments"]
            for (expected,), (found,) in zip(their["resps"], our["resps"], strict=True):
                if isinstance(expected, str):
                    assert found == expected
                    generated.add(found)
                elif isinstance(expected, float):
                    assert found == pytest.approx(expected, abs=1e-3)
                else:
                    assert found[0] == pytest.approx(expected[0], abs=1e-4)
                    assert found[1] == expected[1]
                    flags.add(found[1])
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    return flags, generated
