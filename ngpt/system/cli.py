"""Exit codes and error handling of all commands, and what their options have in common."""

import argparse
import contextlib
import io
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ngpt.config.visible import VisibleFormatter, visible
from ngpt.system.atomic_files import describe_os_error, naming
from ngpt.system.signals import Interrupted, raise_on_signal
from ngpt.system.start import missing_package

if TYPE_CHECKING:
    from ngpt.code.plugins import Table

EXIT_ERROR = 1  # internal error
EXIT_USAGE = 2  # wrong usage, configuration or data
EXIT_BUSY = 3  # another run holds the results directory
EXIT_UNSUCCESSFUL = 4  # done, but a trial failed or diverged
EXIT_IO = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_UNREAD = 141  # 128 + SIGPIPE
SET = "--set"
SETTING = re.compile(r"[^-/=\s][^/=\s]*=")  # how the argument NAME=VALUE starts, unlike a path or an option
DUMB = ("dumb", "unknown")  # values of TERM of terminals that cannot erase a line
FALLBACK_WIDTH = 80  # of a terminal that does not know its size
ERASE = "\r\x1b[K"
ASCII_BAR = str.maketrans("━─", "=-")
RAISING = ("strict", "surrogateescape")  # ways of stdout to handle what it cannot encode; the latter with LANG=C

_status_lock = threading.RLock()
_status_is_shown = False


def run_command(
    command: Callable[[], int],
    *,
    path: object = None,
    interrupted: str = "interrupted",
    crashed: str = "internal error",
) -> int:
    """Runs `command` and returns its exit code. Errors that the user can fix are printed to stderr without traceback.

    All messages are printed in visible form, since they repeat names and values from files. If nobody reads the output
    any more (`| head`), the command ends silently with the code that shells show for other tools then.

    Args:
        command: returns an exit code. A `UserError` has its own exit code, an OSError has `EXIT_IO`. Any other
            exception is a bug: its traceback is printed, and the code is `EXIT_ERROR`.
        path: named in the message of an OSError that has no file name, such as the output folder on a full disk.
        interrupted: message when a signal has ended the command; the code is 128 and its number.
        crashed: message after the traceback of a bug.
    """
    try:
        return _run_and_report(command, path, interrupted, crashed)
    except BrokenPipeError:  # nobody reads the message about an error either (`2>&1 | head`)
        if not discard_unread_output():
            raise
        return EXIT_UNREAD


def _run_and_report(command: Callable[[], int], path: object, interrupted: str, crashed: str) -> int:
    """Returns the exit code of `command` and prints what ended it."""
    try:
        # A model may write characters that the terminal cannot show.
        with raise_on_signal(), encode_stdout("replace"), visible_warnings():
            code = command()
        erase_status()
        with naming("stdout"):
            flush_stdout()  # at exit, an error would no longer change the exit code
        return code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and discard_unread_output():
            return EXIT_UNREAD
        from ngpt.system.cache import cache_advice  # imports pydantic, which --help does not need

        advice = cache_advice(error.filename) if isinstance(error.filename, str | bytes) else ""
        print_lines(f"{describe_os_error(error, path)}{advice}")
        return EXIT_IO
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        with contextlib.suppress(OSError):  # the terminal may be closed
            print_lines(interrupted)
        return 128 + number
    except Exception as error:  # the last handler: whatever no other one expects gets its traceback
        if message := missing_package(error):
            print_lines(message)
            return EXIT_USAGE
        from ngpt.config.base import UserError  # imports pydantic, which --help does not need
        from ngpt.config.secrets import redact

        if isinstance(error, UserError):
            print_lines(str(error))
            return error.exit_code
        print_lines(redact("".join(traceback.format_exception(error))).rstrip("\n"))
        print_lines(crashed)
        return EXIT_ERROR


def exit_process(code: int) -> NoReturn:
    """Exits. After a signal, threads and child processes that still work, such as compilers, are not waited for."""
    if code > 128:
        with contextlib.suppress(OSError):
            flush_stdout()
        os._exit(code)
    sys.exit(code)


def flush_stdout() -> None:
    """Writes what stdout still holds; a process that was started without a stdout (`>&-`) has none."""
    if sys.stdout is not None:
        sys.stdout.flush()


def discard_unread_output() -> bool:
    """Sends stdout and stderr to nowhere if their reader is gone; returns whether that holds for either."""
    unread = []
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # replaced by an object without a file, or closed
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            unread += [stream.fileno() for _, event in poll.poll(0) if event & select.POLLERR]
    for number in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # Python flushes again at exit
    return bool(unread)


@contextlib.contextmanager
def visible_warnings() -> Iterator[None]:
    """Shows log messages that no handler takes, as in all commands, in visible form on stderr."""
    handler = logging.lastResort
    if handler is None:
        yield
        return

    def make_room(record: logging.LogRecord) -> bool:
        erase_status()
        return True

    before = handler.formatter
    handler.setFormatter(VisibleFormatter())
    handler.addFilter(make_room)
    try:
        yield
    finally:
        handler.setFormatter(before)
        handler.removeFilter(make_room)


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


def has_status_line() -> bool:
    """Whether stderr is a terminal that can erase a line."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in DUMB
    except (AttributeError, ValueError):  # it is closed, or replaced by an object that is no file
        return False


def show_status(text: Callable[[int], str]) -> None:
    """Shows `text(width)` as the last line of a terminal, until another one or a printed line takes its place."""
    global _status_is_shown
    with _status_lock, contextlib.suppress(OSError, ValueError):  # the terminal is closed
        line = visible(text(_width() - 1))
        try:
            line.encode(sys.stderr.encoding or "ascii")
        except UnicodeEncodeError:
            line = line.translate(ASCII_BAR)
        sys.stderr.write(f"{ERASE}{line}")
        sys.stderr.flush()
        _status_is_shown = True


def erase_status() -> None:
    """Erases the status line, if one is shown."""
    global _status_is_shown
    with _status_lock, contextlib.suppress(OSError, ValueError):
        if _status_is_shown:
            _status_is_shown = False
            sys.stderr.write(ERASE)
            sys.stderr.flush()


@contextlib.contextmanager
def without_status() -> Iterator[None]:
    """Erases the status line; until the context closes, other threads do not show it again."""
    with _status_lock:
        erase_status()
        yield


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or FALLBACK_WIDTH
    except (OSError, ValueError):
        return FALLBACK_WIDTH


def print_line(text: str) -> None:
    """Prints one line to stderr, in visible form."""
    with without_status():
        print(visible(text), file=sys.stderr, flush=True)


def print_lines(text: str) -> None:
    """Prints text of several lines to stderr, in visible form."""
    with without_status():
        print(visible(text, keep="\n"), file=sys.stderr, flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """Reads the arguments of every command.

    It has `--version`, takes `--set` anywhere, corrects misspelt options and choices, and prints errors in visible
    form: they repeat arguments, which may be names of files (`ngpt.data *`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action=PrintVersion, help="print versions of this program, Python, torch, Ray")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the options, or ends the process with a correction of the first option that does not exist."""
        words = sys.argv[1:] if args is None else list(args)
        try:
            options, unknown = self.parse_known_args(self._one_setting_each(words), namespace)
            if unknown:
                wrong = next((word for word in unknown if word.startswith("--")), None)
                self.error(f"unrecognized arguments: {' '.join(unknown)}" if wrong is None else self._correct(wrong))
            return options
        except ModuleNotFoundError as error:  # of a type of an argument
            if (message := missing_package(error)) is None:
                raise
            self.exit(EXIT_USAGE, f"{message}\n")

    def error(self, message: str) -> NoReturn:
        """Ends the process with a message and how the command is used."""
        super().error(visible(message))

    def print_help(self, file: Any = None) -> None:
        """Prints all options. If the reader has closed the pipe, `exit` handles it."""
        with contextlib.suppress(BrokenPipeError):
            super().print_help(file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the process, silently if nobody reads its output any more."""
        with contextlib.suppress(BrokenPipeError):
            flush_stdout()
        if status == 0 and discard_unread_output():  # also if the text was too long for a buffer, and lost earlier
            status = EXIT_UNREAD
        super().exit(status, message)

    def _one_setting_each(self, words: list[str]) -> list[str]:
        """Writes `--set a=1 b=2 FILE` as `--set=a=1 --set=b=2 FILE`, which argparse reads alike wherever FILE is."""
        if SET not in self._option_string_actions:
            return words
        single: list[str] = []
        follows = False  # a --set, or one of its settings
        for word in words:
            if follows and single[-1] == SET and not word.startswith("-"):
                single[-1] = f"{SET}={word}"
            elif follows and SETTING.match(word):
                single.append(f"{SET}={word}")
            else:
                follows = word == SET or word.startswith(f"{SET}=")
                single.append(word)
        return single

    def _correct(self, word: str) -> str:
        from ngpt.config.base import unknown_message  # imports pydantic, which --help does not need

        return unknown_message("option", word.partition("=")[0], self._option_string_actions)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            from ngpt.config.base import unknown_message

            raise argparse.ArgumentError(action, unknown_message("choice", value, [*map(str, action.choices)]))


class PrintVersion(argparse.Action):
    """The option `--version`, which reads versions once it is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"nargs": 0, "default": argparse.SUPPRESS, "dest": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints the versions and ends the process."""
        from ngpt.code.version import version_text

        with contextlib.suppress(BrokenPipeError):
            print(visible(version_text(), keep="\n"))
        parser.exit()


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Returns an argparse type for whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,}, got {text!r}")

    return parse


def add_set_option(parser: argparse.ArgumentParser, *, help: str = "change settings") -> None:
    """Adds `--set NAME=VALUE [NAME=VALUE ...]`, which may be repeated; the values are in `options.set`."""
    parser.add_argument(SET, nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=help)


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--plugin FILE`, which may be repeated; `use_plugins` loads the plug-ins in `options.plugin`."""
    text = "Python file, or module of an installed package, that adds rules, optimizers, metrics, ...; repeatable"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help=text)


def use_plugins(given: Sequence[str], tables: "Sequence[Table] | None" = None) -> None:
    """Loads the plug-ins that are given and those of installed packages, and prints a line for each.

    `tables` are those that they may add to, by default those of a single run. Without any plug-in, nothing is imported.

    Raises:
        PluginError: one that is given cannot be used. Of an installed package, it is left out with a warning.
    """
    from ngpt.plugins import load

    if not given and next(load.installed(), None) is None:
        return
    tables = load.TABLES if tables is None else tables
    load.load_plugins(given, tables)
    for problem in load.load_installed(tables):
        print_line(f"warning: {problem}")
    if load.loaded_plugins():
        from ngpt.plugins.records import plugin_lines

        for line in plugin_lines():
            print_line(line)


def plugins_for_help(arguments: Sequence[str], load: Callable[[Sequence[str]], None] = use_plugins) -> None:
    """If somebody asks for help about given plug-ins, loads them, so that the help and a line for each name them."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugin_option(parser)
    parser.add_argument("-h", "--help", action="store_true")
    asked, _ = parser.parse_known_args(arguments)
    if asked.help and asked.plugin and (code := run_command(lambda: load(asked.plugin) or 0)):
        raise SystemExit(code)
