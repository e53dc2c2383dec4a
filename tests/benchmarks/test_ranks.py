"""The comparison of ranks with one process: what they send is what rings send, and what gloo adds to it."""

import pytest

from benchmarks.ranks import WARMUP, compare_ranks, main
from ngpt.config.base import override
from ngpt.training.config import TrainConfig


@pytest.mark.slow  # starts processes
def test_ranks_send_what_rings_send(tiny: TrainConfig) -> None:
    config = override(tiny, {"model.n_embd": 64, "steps": WARMUP + 4, "batch_size": 4})
    found = compare_ranks(config, ranks=2, seeds=1, variants=["ddp", "fsdp"])
    whole = 4 * found["n_params"]
    assert found["ddp"]["ideal_bytes"] == whole
    assert found["ddp"]["sent_bytes"] == pytest.approx(whole, rel=0.02)  # and a few numbers such as the loss
    assert abs(found["fsdp"]["loss_differences"][0]) < 1e-5
    # torch's gloo makes a sum of which each rank keeps its part out of a sum that all ranks get.
    ideal = found["fsdp"]["ideal_bytes"]
    assert 0.98 * ideal < found["fsdp"]["sent_bytes"] < 1.02 * (ideal + whole / 2)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("steps=5", "steps must be above 5"), ("batch_size=3", "batch_size must be a multiple of --ranks 2, got 3")],
)
def test_settings_that_cannot_be_measured_are_refused(
    setting: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--set", setting]) == 2
    assert reason in capsys.readouterr().err
