"""Nodes that join, leave or are refused, from given lists of nodes; and the list that Ray itself gives."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from tune.executors.ray_nodes import (
    MOST_START_FAILURES,
    PENDING,
    POLL_SECONDS,
    InBackground,
    Node,
    NodeWatch,
    NoUsableNode,
)

ONE, TWO, THREE = (Node(f"{n:056x}", f"host{n}", f"10.0.0.{n}", {"CPU": 2.0}) for n in (1, 2, 3))

# Two nodes join, one drains, one dies. Prints the CPUs of the nodes after each of these, and how many trials of two
# CPUs fit on three nodes that offer none, three and three.
SCRIPT = """
import json, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from tune.executors.ray_nodes import alive_nodes
from tune.machine.placement import place
from tune.spec.schema import Resources

def cpus():
    return sorted(node.resources.get("CPU", 0) for node in alive_nodes() if node.is_reachable())

def until(expected):
    deadline = time.monotonic() + 60
    while cpus() != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    return cpus()

cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
seen = [cpus()]
second, third = cluster.add_node(num_cpus=3), cluster.add_node(num_cpus=3)
seen.append(until([0, 3, 3]))
seen.append(place(Resources(cpus_per_trial=2), [node.resources for node in alive_nodes()], device="cpu").workers)
order = ["drain-node", "--address", cluster.address, "--node-id", second.node_id, "--reason"]
order += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "600"]
subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *order], check=True, capture_output=True)
seen.append(until([0, 3]))
cluster.remove_node(third)
seen.append(until([0]))
print(json.dumps(seen))
ray.shutdown()
cluster.shutdown()
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(*looks: list[Node]) -> tuple[NodeWatch, Clock]:
    """A watch that sees one of these lists at each look."""
    clock, left = Clock(), list(looks)
    return NodeWatch(lambda: left.pop(0), clock=clock), clock


def test_a_node_that_joins_or_leaves_is_noticed_once() -> None:
    nodes, clock = watch([ONE], [ONE, TWO], [ONE, TWO], [TWO])
    changes = []
    for _ in range(3):
        clock.now += POLL_SECONDS
        changes.append(nodes.poll())
    assert [(change.joined, change.left) for change in changes] == [([TWO], []), ([], []), ([], [ONE])]
    assert nodes.nodes == (TWO,)


def test_the_nodes_are_read_only_every_few_seconds() -> None:
    nodes, clock = watch([ONE], [TWO], [THREE])
    clock.now = POLL_SECONDS / 2
    assert not nodes.poll() and nodes.nodes == (ONE,)
    assert nodes.poll(now=True).joined == [TWO]


def test_a_node_that_a_check_refuses_is_not_used_and_told_once() -> None:
    nodes, _ = watch([ONE], [ONE, TWO, THREE], [ONE, TWO, THREE])
    nodes.checks.append(lambda node: "it does not see the results" if node == TWO else None)
    change = nodes.poll(now=True)
    assert (change.joined, change.refused) == ([THREE], [(TWO, "it does not see the results")])
    assert nodes.nodes == (ONE, THREE)
    assert not nodes.poll(now=True)


def test_a_node_that_is_set_aside_is_told_once() -> None:
    nodes, _ = watch([ONE, TWO], [ONE, TWO], [ONE, TWO])
    nodes.set_aside(TWO.node_id, "no worker starts there")
    change = nodes.poll(now=True)
    assert (change.refused, change.left, nodes.nodes) == ([(TWO, "no worker starts there")], [], (ONE,))
    assert not nodes.poll(now=True)


def test_a_node_that_is_gone_is_told_from_one_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        node = Node("1", "host", "127.0.0.1", {}, raylet.getsockname()[1])
        assert node.is_reachable()
    assert not node.is_reachable()


@pytest.mark.slow
def test_rays_nodes_are_those_that_are_alive_and_not_drained_and_each_is_filled_on_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[0], [0, 3, 3], 2, [0, 3], [0]]


def test_a_node_is_used_once_its_slow_checks_have_ended() -> None:
    may_end, nodes = threading.Event(), [ONE]
    watch = NodeWatch(lambda: list(nodes), clock=lambda: 0.0)
    slow = InBackground(lambda _: None if may_end.wait(60) else "late")
    watch.checks.append(slow)
    nodes.append(TWO)
    assert not watch.poll(now=True) and watch.nodes == (ONE,)
    may_end.set()
    while slow(TWO) == PENDING:
        time.sleep(0.01)
    assert watch.poll(now=True).joined == [TWO] and watch.nodes == tuple(nodes)


def test_a_node_whose_check_fails_is_set_aside_with_the_error() -> None:
    def fails(_: Node) -> str | None:
        raise OSError("no route to host")

    nodes = [ONE]
    watch = NodeWatch(lambda: list(nodes), clock=lambda: 0.0)
    check = InBackground(fails)
    watch.checks.append(check)
    nodes.append(TWO)
    while check(TWO) == PENDING:
        time.sleep(0.01)
    [(refused, reason)] = watch.poll(now=True).refused
    assert refused == TWO and "no route to host" in reason


def test_a_node_is_set_aside_when_workers_cannot_start_there_twice() -> None:
    watch = NodeWatch(lambda: [ONE, TWO])
    watch.note_start_failure(TWO.node_id, "ModuleNotFoundError: No module named 'torch'")
    watch.note_start_failure(ONE.node_id, "once")
    assert not watch.poll(now=True)
    watch.note_start_failure(TWO.address, "ModuleNotFoundError: No module named 'torch'")
    ((node, reason),) = watch.poll(now=True).refused
    assert node == TWO and reason == "workers cannot start there (ModuleNotFoundError: No module named 'torch')"
    watch.check_usable()
    watch.note_start_failure(ONE.node_id, "again")
    watch.poll(now=True)
    with pytest.raises(NoUsableNode, match=r"no node is left .* \(again\)"):
        watch.check_usable()


def test_workers_that_cannot_start_on_unknown_nodes_end_the_campaign() -> None:
    watch = NodeWatch(lambda: [ONE, TWO])
    for _ in range(MOST_START_FAILURES - 1):
        watch.note_start_failure(None, "no environment")
    with pytest.raises(NoUsableNode, match=r"no worker can start \(no environment\)"):
        watch.note_start_failure("10.9.9.9", "no environment")
