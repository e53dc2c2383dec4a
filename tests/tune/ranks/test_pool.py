"""What becomes of a trial when its ranks answer in turn: a pool without processes, with answers that are given."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ngpt.downstream.config import DownstreamTasks
from ngpt.system.heartbeat import request_stop
from ngpt.training.config import TrainConfig
from tune.ranks.pool import RankPool, RanksDied, RankUnfit, run_on_ranks
from tune.ranks.rank import Answer, Seat
from tune.trials.trial import TrialResult, TrialSpec

FIRST, LAST = TrialResult("stopped", {"val_loss": 5.0}), TrialResult("finished", {"val_loss": 4.0})
BROKEN = TrialResult("failed", error="ValueError: it broke")
EVALUATED, ENDED = [Answer("evaluated", FIRST), Answer("evaluated")], [Answer("ended", LAST), Answer("ended")]


class GivenAnswers(RankPool):
    """A pool of two ranks that answers each round with the next of `rounds`; a missing answer never comes."""

    def __init__(self, *rounds: list[Answer]) -> None:
        super().__init__(2)
        self.rounds = deque(rounds)
        self.sent: list[Any] = []  # of the second rank: halvings when it begins, else whether it is to leave
        self.kills = 0

    def start(self, count: int) -> None:
        self.started = count

    def seat(self, **about: Any) -> Seat:
        return Seat(**about)

    def send(self, index: int, method: str, *arguments: Any) -> None:
        if index == 1:
            self.sent.append(arguments[1].halvings if method == "begin" else arguments[0])

    def receive(self, seconds: float) -> Iterator[tuple[int, Answer]]:
        yield from enumerate(self.rounds.popleft() if self.rounds else [])

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    tmp_path.joinpath("trial").mkdir()
    return TrialSpec("t", "alpha", "a", 1, TrainConfig(), tmp_path / "trial", threads=1, attempt=1, ranks=2)


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.ranks.pool.GRACE", 0.0)


def test_evaluations_and_the_result_are_those_of_the_first_rank(spec: TrialSpec) -> None:
    pool = GivenAnswers(EVALUATED, ENDED)
    first, last = run_on_ranks(spec, pool)
    assert (first.interim, last.ended) == ({"t": FIRST}, {"t": LAST})
    assert (pool.sent, pool.kills) == ([0, False], 0)


def test_of_a_trained_trial_the_first_rank_alone_runs_the_downstream_tasks(spec: TrialSpec) -> None:
    pool = GivenAnswers([Answer("ended", LAST)], EVALUATED, ENDED)
    (ended,) = run_on_ranks(replace(spec, evaluation=DownstreamTasks(core="bundle")), pool)
    assert (ended.ended, pool.started, pool.sent) == ({"t": LAST}, 1, [])
    *_, ended = run_on_ranks(spec, pool)
    assert (ended.ended, pool.started, pool.sent) == ({"t": LAST}, 2, [0, False])
    assert pool.kills == 0


def test_memory_that_runs_out_too_late_has_all_ranks_start_again_with_smaller_micro_batches(spec: TrialSpec) -> None:
    late, lost = Answer("late_oom"), Answer("lost")
    pool = GivenAnswers(EVALUATED, [lost, late], [late], ENDED)
    *_, last = run_on_ranks(spec, pool)
    assert last.ended == {"t": LAST}
    assert (pool.sent, pool.kills) == ([0, False, 1, 2], 2)


@pytest.mark.parametrize(
    "answers",
    [
        [Answer("lost"), Answer("failed", BROKEN)],
        [Answer("short", TrialResult("failed")), Answer("failed", BROKEN)],
        [Answer("failed", BROKEN), Answer("died", reason="killed by SIGABRT")],
    ],
)
def test_a_rank_that_fails_gives_the_trial_its_reason(spec: TrialSpec, answers: list[Answer]) -> None:
    pool = GivenAnswers(answers)
    (ended,) = run_on_ranks(spec, pool)
    assert (ended.ended, pool.kills) == ({"t": BROKEN}, 1)


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        (
            [Answer("lost"), Answer("died", reason="killed by SIGKILL")],
            RanksDied,
            "rank 1 of 2 has died: killed by SIG",
        ),
        ([Answer("died", reason="exit code 1")], RanksDied, "rank 0 of 2 has died: exit code 1"),
        ([Answer("lost"), Answer("lost")], RanksDied, "the ranks of alpha/a seed 1 have lost each other"),
        ([Answer("evaluated", FIRST), Answer("paused")], RanksDied, "have lost each other .evaluated, paused"),
        ([Answer("unfit", reason="no GPU"), Answer("unfit")], RankUnfit, "rank 0: no GPU"),
    ],
)
def test_a_trial_whose_ranks_are_gone_is_retried(
    spec: TrialSpec, answers: list[Answer], error: type[Exception], message: str
) -> None:
    pool = GivenAnswers(EVALUATED, answers)
    with pytest.raises(error, match=message):
        list(run_on_ranks(spec, pool))
    assert pool.kills >= 1


def test_a_check_that_raises_ends_the_ranks(spec: TrialSpec) -> None:
    def check() -> None:
        raise RanksDied("no rank has made progress", "hung")

    pool = GivenAnswers()
    with pytest.raises(RanksDied, match="no rank has made progress"):
        list(run_on_ranks(spec, pool, check=check))
    assert pool.kills == 1


def test_a_trial_that_is_closed_leaves_its_ranks_to_the_next_one(spec: TrialSpec) -> None:
    left = [Answer("left"), Answer("left")]
    pool = GivenAnswers(EVALUATED, left, EVALUATED, left, ENDED)
    run = run_on_ranks(spec, pool)
    next(run)
    run.close()
    run = run_on_ranks(spec, pool)
    next(run)
    assert run.send(["t"]).ended == {}
    (ended,) = run_on_ranks(spec, pool)
    assert ended.ended == {"t": LAST}
    assert (pool.sent, pool.kills) == ([0, True, 0, True, 0], 0)


def test_a_trial_that_is_closed_after_a_stop_request_goes_on_until_it_is_saved(spec: TrialSpec) -> None:
    pool = GivenAnswers(EVALUATED, EVALUATED, [Answer("paused"), Answer("paused")])
    run = run_on_ranks(spec, pool)
    next(run)
    request_stop(spec.folder)
    run.close()
    assert (pool.sent, pool.kills) == ([0, False, False], 0)
