"""The retry rules: which deaths are retried, how often, and when a trial must run alone."""

from pathlib import Path

import pytest
import torch

from tune.trials import retries
from tune.trials.retries import RETRY_RULES, WorkerDeath, failure_cause, give_up_reason, must_run_alone, oom_kill_count
from tune.trials.trial import TrialResult


@pytest.mark.parametrize("cause", ["killed", "hung", "ray_lost"])
def test_a_death_that_is_not_the_trials_fault_is_retried_three_times(cause: str) -> None:
    deaths = [WorkerDeath(cause)] * 3
    assert [give_up_reason(deaths[:n]) for n in (1, 2, 3)] == [None] * 3
    assert give_up_reason([*deaths, WorkerDeath(cause)]) == f"{cause}: {RETRY_RULES[cause].description}, 4 times"


def test_process_deaths_are_counted_together_and_memory_apart() -> None:
    mixed = [WorkerDeath("killed"), WorkerDeath("host_oom"), WorkerDeath("hung"), WorkerDeath("ray_lost")]
    assert give_up_reason(mixed) is None
    assert give_up_reason([*mixed, WorkerDeath("killed")]) is not None
    reason = "host_oom: the machine had no memory left, 2 times, the last time as the only running trial"
    assert give_up_reason([*mixed, WorkerDeath("host_oom")]) == reason


@pytest.mark.parametrize("cause", ["diverged", "oom", "code_error"])
def test_results_are_not_retried(cause: str) -> None:
    assert RETRY_RULES[cause].retries == 0 and give_up_reason([WorkerDeath(cause)]) is not None


@pytest.mark.parametrize(
    ("last", "before", "gives_up"),
    [
        ((5, 3), (5, 3), True),
        ((5, 3), (5, 0), True),
        ((6, 3), (5, 3), False),  # it got further
        ((3, 3), (3, 0), False),  # it died before its first step
        ((0, 0), (0, 0), False),
        ((None, None), (None, None), False),  # unknown
    ],
)
def test_a_trial_that_dies_twice_at_the_same_step_is_given_up(
    last: tuple[int | None, int | None], before: tuple[int | None, int | None], gives_up: bool
) -> None:
    deaths = [WorkerDeath("killed", *before), WorkerDeath("hung", *last)]
    assert (give_up_reason(deaths) is not None) is gives_up
    assert give_up_reason([WorkerDeath("ray_lost", *before), WorkerDeath("killed", *last)]) is None, "Ray died itself"


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
        ("failed", "Traceback\ntorch._inductor.exc.InductorError: MemoryError: \n\nSet TORCHDYNAMO_VERBOSE=1", "oom"),
        ("failed", "Traceback\nBackendCompilerFailed: backend='inductor' raised:\nOutOfMemoryError: CUDA out", "oom"),
        ("failed", "Traceback\nRuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling", "oom"),
        ("failed", "Traceback\nRuntimeError: the text names MemoryError: no", "code_error"),
        ("failed", "Traceback\nRuntimeError: [enforce] DefaultCPUAllocator: can't allocate memory: 8 bytes", "oom"),
        ("failed", None, "code_error"),
    ],
)
def test_the_cause_of_a_failure_is_read_from_its_error(status: str, error: str | None, cause: str | None) -> None:
    assert failure_cause(TrialResult(status, error=error)) == cause


def test_torchs_memory_error_has_the_expected_name() -> None:
    assert torch.OutOfMemoryError.__name__ == "OutOfMemoryError"


def test_the_kernels_oom_kills_are_read_where_the_file_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "VMSTAT", tmp_path / "vmstat")
    assert oom_kill_count() == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\ndrop_pagecache 0\n")
    assert oom_kill_count() == 3
