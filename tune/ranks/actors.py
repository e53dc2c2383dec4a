"""Ranks as Ray actors, one in each bundle of the placement group of their trial."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray._private.worker
from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune import format as fmt
from tune.ranks.pool import RankPool
from tune.ranks.rank import Answer, RankRun, Seat
from tune.trials.trial import TrialSpec

MAX_NAME = 100  # characters of a trial's name in the title of a process, which Linux cuts at its end


@ray.remote(max_restarts=0)
class TrialRank(RankRun):
    """The process of a rank, which ends with the worker that owns it."""

    def __init__(self, campaign: str, index: int, umask: int | None) -> None:
        super().__init__()
        self._campaign, self._index, self._title = campaign, index, ""
        if umask is not None:
            os.umask(umask)

    def __repr__(self) -> str:
        """Names the rank in the dashboard and in `ray list actors --detail`."""
        return f"TrialRank(campaign={self._campaign}, rank={self._index}, pid={os.getpid()})"

    def begin(self, spec: TrialSpec, seat: Seat) -> Answer:
        """As in `RankRun`; the title of the process names trial and rank."""
        self._title = f"ray::{self._campaign} {fmt.shorten(fmt.plain(spec.name), MAX_NAME)} rank {seat.index}"
        with ray._private.worker._changeproctitle(self._title, "ray::TrialRank"):
            return super().begin(spec, seat)

    def advance(self, leave: bool) -> Answer:
        """As in `RankRun`."""
        with ray._private.worker._changeproctitle(self._title, "ray::TrialRank"):
            return super().advance(leave)


class ActorPool(RankPool):
    """Ranks in the bundles of the placement group of this process, which is an actor in it without resources.

    Ray kills an actor when its owner dies or its placement group is removed, so the ranks end with this process.
    """

    def __init__(self, count: int, *, bundle: dict[str, float], campaign: str, umask: int | None, host: str) -> None:
        super().__init__(count, host=host)
        self._bundle, self._campaign, self._umask = bundle, campaign, umask
        self._ranks: list[Any] = []
        self._calls: dict[Any, int] = {}  # unanswered: the rank of each

    def start(self, count: int) -> None:
        """Places an actor in each bundle that has none."""
        group = get_current_placement_group()
        assert group is not None, "Tune makes one for each trial"
        for index in range(len(self._ranks), count):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            wanted = {"num_cpus": self._bundle.get("CPU", 0), "num_gpus": self._bundle.get("GPU", 0)}
            actor = TrialRank.options(scheduling_strategy=place, **wanted).remote(self._campaign, index, self._umask)
            self._ranks.append(actor)

    def seat(self, **about: Any) -> Seat:
        return Seat(**about, needs_gpu=bool(self._bundle.get("GPU")))

    def send(self, index: int, method: str, *arguments: Any) -> None:
        self._calls[getattr(self._ranks[index], method).remote(*arguments)] = index

    def receive(self, seconds: float) -> Iterator[tuple[int, Answer]]:
        """Yields the first answer; an actor that Ray has lost answers `died`."""
        ready: Sequence[Any]
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        for call in ready:
            index = self._calls.pop(call)
            try:
                yield index, ray.get(call)
            except RayError as error:  # what it says is known to the executor, such as a node that has died
                yield index, Answer("died", reason=str(error))

    def kill(self) -> None:
        for actor in self._ranks:
            ray.kill(actor, no_restart=True)
        self._ranks, self._calls = [], {}
