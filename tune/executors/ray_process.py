"""The process that runs Ray, a child of the campaign's process (tune/executors/ray_supervisor.py).

It sends these messages:

    RayNote          A line for the user, before Ray is ready.
    RayReady         Ray has started. The reply is a command: either ("share", trials per GPU), after which another
                     RayReady is sent, or ("run",).
    (name, *args)    Calls a method of the session. The reply is (return value, whether a stop was requested).
    RayExited        All trials have run, or an error occurred.

Ray sometimes kills this process, so it holds no campaign state and may die at any moment.
"""

import os
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ngpt.code.plugins import Source
from ngpt.config.base import ConfigError
from tune.executors.orphans import kill_marked
from tune.executors.signals import discard_interrupt
from tune.remote.uri import Uri
from tune.remote.worker import WorkerUploads
from tune.session.remote import RemoteSession
from tune.spec.schema import Resources

DASHBOARD_TIMEOUT = "200"  # seconds for Ray's dashboard to start; Ray's own 60 are too few on a busy machine


@dataclass(frozen=True)
class CodeToRun:
    """The code of a campaign, for the nodes of a cluster."""

    digest: str
    plugins: tuple[Source, ...] = ()
    plugin_files: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)  # see tune/cluster/shipping.py
    compile_for: str | None = None  # the `device` of the campaign, if it compiles models


@dataclass(frozen=True)
class RayNote:
    """A line for the user, said before Ray is ready."""

    text: str


@dataclass(frozen=True)
class RayReady:
    """Ray has started, or has carried out a "share" command."""

    workers: int  # trials or groups that can run concurrently
    trials_per_device: int  # at most
    dashboard_url: str | None
    process_ids: tuple[int, ...] = ()  # raylet and GCS server of a private Ray
    n_gpus: int = 0  # over which trials are spread; 0 on a CPU, and where Ray chooses the GPU
    notes: tuple[str, ...] = ()  # on where trials train, for the warnings of the report
    workers_upload: bool = False  # whether workers train in scratch of their host, and upload by themselves


@dataclass(frozen=True)
class RayExited:
    """The last message of the process."""

    error: str | None = None
    is_config_error: bool = False
    is_start_error: bool = False  # `error` is Ray's own message that it could not start
    has_no_nodes: bool = False  # `error` says why no worker can start on the cluster


def run_ray(
    connection: Connection,
    resources: Resources,
    device: str,
    address: str | None,
    root: Path,
    code: CodeToRun,
    folder: Path | None,
    remote: tuple[Uri, WorkerUploads] | None = None,
) -> None:
    """Main function of the process: starts Ray, runs the trials of the parent's session, shuts Ray down.

    A private Ray keeps its files in `folder` (tune/executors/ray_folder.py). On every node of another cluster, `code`
    must be imported. `remote` is the address of the results and how workers reach it. When the parent dies, the process
    kills every process marked with `root` and exits.
    """
    os.setsid()  # Ctrl-C in the terminal reaches only the parent, which lets the workers save
    discard_interrupt()
    os.dup2(2, 1)  # redirects stdout to stderr: the parent's stdout is for data
    threading.Thread(target=_exit_with_parent, args=(root,), daemon=True).start()
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", DASHBOARD_TIMEOUT)  # read when ray is imported
    from tune.cluster.node_checks import check_data, data_problem
    from tune.executors.ray_cluster import RayCluster, RayNotStarted
    from tune.executors.ray_executor import run_tuner
    from tune.executors.ray_nodes import InBackground, NoUsableNode

    def report(text: str) -> None:
        connection.send(RayNote(text))

    try:
        sent = {"report": report, "plugins": code.plugin_files, "results": root}
        with RayCluster(resources, device=device, address=address, folder=folder, **sent) as cluster:
            if address:  # a private Ray has one host
                _check_nodes(cluster, root, code, remote)
            command: tuple[Any, ...] = ()
            while command != ("run",):
                connection.send(_ready(cluster))
                command = connection.recv()
                if command[0] == "share":
                    cluster.share_gpus(*command[1:])
                elif command[0] == "prepare":
                    check_data(command[1], cluster.nodes.nodes, report, code.plugins)
                    cluster.nodes.checks.append(InBackground(partial(data_problem, command[1], code.plugins)))
            run_tuner(RemoteSession(connection), cluster, root)
            connection.send(RayExited())
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed the connection
        return
    except RayNotStarted as error:
        connection.send(RayExited(str(error), is_start_error=True))
    except NoUsableNode as error:
        connection.send(RayExited(str(error), has_no_nodes=True))
    except ConfigError as error:
        connection.send(RayExited(str(error), is_config_error=True))
    except Exception:  # passed on to the parent, which raises it
        connection.send(RayExited(traceback.format_exc()))


def _check_nodes(cluster: Any, root: Path, code: CodeToRun, remote: tuple[Uri, WorkerUploads] | None) -> None:
    """Checks all nodes and has those that join later checked; decides whether workers upload by themselves.

    Raises:
        ConfigError: a node cannot train trials of the campaign.
    """
    from tune.cluster.node_checks import check_nodes, check_store, node_problem, store_problem
    from tune.cluster.node_store import offer_probe, with_patience
    from tune.executors.ray_nodes import InBackground
    from tune.executors.ray_storage import check_storage, shares_storage, storage_problem

    nodes = cluster.nodes.nodes
    check_nodes(code.digest, nodes, code.plugins, code.compile_for)
    checks: list[Any] = [partial(node_problem, code.digest, code.plugins, code.compile_for)]
    if remote and not shares_storage(root, nodes):
        if cluster.resources.across_nodes:
            text = "ranks on several nodes need a folder that all nodes see, and these nodes upload by themselves"
            raise ConfigError(f"resources.across_nodes: {text}; give --out a shared folder, or set across_nodes: false")
        cluster.uploads = with_patience(remote[1], cluster.resources)
        probe = offer_probe(cluster.uploads, remote[0])
        check_store(probe, nodes)
        checks.append(partial(store_problem, probe))
    else:
        check_storage(root, nodes)
        checks.append(partial(storage_problem, root))
    cluster.nodes.checks += map(InBackground, checks)


def _ready(cluster: Any) -> RayReady:
    placed, url, ids = cluster.placement, cluster.dashboard_url, cluster.process_ids
    uploads = cluster.uploads is not None
    return RayReady(placed.workers, placed.trials_per_device, url, ids, placed.n_gpus, cluster.notes, uploads)


def _exit_with_parent(root: Path) -> None:
    parent = parent_process()
    assert parent is not None, "always started as a child"
    wait([parent.sentinel])
    kill_marked(root)
    os._exit(1)
