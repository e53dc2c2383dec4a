"""The process that runs Ray, a child of the campaign's process (tune/executors/ray_supervisor.py).

It sends these messages:

    RayReady         Ray has started. The reply is a command: either ("share", trials per GPU), after which another
                     RayReady is sent, or ("run",).
    (name, *args)    Calls a method of the session. The reply is (return value, whether a stop was requested).
    RayExited        All trials have run, or an error occurred.

Ray sometimes kills this process, so it holds no campaign state and may die at any moment.
"""

import os
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from tune.executors.orphans import kill_marked
from tune.spec.schema import Resources


@dataclass(frozen=True)
class RayReady:
    """Ray has started, or has carried out a "share" command."""

    workers: int  # trials or groups that can run concurrently
    trials_per_device: int  # at most
    dashboard_url: str | None
    process_ids: tuple[int, ...] = ()  # raylet and GCS server of a private Ray
    n_gpus: int = 0  # over which trials are spread; 0 on a CPU


@dataclass(frozen=True)
class RayExited:
    """The last message of the process."""

    error: str | None = None
    is_config_error: bool = False
    is_start_error: bool = False  # `error` is Ray's own message that it could not start


def run_ray(
    connection: Connection, resources: Resources, device: str, address: str | None, root: Path, folder: Path | None
) -> None:
    """Main function of the process: starts Ray, runs the trials of the parent's session, shuts Ray down.

    A private Ray keeps its files in `folder` (tune/executors/ray_folder.py). When the parent dies, the process kills
    every process marked with `root` and exits.
    """
    os.setsid()  # Ctrl-C in the terminal reaches only the parent, which lets the workers save
    os.dup2(2, 1)  # redirects stdout to stderr: the parent's stdout is for data
    threading.Thread(target=_exit_with_parent, args=(root,), daemon=True).start()
    from tune.executors.ray_executor import RayCluster, RayNotStarted, RemoteSession, run_tuner

    try:
        with RayCluster(resources, device=device, address=address, folder=folder) as cluster:
            command: tuple[Any, ...] = ()
            while command != ("run",):
                url, ids = cluster.dashboard_url, cluster.process_ids
                placed = cluster.placement
                connection.send(RayReady(placed.workers, placed.trials_per_device, url, ids, placed.n_gpus))
                command = connection.recv()
                if command[0] == "share":
                    cluster.share_gpus(*command[1:])
            run_tuner(RemoteSession(connection), cluster, root)
            connection.send(RayExited())
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed the connection
        return
    except RayNotStarted as error:
        connection.send(RayExited(str(error), is_start_error=True))
    except ConfigError as error:
        connection.send(RayExited(str(error), is_config_error=True))
    except Exception:
        connection.send(RayExited(traceback.format_exc()))


def _exit_with_parent(root: Path) -> None:
    parent = parent_process()
    assert parent is not None, "always started as a child"
    wait([parent.sentinel])
    kill_marked(root)
    os._exit(1)
