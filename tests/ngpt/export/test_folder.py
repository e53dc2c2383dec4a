"""An exported folder is whole or absent, loads in transformers, and comes back bit for bit."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from ngpt.config.base import ConfigError
from ngpt.convert import main as convert
from ngpt.data.tokens.tokenizer import train_sentencepiece
from ngpt.export import modeling_ngpt
from ngpt.export.__main__ import main as export
from ngpt.export.folder import export_model
from ngpt.generate import generate_tokens
from ngpt.model.gpt import GPT
from ngpt.training.load_model import load_model
from tests.helpers.random_models import prompts, random_model, save_model
from tests.helpers.vocabularies import ENGLISH, write_llama

NANOCHAT = {"residual": "add", "mlp": "relu2", "softcap": 5.0, "n_kv_head": 1}
LLAMA = {"residual": "add", "qk_norm": False, "embedding_norm": False, "norm_gain": True, "tied": True}
SCHEDULE = {"alpha": 0.1, "alpha_final": 0.4, "norm_mode": "ema", "tied": True}
ADVICE = "trust_remote_code=True"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The copies that transformers makes of the code that it runs are the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, bytes]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([ENGLISH], 300, path)
    return "sentencepiece:300", "tokenizer.model", path.read_bytes()


def reloaded(folder: Path, trust: bool = True) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()


@torch.no_grad()
def assert_same(model: GPT, hf: Any) -> None:
    idx = prompts(model, length=16)
    torch.testing.assert_close(hf(idx).logits, model(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [(SCHEDULE, "NGPTForCausalLM"), (NANOCHAT, "NanoChatForCausalLM"), (LLAMA, "LlamaForCausalLM")],
)
def test_a_model_survives_transformers_and_comes_back_bit_for_bit(
    settings: dict[str, Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, again, back = (tmp_path / name for name in ("run", "out", "again", "back"))
    save_model(random_model(**settings), run, step=8, steps=11)
    model = load_model(run).model
    assert export([str(run), "--to", "hf", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{out}\n" and kind in told.err and "they differ by at most" in told.err
    is_remote = kind == "NGPTForCausalLM"
    assert (ADVICE in told.err, (out / "modeling_ngpt.py").is_file()) == (is_remote, is_remote)
    assert (ADVICE in (out / "README.md").read_text()) == is_remote
    hf = reloaded(out)
    assert type(hf).__name__ == kind
    assert_same(model, hf)
    hf.save_pretrained(again)
    assert_same(model, reloaded(again))
    assert convert([str(again), "--out", str(back)]) == 0
    converted = load_model(back)
    assert_same(converted.model, hf)
    own, found = model.state_dict(), converted.model.state_dict()
    assert own.keys() == found.keys()
    assert [name for name in own if not torch.equal(own[name], found[name])] == []


@pytest.mark.parametrize("settings", [{"logit_scale": 10.0, "s_uv": False}, NANOCHAT])
def test_a_text_goes_on_as_in_our_own_program(
    settings: dict[str, Any], tmp_path: Path, tokenizer: tuple[str, str, bytes]
) -> None:
    model = random_model(vocab_size=320, **settings)  # more entries than the tokenizer has
    with torch.no_grad():
        model.head_weight[300:] *= 50  # which would often be the most probable
    loaded = load_model(save_model(model, tmp_path / "run", tokenizer=tokenizer))
    exported = export_model(loaded, tmp_path / "out")
    assert exported.missing == ""
    hf = reloaded(tmp_path / "out")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.tokenizer is not None and reader.decode(reader(ENGLISH)["input_ids"]) == ENGLISH
    prompt = "<unk>the quick"  # which spells a special token
    right = loaded.tokenizer.encode(prompt).tolist()
    assert reader(prompt)["input_ids"] == right
    ours = generate_tokens(loaded.model, torch.tensor([right]), 8, temperature=0, vocab_size=300)
    expected = torch.cat(list(ours)).tolist()
    batch = reader([prompt, "the fox"], return_tensors="pt", padding=True, padding_side="left")
    assert hf.generate(**batch, do_sample=False, max_new_tokens=8)[0, -8:].tolist() == expected


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model", "none"])
def test_the_example_of_the_card_runs_and_the_hub_understands_its_head(
    kind: str, tmp_path: Path, tokenizer: tuple[str, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    unigram = write_llama(tmp_path / "unigram.model", model_type="unigram", vocab_size=290).read_bytes()
    given = {"tokenizer.json": tokenizer, "tokenizer.model": ("tokenizer.model", "tokenizer.model", unigram)}.get(kind)
    model = random_model(vocab_size=320, block_size=64)
    loaded = load_model(save_model(model, tmp_path / "run", tokenizer=given))
    export_model(loaded, tmp_path / "out", verify=False)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ngpt"]}
    assert card.data.to_dict() == head
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], found)
    ids = found["ids"]["input_ids"] if kind == "tokenizer.json" else found["ids"]
    right = [0, 1, 2] if loaded.tokenizer is None else loaded.tokenizer.encode("The file is").tolist()
    assert ids.tolist() == [right]


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = save_model(random_model(), tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert export([str(run), str(out)]) == 2
    assert capsys.readouterr().err == f"{out} exists already: remove it, or choose another folder\n"
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_model_whose_logits_differ_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = save_model(random_model(), tmp_path / "run"), tmp_path / "out"
    monkeypatch.setattr(modeling_ngpt, "l2_normalize", lambda x: x.float())
    assert export([str(run), str(out)]) == 2
    assert "the exported model computes other logits: they differ by " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert export([str(run), str(out), "--no-verify"]) == 0
    assert "The logits were not compared." in (out / "README.md").read_text()


def test_without_transformers_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_model(random_model(), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export([str(run), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "the export needs transformers: pip install 'ngpt-campaign[hf]'\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "settings are missing, which an exported model has"),
        ({"steps": 0}, "steps is 0, not a whole number from 1"),
        ({"settings": {"n_layer": 2}}, "vocab_size is missing"),
    ],
)
def test_a_changed_config_is_refused_on_the_way_back(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(load_model(save_model(random_model(), tmp_path / "run")), tmp_path / "out", verify=False)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert convert([str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_do_not_fit_are_listed_on_the_way_back(tmp_path: Path) -> None:
    from ngpt.conversion.exported import exported_settings, exported_weights, from_exported

    model = random_model()
    weights = exported_weights(model)
    weights["model.blocks.0.mlp.down.weight"] = torch.zeros(3, 3)
    weights["model.more"] = weights.pop("s_z.stored")
    with pytest.raises(ConfigError) as error:
        from_exported(weights, {"settings": exported_settings(model)})
    assert str(error.value).splitlines() == [
        "model.blocks.0.mlp.down.weight: shape (3, 3), expected (16, 32)",
        "model.more: unknown weight of an exported nGPT",
        "s_z.stored: missing weight of an exported nGPT",
    ]


def test_the_code_in_the_folder_imports_torch_and_transformers_alone() -> None:
    nodes = ast.walk(ast.parse(Path(modeling_ngpt.__file__).read_text(encoding="utf-8")))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(Path(modeling_ngpt.__file__).read_text(encoding="utf-8")))
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    outside = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert outside == {"torch", "transformers"}


def test_bfloat16_weights_give_nearly_the_same_logits(tmp_path: Path) -> None:
    model = random_model(alpha=0.3)
    export_model(load_model(save_model(model, tmp_path / "run")), tmp_path / "out", verify=False)
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16
    )
    idx = prompts(model, length=16)
    with torch.no_grad():
        right, found = model(idx), half(idx).logits
    assert found.dtype == torch.float32
    assert (found - right).abs().max() < 0.1 * right.std()


@torch.no_grad()
def test_labels_give_our_loss_and_hidden_states_our_stream(tmp_path: Path) -> None:
    model = random_model()
    export_model(load_model(save_model(model, tmp_path / "run")), tmp_path / "out", verify=False)
    idx = prompts(model, length=12)
    found = reloaded(tmp_path / "out")(idx, labels=idx, output_hidden_states=True, logits_to_keep=0)
    torch.testing.assert_close(found.loss, model(idx[:, :-1], idx[:, 1:]))
    streams = list(model.stream(idx))
    assert len(found.hidden_states) == len(streams)
    for one, other in zip(found.hidden_states, streams, strict=True):
        torch.testing.assert_close(one, other)
