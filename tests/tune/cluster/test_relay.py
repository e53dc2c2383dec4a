"""The relay passes heartbeats from workers to the campaign, and stop requests back (tests/test_cluster_signals.py)."""

from ngpt.system.heartbeat import Heartbeat
from tune.cluster.relay import Relay, address_in, start_error


def test_the_relay_keeps_the_newest_heartbeat_of_every_trial_until_it_is_collected() -> None:
    relay = Relay()
    relay.report({"a": (1, Heartbeat(7, 0, 3, "one")), "b": (1, Heartbeat(7, 0, 1, "two"))})
    relay.report({"a": (2, Heartbeat(8, 3, 4, "two"))})
    assert relay.exchange([]) == {"a": (2, Heartbeat(8, 3, 4, "two")), "b": (1, Heartbeat(7, 0, 1, "two"))}
    relay.report({"b": (1, Heartbeat(7, 0, 2, "two"))})
    assert relay.exchange([]) == {"b": (1, Heartbeat(7, 0, 2, "two"))}


def test_every_worker_learns_which_trials_shall_stop_for_as_long_as_they_shall() -> None:
    relay = Relay()
    assert relay.report({}) == frozenset()
    relay.exchange([("a", 1), ("b", 2)])
    assert relay.report({}) == relay.report({}) == {("a", 1), ("b", 2)}
    relay.exchange([])
    assert relay.report({}) == frozenset()


# As Ray 2.60 says it, shortened.
IMPORT_ERROR = """\
The actor died because of an error raised in its creation task, \x1b[36mray::TrialWorker.__init__()\x1b[39m (pid=109, \
ip=10.77.1.3, actor_id=59cb06e1f8305cb299822a7901000000, repr=<TemporaryActor object at 0x7f5340d29250>)
RuntimeError: The actor with name TrialWorker failed to import on the worker. This may be because needed library \
dependencies are not installed in the worker environment:

\x1b[36mray::TrialWorker.__init__()\x1b[39m (pid=109, ip=10.77.1.3, actor_id=59cb06e1f8305cb299822a7901000000)
                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ModuleNotFoundError: No module named 'torch'
"""
CRASH = """\
The actor died unexpectedly before finishing this task.
\tclass_name: TrialWorker
\tip: 10.77.1.4
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR
"""


def test_the_reason_why_a_worker_cannot_start_is_the_last_exception_that_ray_reports() -> None:
    assert start_error(IMPORT_ERROR) == "ModuleNotFoundError: No module named 'torch'"
    died = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    assert start_error(CRASH) == died and start_error("") == "no reason given"


def test_the_error_of_ray_names_the_node() -> None:
    assert [address_in(IMPORT_ERROR), address_in(CRASH), address_in("")] == ["10.77.1.3", "10.77.1.4", None]
