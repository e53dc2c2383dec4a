"""Where ranks meet, and the network interface on which they talk."""

import socket

import psutil
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOPBACK = "127.0.0.1"
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


def open_store(host: str = LOOPBACK) -> TCPStore:
    """Opens a store for ranks to meet at, on a free port of `host`; it outlives a rank that dies.

    By itself, torch listens on every interface. At the loopback address, this store listens on that alone.
    """
    listener = socket.create_server((LOOPBACK if host == LOOPBACK else "", 0))
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def interface_to(host: str) -> str | None:
    """Returns the name of the network interface that leads to `host`; None if it cannot be known.

    By itself, gloo takes the interface of this host's name, which may not lead to the other ranks.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # which sends nothing
        probe.connect((host, 1))
        address = probe.getsockname()[0]
    found = (name for name, known in psutil.net_if_addrs().items() if any(each.address == address for each in known))
    return next(found, None)
