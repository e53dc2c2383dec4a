"""The choice of how many trials share a device: from curves that are known, and measured by real processes."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import override
from ngpt.data.dataset import prepare
from ngpt.training.config import TrainConfig, resolved
from tests.helpers.fake_gpus import FakeGpus
from tests.helpers.tiny_campaign import begun, next_trial, pretend, session_on, train_all, write_file
from tune.machine import gpu_sharing, throughput
from tune.machine.concurrency_benchmark import ThroughputPoint
from tune.machine.gpu_sharing import (
    GpuSharing,
    GroupSizes,
    choose_gpu_sharing,
    choose_trials_per_device,
    fastest_point,
    known_trials_per_device,
)
from tune.machine.throughput import device_key, known_curve, remember_curve
from tune.planning.equal_time import step_time_key
from tune.report.markdown import render_markdown
from tune.report.wording import cost_facts, packing_fact
from tune.spec.schema import Campaign, Resources
from tune.storage.journal import read_journal
from tune.storage.state import CampaignState, replay
from tune.trials.trial import TrialResult, TrialSpec

GIB = 1 << 30


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of measurements, in a cache of this test's own."""
    monkeypatch.setattr(throughput, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "speeds.jsonl"


def curve(*speeds: float, room: int = 32) -> list[ThroughputPoint]:
    """Points of one trial, two trials, ... with these tokens per second."""
    return [ThroughputPoint(n, 1, speed, GIB, room) for n, speed in enumerate(speeds, 1)]


ONE = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"


def silent(line: str) -> None:
    pass


def test_the_fastest_number_of_trials_is_chosen() -> None:
    assert fastest_point(curve(100, 150, 170, 160), max_trials=8).trials == 3


def test_the_smallest_of_equally_fast_numbers_is_chosen() -> None:
    assert fastest_point(curve(100, 169, 170, 169.5), max_trials=8).trials == 2


def test_no_more_trials_are_chosen_than_fit_or_exist() -> None:
    assert fastest_point(curve(100, 150, 170, room=2), max_trials=8).trials == 2
    assert fastest_point(curve(100, 150, 170), max_trials=2).trials == 2
    assert (
        fastest_point(curve(100, 150, room=0), max_trials=8).trials == 1
    )  # too large even alone: the trial itself will fail


@given(st.lists(st.floats(1, 1e7), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 40))
def test_the_choice_is_possible_and_nothing_possible_is_much_faster(speeds: list[float], room: int, most: int) -> None:
    points = curve(*speeds, room=room)
    best = fastest_point(points, max_trials=most)
    possible = [p.tokens_per_second for p in points if p.trials <= min(room, most)]
    assert best.trials <= min(room, most)
    assert best.tokens_per_second >= 0.99 * max(possible)


@pytest.mark.slow
def test_trials_are_measured_once_and_the_next_campaign_reads_the_curve(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes; where there is no GPU they share the CPU."""
    prepare(tiny.data)
    config = resolved(override(tiny, {"steps": 10_000_000}))
    lines: list[str] = []
    first = choose_trials_per_device([config] * 4, max_trials=2, devices=1, threads=1, log=lines.append)
    assert first is not None and first.trials_per_device in (1, 2)
    assert [point.trials for point in first.curve] == [1, 2]
    assert "measured at the start of this campaign" in first.why and first.measured_at
    monkeypatch.setattr(gpu_sharing, "measure_concurrent_trials", None)  # nothing is measured again
    again = choose_trials_per_device([config] * 4, max_trials=2, devices=1, threads=1, log=lines.append)
    assert again is not None
    assert (again.trials_per_device, again.curve) == (first.trials_per_device, first.curve)
    assert f"measured on {first.measured_at[:10]}" in again.why


@pytest.mark.slow
def test_a_short_campaign_is_not_worth_a_calibration(tiny: TrainConfig, own_store: Path) -> None:
    prepare(tiny.data)
    chosen = choose_trials_per_device([resolved(tiny)] * 4, max_trials=2, devices=1, threads=1, log=silent)
    assert chosen is not None and chosen.trials_per_device == 1 and len(chosen.curve) == 1
    assert chosen.why.startswith("not measured") and chosen.measured_at is None
    assert not own_store.exists()


@pytest.mark.slow
def test_a_failed_calibration_leaves_one_trial_per_device_and_gives_the_reason(tiny: TrainConfig) -> None:
    too_large = resolved(override(tiny, {"model.n_embd": 400_000}))  # matrices of terabytes
    chosen = choose_trials_per_device([too_large] * 2, max_trials=2, devices=1, threads=1, log=silent)
    assert chosen is not None and chosen.trials_per_device == 1
    assert chosen.why == "not measured: out of memory"


def test_the_memory_of_the_largest_trial_limits_the_number(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, fake_gpus: Callable[..., FakeGpus]
) -> None:
    """The curve of the common shape allows four trials, the largest trial fits twice. The plan says the same."""
    fake_gpus(count=1)
    monkeypatch.setattr(gpu_sharing, "usable_cpus", lambda: 8)
    campaign: Any = SimpleNamespace(resources=Resources(workers=4))
    common, largest = resolved(override(tiny, {"steps": 10_000})), resolved(override(tiny, {"batch_size": 64}))
    for config, points in ((common, curve(1, 2, 3, 4)), (largest, curve(1, room=2))):
        remember_curve(device_key(config, 1), step_time_key(config), points, max_trials=4)
    for configs, trials in (([common] * 9, 4), ([common] * 9 + [largest], 2)):
        chosen = choose_trials_per_device(configs, max_trials=4, devices=1, threads=1, log=silent)
        assert chosen and chosen.trials_per_device == trials
        monkeypatch.setattr(gpu_sharing, "_trials_left", lambda *_, left=configs: left)
        assert known_trials_per_device(campaign, CampaignState()) == trials


def test_a_curve_belongs_to_its_code_and_its_group_size(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_curve("device", "shape", curve(1, 2), max_trials=4, together=8)
    assert known_curve("device", "shape", max_trials=4, together=8)
    assert known_curve("device", "shape", max_trials=4) is None
    monkeypatch.setattr(throughput, "current_code", lambda: SimpleNamespace(digest="edited"))
    assert known_curve("device", "shape", max_trials=4, together=8) is None


def test_a_curve_of_an_older_version_is_not_used(own_store: Path) -> None:
    record = remember_curve("device", "shape", curve(1, 2), max_trials=4).model_dump()
    own_store.write_text(json.dumps({name: record[name] for name in record if name not in ("code", "together")}))
    assert known_curve("device", "shape", max_trials=4) is None


def test_groups_are_as_large_as_every_device_having_a_worker_allows(tiny: TrainConfig) -> None:
    small, compiled, wide = tiny, override(tiny, {"compile": True}), override(tiny, {"model.n_embd": 32})
    configs = [override(small, {"seed": seed}) for seed in range(20)] + [compiled] * 3 + [wide] * 4
    groups = GroupSizes(configs, devices=2, max_size=8)
    assert [groups.of(config) for config in (small, compiled, wide)] == [8, 1, 2]
    assert groups.count == 3 + 3 + 2


def test_vectorised_trials_are_measured_as_groups(
    load: Callable[[str], Campaign],
    corpus: Path,
    fake_gpus: Callable[..., FakeGpus],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = "n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, vocab_size: 400"
    data = f"corpus: '{corpus}', tokenizer: 'sentencepiece:400'"
    campaign = load(
        f"campaign: c\nbase: {{{model}, {data}, steps: 100000}}\nresources: {{vectorise: 8}}\n"
        "seeds: [1, 2, 3, 4, 5, 6, 7, 8]\nvary: {alpha: [0.1, 0.2, 0.3]}\n"
    )
    fake_gpus(count=2)
    measured: list[dict[str, Any]] = []

    def measure(config: TrainConfig, **arguments: Any) -> list[ThroughputPoint]:
        measured.append(arguments)
        return curve(100, 150)

    monkeypatch.setattr(gpu_sharing, "usable_cpus", lambda: 64)
    monkeypatch.setattr(gpu_sharing, "measure_concurrent_trials", measure)
    sharing = choose_gpu_sharing(campaign, CampaignState(), silent)
    assert sharing and (sharing.trials_per_device, sharing.together) == (2, 8)
    (arguments,) = measured
    assert (arguments["together"], arguments["counts"]) == (8, [1, 2])  # 32 trials are 4 groups on 2 GPUs
    assert packing_fact(asdict(sharing)).startswith("2 groups of 8 trials at once on each device (1.50 x")
    assert known_trials_per_device(campaign, CampaignState()) == 2
    monkeypatch.setattr(gpu_sharing, "measure_concurrent_trials", None)  # nothing is measured again
    again = choose_gpu_sharing(campaign, CampaignState(), silent)
    assert again and again.trials_per_device == 2


def test_one_trial_has_nothing_to_share_with(tiny: TrainConfig) -> None:
    assert choose_trials_per_device([tiny], max_trials=1, devices=1, threads=1, log=silent) is None


def test_nothing_is_chosen_on_a_cpu_or_where_the_file_fixes_the_share(load: Callable[[str], Campaign]) -> None:
    text = "campaign: c\nbase: {device: cpu}\nresources: {gpus_per_trial: SHARE}\nvary: {alpha: [0.1, 0.2]}\n"
    for share in ("auto", "0.5"):
        assert choose_gpu_sharing(load(text.replace("SHARE", share)), CampaignState(), silent) is None


CHOSEN = GpuSharing(
    4, "1.60 x the tokens/s of one, measured on 2026-11-21", "H200", tuple(curve(1e6, 1.4e6, 1.5e6, 1.6e6)), "t"
)


def test_the_choice_and_its_curve_are_in_journal_manifest_summary_and_report(corpus: Path, tmp_path: Path) -> None:
    file, root = write_file(tmp_path, corpus, phases=ONE), tmp_path / "r"
    with session_on(file, root) as session:
        begun(session, gpu_sharing=CHOSEN, trials_per_device=4)
        spec = next_trial(session)
        assert spec is not None and spec.packed == 4
        session.tell(spec.trial_id, pretend(spec))
        summary = session.end()
    events = read_journal(root / "journal.jsonl")
    (event,) = [event for event in events if event["event"] == "packing_chosen"]
    assert event["trials_per_device"] == 4
    assert [point["tokens_per_second"] for point in event["curve"]] == [1e6, 1.4e6, 1.5e6, 1.6e6]
    written = json.loads((root / "manifest.json").read_text())["packing"]
    assert replay(events).gpu_sharing == written == summary.packing
    fact = cost_facts(summary)["packing"]
    assert fact.startswith("4 trials at once on each device (1.60 x the tokens/s of one, measured on 2026-11-21)")
    assert "1: 1.00M, 2: 1.40M, 3: 1.50M, 4: 1.60M" in fact
    assert "4 trials at once on each device" in render_markdown(summary)
    assert "4 trials at once on each device" in (root / "report.html").read_text()


@pytest.mark.parametrize(("seeds", "packed"), [("[1]", 1), ("[1, 2]", 2), ("[1, 2, 3, 4]", 3)])
def test_a_trial_with_few_others_has_a_gpu_to_itself(corpus: Path, tmp_path: Path, seeds: str, packed: int) -> None:
    """Two arms on two GPUs, which up to three trials may share."""
    with session_on(write_file(tmp_path, corpus, phases=ONE, seeds=seeds), tmp_path / "r") as session:
        spec = next_trial(begun(session, workers=6, trials_per_device=3, n_gpus=2))
        assert spec is not None and spec.packed == packed


def test_every_record_has_the_number_of_trials_on_its_device(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / "r"
    train_all(write_file(tmp_path, corpus, phases=ONE), root)
    records = [json.loads(line) for line in (root / "alpha" / "trials.jsonl").read_text().splitlines()]
    assert [record["provenance"]["packed"] for record in records] == [1] * 4  # inline, one after the other


@pytest.mark.parametrize(("what", "where"), [("packed", "on a device"), ("vectorised", "in a process")])
def test_a_phase_with_unequally_shared_devices_warns_that_speeds_do_not_compare(
    corpus: Path, tmp_path: Path, what: str, where: str
) -> None:
    file, root = write_file(tmp_path, corpus, phases=ONE), tmp_path / "r"

    def result(spec: TrialSpec, packed: int) -> TrialResult:
        plain = pretend(spec)
        return replace(plain, provenance=plain.provenance | {what: packed})

    with session_on(file, root) as session:
        begun(session)
        for packed in (1, 4, 4, 4):
            spec = next_trial(session)
            assert spec is not None
            session.tell(spec.trial_id, result(spec, packed))
        (warning,) = session.end().phases[0].warnings
    assert warning == f"its trials ran 1 and 4 at a time {where}: their tokens per second cannot be compared"
