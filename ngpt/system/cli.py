"""What all commands share: exit codes, the `--set` option, and one message on stderr for an error of the user."""

import argparse
import os
import sys
from collections.abc import Callable

EXIT_ERROR = 1  # internal error
EXIT_USAGE = 2  # usage, configuration or data
EXIT_BUSY = 3  # another run holds the results directory
EXIT_UNSUCCESSFUL = 4  # done, but a trial failed or diverged
EXIT_IO = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def run_command(
    command: Callable[[], int], *, path: object = None, prints_only: bool = False, interrupted: str = ""
) -> int:
    """Runs `command` and returns its exit code. What a user can mend is a message on stderr, never a traceback.

    Args:
        command: returns an exit code. A `UserError` ends it with the code of that error, an OSError with `EXIT_IO`;
            other exceptions pass through.
        path: what the message of an OSError without a file name blames, such as the output folder of a full disk.
        prints_only: the command only prints, so it may end early, with exit code 0, when `head` closes the pipe.
        interrupted: message on Ctrl-C.
    """
    try:
        code = command()
        sys.stdout.flush()  # here, where an error still decides the exit code
        return code
    except OSError as error:
        if prints_only and isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more at exit
            return 0
        blamed = error.filename or path
        print(f"{blamed}: {error.strerror or error}" if blamed else error, file=sys.stderr)
        return EXIT_IO
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        from ngpt.config.base import UserError  # loads pydantic, which --help can do without

        if not isinstance(error, UserError):
            raise
        print(error, file=sys.stderr)
        return error.exit_code


def add_set_option(parser: argparse.ArgumentParser, *, help: str = "change settings") -> None:
    """Adds `--set NAME=VALUE [NAME=VALUE ...]`, which may be given several times, as `options.set`."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=help)
