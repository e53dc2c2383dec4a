"""What several tests share: a cache of their own, a small corpus, and a run of seconds on it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from ngpt.config.base import build
from ngpt.data.dataset import DataConfig, Dataset, open_dataset
from ngpt.training.config import TrainConfig
from tests.helpers import fake_gpus as fakes
from tests.helpers.tiny_campaign import write_corpus
from tune.campaign import load_campaign
from tune.spec.schema import Campaign
from tune.trials.trial import describe_machine

if not torch.cuda.is_available():
    # Where Triton is installed without a GPU its kernels run in its interpreter. It reads this when it is first
    # imported, which torch's compiler may do in any test; nothing else asks for it.
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes, or to draw it, depends on who else uses the machine. Every run draws other examples.
settings.register_profile("patient", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's cache; tiny tensors are fastest, and repeatable, on one thread."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NGPT_CACHE", str(folder))
        yield folder


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch computes with, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def signals() -> Iterator[None]:
    """Signals mean what they do in a terminal, also where tests run with `nohup`; pytest gets its own way back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty kilobytes of English about Python, as one file."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def data(corpus: Path) -> DataConfig:
    return DataConfig(corpus=str(corpus), tokenizer="sentencepiece:400")


@pytest.fixture(scope="session")
def dataset(data: DataConfig) -> Dataset:
    return open_dataset(data)


@pytest.fixture(scope="session")
def tiny(data: DataConfig) -> TrainConfig:
    """A run of well under a second; tests override what they are about."""
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "mlp_ratio": 2.0}
    settings = {f"model.{name}": value for name, value in small.items()}
    settings |= {"data.corpus": data.corpus, "data.tokenizer": data.tokenizer, "device": "cpu"}
    settings |= {"steps": 8, "batch_size": 4, "eval_every": 3, "eval_tokens": 256, "optim.lr": 0.01}
    return build(TrainConfig, settings)


@pytest.fixture
def settings_file(tiny: TrainConfig, tmp_path: Path) -> Path:
    """The settings of a run of a second, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"data: {{corpus: {tiny.data.corpus}, tokenizer: 'sentencepiece:400'}}\n"
        "model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}\n"
        "device: cpu\n"
        "steps: 4\n"
        "batch_size: 2\n"
        "eval_every: 2\n"
        "eval_tokens: 64\n"
        "optim:\n"
        "  lr: 1e-2\n"
        "  betas: [0.9, 0.99]\n"
    )
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Campaign]:
    """Reads a campaign from its text."""

    def read(text: str) -> Campaign:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_campaign(path)

    return read


@pytest.fixture
def fake_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., fakes.FakeGpus]]:
    """Gives this process, and those that it starts, GPUs that do not exist; takes the fields of `FakeMachine`."""

    def install(**properties: Any) -> fakes.FakeGpus:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return fakes.install(fakes.create(tmp_path / "gpus", **properties), monkeypatch)

    describe_machine.cache_clear()  # it remembers the devices of this process
    yield install
    describe_machine.cache_clear()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Campaigns end without the report, which takes a second."""
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
