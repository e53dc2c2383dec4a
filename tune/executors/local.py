"""The executor without Ray: runs trials, or groups of trials, one after another in this process."""

import contextlib

from tune.executors.signals import stop_on_signal
from tune.session.session import Session
from tune.trials.trial_group import run_trials


def run_inline(session: Session) -> None:
    """Runs every trial in this process, so that a debugger can follow it; the numbers are the same as on Ray."""
    with stop_on_signal(session):
        while specs := session.ask():
            with contextlib.closing(run_trials(specs)) as run:
                stopped: list[str] | None = None
                while not session.stop_requested:
                    try:
                        updates = run.send(stopped)
                    except StopIteration:
                        break
                    for trial_id, result in updates.ended.items():
                        session.tell(trial_id, result)
                    stopped = [name for name, result in updates.interim.items() if session.should_stop(name, result)]
