"""What every command does with errors, interrupts and closed pipes."""

import argparse
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError, Problem, UserError
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.system.cli import ArgumentParser, add_set_option, print_line, run_command, whole_number
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


@pytest.mark.parametrize(("prints_only", "code"), [(True, 0), (False, 74)])
def test_only_a_command_that_prints_may_end_early_when_the_pipe_is_closed(prints_only: bool, code: int) -> None:
    script = (
        "import sys; from ngpt.system.cli import run_command\n"
        "sys.stdin.read()\n"
        f"sys.exit(run_command(lambda: print('text') or 0, prints_only={prints_only}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr


@pytest.mark.parametrize("text", ["1", "42", "4096"])
def test_a_whole_number_in_its_range_is_read(text: str) -> None:
    assert whole_number(1, 4096)(text) == int(text)


@pytest.mark.parametrize("text", ["0", "4097", "-1", "1.5", "1e3", "\u0663", "", " 1", "9" * 5000])
def test_another_number_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from 1 to 4,096, got "):
        whole_number(1, 4096)(text)


def test_set_may_be_given_several_times_with_several_values() -> None:
    parser = argparse.ArgumentParser()
    add_set_option(parser)
    assert parser.parse_args([]).set == []
    assert parser.parse_args(["--set", "a=1", "b=2", "--set", "c=3"]).set == ["a=1", "b=2", "c=3"]
