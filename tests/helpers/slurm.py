"""A Slurm of its own for a test: the real daemons, with two nodes on this machine. Needs root and Debian's packages."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = "munge slurmctld slurmd slurm-client"
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is how long a job waits after it went back into the queue.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str:
    """The reason why this machine cannot run the daemons, or an empty string."""
    if os.geteuid() != 0:
        return "the daemons of Slurm need root"
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    return f"{', '.join(missing)} not found: apt-get install {PACKAGES}" if missing else ""


class Slurm:
    """Context manager that runs the daemons with files in a short folder of their own, and ends all that they start."""

    def __enter__(self) -> "Slurm":
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))
        self.folder.chmod(0o755)  # munge insists that everybody can reach its socket
        self.config = self.folder / "slurm.conf"
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        host = socket.gethostname().split(".")[0]
        self.config.write_text(CONFIG.format(folder=self.folder, host=host, ports=ports))
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = outside | {"SLURM_CONF": str(self.config), "RAY_TMPDIR": str(self.folder)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "seed"}
            options = [f"--{name}={self.folder / file}" for name, file in files.items()]
            self._start("munged", "--foreground", "--force", *options)
            self.until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self.until(lambda: self.call("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in self._daemons:
            daemon.wait()
        shutil.rmtree(self.folder)

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def call(self, *command: str) -> str:
        """Runs a command of Slurm; returns its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or command[0] == "sinfo", f"{command}: {done.stderr}{self.log()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says about a job."""
        words = self.call("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes(self) -> list[psutil.Process]:
        """The daemons, and everything that they have started."""

        def is_ours(process: psutil.Process) -> bool:
            if process.name() == "slurmstepd":  # it overwrites its environment
                return any(Path(file.path).is_relative_to(self.folder) for file in process.open_files())
            return process.environ().get("SLURM_CONF") == str(self.config)

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if is_ours(process):
                    found.append(process)
        return found

    def until(self, happened: Callable[[], bool], seconds: float = 600) -> None:
        """Waits until a condition holds."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                pytest.fail(f"the condition never held: {self.log()}")
            time.sleep(0.5)

    def log(self) -> str:
        """What the daemons have said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))
