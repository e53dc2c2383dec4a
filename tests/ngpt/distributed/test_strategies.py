"""Several ranks train as one device does, with every strategy; ranks are processes on this CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError, build
from ngpt.distributed.strategies import DistributedConfig
from ngpt.training.config import TrainConfig
from tests.helpers.rank_cases import train_cases

TOLERANCE = 1e-5  # nats, in float32
MUONS = {"lr": 0.02, "optim.lr_other": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optim.name": "adamw", "optim.weight_decay": 0.1},
    "muon": {"optim.name": "muon", "optim.weight_decay": 0.1, **MUONS},
    "geodesic muon": {"optim.name": "geodesic_muon", **MUONS},
    "riemannian adamw": {"optim.name": "riemannian_adamw"},
    "tied": {"model.tied": True, "optim.name": "geodesic_muon", **MUONS},
    "gpt": {"model.residual": "add", "model.mlp": "relu2", "optim.name": "muon", **MUONS},
    "gpt with gains": {"model.residual": "add", "model.norm_gain": True, "model.qkv_bias": True},
    "add_normalize": {"model.residual": "add_normalize"},
    "dot product": {"model.norm_mode": "dotprod"},
    "scalar alpha": {"model.alpha_kind": "scalar", "model.logit_scale_kind": "scalar"},
    "alpha per head": {"model.alpha_kind": "head"},
    "accumulation": {"micro_batch_size": 1},
    "clipping": {"optim.grad_clip": 0.01},
    "no clipping": {"optim.grad_clip": None},
    "rare projection": {"project_every": 4},
    "stochastic norms": {"model.norm_probability": 0.5, "model.alpha_final": 0.3},
    "grouped queries": {"model.n_head": 4, "model.n_kv_head": 2, "optim.name": "muon", **MUONS},
    "value residual": {"model.residual": "add", "model.value_residual": 0.5},
}
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def alone(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return train_cases(tiny, tmp_path_factory.mktemp("alone") / "out", CASES, ranks=1)


@pytest.fixture(scope="module")
def together(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Results]:
    """Trains all cases with a strategy on a number of ranks, once."""
    known: dict[tuple[str, int], Results] = {}

    def results(strategy: str, ranks: int) -> Results:
        if (strategy, ranks) not in known:
            out = tmp_path_factory.mktemp("together") / "out"
            changes = {"distributed.strategy": strategy}
            known[strategy, ranks] = train_cases(tiny, out, CASES, ranks=ranks, changes=changes)
        return known[strategy, ranks]

    return results


def pairs() -> Iterator[Any]:
    for strategy, ranks in (("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)):
        marks = [pytest.mark.long] if ranks == 4 and strategy == "ddp" else []  # four processes on two cores
        yield from (pytest.param(strategy, ranks, case, id=f"{strategy}-{ranks}-{case}", marks=marks) for case in CASES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("strategy", "ranks", "case"), [*pairs()])
def test_several_ranks_give_the_losses_of_one_device(
    strategy: str, ranks: int, case: str, alone: Results, together: Callable[[str, int], Results]
) -> None:
    found, expected = together(strategy, ranks)[case], alone[case]
    assert expected["losses"][0] != pytest.approx(expected["losses"][-1], abs=100 * TOLERANCE), "nothing was learned"
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_blocks_that_are_compiled_or_computed_again_give_the_same_losses(tiny: TrainConfig, tmp_path: Path) -> None:
    cases = {"plain": CASES["muon"], "again": CASES["muon"] | {"activation_checkpointing": True}}
    cases["compiled"] = CASES["muon"] | {"compile": True}
    cases["both"] = cases["compiled"] | cases["again"]
    found = train_cases(tiny, tmp_path / "out", cases, ranks=2, changes={"distributed.strategy": "fsdp"})
    assert found["again"] == found["plain"]
    for name in ("compiled", "both"):
        assert found[name]["losses"] == pytest.approx(found["plain"]["losses"], abs=TOLERANCE), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_in_fewer_bits_change_the_loss_a_little(
    ranks: int, tiny: TrainConfig, tmp_path: Path, alone: Results
) -> None:
    changes = {"distributed.gradient_dtype": "bfloat16"}, {"distributed.gradient_dtype": "float8"}
    cases = {each["distributed.gradient_dtype"]: CASES["adamw"] | each for each in changes}
    found = train_cases(tiny, tmp_path / "out", cases, ranks=ranks)
    for name in cases:
        assert found[name] != alone["adamw"], name
        assert found[name]["losses"] == pytest.approx(alone["adamw"]["losses"], abs=0.01), name


def test_an_unknown_strategy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown strategy 'fsdp2', did you mean 'fsdp'"):
        build(DistributedConfig, {"strategy": "fsdp2"})
