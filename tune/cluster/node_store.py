"""Probes whether a node can use the object store of the results: it reads, writes, and deletes what it has written.

This runs on the node, with the campaign's code and the node's own credentials.
"""

import threading
import uuid
from dataclasses import dataclass, replace

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import describe_os_error, make_folder
from tune.remote.store import PROBE, StoreError, open_store, write_problem
from tune.remote.uri import Uri
from tune.remote.worker import WorkerUploads, scratch_folder
from tune.spec.schema import Resources

ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class StoreProbe:
    """What a node has to find in the store of the results: the object `key` with this content."""

    uploads: WorkerUploads
    key: str
    token: str


def offer_probe(uploads: WorkerUploads, address: Uri) -> StoreProbe:
    """Writes what the nodes look for, and leaves it there: nodes that join later look for it, too.

    Raises:
        ConfigError: this host cannot write there.
    """
    probe = StoreProbe(uploads, PROBE, uuid.uuid4().hex)
    try:
        open_store(address).write(probe.key, probe.token.encode())
    except StoreError as error:
        raise ConfigError(str(error)) from None
    return probe


def with_patience(uploads: WorkerUploads, resources: Resources) -> WorkerUploads:
    """The same, with workers that give up waiting for the store before they count as hung."""
    limit = resources.stall_timeout
    return uploads if limit is None else replace(uploads, patience=min(uploads.patience, limit / 2))


def probe_store(probe: StoreProbe) -> str | None:
    """Probes the store on this node, and its own scratch folder; returns what is wrong, or None."""
    folder = scratch_folder(probe.uploads.address)
    try:
        make_folder(folder)
    except OSError as error:
        return f"cannot make its scratch folder ({describe_os_error(error, folder)}; NGPT_CACHE names another)"
    problems: list[str | None] = []
    # A store out of reach, or a service for credentials, would be tried for minutes.
    thread = threading.Thread(target=lambda: problems.append(_store_problem(probe)), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    problem = problems[0] if problems else f"{probe.uploads.address}: no answer within {ANSWER_SECONDS:.0f} s"
    return f"cannot use the store ({problem})" if problem else None


def _store_problem(probe: StoreProbe) -> str | None:
    try:
        store = open_store(Uri(probe.uploads.address))
        if store.read(probe.key) != probe.token.encode():
            return f"it reaches another one under {probe.uploads.address}, without what this run has written there"
        return write_problem(store)
    except (ConfigError, StoreError) as error:
        return str(error)
