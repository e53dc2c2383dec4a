"""Several hosts on this machine, for tests of a cluster: each has its own network, processes, host name and /tmp/ray.

A host is made of Linux namespaces, so it needs root, iproute2 and util-linux. All hosts share this file system, except
for their home, /tmp/ray, /dev/shm and the folders that a test makes private.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PORT = 6400  # of Ray's head
PATIENCE = 60.0  # seconds for a part of a host, or a node of Ray, to appear
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@functools.cache
def why_no_hosts() -> str | None:
    """Why hosts cannot be made here, as the reason of a skipped test; None if they can."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return "hosts are network namespaces, which only root can make on Linux"
    for tool in ("ip", "unshare", "nsenter"):
        if not shutil.which(tool):
            return f"{tool} is not installed (Debian: iproute2, util-linux)"
    tried = subprocess.run(["unshare", "-n", "-m", "-u", "-p", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


# For tests that make hosts.
NEEDS_HOSTS = pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


class Host:
    """A host at `address`, called `name`."""

    def __init__(self, network: "Network", name: str, number: int, private: Sequence[Path], size: str) -> None:
        self.name, self.address = name, f"10.77.{network.number}.{number}"
        self._namespace, self._link = f"hosts{network.number}{name}", f"hv{network.number}n{number}"
        self.home = network.folder / f"home_{name}"
        self.home.mkdir(exist_ok=True)
        self.environment = {"HOME": str(self.home), "PYTHONPATH": str(ROOT), **RAY_SETTINGS}  # of every command
        Path("/tmp/ray").mkdir(exist_ok=True)
        _ip(f"netns add {self._namespace}")
        _ip(f"link add {self._link} type veth peer name eth0 netns {self._namespace}")
        _ip(f"link set {self._link} master {network.bridge} up")
        _ip(f"-n {self._namespace} addr add {self.address}/24 dev eth0")
        _ip(f"-n {self._namespace} link set eth0 up")
        _ip(f"-n {self._namespace} link set lo up")
        mounts = ["mount -t tmpfs tmpfs /tmp/ray", "mount -t tmpfs -o size=2g tmpfs /dev/shm"]
        mounts += [f"mount -t tmpfs -o size={size} tmpfs '{folder}'" for folder in private]
        script = "; ".join([f"hostname {name}", "mount --make-rprivate /", *mounts, "exec sleep infinity"])
        namespaces = ["ip", "netns", "exec", self._namespace, "unshare", "-m", "-u", "-p", "--fork", "--mount-proc"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._holder = subprocess.Popen([*namespaces, "bash", "-ec", script], start_new_session=True, **quiet)
        self._first = self._first_process()
        self._commands: list[subprocess.Popen[str]] = []

    def _first_process(self) -> int:
        """Waits for the process with id 1 on the host, which holds its namespaces; returns its id here."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError, IndexError):
                    parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if parent == self._holder.pid and (path / "cmdline").read_bytes() == b"sleep\0infinity\0":
                        return int(path.name)
            time.sleep(0.05)
        raise TimeoutError(f"host {self.name} did not come up in {PATIENCE:.0f} s")

    def _inside(self, command: Sequence[str | Path]) -> list[str]:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return ["nsenter", "-t", str(self._first), "-n", "-m", "-u", "-p", "env", *variables, *map(str, command)]

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Starts a command on the host, in the current folder; `options` are those of `subprocess.Popen`."""
        self._commands.append(process := subprocess.Popen(self._inside(command), text=True, **options))
        return process

    def run(self, command: Sequence[str | Path], *, timeout: float = 300, **options: Any) -> Any:
        """Runs a command on the host to its end; returns what `subprocess.run` returns, output included."""
        return subprocess.run(self._inside(command), text=True, capture_output=True, timeout=timeout, **options)

    def start_ray(
        self,
        *,
        head: "Host | None" = None,
        cpus: int = 1,
        python: str | Path = sys.executable,
        options: Sequence[str] = (),
    ) -> None:
        """Starts a node of Ray, with more options of `ray start`: the head, or one that joins the cluster of `head`."""
        first = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        where = [f"--address={head.address}:{PORT}"] if head else first
        limits = [f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
        ray = [python, "-m", "ray.scripts.scripts", "start", *where, f"--node-ip-address={self.address}", *limits]
        started = self.run([*ray, *options], timeout=2 * PATIENCE)
        assert started.returncode == 0, started.stdout + started.stderr

    def path(self, path: Path) -> Path:
        """A path as the host sees it, such as one in a folder of its own."""
        return Path(f"/proc/{self._first}/root{path}")

    def pids(self) -> list[int]:
        """Ids, as seen from outside, of the processes that run on the host."""
        space, found = os.readlink(f"/proc/{self._first}/ns/pid"), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns/pid") == space and int(path.name) != self._first:
                    found.append(int(path.name))
        return found

    def cut(self) -> None:
        """Cuts the host off the network."""
        _ip(f"link set {self._link} down")

    def mend(self) -> None:
        """Joins the host to the network again."""
        _ip(f"link set {self._link} up")

    def down(self) -> None:
        """Switches the host off: SIGKILL to every process on it."""
        if self._holder.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)  # the kernel kills the others with it
            self._holder.wait(PATIENCE)
            subprocess.run(["ip", "netns", "del", self._namespace], check=False, capture_output=True)
            subprocess.run(["ip", "link", "del", self._link], check=False, capture_output=True)
        for process in self._commands:
            process.kill()
            process.wait(PATIENCE)


class Network:
    """Context manager: a network that hosts can join, at 10.77.X.0/24."""

    def __init__(self) -> None:
        self._hosts: list[Host] = []

    def __enter__(self) -> "Network":
        self.folder = Path(tempfile.mkdtemp(prefix="hosts"))
        for self.number in range(1, 255):  # others may run the same tests on this machine
            self.bridge = f"hostsbr{self.number}"
            if (
                subprocess.run(["ip", "link", "add", self.bridge, "type", "bridge"], capture_output=True).returncode
                == 0
            ):
                break
        else:
            raise OSError("no name for a network is free")
        _ip(f"addr add 10.77.{self.number}.1/24 dev {self.bridge}")
        _ip(f"link set {self.bridge} up")
        return self

    def host(self, name: str, *, private: Sequence[Path] = (), size: str = "50%") -> Host:
        """Adds a host, on which each folder of `private` is an empty disk of its own.

        `size` is that of each disk, such as `8m`, or a share of the memory.
        """
        for folder in private:
            folder.mkdir(parents=True, exist_ok=True)
        self._hosts.append(host := Host(self, name, len(self._hosts) + 2, private, size))
        return host

    def cluster(self, *names: str, cpus: int = 1, private: Sequence[Path] = ()) -> list[Host]:
        """Adds hosts that form a cluster of Ray, the head first."""
        hosts = [self.host(name, private=private) for name in names]
        for host in hosts:
            host.start_ray(head=None if host is hosts[0] else hosts[0], cpus=cpus)
        return hosts

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.down()
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(*names: str, cpus: int = 1, private: Sequence[Path] = ()) -> Iterator[list[Host]]:
    """A cluster of Ray on hosts with these names, the head first."""
    with Network() as network:
        yield network.cluster(*names, cpus=cpus, private=private)
