"""GPUs that do not exist, for tests of everything that surrounds the kernels.

They stand in for ngpt/system/gpus.py, the only module that asks torch about GPUs, and for `nvidia-smi`. Tensors stay on
the CPU. GPU `i` of a process is the device `cpu:i`: torch puts its tensors on the CPU, and it differs from `cpu`.

A machine of fake GPUs is a folder:

    machine.json    what it has: `FakeMachine`
    memory/I/PID    the bytes that a process holds on GPU number I
    bin/nvidia-smi  lists the GPUs and the memory in use

The folder's path is in the variable NGPT_TEST_FAKE_GPUS, and PYTHONPATH has the folder `fake_gpus_start`, so child
processes, Ray's workers among them, see the same machine. As on a real one, CUDA_VISIBLE_DEVICES selects and orders the
GPUs of a process: by index, by UUID, or none.

Memory is counted by a model, not measured, so that tests are repeatable: see `step_bytes`. A process that asks for more
than is free, or than its limit, gets the error of torch's allocator. `break_context` is an error that stays in the
process, as a failed assertion in a kernel does.

    def test_x(fake_gpus: Callable[..., FakeGpus]) -> None:  # a fixture in tests/conftest.py
        gpus = fake_gpus(count=2, memory_bytes=1 << 30)
"""

import contextlib
import functools
import importlib
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "NGPT_TEST_FAKE_GPUS"  # holds the folder of the machine
STARTUP = Path(__file__).with_name("fake_gpus_start")
GIB = 1 << 30

SMI = """\
#!{python} -SE
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
machine = json.loads((folder / "machine.json").read_text())
query = next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith("--query-gpu=")), "index,uuid,name")
fields = query.split(",")
for i in range(machine["count"]):
    held = [path for path in (folder / "memory" / str(i)).glob("[0-9]*") if os.path.exists(f"/proc/{{path.name}}")]
    used = machine["held_by_others"] + sum(int(path.read_text() or 0) for path in held)
    row = {{"index": i, "uuid": f"GPU-fake-{{i}}", "name": machine["name"], "memory.used": used >> 20,
           "memory.total": machine["memory_bytes"] >> 20}}
    row["memory.free"] = row["memory.total"] - row["memory.used"]
    print(", ".join(str(row.get(field.strip(), "[N/A]")) for field in fields))
"""


@dataclass(frozen=True)
class FakeMachine:
    """A machine with fake GPUs."""

    count: int = 2
    memory_bytes: int = 80 * GIB  # of each
    name: str = "Fake GPU"
    torch_has_cuda: bool = True  # if not, only nvidia-smi knows the GPUs
    held_by_others: int = 0  # bytes of each GPU
    context_bytes: int = 512 << 20  # that a process holds besides its tensors
    scale: int = 1  # of the memory that steps need, so that tiny models fill a large GPU
    fault_width: int | None = None  # a model of this width fails in its first step; on a GPU, as a kernel does
    folder: str = ""

    def uuid(self, index: int) -> str:
        return f"GPU-fake-{index}"

    def users(self, index: int) -> dict[int, int]:
        """The bytes that living processes hold on a GPU, by process id."""
        held = {}
        for path in Path(self.folder, "memory", str(index)).glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):  # being replaced
                if is_running(int(path.name)):
                    held[int(path.name)] = int(path.read_text())
        return held

    def free(self, index: int) -> int:
        return self.memory_bytes - self.held_by_others - sum(self.users(index).values())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class FakeGpus:
    """What one process sees of the machine: the functions of ngpt/system/gpus.py, by the same names."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.calls: list[str] = []  # the synchronizations and releases so far, for tests
        self.broken: str | None = None
        self._share = 1.0
        self._allocated = self._reserved = self._peak_allocated = self._peak_reserved = 0
        self._has_context = False

    # ---- the functions of ngpt/system/gpus.py ----

    def is_available(self) -> bool:
        return self.count() > 0

    def is_built(self) -> bool:
        return self.machine.torch_has_cuda

    def count(self) -> int:
        return len(self.visible()) if self.machine.torch_has_cuda else 0

    def current(self) -> Any:
        import torch

        return torch.device("cpu", 0)

    def is_gpu(self, device: Any) -> bool:
        return device.type == "cpu" and device.index is not None

    def name(self, device: Any) -> str:
        self._index(device)
        return self.machine.name

    def is_in_use(self) -> bool:
        return self._has_context

    def memory(self, device: Any) -> tuple[int, int]:
        self._open()
        return max(0, self.machine.free(self._index(device))), self.machine.memory_bytes

    def limit_memory(self, share: float) -> None:
        assert 0 <= share <= 1, share  # torch raises ValueError
        self._open()
        self._share = share

    def reset_peaks(self, device: Any) -> None:
        self._open()
        self._peak_allocated, self._peak_reserved = self._allocated, self._reserved

    def peak_allocated(self, device: Any) -> int:
        return self._peak_allocated

    def peak_reserved(self, device: Any) -> int:
        return self._peak_reserved

    def release_unused(self) -> None:
        self.calls.append("release_unused")
        if self._has_context:
            self._allocated, self._reserved = 0, 0
            self._write()

    def synchronize(self, device: Any) -> None:
        self.calls.append("synchronize")
        self._check()

    # ---- what happens on a fake GPU ----

    def visible(self) -> list[int]:
        """The indices of the GPUs that this process sees, as CUDA reads the variable: up to the first unknown one."""
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return list(range(self.machine.count))
        names = {str(i): i for i in range(self.machine.count)}
        found: list[int] = []
        for word in map(str.strip, chosen.split(",")):
            uuids = [i for i in range(self.machine.count) if word.startswith("GPU-") and self.machine.uuid(i) == word]
            index = names.get(word, uuids[0] if uuids else None)
            if index is None or index in found:
                break
            found.append(index)
        return found

    def hold(self, bytes_needed: int) -> None:
        """Holds so many bytes of tensors at once on the current GPU; raises what torch raises if they do not fit."""
        import torch

        self._check()
        self._open()
        index = self._index(self.current())
        limit = int(self._share * self.machine.memory_bytes)
        more = bytes_needed - self._reserved
        if bytes_needed > limit or more > self.machine.free(index):
            text = f"CUDA out of memory. Tried to allocate {max(0, more) / 2**20:.2f} MiB. GPU 0 has a total capacity"
            raise torch.OutOfMemoryError(f"{text} of {self.machine.memory_bytes / GIB:.2f} GiB")
        self._allocated, self._peak_allocated = bytes_needed, max(self._peak_allocated, bytes_needed)
        self._peak_reserved = max(self._peak_reserved, bytes_needed)
        if more > 0:
            self._reserved = bytes_needed
            self._write()

    def break_context(self, message: str = "CUDA error: device-side assert triggered") -> None:
        """Raises an error that every later use of a GPU by this process raises again."""
        self._open()
        self.broken = message
        self._check()

    def _check(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)

    def _index(self, device: Any) -> int:
        number = device if isinstance(device, int) else device.index or 0
        visible = self.visible()
        assert self.machine.torch_has_cuda, "Torch not compiled with CUDA enabled"
        assert number < len(visible), f"invalid device ordinal: {number} of {len(visible)}"
        return visible[number]

    def _open(self) -> None:
        if not self._has_context:
            self._has_context = True
            self._write()

    def _write(self) -> None:
        folder = Path(self.machine.folder, "memory", str(self._index(0)))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{os.getpid()}"
        temporary.write_text(str(self.machine.context_bytes + self._reserved))
        temporary.replace(folder / str(os.getpid()))


FUNCTIONS = (
    *("is_available", "is_built", "count", "current", "is_gpu", "name", "is_in_use", "memory", "limit_memory"),
    *("reset_peaks", "peak_allocated", "peak_reserved", "release_unused", "synchronize"),
)


def step_bytes(model: Any, rows: int, length: int, *, has_gradient: bool) -> int:
    """The modelled bytes of a pass: weights, gradients and two moments, activations, and float32 logits."""
    config = model.cfg
    weights = 16 * sum(parameter.numel() for parameter in model.parameters())
    layers = config.n_layer if has_gradient else 1
    return weights + 4 * rows * length * (16 * config.n_embd * layers + config.vocab_size)


def counting(gpus: FakeGpus, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward` that holds the memory of the pass first, if the process uses a GPU."""
    import torch
    from torch._C._functorch import get_unwrapped, is_batchedtensor

    @functools.wraps(forward)
    def counted(self: Any, idx: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and self.cfg.n_embd == gpus.machine.fault_width
        ):
            if gpus.is_in_use():
                gpus.break_context()
            raise RuntimeError("this model fails")
        if not torch.compiler.is_compiling() and gpus.is_in_use():
            # A group of trials is one pass through `torch.vmap`, which hides the number of trials.
            whole = idx
            while is_batchedtensor(whole):
                whole = get_unwrapped(whole)
            trials = whole.numel() // idx.numel()
            rows, length = idx.shape
            needed = step_bytes(self, rows, length, has_gradient=torch.is_grad_enabled())
            gpus.hold(gpus.machine.scale * trials * needed)
        return forward(self, idx, *args, **kwargs)

    return counted


# ---- how they get into a process ------------------------------------------------------------------------------------


def create(folder: Path, **properties: Any) -> FakeMachine:
    """Writes the folder of a machine."""
    machine = FakeMachine(**properties, folder=str(folder))
    (folder / "memory").mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(asdict(machine)))
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(SMI.format(python=sys.executable, folder=str(folder)))
    smi.chmod(0o755)
    return machine


def environment(machine: FakeMachine) -> dict[str, str]:
    """The variables with which a process sees the machine."""
    root = Path(__file__).parents[2]
    paths = [str(STARTUP), str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        VARIABLE: machine.folder,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PATH": os.pathsep.join((str(Path(machine.folder, "bin")), os.environ.get("PATH", ""))),
    }


def replacements(gpus: FakeGpus) -> Iterator[tuple[str, Callable[[ModuleType], Sequence[tuple[Any, str, Any]]]]]:
    """For each module to be changed: what is set on it, as (object, name, value)."""
    yield "ngpt.system.gpus", lambda module: [(module, name, getattr(gpus, name)) for name in FUNCTIONS]
    # A group of trials, or an evaluation by token, does not go through `forward`.
    names = ("forward", "features_uncompiled")
    yield "ngpt.model.gpt", lambda module: [(module.GPT, x, counting(gpus, getattr(module.GPT, x))) for x in names]


def install(machine: FakeMachine, patch: Any) -> FakeGpus:
    """Makes this process, and those that it starts, see the machine until `patch`, a MonkeyPatch, is undone."""
    for variable, value in environment(machine).items():
        patch.setenv(variable, value)
    gpus = FakeGpus(machine)
    for name, changes in replacements(gpus):
        for target, attribute, value in changes(importlib.import_module(name)):
            patch.setattr(target, attribute, value)
    return gpus


def install_on_import() -> None:
    """Makes this process see the machine of its environment; called at the start of Python."""
    machine = FakeMachine(**json.loads(Path(os.environ[VARIABLE], "machine.json").read_text()))
    sys.meta_path.insert(0, _Finder(dict(replacements(FakeGpus(machine)))))


class _Finder:
    """Finds the modules to be changed as Python does, and changes them once they are imported."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], Sequence[tuple[Any, str, Any]]]]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for changed, attribute, value in self._changes[name](module):
                setattr(changed, attribute, value)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
