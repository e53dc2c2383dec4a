"""Where the command line finds results: in a local folder, or at the address of an object store.

What an address needs is imported once there is one: the command line starts without pyarrow.
"""

import argparse
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.machine.doctor import Check
    from tune.remote.uri import Uri

REPORT = "report.html"
SMOKE = "-smoke"  # suffix of the results directory of a smoke run


def location(text: str) -> "Path | Uri":
    """The folder or address that an argument of the command line means; raises ArgumentTypeError for a bad one."""
    from tune.remote.uri import parse_location  # imports pydantic, which --help does not need

    return parse_location(text)


def place_of(target: "str | os.PathLike[str]") -> "Path | Uri":
    """The folder or address that an argument of a Python function means; `~` is the home folder.

    Raises:
        ConfigError: a bad address.
    """
    if isinstance(target, Path):
        return target
    try:
        return location(os.path.expanduser(os.fspath(target)))
    except argparse.ArgumentTypeError as error:
        from ngpt.config.base import ConfigError

        raise ConfigError(str(error)) from None


def recordable(argument: str) -> str:
    """An argument of the command line without the credentials that an address may hold."""
    if "://" not in argument:
        return argument
    from tune.remote.uri import without_credentials

    return without_credentials(argument)


def results_name(campaign: str, *, smoke: bool) -> str:
    """The name of the results directory of a campaign."""
    return f"{campaign}{SMOKE}" if smoke else campaign


def entry(place: "Path | Uri", name: str) -> "Path | Uri":
    """The results directory `name` in the folder or at the address of `--out`."""
    return (place / name).absolute() if isinstance(place, Path) else place.child(name)


def report_path(results: "Path | Uri") -> "Path | Uri":
    """The report of a results directory, as short as it can be shown."""
    if not isinstance(results, Path):
        return results.child(REPORT)
    report = results / REPORT
    return report.relative_to(Path.cwd()) if report.is_relative_to(Path.cwd()) else report


def local_results(results: "Path | Uri", *, stack: contextlib.ExitStack, verb: str) -> Path:
    """The results directory for a verb. Results at an address are copied until `stack` closes.

    `verify` gets them whole, and `plan` an empty folder if there are none. What `report` changes is uploaded.

    Raises:
        ConfigError: `prune` or `serve` is given an address.
    """
    if isinstance(results, Path):
        return results
    if verb in ("prune", "serve"):
        from ngpt.config.base import ConfigError

        raise ConfigError(f"{results}: {verb} works on a local results directory, not on an address")
    from tune.remote.results import RemoteResults, local_copy

    if verb == "report":
        return stack.enter_context(RemoteResults(results)).root
    checkpoints = "all" if verb == "verify" else "none"
    return stack.enter_context(local_copy(results, checkpoints=checkpoints, required=verb != "plan"))


def working_folder(out: "Path | Uri") -> Path:
    """The folder on this machine in which campaigns with this `--out` run."""
    if isinstance(out, Path):
        return out
    from tune.remote.results import local_folder

    return local_folder(out)


def store_checks(out: "Path | Uri") -> "Iterator[Check]":
    """A check of `doctor`: whether this machine can use the object store of `--out`, if that is an address."""
    if isinstance(out, Path):
        return
    from ngpt.config.base import ConfigError
    from tune.machine.doctor import Check
    from tune.remote.store import StoreError, open_store, write_problem

    try:
        problem = write_problem(open_store(out))
    except (ConfigError, StoreError) as error:
        problem = str(error)
    yield Check("object store", str(out), problem)


@contextlib.contextmanager
def open_results(
    out: "Path | Uri", name: str, *, stop: threading.Event | None, whole: bool
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The results directory for a campaign, and arguments of `launch`; uploads it if `out` is an address.

    Args:
        whole: whether checkpoints of finished trials are downloaded, too.
    """
    results = entry(out, name)
    if isinstance(results, Path):
        yield results, {"stop": stop}
        return
    from tune.remote.results import RemoteResults

    with RemoteResults(results, stop=stop, checkpoints="all" if whole else "unfinished") as remote:
        yield remote.root, {"stop": remote.stop, "view": remote.view, "remote": remote}
