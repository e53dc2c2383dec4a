"""Joins a running Ray cluster, or says within seconds, in one line, why that is not possible.

Ray itself tries for five minutes to reach a cluster, logs warnings and stacks of its C++ code meanwhile, and then gives
few reasons. So everything that usually goes wrong is tried here first.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray._common.usage.usage_lib
import ray._private.ray_constants
import ray._private.services
import ray._private.utils
import ray.exceptions
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

from ngpt.config.base import ConfigError, printable
from tune.cluster.address import ADDRESS_VARIABLE, AUTO, JOB_VARIABLE

GCS_SECONDS = 15.0  # for the head to answer
NODE_SECONDS = 5.0  # for a node on this host to appear
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
UV_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
MAX_REASON = 500  # characters of an error of Ray


def join_cluster(
    address: str, runtime_env: Mapping[str, Any] | None = None, *, naming: Mapping[str, Any] | None = None
) -> Any:
    """Joins the cluster at `address`, which may be `auto`; returns what `ray.init` returns.

    `naming` are arguments of `ray.init` that name the job.

    Raises:
        ConfigError: the cluster cannot be joined. The message is one line with the address and the reason.
    """
    # Under `uv run`, Ray would send the working directory to all nodes and refuse one above 512 MiB.
    is_wanted = os.environ.get(UV_VARIABLE, "").lower() in ("1", "true")
    ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = is_wanted
    with quiet_stderr():
        if address == AUTO:
            logging.getLogger("ray").setLevel(logging.ERROR)  # Ray warns that it sends the token
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        found = _resolve(address)
        name = f"--address {printable(address)}" + (f" ({found})" if found != address else "")
        with _naming(name):
            _check_token()
            client = _reach(found)
            _check_versions(client)
            _check_node(client)
            return ray.init(
                address=found,
                runtime_env=dict(runtime_env) if runtime_env else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **(naming or {}),
            )


class _CannotJoin(Exception):
    """Why the cluster cannot be joined, for the end of a sentence."""


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns every error into a ConfigError with the name of the cluster."""
    try:
        yield
    except _CannotJoin as error:
        raise ConfigError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # of many types, with tracebacks of Ray's agents in their messages
        raise ConfigError(f"{name}: Ray cannot join it: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error of Ray on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text, MAX_REASON)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keeps what Ray's C++ code writes to stderr off the terminal, which it does until it knows the cluster's logs."""
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _resolve(address: str) -> str:
    """The address of the head as Ray wants it: the running Ray that it finds for `auto`, no loopback address."""
    try:
        found = ray._private.services.canonicalize_bootstrap_address(address)
    except ConnectionError:
        found = None
    if found is None:
        advice = "start one (ray start --head, or ray start --address=HOST:PORT to join one), or give HOST:PORT"
        raise ConfigError(f"--address {AUTO}: no Ray runs on this machine; {advice}")
    return found


def _check_token() -> None:
    """Raises an error if Ray's C++ code would end the process for lack of the token that it is to send."""
    if os.environ.get(AUTH_MODE, "").lower() == "token" and not any(_token_sources().values()):
        raise _CannotJoin(f"{AUTH_MODE} is token, and there is no token in {', '.join(_token_sources())}; {_advice()}")
    if (path := os.environ.get(TOKEN_PATH)) and not os.environ.get(TOKEN) and not _is_token(Path(path)):
        raise _CannotJoin(f"{TOKEN_PATH}={path} is not a file with a token; {_advice()}")


def _advice() -> str:
    return "copy ~/.ray/auth_token from the cluster's head (`ray get-auth-token` prints it there)"


def _token_sources() -> dict[str, bool]:
    """The places in which Ray looks for a token, in its order, and whether there is one."""
    path = os.environ.get(TOKEN_PATH)
    home = Path(os.path.expanduser("~/.ray/auth_token"))
    return {
        TOKEN: bool(os.environ.get(TOKEN)),
        f"{TOKEN_PATH}={path}" if path else TOKEN_PATH: bool(path) and _is_token(Path(str(path))),
        str(home): _is_token(home),
    }


def _is_token(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except (OSError, UnicodeError):
        return False


def _token_problem() -> str:
    """Why the cluster did not accept the token of this process, or its lack."""
    held = next((source for source, has_token in _token_sources().items() if has_token), None)
    sent = os.environ.get(AUTH_MODE, "").lower() == "token"
    if sent:
        return f"it refuses the token of {held}; {_advice()}"
    if held:
        return f"it asks for a token, and none is sent; set {AUTH_MODE}=token to send that of {held}"
    return f"it asks for a token; {_advice()} and set {AUTH_MODE}=token"


def _reach(address: str) -> GcsClient:
    """Connects to the head, which a thread tries, since Ray waits longer than people do."""
    client = _in_thread(lambda: GcsClient(address=address), GCS_SECONDS)
    if client is None:
        reason = f"the port is open, but no Ray answers there within {GCS_SECONDS:.0f} s"
        raise _CannotJoin(
            f"{reason}; write the port of Ray's head (6379, unless --port was given), not its dashboard's"
        )
    return client


def _in_thread(call: Callable[[], Any], seconds: float) -> Any:
    """The result of a call, or its error; None after a time-out."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if error := outcome.get("error"):
        if isinstance(error, ray.exceptions.AuthenticationError):
            raise _CannotJoin(_token_problem()) from error
        raise error
    return outcome.get("value")


def _check_versions(client: GcsClient) -> None:
    """Compares Python and Ray with those of the head, as Ray does, which answers in six lines."""
    metadata = ray._common.usage.usage_lib.get_cluster_metadata(client)
    try:
        ray._private.utils.check_version_info(metadata, "this host")
    except RuntimeError as error:
        there = {name: str(value) for name, value in metadata.items()}
        here: dict[str, str] = dict(
            zip(("ray_version", "python_version"), ray._private.utils.compute_version_info(), strict=True)
        )
        names = {"ray_version": "Ray", "python_version": "Python"}
        differing = [key for key in names if there[key] != here[key]]
        pairs = [f"{names[key]} {there[key]} there, {here[key]} here" for key in differing]
        raise _CannotJoin(f"other versions: {', '.join(pairs)}; use the same on all hosts") from error


def _check_node(client: GcsClient) -> None:
    """Checks that a node of the cluster runs on this host, since a process can only join through one."""
    deadline = time.monotonic() + NODE_SECONDS
    while True:
        alive = {node_id.hex() for node_id, node in client.get_all_node_info().items() if node.state == 0}
        if alive & ray._private.services.find_node_ids():
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    advice = "run the command on one of them, join this host to them (ray start --address=...), or use ray job submit"
    raise _CannotJoin(f"this host is none of its nodes ({len(alive)}); {advice}")


def forget_surroundings() -> None:
    """Keeps settings of the shell, of a Ray job or of `uv run` from a private Ray, which runs on this machine only."""
    # With this variable unset, a new Ray requires its token; the shell may have turned that off.
    os.environ.pop(AUTH_MODE, None)
    # A job's own code is in another cluster, where a private Ray would look for it in vain.
    for name in (JOB_VARIABLE, ADDRESS_VARIABLE, ray._private.ray_constants.RAY_RUNTIME_ENV_HOOK):
        os.environ.pop(name, None)
    # Ray would pack the working directory, refuse one above 512 MiB, and start every worker through uv.
    ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
