"""Building of C++ kernels: once per machine, with a fallback if no compiler is found."""

import ctypes
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngpt.kernels import build as native
from ngpt.kernels.build import load_native
from ngpt.system import cache

numbers = st.floats(-300, 300, allow_nan=False)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path))
    for cached in (load_native, cache._code_folder):
        cached.cache_clear()
    yield tmp_path
    for cached in (load_native, cache._code_folder):
        cached.cache_clear()


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, peak and mass of bfloat16 logits (R, V)."""
    library, slope = load_native("softmax"), logits.clone()
    assert library is not None, "the tests need a C++ compiler, as torch.compile does"
    peak, mass = torch.empty(len(logits)), torch.empty(len(logits))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (slope, peak, mass)]
    library.unnormalized_softmax(*pointers, *map(ctypes.c_int64, logits.shape))
    return slope, peak, mass


@given(st.lists(numbers, min_size=1, max_size=70))
def test_softmax_matches_numpy(row: list[float]) -> None:
    logits = torch.tensor([row, row[::-1]]).bfloat16()
    slope, peak, mass = softmax(logits)
    exact = logits.double().numpy()
    top = exact.max(1, keepdims=True)
    expected = np.exp(exact - top)
    np.testing.assert_array_equal(peak, top[:, 0])
    np.testing.assert_allclose(mass, expected.sum(1), rtol=1e-6)
    np.testing.assert_allclose(slope.double(), expected, rtol=2**-8, atol=1e-36)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_propagate(bad: float) -> None:
    logits = torch.zeros(3, 40).bfloat16()
    logits[1, 17] = bad
    _, _, mass = softmax(logits)
    assert mass.isfinite().tolist() == [True, False, True]


def test_a_library_built_under_any_umask_is_trusted_again(empty_cache: Path) -> None:
    before = os.umask(0)
    try:
        assert load_native("softmax") is not None
    finally:
        os.umask(before)
    assert cache.code_folder_problem(empty_cache / "native") is None


def test_library_is_built_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_native("softmax") is not None
    assert [path.suffix for path in (empty_cache / "native").iterdir()] == [".so"]
    load_native.cache_clear()
    monkeypatch.setattr(native, "_build", lambda *arguments: pytest.fail("built again"))
    assert load_native("softmax") is not None


@pytest.mark.parametrize("place", ["native", "library"])
def test_a_library_that_others_could_have_written_is_not_loaded_but_built_again(
    place: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_native("softmax") is not None
    (library,) = (empty_cache / "native").iterdir()
    (library if place == "library" else library.parent).chmod(0o777)
    loaded: list[Path] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(Path(path)))
    for cached in (load_native, cache._code_folder):
        cached.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_native("softmax")
    assert [path.name for path in loaded] == [library.name] and loaded[0].parent != library.parent
    assert "can be written by other users (mode 0777): compiled code is not kept" in caplog.text


@pytest.mark.usefixtures("empty_cache")
def test_without_a_compiler_load_native_warns_and_returns_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert load_native("softmax") is None
    assert "softmax.cpp was not built" in caplog.text and "no-such-compiler" in caplog.text


def test_failed_build_leaves_no_files(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wrong.cpp").write_text("int broken(")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert load_native("wrong") is None
    assert "wrong.cpp" in caplog.text and "error" in caplog.text
    assert not list((empty_cache / "native").iterdir())
