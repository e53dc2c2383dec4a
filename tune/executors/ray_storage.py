"""Probes from every node of a cluster whether it shares the results folder, before a trial runs there.

Without a shared folder, the files of a trial would stay on its node, and stop requests would not reach it.
"""

from collections.abc import Sequence
from pathlib import Path

import ray
import ray.cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ngpt.config.base import ConfigError
from tune import format as fmt
from tune.cluster import shared_folder
from tune.cluster.node_checks import answer_of
from tune.executors.ray_nodes import Node, alive_nodes

PROBE_SECONDS = 120.0  # for all nodes together, which may have to start a worker and set up its environment
ADVICE = "give --out a folder that all nodes share at the same path, such as one on NFS, or an address such as s3://"


def check_storage(root: Path, nodes: Sequence[Node]) -> None:
    """Raises ConfigError if one of the nodes that have CPUs does not share the results folder `root`.

    The message names each such node. A head often has no CPUs, and then runs no trials.
    """
    used = [node for node in nodes if node.resources.get("CPU")]
    try:
        problems = storage_problems(root, used)
    except OSError as error:
        raise ConfigError(f"{root}: this host cannot write, rename and lock files there: {error.strerror}") from error
    if problems:
        names = {node.node_id: f"node {node.host} ({node.address})" for node in used}
        found = fmt.listing([f"{names[node_id]} {problem}" for node_id, problem in problems.items()], most=4)
        raise ConfigError(f"{root}: {found}; {ADVICE}")


def shares_storage(root: Path, nodes: Sequence[Node]) -> bool:
    """Whether all nodes with CPUs share the results folder `root`, and one of them is another host than this one.

    A node of this host alone says nothing about those that may join.
    """
    used = [node for node in nodes if node.resources.get("CPU")]
    here = ray.get_runtime_context().get_node_id()
    if all(node.node_id == here for node in used):
        return False
    try:
        return not storage_problems(root, used)
    except OSError:
        return False


def storage_problem(root: Path, node: Node) -> str | None:
    """Why trials on a node that joins later could not use the results folder `root`; None if they can."""
    try:
        return storage_problems(root, [node]).get(node.node_id)
    except OSError as error:
        return f"cannot be probed ({error.strerror})"


def storage_problems(root: Path, nodes: Sequence[Node]) -> dict[str, str]:
    """Probes the results folder from all nodes at once; returns what is wrong, by node id, where it does not work.

    A node that disappears meanwhile has no problem.

    Raises:
        OSError: this host itself cannot write, rename or lock files in `root`.
    """
    # The function travels with the task, so that a node without the project can answer.
    ray.cloudpickle.register_pickle_by_value(shared_folder)
    task = ray.remote(num_cpus=0, max_retries=0)(shared_folder.probe_folder)
    found: dict[str, str] = {}
    with shared_folder.FolderProbe(root) as probe:
        asked = []
        for number, node in enumerate(nodes):
            probe.offer(number)
            strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            arguments = (str(probe.folder), probe.token, number)
            asked.append(task.options(scheduling_strategy=strategy).remote(*arguments))
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=PROBE_SECONDS)
        problems = [answer_of(each, PROBE_SECONDS) for each in asked]
        alive = {node.node_id for node in alive_nodes()}
        for number, (node, problem) in enumerate(zip(nodes, problems, strict=True)):
            if problem is None and not probe.is_answered(number):
                problem = "writes files there that this host does not see"
            if problem is not None and node.node_id in alive:
                found[node.node_id] = problem
    return found
