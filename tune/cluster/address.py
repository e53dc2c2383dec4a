"""Which Ray a campaign uses: the cluster that `--address` names, that of the Ray job it runs in, or a private one."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from ngpt.config.base import ConfigError, printable

AUTO, LOCAL = "auto", "local"  # the running Ray that Ray itself finds, and a private one
ADDRESS_VARIABLE = "RAY_ADDRESS"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the entry point of a job
JOB_FOLDERS = "working_dir_files"  # part of the path of what Ray unpacks for jobs
CONNECT_SECONDS = 5.0
EXAMPLE = "HOST:PORT of Ray's head, such as 10.0.0.1:6379"


def choose_address(given: str | None, report: Callable[[str], object]) -> str | None:
    """Returns the address of the cluster to join, `auto` included; None stands for a private Ray on this machine.

    Without an address, a campaign inside a Ray job joins the cluster of the job, for which its user has started it
    there. Anywhere else RAY_ADDRESS alone changes nothing. `report` gets a line where the choice may surprise.

    Args:
        given: the value of `--address`.

    Raises:
        ConfigError: it is no address that a campaign can join.
    """
    variable = os.environ.get(ADDRESS_VARIABLE) or None
    if given is None and variable and os.environ.get(JOB_VARIABLE):
        report(f"inside a Ray job: joining its cluster at {variable} (--address local starts a private Ray instead)")
        given = variable
    elif given is None and variable and variable != LOCAL:
        report(f"{ADDRESS_VARIABLE}={variable} is not used without --address auto: starting a private Ray")
    address = (variable or AUTO) if given == AUTO else given
    if address in (None, LOCAL):
        return None
    if address != AUTO:
        _split(address)
    return address


def job_folder_note(folder: Path) -> str | None:
    """A warning if a folder lies in the copy of a working directory that Ray makes for a job; None if it does not."""
    if JOB_FOLDERS not in folder.parts:
        return None
    return f"{folder} is in the folder that Ray has made for this job and removes later: give --out one that stays"


def check_listening(address: str) -> None:
    """Raises ConfigError if nothing listens at an address, which Ray itself would try for minutes."""
    if address == AUTO:
        return
    host, port = _split(address)
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except socket.gaierror as error:
        raise ConfigError(_problem(address, f"the host name does not resolve ({error.strerror})")) from None
    except ConnectionRefusedError:
        reason = "nothing listens there; start Ray's head (ray start --head), or correct the address"
        raise ConfigError(_problem(address, reason)) from None
    except TimeoutError:
        reason = f"no answer within {CONNECT_SECONDS:.0f} s; is the host up, and its port open in the firewall?"
        raise ConfigError(_problem(address, reason)) from None
    except OSError as error:
        raise ConfigError(_problem(address, error.strerror or str(error))) from None


def _split(address: str) -> tuple[str, int]:
    """The host and the port of an address."""
    scheme, has_scheme, rest = address.partition("://")
    if has_scheme:
        known = {"ray": "that is the port of Ray Client, through which campaigns do not run"}
        reason = known.get(scheme, "that is no address of a Ray cluster")
        host = rest.partition("/")[0].rpartition(":")[0] or rest
        raise ConfigError(_problem(address, f"{reason}; write {host or 'HOST'}:6379, or the port of its head"))
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise ConfigError(_problem(address, f"the port is missing; write {EXAMPLE}, auto or local"))
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigError(_problem(address, f"{port!r} is not a port; write {EXAMPLE}, auto or local"))
    return host.removeprefix("[").removesuffix("]"), int(port)


def _problem(address: str, reason: str) -> str:
    return f"--address {printable(address)}: {reason}"
