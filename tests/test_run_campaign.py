"""The command line: exit codes, one message per mistake, JSON for programs, plain text for people."""

import asyncio
import gc
import http.client
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import run_campaign
from ngpt.system.cli import EXIT_ERROR
from ngpt.system.heartbeat import read_heartbeat
from tests.helpers.tiny_campaign import begun, drive, losses, next_trial, records, session_on, strict, write_file
from tune.session.executor_info import ExecutorLost
from tune.storage.journal import read_journal

SCRIPT = Path(__file__).parents[1] / "run_campaign.py"
pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The results of a campaign that ran from the command line."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_campaign.main([str(write_file(folder, corpus)), "--inline", "--out", str(folder)]) == 0
    return folder / "tiny"


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", ["plan", "claims", "verify"])
def test_a_terminal_without_unicode_gets_plain_characters(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, verb: str, no_report: None
) -> None:
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
    file, out = write_file(tmp_path, corpus, phases=phases, seeds="[1]"), tmp_path / "r\u00e9sultats"
    claim = "{id: x, says: longer is better, relation: less, left: {alpha: 0.4}, right: {alpha: 0.05}}"
    file.write_text(f"noise: 0.02\nclaims: [{claim}]\n{file.read_text()}")
    with session_on(file, out / "tiny") as session:
        drive(begun(session))
        session.end()
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    words = {"plan": [str(file), "--plan", "--out", str(out)]}
    assert run_campaign.main(words.get(verb, [verb, str(out / "tiny")])) in (0, EXIT_ERROR)
    stdout.seek(0)
    text = stdout.read().replace("\n", "")  # where a long path is broken
    assert {"plan": "r?sultats", "verify": "r?sultats", "claims": "-0.35"}[verb] in text


# ---- running -------------------------------------------------------------------------------------------------------


def test_a_campaign_run_twice_trains_nothing_the_second_time(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(file), "--inline", "--out", str(tmp_path / "r")]
    assert run_campaign.main(command) == 0
    first, before = capsys.readouterr(), losses(tmp_path / "r" / "tiny")
    assert run_campaign.main(command) == 0
    second = capsys.readouterr()
    assert losses(tmp_path / "r" / "tiny") == before
    assert (first.err.count(" seed "), second.err.count(" seed ")) == (6, 0)
    assert "4 trials, 4 of them already done" in second.err
    assert tables(first.out) == tables(second.out) != []


def tables(text: str) -> list[str]:
    """The rows of the last screen that have a loss in them."""
    return [line for line in text.splitlines() if " ± " in line]


def test_with_json_stdout_is_the_summary_and_nothing_else(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_campaign.main([str(file), "--inline", "--json", "--out", str(tmp_path / "r")]) == 0
    printed = capfd.readouterr()
    assert strict(printed.out) == strict((tmp_path / "r" / "tiny" / "summary.json").read_text())
    assert "\x1b" not in printed.err and "phase alpha: " in printed.err


@pytest.mark.slow
def test_without_a_terminal_there_are_no_escapes(file: Path, tmp_path: Path) -> None:
    done = script(file, "--inline", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert "alpha=0.05" in done.stdout and "report.html" in done.stdout
    assert (
        len(re.findall(r"^\[\d/6\+?\] \S+  \S+ seed \d  val_loss \d\.\d+  \S+ tok/s  \S+ s$", done.stderr, re.M)) == 6
    )


def test_set_changes_the_base(file: Path, tmp_path: Path) -> None:
    assert (
        run_campaign.main([str(file), "--inline", "--out", str(tmp_path), "--set", "steps=4", "--set", "lr=0.02"]) == 0
    )
    configs = [record["config"] for record in records(tmp_path / "tiny")]
    assert {(config["steps"], config["optim.lr"]) for config in configs} == {(4, 0.02)}


def test_smoke_runs_a_smaller_campaign_in_its_own_folder(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, steps=1000, seeds="[1, 2, 3]")
    assert run_campaign.main([str(file), "--smoke", "--inline", "--out", str(tmp_path / "r")]) == 0
    assert [path.name for path in (tmp_path / "r").iterdir() if path.is_dir()] == ["tiny-smoke"]
    assert {record["config"]["steps"] for record in records(tmp_path / "r" / "tiny-smoke")} == {8}
    assert {record["seed"] for record in records(tmp_path / "r" / "tiny-smoke")} == {1, 2}


def test_a_plan_starts_nothing(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main([str(file), "--plan", "--json", "--out", str(tmp_path / "r")]) == 0
    planned = strict(capsys.readouterr().out)
    assert (planned["trials"], planned["to_run"]) == (6, 6)
    assert not (tmp_path / "r").exists()


# ---- exit codes ----------------------------------------------------------------------------------------------------


def test_a_mistake_in_the_file_is_one_line_with_its_position_and_nothing_is_written(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace("vary: {alpha", "vary: {alhpa").replace("steps: 6", "steps: six"))
    done = script(file, "--out", tmp_path / "r")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(rf"{file}:\d+:\d+: base\.steps: .*got 'six'", lines[0])
    assert re.fullmatch(rf"{file}:\d+:\d+: phases\[0\]\.vary\.alhpa: unknown setting, did you mean 'alpha'\?", lines[1])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("text", ["", "[1, 2", "campaign: x\ncampaign: y\n"])
def test_a_file_that_is_not_a_campaign_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert run_campaign.main([str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "r")]) == 2
    err = capsys.readouterr().err
    assert "bad.yaml" in err and "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_a_missing_file_is_reported_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main([str(tmp_path / "gone.yaml")]) in (2, 74)
    assert "gone.yaml" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_campaign.main([str(file), "--inlin3"])
    assert caught.value.code == 2
    assert "--inlin3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stauts", "results/x"], "unknown verb 'stauts', did you mean 'status'?"),
        (["docter"], "unknown verb 'docter', did you mean 'doctor'?"),
        (["wxyz"], f"unknown verb 'wxyz'; choose one of {', '.join(sorted(run_campaign.VERBS))}"),
        (["tinny.yaml", "--plan"], "tinny.yaml: no such file, did you mean 'tiny.yaml'?"),
        (["tinny", "--plan"], "tinny: no such file, did you mean 'tiny.yaml'?"),
        (["quikstart.yml"], "quikstart.yml: no such file, `python run_campaign.py new quickstart` copies the shipped"),
        (["no/such/thing"], "no/such/thing: No such file or directory"),
    ],
)
def test_a_misspelt_verb_or_file_is_corrected(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tiny.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert run_campaign.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_second_run_on_one_directory_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with session_on(file, tmp_path / "tiny"):
        assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err == f"{tmp_path / 'tiny'} is in use by another run (process {os.getpid()})\n"


def test_a_campaign_with_a_trial_that_diverged_finishes_with_code_4(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = "\n  - name: rate\n    set: {residual: add}\n    vary: {optim.lr: [1e-2, 1e38]}\n"
    file = write_file(tmp_path, corpus, phases=phases)
    assert run_campaign.main([str(file), "--inline", "--json", "--out", str(tmp_path)]) == 4
    summary = strict(capsys.readouterr().out)
    assert (summary["status"], summary["trials"]["diverged"], summary["trials"]["finished"]) == ("finished", 2, 2)
    assert summary["phases"][0]["winner"] != "optim.lr=1e+38"
    assert sorted(r["status"] for r in records(tmp_path / "tiny")) == ["diverged"] * 2 + ["finished"] * 2


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_results_that_cannot_be_written_are_an_io_error_with_the_path(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / place)]) == 74
    err = capsys.readouterr().err
    assert place in err and err.count("\n") == 1


def test_a_damaged_journal_is_an_io_error_that_names_the_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(file), "--inline", "--out", str(tmp_path)]
    assert run_campaign.main(command) == 0
    journal = tmp_path / "tiny" / "journal.jsonl"
    before, _, after = (text := journal.read_text()).partition('"attempt": 1')
    journal.write_text(f'{before}"attempt": 2{after}')
    assert run_campaign.main(command) == 74
    line = text.count("\n", 0, len(before)) + 1
    assert line > 2 and f"journal.jsonl:{line}: this line does not match its CRC" in capsys.readouterr().err


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (ExecutorLost("Ray died"), 1)])
def test_an_interrupt_and_a_lost_ray_are_one_line(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
) -> None:
    def launch(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("tune.launch.launch", launch)
    assert run_campaign.main([str(file), "--out", str(tmp_path)]) == code
    assert capsys.readouterr().err in ("interrupted; run the same command again to resume\n", "Ray died\n")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ask", "tell", "should_stop", "end", "begin"])
def test_an_internal_error_anywhere_exits_with_1_and_the_same_command_resumes(
    where: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-hf-1f0e2d3c4b5a")
    command = [str(file), "--inline", "--out", str(tmp_path)]

    def broken(*_: object, **__: object) -> None:
        raise KeyError("canary-hf-1f0e2d3c4b5a")

    with monkeypatch.context() as patch:
        patch.setattr(f"tune.session.session.Session.{where}", broken)
        assert run_campaign.main(command) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "internal error; finished trials are saved: run the same command again to resume"
    assert "KeyError" in said and "canary" not in said
    journal = read_journal(tmp_path / "tiny" / "journal.jsonl")
    assert [event["event"] for event in journal].count("crash") == (0 if where == "begin" else 1)
    assert "canary" not in (tmp_path / "tiny" / "journal.jsonl").read_text()
    assert run_campaign.main(command) == 0


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_exits_with_129(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(file), "--inline", "--out", str(tmp_path), "--set", "steps=100000"]
    master, slave = os.openpty()
    own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", own, *command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as process:
        os.close(slave)
        try:
            while not any(
                (beat := read_heartbeat(trial)) and beat.step > 2 for trial in tmp_path.glob("tiny/trials/*")
            ):
                assert process.poll() is None
                os.read(master, 4096)  # it draws three times a second
            os.close(master)
            assert process.wait(timeout=60) == 128 + signal.SIGHUP
        finally:
            process.kill()
    assert read_journal(tmp_path / "tiny" / "journal.jsonl")[-1]["status"] == "interrupted"
    assert list(tmp_path.glob("tiny/trials/*/checkpoints/step_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_trial_leaves_no_lock(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, number: int
) -> None:
    main = threading.get_ident()
    if number == signal.SIGINT:  # a shell starts what runs in its background with this signal ignored
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))
    monkeypatch.setattr("tune.launch.prepare_all", lambda *_: signal.pthread_kill(main, number))
    monkeypatch.setattr("tune.launch.describe_data", lambda *_: signal.pause())
    try:
        code = run_campaign.main([str(file), "--inline", "--out", str(tmp_path)])
    except SystemExit as exit:
        code = exit.code
    assert code == 128 + number
    assert not (tmp_path / "tiny" / "campaign.pid").exists()
    with session_on(file, tmp_path / "tiny") as session:
        assert session.journal.events == []


# ---- called by another program -----------------------------------------------------------------------------------


def test_a_run_leaves_the_process_of_its_caller_as_it_was(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None], no_report: None
) -> None:
    """As in a notebook: another program's arguments and handlers, and an event loop that runs."""
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
    file = write_file(tmp_path, corpus, phases=phases, seeds="[1]", steps=1)
    claim = "{id: x, says: longer is better, relation: less, left: {alpha: 0.4}, right: {alpha: 0.05}}"
    file.write_text(f"claims: [{claim}]\n{file.read_text()}")
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace"))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    set_threads(2)

    def process() -> list[object]:
        handlers = [signal.getsignal(number) for number in numbers]
        return [*handlers, *sys.argv, sys.stdout.errors, os.getcwd(), torch.get_num_threads(), gc.get_freeze_count()]

    async def cell() -> int:
        return run_campaign.main(arguments)

    arguments = [str(file), "--inline", "--out", str(tmp_path)]
    before = process()
    assert asyncio.run(cell()) == 0
    assert process() == before
    command = json.loads((tmp_path / "tiny" / "manifest.json").read_text())["command"]
    assert shlex.split(command) == ["python", "run_campaign.py", *arguments]
    assert run_campaign.main(["claims", str(tmp_path / "tiny"), "--out", str(tmp_path / "ledger.md")]) == 0
    assert "ipykernel" not in (tmp_path / "ledger.md").read_text()


def test_another_thread_stops_a_run_and_the_command_it_is_told_resumes_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["host"])
    stop, codes = threading.Event(), list[int]()
    arguments = [str(file), "--inline", "--out", str(tmp_path), "--set", "steps=1000000"]
    thread = threading.Thread(target=lambda: codes.append(run_campaign.main(arguments, stop=stop)), daemon=True)
    thread.start()
    while not any((beat := read_heartbeat(trial)) and beat.step > 2 for trial in tmp_path.glob("tiny/trials/*")):
        assert thread.is_alive()
        time.sleep(0.01)
    stop.set()
    thread.join(timeout=120)
    assert codes == [130]
    assert read_journal(tmp_path / "tiny" / "journal.jsonl")[-1]["status"] == "interrupted"
    assert list(tmp_path.glob("tiny/trials/*/checkpoints/step_*"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted; to resume: {shlex.join(['python', 'run_campaign.py', *arguments])}"


# ---- verbs ---------------------------------------------------------------------------------------------------------


def test_status_is_strict_json_and_text(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main(["status", str(finished), "--json"]) == 0
    snapshot = strict(capsys.readouterr().out)
    done = 6  # of 8, since two phases share the trials of a baseline
    assert (snapshot["campaign"], snapshot["status"], snapshot["done"]) == ("tiny", "finished", done)
    assert run_campaign.main(["status", str(finished)]) == 0
    assert "6/6" in capsys.readouterr().out


def test_status_of_a_running_campaign_does_not_disturb_it(file: Path, tmp_path: Path) -> None:
    with session_on(file, tmp_path / "tiny") as session:
        drive(begun(session), most=1)
        next_trial(session)
        done = script("status", tmp_path / "tiny", "--json")
        assert done.returncode == 0, done.stderr
        snapshot = strict(done.stdout)
        assert (snapshot["status"], snapshot["done"], len(snapshot["running"])) == ("running", 1, 1)
        drive(session, most=1)


def test_report_rebuilds_what_was_deleted(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = strict((finished / "summary.json").read_text())
    for name in ("summary.json", "report.html", "report.md", "alpha/trials.jsonl", "alpha/curves.parquet"):
        (finished / name).unlink()
    assert run_campaign.main(["report", str(finished), "--json"]) == 0
    assert strict(capsys.readouterr().out) == strict((finished / "summary.json").read_text()) == before
    for name in ("report.html", "report.md", "alpha/trials.jsonl", "alpha/curves.parquet"):
        assert (finished / name).stat().st_size > 0


def test_compare_is_strict_json_and_text(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main(["compare", str(finished), str(finished), "--json"]) == 0
    rows = strict(capsys.readouterr().out)["arms"]
    assert len(rows) == 3 and all(row["identical"] for row in rows)  # 4 arms, of which one is in both phases
    assert run_campaign.main(["compare", str(finished), str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "identical in every trial" in " ".join(shown.split()).lower() and max(map(len, shown.splitlines())) <= 80


def test_results_that_cannot_be_compared_are_a_usage_error(
    finished: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny", ("eval_tokens=64",)) as session:
        drive(begun(session), most=1)
    assert run_campaign.main(["compare", str(finished), str(tmp_path / "tiny")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "the evaluation tokens differ: 128" in captured.err
    assert run_campaign.main(["compare", str(finished), str(tmp_path)]) == 2
    assert "is not a results directory" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["status", "report"])
def test_a_verb_on_another_folder_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert run_campaign.main([verb, str(tmp_path)]) == 2
    assert "is not a results directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads which libraries a process has loaded")
def test_serve_says_where_it_is_needs_no_torch_and_ends_with_one_line(finished: Path) -> None:
    """Ctrl-C ends it at once, also while a browser keeps a connection open; a shell's background ignores Ctrl-C."""
    number = signal.SIGTERM if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else signal.SIGINT
    command = [sys.executable, str(SCRIPT), "serve", str(finished.parent), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", json.loads(process.stdout.readline())["url"])[1])  # type: ignore[index]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("GET", "/")
            assert b'href="/tiny/"' in connection.getresponse().read()
            assert not re.search(r"/torch/|/ray/", Path(f"/proc/{process.pid}/maps").read_text())
            process.send_signal(number)
            assert process.communicate(timeout=120) == ("", "interrupted\n")
            assert process.returncode == 128 + number
            connection.close()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist; serve shows a folder of campaigns, or the results of one"),
        (["s3://bucket/results"], "s3://bucket/results: serve works on a local results directory, not on an address"),
        (["missing", "--port", "65536"], "must be a whole number from 0 to 65,535, got '65536'"),
    ],
)
def test_serve_refuses_what_it_cannot_show_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run_campaign.main(["serve", *arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "") and message in printed.err.splitlines()[-1]


def test_doctor_is_strict_json_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_campaign.main(["doctor", "--out", str(tmp_path), "--json"])
    checks = strict(capsys.readouterr().out)
    assert {"python", "packages", "device", "results"} <= {check["name"] for check in checks}
    assert code == (1 if any(check["problem"] for check in checks) else 0)
    run_campaign.main(["doctor", "--out", str(tmp_path)])
    assert "python" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_every_command_is_silent_when_nobody_reads_its_output(
    options: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in `| head -1`; rich, JSON, Markdown and plain text are printed in different ways."""
    table = tmp_path / "table.csv"
    table.write_text("arm,seed,value\nbase,1,3.0\nbase,2,3.1\nother,1,2.0\nother,2,2.1\n")
    claims = tmp_path / "claims.yaml"
    claims.write_text("claims:\n  - {id: a, left: {alpha: 0.4}, right: {alpha: 0.05}, relation: less}\n")
    results = str(finished)
    run = [str(finished / "campaign.yaml"), "--inline", "--out", str(finished.parent)]
    verbs = [["status"], ["report"], ["verify"], ["claims", "--claims", str(claims)], ["compare", results]]
    commands = [[verb[0], results, *verb[1:]] for verb in verbs]
    for command in [*commands, ["judge", str(table)], ["doctor"], [*run, "--plan"], run]:
        reader, writer = os.pipe()
        os.close(reader)
        with monkeypatch.context() as patch, open(writer, "w") as unread:
            patch.setattr(sys, "stdout", unread)
            assert run_campaign.main([*command, *options]) == 128 + signal.SIGPIPE, command
        lines = capsys.readouterr().err.splitlines()
        assert command is run or lines == [], command
        assert "roken pipe" not in "".join(lines)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in run_campaign.VERBS)])
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    code = f"""
import sys, runpy
sys.argv = ["run_campaign.py", *{arguments!r}]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as exit:
    heavy = sorted({{"torch", "ray", "pyarrow", "scipy", "numpy", "plotly"}} & set(sys.modules))
    print(heavy, exit.code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[] 0"
    assert done.stdout.startswith("usage: run_campaign.py")


def test_the_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_campaign.main(["--help"])
    text = capsys.readouterr().out
    for words in ("0 all trials finished", "2 usage", "3 another run", "4 finished, but", "74 input", "130", "143"):
        assert words in text
