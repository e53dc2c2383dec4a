"""Where ranks meet."""

import psutil

from ngpt.distributed.network import LOOPBACK, interface_to, open_store


def test_a_store_of_one_host_cannot_be_reached_from_others() -> None:
    store = open_store()
    found = psutil.Process().net_connections("tcp")
    assert [each.laddr.ip for each in found if each.status == "LISTEN" and each.laddr.port == store.port] == [LOOPBACK]
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_ranks_of_one_host_talk_on_its_loopback_interface() -> None:
    name = interface_to(LOOPBACK)
    assert name is not None
    assert LOOPBACK in {each.address for each in psutil.net_if_addrs()[name]}
