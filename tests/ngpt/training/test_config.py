"""Training settings: conflicting ones are refused, and errors have their position in the file."""

from pathlib import Path

import pytest

from ngpt.config.base import ConfigError, content_hash, override
from ngpt.training.config import TrainConfig, read_config, resolved


def test_the_vocabulary_may_be_larger_than_the_tokenizers(tiny: TrainConfig) -> None:
    assert resolved(tiny).model.vocab_size == 400
    assert resolved(override(tiny, {"vocab_size": 512})).model.vocab_size == 512
    with pytest.raises(ConfigError, match=r"model\.vocab_size 399 is smaller than the 400 tokens of the data"):
        resolved(override(tiny, {"vocab_size": 399}))


def test_a_batch_must_be_a_multiple_of_its_micro_batch(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size: batch_size 4 is not a multiple of micro_batch_size 3"):
        override(tiny, {"micro_batch_size": 3})


@pytest.mark.parametrize("optimizer", ["geodesic_muon", "riemannian_adamw"])
def test_a_spherical_optimizer_needs_a_spherical_model(optimizer: str, tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=f"optim.name: optimizer {optimizer} .*add"):
        override(tiny, {"optim.name": optimizer, "residual": "add"})


def test_runtime_settings_are_not_part_of_the_identity(tiny: TrainConfig) -> None:
    other = {"device": "auto", "tracker.wandb": "offline", "tracker.log_every": 3, "checkpoint.every": 7}
    assert content_hash(override(tiny, other)) == content_hash(tiny)
    assert content_hash(override(tiny, {"project_every": 2})) != content_hash(tiny)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 1e-2", "  lrr: 1e-2", "{file}:9:3: optim.lrr: unknown setting, did you mean 'lr'?"),
        ("  lr: 1e-2", "  lr: '1e-2'", "{file}:9:3: optim.lr: input should be a valid number, got '1e-2'"),
        ("0.99]", "1.5]", "{file}:10:16: optim.betas[1]: input should be less than 1, got 1.5"),
        ("n_head: 2", "n_head: 3", "{file}:2:21: model.n_head: n_embd 16 cannot be divided into n_head 3 heads"),
        (
            "steps: 4",
            "sceptre: 4",
            "{file}:4:1: sceptre: unknown setting; find it with `python run_campaign.py settings WORD`",
        ),
        ("steps: 4", "steps: 4\nsteps: 5", "{file}:5:1: duplicate key 'steps'"),
        ("steps: 4", "steps: 4\nlr: 0.1", "{file}:10:3: optim.lr: optim.lr is given twice"),
        ("steps: 4", "steps: [4", "{file}:5:11: not valid YAML"),
    ],
)
def test_an_error_in_the_file_has_its_position(old: str, new: str, message: str, settings_file: Path) -> None:
    settings_file.write_text(settings_file.read_text().replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_config(settings_file, [])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(message.format(file=settings_file))


def test_all_errors_of_a_file_are_reported_together(settings_file: Path) -> None:
    settings_file.write_text(settings_file.read_text().replace("n_layer: 1", "n_layer: 0").replace("1e-2", "-1"))
    with pytest.raises(ConfigError) as caught:
        read_config(settings_file, [])
    lines = [line.removeprefix(f"{settings_file}:").split(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(lines) == ["2", "9"]


def test_assignments_override_the_file_and_the_file_overrides_defaults(settings_file: Path) -> None:
    config = read_config(settings_file, ["lr=3e-2", "model.alpha=0.2"])
    assert (config.optim.lr, config.model.alpha, config.steps) == (0.03, 0.2, 4)
    assert config.project_every == TrainConfig().project_every
    assert read_config(None, []) == TrainConfig()
