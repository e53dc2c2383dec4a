"""The process that Ray runs in, and what it says to the one that started it (tune/executors/ray_supervisor.py).

    RayReady            Ray has started; answered with an order: ("share", trials per GPU), then RayReady again, or ("run",)
    (name, *args)    a question to the session, answered with (value, whether the run was asked to stop)
    DriverExited             there is no more to run, or something failed

It holds nothing that is not elsewhere: it may be ended at any moment, and Ray sometimes does that.
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
    """Ray has started, or shares its GPUs as it was told."""

    workers: int  # trials at once
    trials_per_device: int
    dashboard_url: str | None
    process_ids: tuple[int, ...]  # of Ray itself, where it is ours
    folder: Path | None = None  # of its logs and sockets, where it is ours


@dataclass(frozen=True)
class DriverExited:
    """The last word of a driver."""

    error: str | None = None
    is_users: bool = False  # whether the error is one of configuration
    is_rays: bool = False  # whether it is what Ray said when it did not start


def drive(line: Connection, resources: Resources, address: str | None, root: Path) -> None:
    """The body of the process: starts Ray, runs the trials that the session at the other end has, ends Ray.

    When the process that started it is gone, it ends with everything that carries the mark of `root`.
    """
    os.setsid()  # a Ctrl-C of the terminal is for the campaign, which lets the workers save
    os.dup2(2, 1)  # stdout is for data
    threading.Thread(target=_follow_parent, args=(root,), daemon=True).start()
    from tune.executors.ray_executor import NotStarted, RayCluster, RemoteSession, fit

    try:
        with RayCluster(resources, address=address) as cluster:
            order: tuple[Any, ...] = ()
            while order != ("run",):
                url, ids = cluster.dashboard_url, cluster.process_ids
                line.send(RayReady(cluster.workers, cluster.packed, url, ids, cluster.folder))
                order = line.recv()
                if order[0] == "share":
                    cluster.share(*order[1:])
            fit(RemoteSession(line), cluster, root)
            line.send(DriverExited())
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the other end has let go of this Ray
        return
    except NotStarted as error:
        line.send(DriverExited(str(error), is_rays=True))
    except Exception as error:
        is_users = isinstance(error, ConfigError)
        line.send(DriverExited(str(error) if is_users else traceback.format_exc(), is_users=is_users))


def _follow_parent(root: Path) -> None:
    parent = parent_process()
    assert parent is not None, "it is always started as a child"
    wait([parent.sentinel])
    kill_marked(root)
    os._exit(1)
