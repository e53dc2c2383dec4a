"""H3: the power fails after any disk operation of a campaign; the same command resumes from every possible state."""

import random
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.disk import Disk, Tree, digest, played, read_tree, write_tree
from tests.chaos.failpoints import acknowledged, recorded
from tests.chaos.invariants import Facts, check_finished, check_stopped, facts
from tests.chaos.operations import Operation
from tests.chaos.outcome import Options, Outcome
from tests.chaos.world import World, clear, world

MIXED = 2  # random states per operation, in addition to the corner cases


def run(options: Options) -> Outcome:
    """Generates the possible states after each operation, and resumes from each new one."""
    outcome = Outcome()
    with world(keep=options.case is not None) as made:
        undisturbed, operations = facts(made.reference), recorded(made)
        outcome.figures["operations"] = len(operations)
        there = read_tree(made.folder / "recorded")
        if played(operations).tree(lambda node: node.names, lambda node: node.content) != there:
            outcome.add("log", ["the log of operations does not reproduce the files: an operation was missed"])
            return outcome
        states = list(different(operations, options.seed))
        outcome.figures["states"] = len(states)
        for at, name, tree in states[:: 1 if options.case else options.every]:
            case = f"{name}@{at}"
            if options.case in (None, case):
                broken = try_state(made, undisturbed, operations[:at], tree, made.folder / f"power-{name}-{at}")
                outcome.add(
                    case, [f"{each} (after {operations[at - 1].kind} {operations[at - 1].path})" for each in broken]
                )
    return outcome


def different(operations: list[Operation], seed: int) -> Iterator[tuple[int, str, Tree]]:
    """Number of operations, name and tree of each new state."""
    disk, seen = Disk(), set[str]()
    for at, operation in enumerate(operations, 1):
        disk.apply(operation)
        for name, tree in disk.crash_states(random.Random(f"{seed} {at}"), MIXED):
            if (key := digest(tree)) not in seen:
                seen.add(key)
                yield at, name, tree


def try_state(made: World, undisturbed: Facts, operations: list[Operation], tree: Tree, out: Path) -> list[str]:
    """Resumes from a state of the disk; returns the violations."""
    write_tree(tree, out)
    root = out / made.reference.name
    told = acknowledged(operations, root.name)
    broken = list(check_stopped(root, made, told))
    ran = made.run(out)
    if ran.code:
        broken.append(f"I9 the same command ended with {ran.code}: {ran.err.strip().splitlines()[-1:]}")
    if "Traceback" in ran.err:
        broken.append("I9 a traceback")
    broken += check_finished(root, made, undisturbed, told)
    if not broken:
        clear(out)
    return broken
