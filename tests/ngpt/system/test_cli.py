"""What every command does with errors, interrupts and closed pipes."""

import argparse
import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.code.version import version_text
from ngpt.config.base import ConfigError, Problem, UserError
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.system.cli import (
    ERASE,
    ArgumentParser,
    add_set_option,
    erase_status,
    has_status_line,
    print_line,
    run_command,
    show_status,
    whole_number,
)
from tests.helpers import ROOT


class HeldElsewhere(UserError):
    exit_code = 3


def fails_with(error: BaseException):
    def command() -> int:
        raise error

    return command


def test_characters_that_the_terminal_cannot_show_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252", newline="\n"))
    assert run_command(lambda: print("caf\u00e9 \u65e5 \ud800") or 0) == 0
    assert shown.getvalue() == b"caf\xe9 ? ?\n"


@pytest.mark.parametrize(
    ("errors", "shown"), [("strict", b"?"), ("surrogateescape", b"?"), ("backslashreplace", b"\\u65e5")]
)
def test_stdout_handles_such_characters_as_before_once_the_command_is_over(
    monkeypatch: pytest.MonkeyPatch, errors: str, shown: bytes
) -> None:
    """The process may be that of another program."""
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_command(lambda: print("\u65e5", end="") or 0) == 0
    assert (written.getvalue(), stdout.errors) == (shown, errors)


def test_the_exit_code_of_a_command_is_passed_on() -> None:
    assert run_command(lambda: 4) == 4


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError([Problem(("lr",), "too large"), Problem((), "no data")]), 2, "lr: too large\nno data"),
        (CorruptShardError(Path("a.bin"), "CRC mismatch"), 2, "a.bin: CRC mismatch"),
        (HeldElsewhere("another run has it"), 3, "another run has it"),
        (FileNotFoundError(2, "No such file", "b.yaml"), 74, "b.yaml: No such file"),
        (OSError(28, "No space left on device"), 74, "runs/x: No space left on device"),
        (OSError("the journal is damaged"), 74, "runs/x: the journal is damaged"),
        (BrokenPipeError(32, "Broken pipe"), 74, "runs/x: Broken pipe"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_error_of_the_user_is_one_message_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(fails_with(error), path="runs/x", interrupted="stopped") == code
    assert capsys.readouterr() == ("", message + "\n")


def test_an_error_that_nobody_reads_ends_the_command_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        assert run_command(fails_with(ConfigError("no such experiment"))) == 141


def test_a_path_that_the_message_has_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fails_with(OSError("runs/x/journal.jsonl:3: edited")), path="runs/x") == 74
    assert capsys.readouterr().err == "runs/x/journal.jsonl:3: edited\n"


def test_an_internal_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fails_with(ZeroDivisionError("by \x1b[31m")), crashed="a bug") == 1
    first, *_, last, end = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert (last, end) == (r"ZeroDivisionError: by \x1b[31m", "a bug")


@pytest.mark.parametrize(
    "error",
    [ConfigError("\x1b[2J\u202e\udcff"), OSError(28, "full", "\x1b]0;t\x07\udcff"), ValueError("\x1b[2J")],
    ids=lambda error: type(error).__name__,
)
def test_errors_and_log_messages_are_printed_in_visible_form(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's; a command has none

    def command() -> int:
        logging.getLogger("ngpt").warning("skipped %s", "a\x1b[2J\u202e")
        print_line("in \x1b[2J\r\n\udcff")
        raise error

    run_command(command)
    text = capsys.readouterr().err
    assert text.startswith("skipped a\\x1b[2J\\u202e\nin \\x1b[2J\\r\\n\\udcff\n")
    assert text.replace("\n", "").isprintable()


def test_wrong_usage_is_printed_in_visible_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ArgumentParser(prog="x").parse_args(["\x1b[2J.txt"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: \\x1b[2J.txt\n")


def start(script: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_command_ends_silently_when_nobody_reads_its_output_any_more() -> None:
    script = (
        "import sys; from ngpt.system.cli import exit_process, run_command\n"
        "sys.stdin.read()\n"
        "exit_process(run_command(lambda: print('text') or 0))"
    )
    with start(script) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.usefixtures("signals")
def test_a_signal_ends_a_command_with_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before, cleaned = signal.getsignal(number), []

    def command() -> int:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)
        return 0

    assert run_command(command) == 128 + number
    assert capsys.readouterr() == ("", "interrupted\n")
    assert cleaned and signal.getsignal(number) == before


def test_a_command_that_does_not_react_to_a_signal_is_ended() -> None:
    """As one that tokenizes a large text in native code, where Python handles no signal."""
    script = (
        "import time; from ngpt.system import cli, signals\n"
        "signals.GRACE = 0.1\n"
        "signals.end_process_on_signal()\n"
        "def command():\n"
        "    print('started', flush=True)\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "cli.exit_process(cli.run_command(command))"
    )
    with start(script) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("text", ["1", "42", "4096"])
def test_a_whole_number_in_its_range_is_read(text: str) -> None:
    assert whole_number(1, 4096)(text) == int(text)


@pytest.mark.parametrize("text", ["0", "4097", "-1", "1.5", "1e3", "\u0663", "", " 1", "9" * 5000])
def test_another_number_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from 1 to 4,096, got "):
        whole_number(1, 4096)(text)


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="x")
    add_set_option(parser)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "a=1", "b.c=2", "--set", "d=x=y"],
        ["--set", "a=1", "--set=b.c=2", "--set", "d=x=y", "FILE"],
        ["FILE", "--set", "a=1", "b.c=2", "d=x=y"],
        ["--set", "a=1", "b.c=2", "d=x=y", "FILE"],
        ["--set", "a=1", "b.c=2", "FILE", "--set=d=x=y", "--dry-run"],
    ],
    ids=" ".join,
)
def test_set_may_be_anywhere_several_times_and_with_several_values(
    arguments: list[str], parser: ArgumentParser
) -> None:
    options = parser.parse_args(arguments)
    assert options.set == ["a=1", "b.c=2", "d=x=y"]
    assert options.file == ("FILE" if "FILE" in arguments else None)
    assert options.dry_run == ("--dry-run" in arguments)


def test_what_follows_set_is_a_setting_only_if_it_looks_like_one(parser: ArgumentParser) -> None:
    assert parser.parse_args([]).set == []
    assert parser.parse_args(["--set", "a=1", "runs/x=1"]).file == "runs/x=1"
    assert parser.parse_args(["--set", "alpha"]).set == ["alpha"]  # refused where settings are read
    for wrong in (["--set"], ["--set", "--dry-run"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-rum"], "x: error: unknown option '--dry-rum', did you mean '--dry-run'?"),
        (["--st=a=1"], "unknown option '--st', did you mean '--set'?"),
        (["--zzzzz"], "unknown option '--zzzzz'; choose one of --dry-run, --dtype, --help, --set, --version, -h"),
        (["--dtype", "bfloat61"], "argument --dtype: unknown choice 'bfloat61', did you mean 'bfloat16'?"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_misspelt_option_or_choice_is_corrected(
    arguments: list[str], message: str, parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_every_parser_prints_the_versions(parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--version"])
    assert capsys.readouterr().out == f"{version_text()}\n"


@pytest.mark.parametrize(
    "command", ["parser.parse_args(['--help'])", "sys.exit(run_command(lambda: print('text') or 0))"]
)
def test_a_command_without_a_stdout_works(command: str) -> None:
    code = "import sys; from ngpt.system.cli import ArgumentParser, run_command; parser = ArgumentParser()"
    shell = ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, f"{code}; {command}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr  # argparse then prints its help on stderr


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_that_nobody_reads_ends_silently(argument: str) -> None:
    code = (
        "import sys; from ngpt.system.cli import ArgumentParser\n"
        "parser = ArgumentParser(description='long ' * 4000)\n"  # longer than the buffer of stdout
        "sys.stdin.read()\n"
        f"parser.parse_args([{argument!r}])"
    )
    with start(code) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + signal.SIGPIPE, "")


# ---- the status line of a terminal ----------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A stderr that claims to be a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


def on_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> Terminal:
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_a_line_that_is_printed_takes_the_place_of_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    show_status(lambda width: "10 %")
    show_status(lambda width: "20 %")
    print_line("one")
    print_line("two")
    assert terminal.text() == f"{ERASE}10 %{ERASE}20 %{ERASE}one\ntwo\n"


def test_the_status_is_erased_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    show_status(lambda width: "10 %")
    erase_status()
    erase_status()
    assert terminal.text() == f"{ERASE}10 %{ERASE}"


def test_untrusted_text_is_visible_and_an_ascii_terminal_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "ascii")
    show_status(lambda width: "a\x1b[2J ━━──")
    erase_status()
    assert terminal.text() == f"{ERASE}a\\x1b[2J ==--{ERASE}"


def test_the_status_has_the_width_of_the_terminal_at_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl, struct, termios = (pytest.importorskip(name) for name in ("fcntl", "struct", "termios"))
    master, slave = os.openpty()
    widths: list[int] = []

    def record(width: int) -> str:
        widths.append(width)
        return "x"

    with open(slave, "w") as stream, open(master, "rb"):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        assert has_status_line()
        for columns in (60, 120):
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            show_status(record)
        erase_status()
    assert widths == [59, 119]  # a full line would wrap


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_a_terminal_that_cannot_erase_has_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on_terminal(monkeypatch)
    assert has_status_line()
    monkeypatch.setenv("TERM", name)
    assert not has_status_line()


def test_a_file_and_a_closed_stream_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not has_status_line()
    sys.stderr.close()
    assert not has_status_line()
    show_status(lambda width: "x")  # raises nothing
    erase_status()
