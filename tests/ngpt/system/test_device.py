"""Devices and precision."""

import pytest
import torch

from ngpt.config.base import ConfigError
from ngpt.system.device import DEVICES, DTYPES, mixed_precision, pick_device


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_picks_the_fastest_available_device(
    cuda: bool, mps: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == chosen
    there = {"cpu": True, "cuda": cuda, "mps": mps}
    for name in there:
        if there[name]:
            assert pick_device(name).type == name
        else:
            with pytest.raises(ConfigError, match=f"device '{name}' is not available; this machine has cpu"):
                pick_device(name)
    assert set(there) == set(DEVICES) - {"auto"}


@pytest.mark.parametrize("name", DTYPES)
def test_matrix_products_have_the_requested_precision(name: str) -> None:
    one = torch.ones(2, 2)
    with mixed_precision(torch.device("cpu"), name):
        assert (one @ one).dtype == DTYPES[name]
    assert (one @ one).dtype == torch.float32
