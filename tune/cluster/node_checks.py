"""Compares every node of a cluster with the host of the campaign, before a trial runs there: versions, code and data.

Another torch or another code would give other numbers without a word; a missing package would cost trial after trial.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ray
import ray.cloudpickle
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ngpt.code.plugins import Source
from ngpt.config.base import ConfigError, printable
from tune import format as fmt
from tune.cluster import node_report
from tune.cluster.node_data import ExpectedCorpus, prepare_corpora
from tune.cluster.node_store import StoreProbe, probe_store

CHECK_SECONDS = 120.0  # for all nodes together, which may have to unpack the code and start a worker
REPORT_SECONDS = 15.0  # between lines that say that nodes still prepare their data
MAX_REASON = 300  # characters of an error of Ray
MAX_NODES = 4  # in a message
DATA_ADVICE = "the corpus has to be at the same path on every node, also where all share a cache"
STORE_ADVICE = "every node needs credentials of its own: of its role, of ~/.aws, or of the shell of its ray start"
# A difference in these can change numbers, or what a worker understands of its orders. Others only have to be there.
SAME = ("torch", "ray", "numpy", "pydantic")
NEEDED = ("pyarrow", "safetensors", "sentencepiece", "filelock", "scipy", "psutil")


class Node(Protocol):
    """A host of the cluster."""

    @property
    def node_id(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def resources(self) -> Mapping[str, float]: ...


def check_nodes(
    code: str, nodes: Sequence[Node], plugins: Sequence[Source] = (), compile_for: str | None = None
) -> None:
    """Raises ConfigError if a node with CPUs has other versions or other code than this host, or no compiler.

    The message names each such node.

    Args:
        code: the digest of the campaign's code (ngpt/code/digest.py), with that of the `plugins`.
        compile_for: the `device` of the campaign, if it compiles models.
    """
    used = [node for node in nodes if node.resources.get("CPU")]  # a head often has none, and then runs no trials
    found = node_problems(code, used, plugins, compile_for)
    _refuse(used, found, "give all nodes the same Python environment, or take these out of the cluster")


def _refuse(nodes: Sequence[Node], problems: Mapping[str, str], advice: str) -> None:
    texts = [
        f"node {node.host} ({node.address}) {problems[node.node_id]}" for node in nodes if node.node_id in problems
    ]
    if texts:
        raise ConfigError(f"the nodes of the cluster differ: {fmt.listing(texts, most=MAX_NODES)}; {advice}")


def node_problem(code: str, plugins: Sequence[Source], compile_for: str | None, node: Node) -> str | None:
    """Why trials cannot run on a node that joins later; None if they can."""
    return node_problems(code, [node], plugins, compile_for).get(node.node_id)


def check_data(
    corpora: Sequence[ExpectedCorpus],
    nodes: Sequence[Node],
    report: Callable[[str], object],
    plugins: Sequence[Source] = (),
) -> None:
    """Prepares the corpora on every node with CPUs that has not got them; `report` is called while that takes time.

    Raises:
        ConfigError: a node cannot have them, or has others; the message names each such node.
    """
    used = [node for node in nodes if node.resources.get("CPU")]
    answers = ask_nodes(prepare_corpora, used, corpora, plugins, report=report)
    _refuse(used, {node_id: answer for node_id, answer in answers.items() if answer}, DATA_ADVICE)


def data_problem(corpora: Sequence[ExpectedCorpus], plugins: Sequence[Source], node: Node) -> str | None:
    """Prepares the corpora on a node that joins later; why it cannot have them, or None."""
    return ask_nodes(prepare_corpora, [node], corpora, plugins).get(node.node_id)


def check_store(probe: StoreProbe, nodes: Sequence[Node]) -> None:
    """Raises ConfigError if a node with CPUs cannot use the object store of the results; names each such node."""
    used = [node for node in nodes if node.resources.get("CPU")]
    answers = ask_nodes(probe_store, used, probe, seconds=CHECK_SECONDS)
    _refuse(used, {node_id: answer for node_id, answer in answers.items() if answer}, STORE_ADVICE)


def store_problem(probe: StoreProbe, node: Node) -> str | None:
    """Why a node that joins later cannot use the object store of the results, or None."""
    return ask_nodes(probe_store, [node], probe, seconds=CHECK_SECONDS).get(node.node_id)


def node_problems(
    code: str, nodes: Sequence[Node], plugins: Sequence[Source] = (), compile_for: str | None = None
) -> dict[str, str]:
    """What keeps trials from running on nodes, by node id. A node that leaves meanwhile has no problem."""
    # The function travels with the task, so that a node without the project can answer.
    ray.cloudpickle.register_pickle_by_value(node_report)
    # As texts, since the node may not have the class.
    sent = [(each.name, each.module, str(each.file or "")) for each in plugins]
    asked = (*SAME, *NEEDED), sent, compile_for
    answers = ask_nodes(node_report.report_node, nodes, *asked, seconds=CHECK_SECONDS)
    here = host_versions()
    problems = {
        node_id: answer if isinstance(answer, str) else compare(answer, here, code)
        for node_id, answer in answers.items()
    }
    return {node_id: problem for node_id, problem in problems.items() if problem}


def host_versions() -> dict[str, str | None]:
    """The versions of this host, as a node reports them."""
    report = node_report.report_node((*SAME, *NEEDED))
    return {"Python": report["python"], **report["versions"]}


def compare(report: Mapping[str, Any], here: Mapping[str, str | None], code: str) -> str | None:
    """What is wrong with a node, by its report, for the end of a sentence; None if nothing is."""
    there = {"Python": report["python"], **report["versions"]}
    missing = [name for name, version in there.items() if version is None and here[name] is not None]
    if missing:
        return f"has no {fmt.listing(missing, most=len(missing))}"
    differing = [name for name in ("Python", *SAME) if _public(there[name]) != _public(here[name])]
    others = [f"{name} {there[name]}, and this host {here[name]}" for name in differing]
    if others:
        return f"has {'; '.join(others)}"
    if "error" in report["code"]:
        return f"cannot import the code ({printable(report['code']['error'], MAX_REASON)})"
    if report["code"]["digest"] != code:
        return f"imports other code, from {printable(report['code']['folder'])}"
    if problem := report.get("compiler"):
        return f"cannot train: {printable(problem, MAX_REASON)}"
    return None


def _public(version: str | None) -> str | None:
    """A version without the build: a host without a GPU may have 2.11.0+cpu, and its GPU nodes 2.11.0+cu130."""
    return version and version.partition("+")[0]


def ask_nodes(
    function: Callable[..., Any],
    nodes: Sequence[Node],
    *arguments: Any,
    seconds: float = math.inf,
    report: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Calls a function on all nodes at once; returns what each returned, by node id, or a text that says why not.

    The calls need no CPU, so they run beside trials. Nodes that have left the cluster are not in the result. While it
    waits, `report` is called every few seconds.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        asked[node.node_id] = task.options(scheduling_strategy=strategy).remote(*arguments)
    waiting, began = list(asked.values()), time.monotonic()
    while waiting and time.monotonic() - began < seconds:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(seconds, REPORT_SECONDS))
        if waiting and report:
            report(f"waiting for {len(waiting)} of {len(nodes)} nodes ({time.monotonic() - began:.0f} s)")
    answers = {node_id: answer_of(reference, seconds) for node_id, reference in asked.items()}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {node_id: answer for node_id, answer in answers.items() if node_id in alive}


def answer_of(reference: Any, seconds: float) -> Any:
    """Returns the result of a task on a node, or a text that says why there is none after `seconds` of waiting."""
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"has not answered for {seconds:.0f} s"
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"cannot run a task ({printable(lines[-1], MAX_REASON)})"
