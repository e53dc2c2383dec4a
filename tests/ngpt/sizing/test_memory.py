"""Planned memory against what torch's own accounting sees in real steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from ngpt.distributed.ranks import ALONE, ProcessRanks, Ranks
from ngpt.distributed.strategies import replicate
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import build_optimizers
from ngpt.sizing.memory import RankMemory, rank_memory
from ngpt.training.config import TrainConfig, read_config

MODELS = Path(__file__).parents[3] / "experiments" / "models"
SMALL = ("n_layer=2", "n_head=2", "n_embd=64", "vocab_size=256", "block_size=64", "batch_size=4")


@pytest.fixture
def four_ranks() -> Iterator[ProcessRanks]:
    """The first of four ranks, in a group of torch's that sends nothing: sizes are right, numbers are not."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    assert dist.group.WORLD is not None
    yield ProcessRanks(dist.group.WORLD, dist.group.WORLD)
    dist.destroy_process_group()


def peak(config: TrainConfig, ranks: Ranks) -> dict[str, int]:
    """The bytes by category at the peak of the second step of a rank, as torch counts them."""
    model = GPT(config.model)
    if config.activation_checkpointing:
        model.recompute_blocks()
    replica = replicate(model, ranks, config.distributed)
    optimizers = build_optimizers(replica.model, config.optim)
    replica.adopt(optimizers)
    idx = torch.zeros(config.batch_size // ranks.count, config.model.block_size, dtype=torch.int64)
    tracker = MemTracker()
    tracker.track_external(replica.model, *optimizers)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            replica.loss(idx, idx).backward()
            replica.parameters()  # gives the parts their gradients
            for optimizer in optimizers:
                optimizer.step()
            replica.model.zero_grad(set_to_none=True)
    (sizes,) = tracker.get_tracker_snapshot("peak").values()
    return {str(name).split(".")[-1].lower(): size for name, size in sizes.items()}


def small(*settings: str) -> TrainConfig:
    return read_config(None, [*SMALL, *settings])


def planned(config: TrainConfig, ranks: int = 1) -> RankMemory:
    return rank_memory(config, ranks, strategy=config.distributed.strategy, recompute=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "geodesic_muon", "riemannian_adamw"])
def test_weights_and_moments_are_those_of_a_real_step(optimizer: str) -> None:
    config = small(f"optim.name={optimizer}")
    found, plan = peak(config, ALONE), planned(config)
    counters = 4 * len(list(GPT(config.model).parameters()))  # a step count for each parameter at most
    assert found["param"] == plan.weights
    assert 0 <= found["opt"] - plan.moments <= counters


@pytest.mark.parametrize(
    "settings", [("norm_mode=dotprod", "value_residual=0.5"), ("residual=add", "n_kv_head=1", "mlp=relu2")]
)
def test_each_block_keeps_what_it_keeps_in_a_real_step(settings: tuple[str, ...]) -> None:
    shallow, deep = small(*settings, "n_layer=2"), small(*settings, "n_layer=4")
    measured = peak(deep, ALONE)["act"] - peak(shallow, ALONE)["act"]
    assert measured == pytest.approx(planned(deep).activations - planned(shallow).activations, rel=0.01)


def test_a_real_step_needs_at_most_the_planned_memory() -> None:
    config = small("n_layer=4")
    assert 0.75 < peak(config, ALONE)["total"] / planned(config).training <= 1
    recomputed = rank_memory(config, 1, strategy="ddp", recompute=True).training
    config = small("n_layer=4", "activation_checkpointing=true")
    assert 0.75 < peak(config, ALONE)["total"] / recomputed <= 1


def test_parts_of_a_sharded_model_are_those_of_a_real_rank(four_ranks: ProcessRanks) -> None:
    config = small("distributed.strategy=fsdp")
    found, plan = peak(config, four_ranks), planned(config, ranks=4)
    assert 0.6 < found["total"] / plan.training <= 1
    assert 0 <= found["opt"] - plan.moments <= 1000  # and counters of steps


@pytest.mark.parametrize("name", ["0.5B", "1B"])
def test_the_presets_have_the_weights_of_their_models(name: str) -> None:
    config = read_config(None, [f"model={MODELS / name}.yaml"])
    with torch.device("meta"):  # allocates nothing
        entries = sum(parameter.numel() for parameter in GPT(config.model).parameters())
    plan = planned(config)
    assert (plan.weights, plan.moments) == (4 * entries, 8 * entries)
