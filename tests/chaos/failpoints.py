"""H1: each disk operation of a whole campaign fails once, in every way; then the same command runs again.

After SQLite's I/O error tests (sqlite.org/testing.html, section 3.2): the n-th call fails, for every n.
"""

from collections.abc import Iterable
from pathlib import Path

from tests.chaos.invariants import Acknowledged, Facts, check_end, check_finished, check_stopped, facts
from tests.chaos.operations import FAULTS, Fault, Operation, Watch, read_log
from tests.chaos.outcome import Options, Outcome
from tests.chaos.world import Ran, World, clear, world
from tune.storage.journal import parse_line


def run(options: Options) -> Outcome:
    """Tries each fault at each operation."""
    outcome = Outcome()
    with world(keep=options.case is not None) as made:
        undisturbed, operations = facts(made.reference), recorded(made)
        outcome.figures["operations"] = len(operations)
        chosen = faults(operations, options.faults)[:: options.every]
        if options.case:
            chosen = [fault for fault in faults(operations) if str(fault) == options.case]
        for fault in chosen:
            operation = operations[fault.at]
            broken = try_fault(made, undisturbed, fault, operations)
            outcome.add(str(fault), [f"{each} (at {operation.kind} {operation.path})" for each in broken])
            outcome.count(fault.name)
    return outcome


def recorded(world: World) -> list[Operation]:
    """All operations of an undisturbed run."""
    out = world.folder / "recorded"
    ran = watched(world, out, None)
    assert ran.code == 0, ran.err
    return read_log(out.with_suffix(".log"))


def watched(world: World, out: Path, fault: Fault | None) -> Ran:
    """Runs with a log of all operations next to `out`, and with the fault."""
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    out.mkdir()
    return world.run(out, lambda: Watch(out, log, fault).install())


def faults(operations: list[Operation], names: Iterable[str] = FAULTS) -> list[Fault]:
    """Every fault that can hit each operation."""
    return [Fault(name, at) for name in names for at, op in enumerate(operations) if op.kind in FAULTS[name]]


def try_fault(world: World, undisturbed: Facts, fault: Fault, operations: list[Operation]) -> list[str]:
    """Runs into the fault, then resumes; returns the violations. `operations` are those of an undisturbed run."""
    out = world.folder / f"fault-{fault.name}-{fault.at}"
    root = out / world.reference.name
    ran = watched(world, out, fault)
    told = acknowledged(read_log(out.with_suffix(".log")), root.name)
    broken = check_end(ran, fault.name, operations[fault.at].path)
    storage = fault.name in ("enospc", "eio", "full")
    if fault.name != "full":
        broken += check_stopped(root, world, told, one_missing=storage)
    again = world.run(out)
    if again.code:
        broken.append(f"I9 the same command ended with {again.code}: {again.err.strip().splitlines()[-1:]}")
    broken += check_finished(root, world, undisturbed, told)
    if not broken:
        clear(out)
    return broken


def acknowledged(operations: list[Operation], name: str) -> Acknowledged:
    """What is safe after these operations: synced events, and checkpoints whose folder was synced."""
    journal, synced = b"", b""
    steps: dict[str, list[int]] = {}
    renamed: dict[str, tuple[str, int]] = {}
    for op in operations:
        if op.path == f"{name}/journal.jsonl":
            if op.kind == "write":
                journal = journal[: op.offset] + op.data
            elif op.kind == "truncate":
                journal = journal[: op.offset]
            elif op.kind == "fsync":
                synced = journal
        elif op.kind == "rename" and "/step_" in op.to:
            folder, _, step = op.to.rpartition("/step_")
            renamed[folder] = (folder.split("/")[2], int(step))
        elif op.kind == "fsync" and op.path in renamed:
            trial_id, step = renamed.pop(op.path)
            steps.setdefault(trial_id, []).append(step)
    events = [parse_line(line) for line in synced.split(b"\n")[:-1]]
    return Acknowledged(tuple(event for event in events if event), {i: tuple(s) for i, s in steps.items()})
