"""The nodes of the Ray cluster that this process has joined, and which of them came, went or may not be used."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import ray
import ray._private.state
from ray.util import placement_group, remove_placement_group

from ngpt.config.base import ConfigError
from tune import format as fmt
from tune.machine.placement import cluster_notes, cpu_reason, place, ray_strategy, wanted
from tune.spec.schema import Resources

PENDING = "its checks have not ended"  # the answer of a check until it has one
START_FAILURES_OF_NODE = 2  # of workers, after which it is set aside
MOST_START_FAILURES = 8  # on unknown nodes, as when the environment of the workers cannot be made anywhere
POLL_SECONDS = 2.0  # between two looks at the nodes
CONNECT_TIMEOUT = 3.0  # seconds, to a node of the cluster
MOST_NAMES = 4  # of nodes in a message


@dataclass(frozen=True)
class Node:
    """A host of the cluster, as Ray describes it."""

    node_id: str  # hexadecimal; new if the host leaves and joins again
    host: str  # name of the host
    address: str  # IP address
    resources: Mapping[str, float]  # in total, such as {"CPU": 8.0, "GPU": 2.0}; nothing is listed as 0
    port: int = 0  # on which its raylet listens

    def is_reachable(self) -> bool:
        """Whether its raylet accepts a connection. Ray itself takes half a minute to find out."""
        try:
            with socket.create_connection((self.address, self.port), timeout=CONNECT_TIMEOUT):
                return True
        except OSError:
            return False


def alive_nodes() -> list[Node]:
    """The nodes on which new trials may start: those that are alive and not about to be taken away."""
    draining = ray._private.state.state.get_draining_nodes()  # by node id; no public function lists them
    return [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["NodeManagerAddress"],
            node["Resources"],
            node["NodeManagerPort"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    ]


@dataclass(frozen=True)
class NodeChange:
    """What has happened to the nodes since the previous look."""

    joined: Sequence[Node] = ()
    left: Sequence[Node] = ()
    refused: Sequence[tuple[Node, str]] = ()  # with the reason

    def __bool__(self) -> bool:
        return bool(self.joined or self.left or self.refused)


class NoUsableNode(Exception):
    """Workers cannot start on any node."""


class InBackground:
    """A check of a node that takes its time: it runs in a thread, and its answer is `PENDING` until it has ended."""

    def __init__(self, check: Callable[[Node], str | None]) -> None:
        self._check = check
        self._answers: dict[str, list[str | None]] = {}  # by node id; empty until the check has ended

    def __call__(self, node: Node) -> str | None:
        """Starts the check of a node at the first call; returns its answer once there is one."""
        if node.node_id not in self._answers:
            self._answers[node.node_id] = []
            threading.Thread(target=self._run, args=(node,), daemon=True).start()
        answer = self._answers[node.node_id]
        return answer[0] if answer else PENDING

    def _run(self, node: Node) -> None:
        try:
            reason = self._check(node)
        except Exception as error:  # Ray's, of many types
            reason = f"it could not be checked ({type(error).__name__}: {error})"
        self._answers[node.node_id].append(reason)


class NodeWatch:
    """Reads the nodes every few seconds.

    Attributes:
        nodes: those that trials may use.
        pending: ids of nodes whose checks have not ended. Ray may already have placed trials there.
        checks: functions that are called with each node that joins, and return why it may not be used, or None; or
            `PENDING`, and then they are called again at the next look.
    """

    def __init__(
        self, read: Callable[[], list[Node]] = alive_nodes, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._clock = read, clock
        self._set_aside: dict[str, str] = {}  # reasons, by node id
        self._start_failures = Counter[str | None]()  # of workers, by node id; None if it is not known
        self.checks: list[Callable[[Node], str | None]] = []
        self.nodes: tuple[Node, ...] = tuple(read())
        self.pending: Set[str] = frozenset()
        self._read_at = clock()

    def set_aside(self, node_id: str, reason: str) -> None:
        """Takes a node out of `nodes` at the next look, as long as it stays in the cluster."""
        self._set_aside[node_id] = reason

    @property
    def offers(self) -> list[Mapping[str, float]]:
        """What the nodes offer, for tune/machine/placement.py."""
        return [node.resources for node in self.nodes]

    def note_start_failure(self, node: str | None, reason: str) -> None:
        """Counts a worker that could not start on the node with this id or IP address; the second sets it aside."""
        node_id = next((each.node_id for each in self.nodes if node in (each.node_id, each.address)), None)
        self._start_failures[node_id] += 1
        if node_id is not None and self._start_failures[node_id] >= START_FAILURES_OF_NODE:
            self.set_aside(node_id, f"workers cannot start there ({reason})")
        elif self._start_failures[None] >= MOST_START_FAILURES:
            raise NoUsableNode(f"no worker can start ({reason})")

    def check_usable(self) -> None:
        """Raises NoUsableNode if all nodes of the cluster were set aside."""
        if not self.nodes and not self.pending and self._set_aside:
            *_, reason = self._set_aside.values()
            raise NoUsableNode(f"no node is left that trials can use: {reason}")

    @property
    def excluded(self) -> Mapping[str, str]:
        """Why nodes are set aside, by node id."""
        return self._set_aside

    def poll(self, *, now: bool = False) -> NodeChange:
        """Looks again if the last look is `POLL_SECONDS` old, or immediately if `now`; returns what has changed."""
        if not now and self._clock() - self._read_at < POLL_SECONDS:
            return NodeChange()
        current, known = self._read(), {node.node_id for node in self.nodes}
        self._read_at = self._clock()
        ids = {node.node_id for node in current}
        aside = {node.node_id: reason for node in self.nodes if (reason := self._set_aside.get(node.node_id))}
        joined, pending = list[Node](), set[str]()
        for node in current:
            if node.node_id in known or node.node_id in self._set_aside:
                continue
            reason = next(filter(None, (check(node) for check in self.checks)), None)
            if reason == PENDING:
                pending.add(node.node_id)
            elif reason:
                self._set_aside[node.node_id] = aside[node.node_id] = reason
            else:
                joined.append(node)
        left = [node for node in self.nodes if node.node_id not in ids]
        refused = [(node, aside[node.node_id]) for node in current if node.node_id in aside]
        self.nodes = tuple(node for node in current if node.node_id not in {*self._set_aside, *pending})
        self.pending = pending
        return NodeChange(joined, left, refused)


def describe_change(change: NodeChange, workers: int) -> str:
    """What has happened to the nodes, in one line with the number of trials that now can run at once."""
    parts = [f"{_names(change.joined)} joined the cluster"] if change.joined else []
    parts += [f"{_names(change.left)} left the cluster or is about to"] if change.left else []
    parts += [f"{_names([node])} is not used: {reason}" for node, reason in change.refused]
    return f"{'; '.join(parts)}; workers {workers}"


def _names(nodes: Sequence[Node]) -> str:
    return fmt.listing((f"{node.host} ({node.address})" for node in nodes), most=MOST_NAMES)


def wait_for_room(watch: NodeWatch, resources: Resources, *, device: str, report: Callable[[str], object]) -> None:
    """Waits for a node with room for a trial if the campaign says so (`wait_for_nodes`), and asks for one.

    `report` prints a line for the user: that it waits, and what there is to say about the GPUs.

    Raises:
        ConfigError: there is no such node in time, or the campaign does not wait.
    """
    limit, began, asked = resources.wait_for_nodes, time.monotonic(), None
    try:
        while problem := _room_problem(watch, resources, device):
            if limit is None:
                raise ConfigError(f"{problem}; resources.wait_for_nodes: SECONDS waits for such a node")
            if time.monotonic() - began > limit:
                raise ConfigError(f"{problem}, after waiting for {limit:g} s (resources.wait_for_nodes)")
            if asked is None:
                report(f"{problem}: waiting up to {limit:g} s for a node (resources.wait_for_nodes)")
                # The autoscaler adds a node for what is queued. Ray forgets that if this process dies.
                bundles = [wanted(resources, device=device)] * resources.ranks_per_trial
                asked = placement_group(bundles, strategy=ray_strategy(resources))
            time.sleep(POLL_SECONDS / 2)
            watch.poll(now=True)
    finally:
        if asked is not None:
            remove_placement_group(asked)
    on_cpu = cpu_reason(resources, watch.offers, device=device) is not None
    for note in cluster_notes(resources, watch.offers, device=device):
        report(f"warning: {note}" if on_cpu else note)


def _room_problem(watch: NodeWatch, resources: Resources, device: str) -> str | None:
    """Why no trial could run now as the campaign asks, or None."""
    on_cpu = cpu_reason(resources, watch.offers, device=device)
    if on_cpu and (device == "cuda" or resources.wait_for_nodes):
        return f"{on_cpu} (base.device: cpu says that trials are to train on the CPU)"
    try:
        place(resources, watch.offers, device=device)
    except ConfigError as error:
        return str(error)
    return None
