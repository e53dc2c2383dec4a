"""A tracking tool whose package is missing is one line that names the extra."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from ngpt.trackers.config import TrackerConfig, absolute_address, resolve_tracker


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("mlflow", "auto"), ("trackio", "local")])
def test_a_missing_package_is_an_error_that_names_the_extra(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"tracker.{name} needs a package: pip install 'ngpt-campaign\[{name}\]'"):
        resolve_tracker(TrackerConfig(**{name: value}), tmp_path)
    assert resolve_tracker(TrackerConfig(), tmp_path) == TrackerConfig()


def test_a_folder_of_mlflow_becomes_absolute_and_other_addresses_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_address("runs") == str(tmp_path / "runs")
    for kept in ("auto", "disabled", "http://host:5000", "sqlite:///m.db", "databricks", 3):
        assert absolute_address(kept) == kept
