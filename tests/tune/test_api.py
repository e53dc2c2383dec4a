"""`plan`, `run` and `compare` from Python: what the command line does, with exceptions, in any thread."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import run_campaign
import tune
from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import read_heartbeat
from tests.helpers.tiny_campaign import write_file
from tune import CampaignInterrupted, CampaignRun, ResultsLocked, compare, load_campaign, load_results, plan, run
from tune.storage.journal import read_journal

pytestmark = pytest.mark.usefixtures("no_report")
PHASES = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
LONG = {"steps": 1_000_000}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return write_file(tmp_path_factory.mktemp("api"), corpus, phases=PHASES, seeds="[1, 2]", steps=2, every=1)


@pytest.fixture(scope="module")
def ended(file: Path) -> CampaignRun:
    """A campaign of four trials that has run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.write_report", lambda *_: None)
        patch.setattr(sys, "argv", ["host", "--secret-of-the-host"])
        return run(str(file), {"optim.lr": np.float64(0.02), "batch_size": 4}, out=str(file.parent), inline=True)


def until_training(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not any((beat := read_heartbeat(trial)) and beat.step > 2 for trial in folder.glob("tiny/trials/*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_importing_the_package_takes_neither_torch_nor_ray() -> None:
    code = "import sys, tune; assert {*tune.__all__} <= {*dir(tune)}; from tune import judge; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not {"torch", "ray", "pandas", "pyarrow", "rich"} & {*done.stdout.split()}
    with pytest.raises(AttributeError, match="module 'tune' has no attribute 'runn'"):
        getattr(tune, "runn")  # noqa: B009


def test_a_run_returns_how_it_ended_and_its_results(ended: CampaignRun, file: Path) -> None:
    assert (ended.exit_code, ended.status, ended.path) == (0, "finished", str(file.parent / "tiny"))
    assert {trial.config["optim.lr"] for trial in ended.results.trials} == {0.02}
    assert ended.summary.trials.finished == len(ended.results.trials) == 4
    assert repr(ended).startswith("exit code 0\ntiny: finished, 4 of 4 trials") and ended._repr_html_()
    written = b"".join(path.read_bytes() for path in Path(ended.path).rglob("*") if path.is_file())
    assert b"secret-of-the-host" not in written


def test_the_recorded_command_does_the_same_in_a_terminal(ended: CampaignRun, file: Path) -> None:
    assert json.loads((Path(ended.path) / "manifest.json").read_text())["command"] == ended.command
    program, script, *words = shlex.split(ended.command)
    assert (program, script) == ("python", "run_campaign.py")
    options = run_campaign.run_parser().parse_args(words)
    assert (options.campaign, options.out, options.inline) == (file, file.parent, True)
    again = run(load_campaign(options.campaign, options.set), out=options.out, inline=True)
    assert [event["event"] for event in read_journal(Path(ended.path) / "journal.jsonl")].count("trial_started") == 4
    assert again.results.trials == ended.results.trials


def test_every_option_is_in_the_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    @dataclass
    class Summary:
        status: str = "finished"

    def launch_at(campaign: Any, name: str, out: Path, **options: Any) -> tuple[Summary, int]:
        given.update(options, name=name, out=out)
        return Summary(), 0

    monkeypatch.setattr("tune.api.launch_at", launch_at)
    monkeypatch.setattr("tune.api.exit_code", lambda *_: 0)
    how: dict[str, Any] = {"out": "some where", "smoke": True, "address": "auto", "allow_change": True, "keep": True}
    run(file, ["steps=3"], retrain=["alpha=0.4", "baseline"], **how)
    options = vars(run_campaign.run_parser().parse_args(shlex.split(given["command"])[2:]))
    assert {name: options[name] for name in how} == how | {"out": Path("some where")}
    assert (options["retrain"], options["set"]) == (["alpha=0.4", "baseline"], ["steps=3"])
    assert (given["name"], given["retrain"], given["address"]) == ("tiny-smoke", ["alpha=0.4", "baseline"], "auto")
    for value, expected in ((True, []), (False, None), ([], None), ("alpha=0.4", ["alpha=0.4"])):
        run(file, retrain=value)
        assert given["retrain"] == expected
        assert run_campaign.run_parser().parse_args(shlex.split(given["command"])[2:]).retrain == expected


def test_a_plan_has_the_numbers_of_the_command_line(
    ended: CampaignRun, file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    found = plan(file, ["optim.lr=0.02", "batch_size=4", "seeds=3"][:2], out=file.parent)
    assert (found.trials, found.to_run, found.tokens) == (4, 0, 0)
    new = plan(load_campaign(file), out=tmp_path)
    assert run_campaign.main([str(file), "--plan", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    names = ("trials", "to_run", "tokens", "disk_bytes", "workers", "results")
    assert {name: getattr(new, name) for name in names} == {name: printed[name] for name in names}
    assert new.seconds > 0 and new.seconds_source and list(tmp_path.iterdir()) == []
    assert new.phases.to_pandas()["trials"].tolist() == [row["trials"] for row in printed["phases"]] == [4]
    assert "seeds: alpha 1 and 2" in repr(new) and "<td>alpha</td>" in new._repr_html_()


def test_a_comparison_has_typed_rows(ended: CampaignRun, file: Path, tmp_path: Path) -> None:
    found = compare(ended, str(ended.path))
    assert [arm.verdict for arm in found.arms] == ["identical in every trial"] * 2
    frame = found.arms.to_pandas()
    assert frame["delta.mean"].tolist() == [0.0, 0.0] and frame["n.a"].tolist() == [2, 2]
    assert frame["a"].map(list).tolist() == [["alpha/alpha=0.05"], ["alpha/alpha=0.4"]]
    assert (found.a["results"], found.metric.name) == (ended.path, "val_loss")
    assert "Identical in every trial" in repr(found) and "<table>" in found._repr_html_()
    with pytest.raises(ConfigError, match="is not a results directory"):
        compare(ended, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"alhpa": 1}, "--set alhpa=1: unknown setting, did you mean 'alpha'?"),
        (["alhpa=1"], "--set alhpa=1: unknown setting, did you mean 'alpha'?"),
        ("alhpa=1", "--set alhpa=1: unknown setting, did you mean 'alpha'?"),
        ({"steps": "many"}, '--set steps="many": input should be a valid integer'),
        ({"seeds": [1]}, "--set seeds=[1]: `seeds:` is a top-level key of the campaign file"),
        ({"alpha": object}, "alpha: a setting cannot be a type, got <class 'object'>"),
    ],
)
def test_mistakes_are_exceptions_with_one_clear_message(
    file: Path, tmp_path: Path, overrides: Any, message: str
) -> None:
    for call in (load_campaign, plan, run):
        options: dict[str, Any] = {} if call is load_campaign else {"out": tmp_path}
        with pytest.raises(ConfigError) as error:
            call(file, overrides, **options)
        assert str(error.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_overrides_of_a_loaded_campaign_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory"):
        run(tmp_path / "nowhere.yaml", out=tmp_path)
    with pytest.raises(ConfigError, match="give the overrides to load_campaign"):
        run(load_campaign(file), {"steps": 3}, out=tmp_path)


def test_settings_of_a_mapping_may_be_paths_numbers_of_numpy_and_sections(file: Path, corpus: Path) -> None:
    given = {
        "data.corpus": corpus,
        "optim": {"betas": (0.8, np.float32(0.5))},
        "steps": np.int64(7),
        "dtype": "float32",
    }
    base = load_campaign(file, given).base
    assert (base.data.corpus, base.optim.betas, base.steps) == (str(corpus), (0.8, 0.5), 7)


# ---- stopping ------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_another_thread_stops_the_first(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, found = threading.Event(), list[CampaignRun]()
    work = threading.Thread(target=lambda: found.append(run(file, LONG, out=tmp_path, inline=True, stop=stop)))
    work.start()
    try:
        until_training(tmp_path)
        with pytest.raises(ResultsLocked, match="is in use by another run"):
            run(file, LONG, out=tmp_path, inline=True)
        running = load_results(tmp_path / "tiny")
        assert running.status == "running" and len(running.curves) > 0
    finally:
        stop.set()
        work.join(timeout=120)
    (ended,) = found
    assert (ended.exit_code, ended.status, ended.results.status) == (130, "interrupted", "interrupted")
    assert list(tmp_path.glob("tiny/trials/*/checkpoints/step_*")) and len(ended.results.curves) > 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"or in a terminal: {ended.command}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_raises_and_leaves_the_handlers_of_the_host(
    file: Path, tmp_path: Path, number: signal.Signals, signals: None
) -> None:
    handlers = {each: lambda *_: None for each in (signal.SIGINT, signal.SIGTERM)}
    for each, handler in handlers.items():
        signal.signal(each, handler)
    main = threading.get_ident()

    def send() -> None:
        until_training(tmp_path)
        signal.pthread_kill(main, number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as raised:
        run(file, LONG, out=tmp_path, inline=True)
    sender.join(timeout=120)
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 143
    else:
        assert isinstance(raised.value, CampaignInterrupted)
        assert str(raised.value).endswith(f"or in a terminal: {raised.value.run.command}")
        assert (raised.value.run.exit_code, raised.value.run.status) == (130, "interrupted")
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    assert read_journal(tmp_path / "tiny" / "journal.jsonl")[-1]["status"] == "interrupted"
    assert list(tmp_path.glob("tiny/trials/*/checkpoints/step_*"))


def test_an_interruption_before_the_first_trial_says_how_to_resume(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Callable[[], None]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tune.launch.describe_data", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"to resume, call run.* in a terminal: python .*{file.name}"):
            run(file, out=tmp_path, inline=True)
    assert run(file, {"steps": 1}, out=tmp_path, inline=True).exit_code == 0


def test_relative_paths_belong_to_the_working_directory_of_the_call(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    campaign = load_campaign(file.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended = run(campaign, out=os.curdir, inline=True, smoke=True)
    monkeypatch.chdir(tmp_path)
    assert ended.exit_code == 0 and ended.results.summary.smoke
    assert Path(ended.path) == tmp_path / "elsewhere" / "tiny-smoke"
