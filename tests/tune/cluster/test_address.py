"""Which Ray a campaign uses, and what is said of an address where none is."""

import socket
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tune.cluster import address
from tune.cluster.address import ADDRESS_VARIABLE, JOB_VARIABLE, check_listening, choose_address, job_folder_note

JOB = '{"runtime_env": {"working_dir": "gcs://x.zip"}}'


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ADDRESS_VARIABLE, JOB_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "variable", "in_job", "chosen", "lines"),
    [
        (None, None, False, None, 0),
        (None, "10.0.0.1:6379", False, None, 1),  # the shell's variable alone changes nothing, which is said
        (None, "10.0.0.1:6379", True, "10.0.0.1:6379", 1),
        (None, None, True, None, 0),
        ("local", "10.0.0.1:6379", True, None, 0),
        ("auto", None, False, "auto", 0),
        ("auto", "10.0.0.1:6379", False, "10.0.0.1:6379", 0),
        ("10.0.0.2:6379", "10.0.0.1:6379", True, "10.0.0.2:6379", 0),
        ("[fe80::1]:6379", None, False, "[fe80::1]:6379", 0),
    ],
)
def test_the_option_goes_before_the_job_and_the_job_before_a_private_ray(
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    variable: str | None,
    in_job: bool,
    chosen: str | None,
    lines: int,
) -> None:
    if variable:
        monkeypatch.setenv(ADDRESS_VARIABLE, variable)
    if in_job:
        monkeypatch.setenv(JOB_VARIABLE, JOB)
    said: list[str] = []
    assert choose_address(given, said.append) == chosen
    assert len(said) == lines and all("10.0.0.1:6379" in line for line in said)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("ray://10.0.0.1:10001", "write 10.0.0.1:6379"),
        ("http://10.0.0.1:8265", "write 10.0.0.1:6379"),
        ("10.0.0.1", "the port is missing"),
        ("10.0.0.1:", "'' is not a port"),
        ("10.0.0.1:ray", "'ray' is not a port"),
        ("10.0.0.1:70000", "'70000' is not a port"),
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write(given: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        choose_address(given, print)
    assert str(raised.value).startswith(f"--address {given}: ") and reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_port_on_which_nothing_listens_is_an_error_at_once() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, but not listening
        place = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"^--address {place}: nothing listens there"):
            check_listening(place)


def test_a_host_name_that_does_not_resolve_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^--address no-such-host\.invalid:6379: the host name does not resolve"):
        check_listening("no-such-host.invalid:6379")


def test_a_host_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "CONNECT_SECONDS", 0.3)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # the kernel drops further connections once its queue is full
        place = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(place)
        with pytest.raises(ConfigError, match="no answer within"):
            check_listening(f"127.0.0.1:{place[1]}")
        for each in waiting:
            each.close()


def test_a_port_that_listens_is_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_listening(f"127.0.0.1:{server.getsockname()[1]}")


def test_results_in_the_folder_of_a_job_are_warned_of() -> None:
    job = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/results/tiny")
    assert str(job) in str(job_folder_note(job)) and "--out" in str(job_folder_note(job))
    assert job_folder_note(Path("/shared/results/tiny")) is None
