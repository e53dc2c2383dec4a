"""Exit codes, error handling and the `--set` option of all commands."""

import argparse
import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from ngpt.config.visible import VisibleFormatter, visible
from ngpt.system.atomic_files import describe_os_error, naming

EXIT_ERROR = 1  # internal error
EXIT_USAGE = 2  # wrong usage, configuration or data
EXIT_BUSY = 3  # another run holds the results directory
EXIT_UNSUCCESSFUL = 4  # done, but a trial failed or diverged
EXIT_IO = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT
RAISING = ("strict", "surrogateescape")  # ways of stdout to handle what it cannot encode; the latter with LANG=C


def run_command(
    command: Callable[[], int],
    *,
    path: object = None,
    prints_only: bool = False,
    interrupted: str = "",
    crashed: str = "internal error",
) -> int:
    """Runs `command` and returns its exit code. Errors that the user can fix are printed to stderr without traceback.

    All messages are printed in visible form, since they repeat names and values from files.

    Args:
        command: returns an exit code. A `UserError` has its own exit code, an OSError has `EXIT_IO`. Any other
            exception is a bug: its traceback is printed, and the code is `EXIT_ERROR`.
        path: named in the message of an OSError that has no file name, such as the output folder on a full disk.
        prints_only: the command has no other effect than printing, so a closed pipe (`| head`) ends it with code 0.
        interrupted: message on Ctrl-C.
        crashed: message after the traceback of a bug.
    """
    try:
        with encode_stdout("replace"), visible_warnings():  # a model may write characters that the terminal cannot show
            code = command()
        with naming("stdout"):
            sys.stdout.flush()  # at exit, an error would no longer change the exit code
        return code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):  # stdout may have been replaced by an object without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
            if prints_only:
                return 0
        from ngpt.system.cache import cache_advice  # imports pydantic, which --help does not need

        advice = cache_advice(error.filename) if isinstance(error.filename, str | bytes) else ""
        print_lines(f"{describe_os_error(error, path)}{advice}")
        return EXIT_IO
    except KeyboardInterrupt:
        print_lines(interrupted)
        return EXIT_INTERRUPTED
    except Exception as error:
        from ngpt.config.base import UserError  # imports pydantic, which --help does not need
        from ngpt.config.secrets import redact

        if isinstance(error, UserError):
            print_lines(str(error))
            return error.exit_code
        print_lines(redact("".join(traceback.format_exception(error))).rstrip("\n"))
        print_lines(crashed)
        return EXIT_ERROR


@contextlib.contextmanager
def visible_warnings() -> Iterator[None]:
    """Shows log messages that no handler takes, as in all commands, in visible form on stderr."""
    handler = logging.lastResort
    if handler is None:
        yield
        return
    before = handler.formatter
    handler.setFormatter(VisibleFormatter())
    try:
        yield
    finally:
        handler.setFormatter(before)


@contextlib.contextmanager
def encode_stdout(errors: str) -> Iterator[None]:
    """Handles characters that stdout cannot encode as `errors` says, if they would raise otherwise."""
    stream = sys.stdout
    before = stream.errors if isinstance(stream, io.TextIOWrapper) else None
    if not isinstance(stream, io.TextIOWrapper) or before not in RAISING:
        yield
        return
    stream.reconfigure(errors=errors)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):  # closed, or a closed pipe
            stream.reconfigure(errors=before)


def print_line(text: str) -> None:
    """Prints one line to stderr, in visible form."""
    print(visible(text), file=sys.stderr, flush=True)


def print_lines(text: str) -> None:
    """Prints text of several lines to stderr, in visible form."""
    print(visible(text, keep="\n"), file=sys.stderr, flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """Prints its errors in visible form: they repeat arguments, which may be names of files (`ngpt.data *`)."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Returns an argparse type for whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,}, got {text!r}")

    return parse


def add_set_option(parser: argparse.ArgumentParser, *, help: str = "change settings") -> None:
    """Adds `--set NAME=VALUE [NAME=VALUE ...]`, which may be repeated; the values are in `options.set`."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=help)
