"""Steps of trials on several ranks are timed by processes that train them together."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ngpt.config.base import override
from ngpt.training.config import TrainConfig, resolved
from tests.helpers.tiny_campaign import write_file
from tune.campaign import load_campaign
from tune.machine.estimate import estimate
from tune.machine.rank_speed import RanksNotMeasured, measure_on_ranks
from tune.machine.throughput import device_key, known_speeds, ranks_key
from tune.planning.equal_time import step_time_key

PHASES = "\n  - name: alpha\n    vary: {alpha: [0.4], batch_size: [8]}\n"
ONE_RANK = "resources: {cpus_per_trial: 1, workers: 2}"
TWO_RANKS = "resources: {cpus_per_trial: 2, workers: 1, ranks_per_trial: 2, strategy: fsdp}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plan_times_steps_with_the_ranks_and_the_strategy_of_the_campaign(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    file = write_file(tmp_path, corpus, phases=PHASES, seeds="[1]")
    file.write_text(file.read_text().replace(ONE_RANK, TWO_RANKS))
    campaign = load_campaign(file)
    estimated = estimate(campaign, tmp_path / "results", measure=True)
    assert estimated.seconds_source == "measured just now"
    speeds = known_speeds(device_key(campaign.base, 1, ranks=ranks_key(campaign.resources)))
    shapes = campaign.base, override(campaign.base, {"batch_size": 8})
    assert speeds.keys() == {(step_time_key(resolved(config)), 1) for config in shapes}
    assert min(speeds.values()) > 0 and known_speeds(device_key(campaign.base, 1)) == {}  # of one rank
    assert not any("spawn_main" in " ".join(each.cmdline()) for each in psutil.Process().children())
    scattered = replace(campaign, resources=campaign.resources.model_copy(update={"across_nodes": True}))
    source = estimate(scattered, tmp_path / "results", measure=True).seconds_source
    assert source.endswith("; what the ranks exchange is not counted, and --measure cannot time it between nodes")


@pytest.mark.slow
def test_a_rank_that_fails_is_said_in_one_line(tiny: TrainConfig) -> None:
    config = override(tiny, {"batch_size": 3, "distributed.strategy": "ddp"})
    with pytest.raises(RanksNotMeasured, match=r"--measure: rank .: .*3 sequences cannot be divided among 2 ranks"):
        measure_on_ranks([config], 2, threads=1)
