"""The table of what is done about trials that did not end well."""

import pytest
import torch

from tune.trials import retries
from tune.trials.retries import RETRY_RULES, WorkerDeath, failure_cause, give_up_reason, must_run_alone, oom_kill_count
from tune.trials.trial import TrialResult


@pytest.mark.parametrize("cause", ["killed", "hung", "ray_lost"])
def test_what_is_not_the_trials_fault_is_tried_again_three_times(cause: str) -> None:
    deaths = [WorkerDeath(cause)] * 3
    assert [give_up_reason(deaths[:n]) for n in (1, 2, 3)] == [None] * 3
    assert give_up_reason([*deaths, WorkerDeath(cause)]) == f"{cause}: {RETRY_RULES[cause].says}, 4 times"


def test_deaths_of_one_kind_count_together_and_memory_by_itself() -> None:
    mixed = [WorkerDeath("killed"), WorkerDeath("host_oom"), WorkerDeath("hung"), WorkerDeath("ray_lost")]
    assert give_up_reason(mixed) is None
    assert give_up_reason([*mixed, WorkerDeath("killed")]) is not None
    assert str(give_up_reason([*mixed, WorkerDeath("host_oom")])).startswith(
        "host_oom: the machine had no memory left, 2 times"
    )


@pytest.mark.parametrize("cause", ["diverged", "oom", "code_error"])
def test_results_are_not_tried_again(cause: str) -> None:
    assert RETRY_RULES[cause].retries == 0 and give_up_reason([WorkerDeath(cause)]) is not None


@pytest.mark.parametrize(
    ("last", "before", "poison"),
    [
        ((5, 3), (5, 3), True),
        ((5, 3), (5, 0), True),
        ((6, 3), (5, 3), False),  # it got further
        ((3, 3), (3, 0), False),  # it died before its first step: starting takes longest
        ((0, 0), (0, 0), False),
        ((None, None), (None, None), False),  # nobody knows
    ],
)
def test_the_same_step_twice_is_once_too_often(
    last: tuple[int | None, int | None], before: tuple[int | None, int | None], poison: bool
) -> None:
    deaths = [WorkerDeath("killed", *before), WorkerDeath("hung", *last)]
    assert (give_up_reason(deaths) is not None) is poison
    assert give_up_reason([WorkerDeath("ray_lost", *before), WorkerDeath("killed", *last)]) is None, "that was Ray's"


def test_only_a_lack_of_memory_makes_a_trial_run_alone() -> None:
    assert must_run_alone([WorkerDeath("host_oom"), WorkerDeath("killed")])
    assert not must_run_alone([WorkerDeath("killed"), WorkerDeath("hung")])


@pytest.mark.parametrize(
    ("status", "error", "cause"),
    [
        ("finished", None, None),
        ("stopped", "its arm fell behind", None),
        ("diverged", None, "diverged"),
        ("failed", "Traceback\nValueError: memory", "code_error"),
        ("failed", "Traceback\n  raise\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nmore", "oom"),
        ("failed", "Traceback\nMemoryError", "oom"),
        ("failed", "Traceback\nRuntimeError: [enforce] DefaultCPUAllocator: can't allocate memory: 8 bytes", "oom"),
        ("failed", None, "code_error"),
    ],
)
def test_a_result_says_its_cause(status: str, error: str | None, cause: str | None) -> None:
    assert failure_cause(TrialResult(status, error=error)) == cause


def test_the_names_of_memory_errors_are_torchs_own() -> None:
    assert torch.OutOfMemoryError.__name__ == "OutOfMemoryError"


def test_the_kernels_count_is_read_where_there_is_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "VMSTAT", tmp_path / "vmstat")
    assert oom_kill_count() == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\ndrop_pagecache 0\n")
    assert oom_kill_count() == 3
