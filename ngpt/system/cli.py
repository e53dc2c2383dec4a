"""Exit codes, error handling and the `--set` option of all commands."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

EXIT_ERROR = 1  # internal error
EXIT_USAGE = 2  # wrong usage, configuration or data
EXIT_BUSY = 3  # another run holds the results directory
EXIT_UNSUCCESSFUL = 4  # done, but a trial failed or diverged
EXIT_IO = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT
RAISING = ("strict", "surrogateescape")  # ways of stdout to handle what it cannot encode; the latter with LANG=C


def run_command(
    command: Callable[[], int], *, path: object = None, prints_only: bool = False, interrupted: str = ""
) -> int:
    """Runs `command` and returns its exit code. Errors that the user can fix are printed to stderr without traceback.

    Args:
        command: returns an exit code. A `UserError` has its own exit code, an OSError has `EXIT_IO`; other exceptions
            propagate.
        path: named in the message of an OSError that has no file name, such as the output folder on a full disk.
        prints_only: the command has no other effect than printing, so a closed pipe (`| head`) ends it with code 0.
        interrupted: message on Ctrl-C.
    """
    try:
        with encode_stdout("replace"):  # a model may write characters that the terminal cannot show
            code = command()
            sys.stdout.flush()  # at exit, an error would no longer change the exit code
        return code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):  # stdout may have been replaced by an object without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
            if prints_only:
                return 0
        from ngpt.system.cache import cache_advice  # imports pydantic, which --help does not need

        failed_path = error.filename or path
        text = f"{failed_path}: {error.strerror or error}" if failed_path else str(error)
        advice = cache_advice(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        print(f"{text}{advice}", file=sys.stderr)
        return EXIT_IO
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        from ngpt.config.base import UserError  # imports pydantic, which --help does not need

        if not isinstance(error, UserError):
            raise
        print(error, file=sys.stderr)
        return error.exit_code


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
    """Prints to stderr."""
    print(text, file=sys.stderr, flush=True)


def add_set_option(parser: argparse.ArgumentParser, *, help: str = "change settings") -> None:
    """Adds `--set NAME=VALUE [NAME=VALUE ...]`, which may be repeated; the values are in `options.set`."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=help)
