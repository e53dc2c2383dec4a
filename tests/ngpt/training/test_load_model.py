"""Models loaded from checkpoints compute the same numbers, have the right tokenizer, and are never damaged."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ngpt.config.base import ConfigError, flatten, override
from ngpt.data.dataset import DataConfig, Dataset
from ngpt.data.tokens.shards import write_shard
from ngpt.data.tokens.tokenizer import load_tokenizer
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.training.checkpoint import save_checkpoint, verify_checkpoint
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.load_model import (
    find_checkpoint,
    load_model,
    parse_model_changes,
    saved_tokenizer,
    tokenizer_origin,
)
from ngpt.training.loop import train, train_step
from ngpt.training.run import Run, set_up
from ngpt.training.saving import save
from ngpt.training.tracker import Tracker
from tests.helpers.vocabularies import write_gpt2, write_ranks


def finish(config: TrainConfig, out: Path, dataset: Dataset | None = None) -> Path:
    """Trains to the end."""
    for _ in train(config, out, dataset=dataset):
        pass
    return out


@pytest.fixture(scope="module")
def trained(tiny: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 3, 6 and 8."""
    config = override(tiny, {"checkpoint.every": 3, "checkpoint.keep_last": 5})
    return finish(config, tmp_path_factory.mktemp("trained") / "run", dataset)


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:07d}"


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def damage(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def logits(model: torch.nn.Module, vocab_size: int = 400) -> torch.Tensor:
    idx = torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(idx)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha": 0.3, "alpha_final": 0.05},
        {"alpha": [0.3, 0.1], "alpha_kind": "head", "norm_mode": "dotprod", "norm_probability": 0.5},
        {"residual": "add", "norm_gain": True, "tied": True, "n_kv_head": 1},
    ],
)
def test_a_loaded_model_computes_what_the_run_computed(
    changes: dict[str, Any], tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    run: Run = set_up(override(resolved(tiny), changes), tmp_path, resume=None, dataset=dataset)
    for _ in range(5):
        train_step(run)
    with Tracker(run.config.tracker, tmp_path, settings={}) as tracker:
        save(run, tracker)
    model, tokenizer, checkpoint = load_model(tmp_path)
    assert not model.training and checkpoint.step == 5 and tokenizer is not None
    assert torch.equal(logits(model), logits(run.model.eval()))


@pytest.mark.parametrize("where", ["run", "checkpoints", "step"])
def test_a_model_is_found_by_its_run_or_checkpoint_folder(where: str, trained: Path) -> None:
    path = {"run": trained, "checkpoints": trained / "checkpoints", "step": step(trained, 3)}[where]
    assert find_checkpoint(path).step == (3 if where == "step" else 8)


def test_a_checkpoint_can_be_loaded_without_its_run_and_corpus(
    trained: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = copied(step(trained, 8), tmp_path / "alone")
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "nothing"))
    monkeypatch.chdir(moved)
    _, tokenizer, checkpoint = load_model(Path())
    assert checkpoint.step == 8 and tokenizer is not None
    assert tokenizer.sha256 == dataset.manifest["tokenizer"]["sha256"]
    assert tokenizer.decode(tokenizer.encode("def f(x): é 日")) == "def f(x): é 日"


def test_loading_unpickles_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    assert load_model(trained).checkpoint.step == 8


def test_the_best_checkpoint_has_the_lowest_validation_loss(tmp_path: Path) -> None:
    cfg = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=300)
    identity = {f"model.{name}": value for name, value in flatten(cfg).items()}
    for number, loss in enumerate([3.0, 2.0, None, 2.5], start=1):
        model = GPT(cfg, seed=number)
        save_checkpoint(
            tmp_path, weights=model.state_dict(), state={}, step=number, val_loss=loss, identity=identity, keep_last=9
        )
    assert find_checkpoint(tmp_path, best=True).step == 2 and find_checkpoint(tmp_path).step == 4
    best = load_model(tmp_path, best=True).model
    assert torch.equal(best.wte.weight, GPT(cfg, seed=2).wte.weight)
    with pytest.raises(ConfigError, match="step_0000003 has no checkpoint with a validation loss"):
        find_checkpoint(tmp_path / "step_0000003", best=True)


def test_a_damaged_checkpoint_is_skipped_and_not_renamed(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied(trained, tmp_path / "run")
    damage(step(run, 8))
    before = sorted(run.rglob("*"))
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(run).step == 6
    assert "skipped a damaged checkpoint" in caplog.text and "step_0000008" in caplog.text
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ConfigError, match=r"step_0000008 has no intact checkpoint: .*SHA-256 differs"):
        load_model(step(run, 8))
    (step(run, 8) / "MANIFEST.json").unlink()
    with pytest.raises(ConfigError, match=r"step_0000008 has no intact checkpoint: .*MANIFEST\.json"):
        load_model(step(run, 8))
    damage(step(run, 6))
    damage(step(run, 3))
    with pytest.raises(ConfigError, match="run has no intact checkpoint"):
        load_model(run)


def test_an_error_for_a_wrong_folder_suggests_another(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: no such folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"model\.safetensors: a file, give the folder that it is in"):
        load_model(step(trained, 8) / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{tmp_path.name} has no checkpoints$"):
        load_model(tmp_path)
    for trial in ("b-s1", "a-s1"):
        (tmp_path / "trials" / trial).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has no checkpoints; give one of its 2 trials, such as .*trials/a-s1$"):
        load_model(tmp_path)


def test_settings_that_do_not_affect_weights_can_be_changed(trained: Path) -> None:
    plain = load_model(trained).model
    longer = load_model(trained, block_size=64, rope_scaling="yarn", rope_factor=4).model
    assert (longer.cfg.block_size, longer.cfg.rope_scaling, len(longer.cos)) == (64, "yarn", 64)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), longer.parameters(), strict=True))
    assert not torch.allclose(logits(longer), logits(plain))
    more = load_model(trained, block_size=64).model  # a larger block size alone does not change the first tokens
    torch.testing.assert_close(logits(more), logits(plain))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_embd": 32},
            r"n_embd=32 does not fit .*: blocks\.0\.attention\.key\.weight would be \(32, 32\), in the ch",
        ),
        ({"n_layer": 3}, r"n_layer=3 does not fit .*: blocks\.2\.\S+ would be .*, in the checkpoint it is missing"),
        ({"n_layer": 1}, r"n_layer=1 does not fit .*: blocks\.1\.\S+ would be missing"),
        ({"tied": True}, r"tied=True does not fit .*: lm_head\.weight would be missing"),
        (
            {"vocab_size": 500},
            r"vocab_size=500 does not fit .* would be \(500, 16\), in the checkpoint it is \(400, 16\)",
        ),
        ({"rope_scalng": "yarn"}, "rope_scalng: unknown setting, did you mean 'rope_scaling'?"),
        ({"rope_scaling": "yarm"}, "rope_scaling: unknown rope scaling 'yarm', did you mean 'yarn'?"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(changes: dict[str, Any], message: str, trained: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(trained, **changes)


def test_set_changes_only_settings_of_the_model(trained: Path) -> None:
    assert parse_model_changes(["rope_factor=4", "model.tied=true"]) == {"model.rope_factor": 4, "model.tied": True}
    for name in ("device", "best", "tokenizer", "path", "lr"):
        with pytest.raises(ConfigError, match=f"{name}: unknown setting"):
            load_model(trained, **parse_model_changes([f"{name}=1"]))


def test_a_tokenizer_other_than_the_models_is_refused(trained: Path, tmp_path: Path) -> None:
    own = shutil.copy(step(trained, 8) / "tokenizer.model", tmp_path / "mine.model")
    again = load_model(trained, tokenizer=str(own)).tokenizer
    assert again is not None and again.vocab_size == 400
    with pytest.raises(ConfigError, match="sentencepiece:400 is trained on a corpus"):
        load_model(trained, tokenizer="sentencepiece:400")
    other = tmp_path / "other.model"
    other.write_bytes(Path(own).read_bytes() + _unused_field())
    with pytest.raises(ConfigError, match=r"other\.model is not the tokenizer that .*step_0000008 was trained with"):
        load_model(trained, tokenizer=str(other))


def _unused_field() -> bytes:
    """Another file with the same tokenizer: adds the unused protobuf field 1000 with the value 1."""
    return bytes([0xC0, 0x3E, 0x01])


def test_a_model_trained_on_shards_has_the_tokenizer_beside_them(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    def tokenizer_of(number: int, *, beside: bool) -> object:
        shards = tmp_path / f"shards-{number}"
        shards.mkdir(exist_ok=True)
        for split, tokens in (("train", dataset.train[0]), ("val", dataset.val[0])):
            write_shard(shards / f"{split}_0.bin", np.asarray(tokens)[number:], vocab_size=400)
        (shards / "tokenizer.model").unlink(missing_ok=True)
        if beside:
            shutil.copy(dataset.folder / "tokenizer.model", shards)
        run = tmp_path / f"run-{number}-{beside}"
        finish(override(tiny, {"data.corpus": str(shards), "steps": 1}), run)
        return load_model(run).tokenizer

    assert tokenizer_of(1, beside=True) is not None
    assert tokenizer_of(2, beside=False) is None
    assert tokenizer_of(1, beside=False) is None  # although its hash is known from before


def test_a_tokenizer_given_by_path_is_saved_in_the_checkpoint(
    tiny: TrainConfig, data: DataConfig, dataset: Dataset, tmp_path: Path
) -> None:
    given = Path(shutil.copy(dataset.folder / "tokenizer.model", tmp_path / "given.model"))
    finish(override(tiny, {"data.tokenizer": str(given), "steps": 1}), tmp_path / "run")
    given.unlink()
    tokenizer = load_model(tmp_path / "run").tokenizer
    assert tokenizer is not None
    assert np.array_equal(tokenizer.encode("a file"), load_tokenizer(data.tokenizer, dataset.folder).encode("a file"))


@pytest.mark.parametrize("kind", ["hf", "tiktoken:cl100k_base"])  # the ids of the latter need 32 bits
def test_a_tokenizer_of_another_library_is_saved_in_the_checkpoint(
    kind: str, tiny: TrainConfig, tmp_path: Path
) -> None:
    if kind == "hf":
        given = write_gpt2(tmp_path / "given")
        (given / "encoder.json").rename(given / "vocab.json")
        (given / "vocab.bpe").rename(given / "merges.txt")
    else:
        given = write_ranks(tmp_path / "given.tiktoken")
    before = load_tokenizer(f"{kind}:{given}", None)
    finish(override(tiny, {"data.tokenizer": f"{kind}:{given}", "steps": 1}), tmp_path / "run")
    shutil.rmtree(given) if given.is_dir() else given.unlink()
    loaded = load_model(tmp_path / "run")
    assert loaded.tokenizer is not None and loaded.tokenizer.sha256 == before.sha256
    assert np.array_equal(loaded.tokenizer.encode("the file"), before.encode("the file"))
    spec = saved_tokenizer(loaded.checkpoint)
    assert spec is not None and load_tokenizer(spec, None).sha256 == before.sha256


def test_the_tokenizer_in_a_checkpoint_is_not_part_of_its_identity(trained: Path) -> None:
    folder = step(trained, 8)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "state.pt", "tokenizer.model"]
    assert not any(name in manifest["identity"] for name in ("data.corpus", "data.tokenizer", "data.path"))
    assert tokenizer_origin(verify_checkpoint(folder)).spec == "sentencepiece:400"


def test_a_converted_model_can_be_loaded(trained: Path, tmp_path: Path) -> None:
    cfg = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=450)
    spec = str(step(trained, 8) / "tokenizer.model")
    identity = {f"model.{name}": value for name, value in flatten(cfg).items()} | {"data.tokenizer": spec}
    save_checkpoint(
        tmp_path, weights=GPT(cfg).state_dict(), state={}, step=0, val_loss=None, identity=identity, keep_last=1
    )
    tokenizer = load_model(tmp_path).tokenizer
    assert tokenizer is not None and tokenizer.vocab_size == 400
