"""Initial weights that a campaign names: checked before anything starts, and known by their content."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.training.checkpoint import save_checkpoint
from ngpt.training.load_model import weights_digest
from tune.planning.plan import preview
from tune.spec.schema import Campaign

Load = Callable[[str], Campaign]

FILE = """\
campaign: c
base:
  model: {n_layer: 1, n_head: 2, n_embd: WIDTH, block_size: 8}
  data: {corpus: CORPUS, tokenizer: "sentencepiece:400"}
  init_from: runs/first
vary: {alpha: [0.1, 0.2]}
"""


@pytest.fixture
def file(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A campaign that starts from the run `runs/first` in the working directory, of width 16."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/first"), seed=1)
    return FILE.replace("WIDTH", "16").replace("CORPUS", str(corpus))


def write_run(folder: Path, *, seed: int) -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=400), seed=seed)
    save_checkpoint(
        folder / "checkpoints", weights=model.state_dict(), state={}, step=3, val_loss=None, identity={}, keep_last=1
    )


def ids(campaign: Campaign) -> list[str]:
    weights_digest.cache_clear()  # as in a new process
    return [trial.trial_id for phase in preview(campaign) for trial in phase.trials]


def test_a_trials_id_has_the_content_of_its_initial_weights_and_not_their_path(file: str, load: Load) -> None:
    before = ids(load(file))
    shutil.copytree("runs/first", "elsewhere")
    assert ids(load(file.replace("runs/first", "elsewhere"))) == before
    shutil.rmtree("runs/first")
    write_run(Path("runs/first"), seed=2)
    assert not set(ids(load(file))) & set(before)


def test_relative_initial_weights_are_found_from_any_folder_later(file: str, load: Load, tmp_path: Path) -> None:
    varied = file.replace("  init_from: runs/first\n", "").replace("alpha: [0.1, 0.2]", "init_from: [null, runs/first]")
    for campaign in (load(file), load(varied)):
        named = [trial.config.init_from for phase in preview(campaign) for trial in phase.trials]
        assert set(named) - {None} == {str(tmp_path / "runs" / "first")}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("runs/first", "runs/frist", "c.yaml:5:3: base.init_from: {}/runs/frist: no such folder"),
        (
            "n_embd: 16",
            "n_embd: 32",
            "c.yaml:5:3: base.init_from: the model does not fit {}/runs/first/checkpoints/step_0000003: "
            "blocks.0.attention.key.weight would be (32, 32), in the checkpoint it is (16, 16)",
        ),
        (
            "alpha: [0.1, 0.2]",
            "n_layer: [1, 2]",
            "c.yaml:6:21: vary.n_layer[1]: the model does not fit {}/runs/first/checkpoints/step_0000003: "
            "blocks.1.attention.key.weight would be (16, 16), in the checkpoint it is missing",
        ),
    ],
)
def test_weights_that_are_missing_or_do_not_fit_are_reported_at_their_place(
    before: str, after: str, message: str, file: str, load: Load, tmp_path: Path
) -> None:
    weights_digest.cache_clear()
    load(file)
    with pytest.raises(ConfigError) as error:
        load(file.replace(before, after))
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(error.value).splitlines()]
    assert lines == [message.format(tmp_path)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("strategy: fsdp", "strategy: a campaign says this in its resources: {ranks_per_trial: N, strategy: ...}"),
        ("gradient_dtype: bfloat16", "gradient_dtype: is for several ranks, and this run has one"),
    ],
)
def test_what_only_several_ranks_use_is_refused_without_them(setting: str, message: str, load: Load) -> None:
    file = f"campaign: ranks\nbase: {{steps: 4, {setting}}}\nvary: {{alpha: [0.1, 0.2]}}\n"
    with pytest.raises(ConfigError, match=f":2:.*{re.escape(message)}"):
        load(file)


def test_several_ranks_may_compress_gradients_and_the_ids_of_trials_do_not_depend_on_their_number(load: Load) -> None:
    file = "campaign: ranks\nbase: {steps: 4, batch_size: 8}\nvary: {alpha: [0.1, 0.2]}\n"
    ranks = "resources: {ranks_per_trial: 4, strategy: STRATEGY}\n"

    def ids(text: str) -> set[str]:
        return {trial.trial_id for phase in preview(load(text)) for trial in phase.trials}

    ddp, fsdp = (file + ranks.replace("STRATEGY", name) for name in ("ddp", "fsdp"))
    assert ids(file) == ids(ddp) == ids(fsdp)
    assert not ids(file) & ids(ddp.replace("steps: 4", "steps: 4, gradient_dtype: bfloat16"))
