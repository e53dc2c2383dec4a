"""Contenders take turns, and rates and ratios are right for known times."""

import pytest
import torch

from ngpt.system import timing

CPU = torch.device("cpu")


class Clock:
    """A clock that advances only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_contenders_take_turns_after_a_warmup_until_the_time_is_up(clock: Clock) -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        clock.pass_time(seconds)

    variants = {"a": lambda: work("a", 1.0), "b": lambda: work("b", 3.0)}
    times = timing.interleave(timing.timers(variants, CPU), seconds=30.0, warmup=2)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert times == {"a": [1.0] * 6, "b": [3.0] * 6}  # the eighth round, of which two were warm-up, ends at 32 s


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, timing.MIN_ROUNDS), (1e9, timing.MAX_ROUNDS)])
def test_the_number_of_rounds_is_bounded(seconds: float, rounds: int, clock: Clock) -> None:
    times = timing.interleave(timing.timers({"a": lambda: clock.pass_time(1.0)}, CPU), seconds=seconds)
    assert len(times["a"]) == rounds


def test_the_ratio_is_taken_per_round_so_a_slow_phase_of_the_machine_does_not_change_it() -> None:
    ours, reference = [1.0, 10.0, 1.0, 10.0, 1.0], [2.0, 20.0, 2.0, 20.0, 7.0]
    assert timing.speed_ratio(ours, reference) == 2.0
    assert timing.compare_times(ours, reference) == {"ms": 1000, "best_ms": 1000, "reference_ms": 7000, "ratio": 2.0}


def test_the_rate_of_matrix_products_counts_two_operations_per_element(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))  # every product takes a second
    assert timing.gemm_flops(CPU, torch.float32, size=64) == 2 * 64**3


def test_the_copy_bandwidth_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    assert timing.copy_bandwidth(CPU, size=4096) == 2 * 4096


def test_nested_figures_are_printed_with_dotted_names(capsys: pytest.CaptureFixture[str]) -> None:
    timing.print_metrics({"a": 1.0, "b": {"c": {"d": 2}}}, as_json=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["a", "1"], ["b.c.d", "2"]]


@pytest.mark.parametrize(
    ("device", "dtype", "slowdown", "note"),
    [
        ("cpu", "bfloat16", 39.8, "bfloat16 is emulated on this CPU: 40 x slower than float32; set dtype: float32"),
        ("cpu", "bfloat16", 254.4, "bfloat16 is emulated on this CPU: 254 x slower than float32; set dtype: float32"),
        ("cpu", "bfloat16", 2.34, "bfloat16 is emulated on this CPU: 2.3 x slower than float32; set dtype: float32"),
        ("cpu", "bfloat16", 1.5, None),
        ("cpu", "float32", 39.8, None),
        ("cuda", "bfloat16", 39.8, None),
    ],
)
def test_a_dtype_that_the_cpu_emulates_is_noted(
    device: str, dtype: str, slowdown: float, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "bfloat16_slowdown", lambda: slowdown)
    assert timing.slow_dtype_note(torch.device(device), dtype) == note


def test_products_in_bfloat16_are_compared_with_those_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product takes one second, and 40 seconds in bfloat16."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(timing.time, "thread_time", lambda: clock.now)
    monkeypatch.setattr(torch, "mm", lambda x, _: clock.pass_time(40.0 if x.dtype == torch.bfloat16 else 1.0))
    assert timing.bfloat16_slowdown.__wrapped__() == 40.0
