"""Results say which plug-in they need, and nothing in them makes it run."""

import json
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError, flatten, override, unknown_message
from ngpt.data.dataset import Dataset
from ngpt.plugins.load import forget_plugins, load_plugins
from ngpt.plugins.records import describe, plugin_lines, plugins_in_brief, remember_plugins, used_plugins
from ngpt.plugins.tables import PluginError
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import load_model
from tests.helpers.plugin_files import RULE, no_plugins, write
from tests.helpers.tiny_run import run

__all__ = ["no_plugins"]


def test_a_model_of_a_plugin_names_it_and_is_loaded_once_it_is_given(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path)
    load_plugins([file])
    (record,) = describe()
    assert plugin_lines() == [f"plug-in mine.py (digest {record['digest'][:10]}): residual rule mine"]
    assert plugins_in_brief() == f"mine.py (digest {record['digest'][:10]})"
    config = override(tiny, {"residual": "mine"})
    assert used_plugins(flatten(tiny)) == [] and used_plugins(flatten(config)) == [record]
    run(config, tmp_path / "run", dataset)
    run(tiny, tmp_path / "other", dataset)
    saved = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/checkpoints/*/MANIFEST.json"))]
    assert [manifest["data"].get("plugins") for manifest in saved] == [None, [record]]

    forget_plugins()
    with pytest.raises(ConfigError) as caught:
        load_model(tmp_path / "run")
    gave = f"the plug-in mine.py (digest {record['digest'][:10]}) gave it: pass --plugin {file}; code that results name"
    assert f"residual: unknown residual rule 'mine': {gave} is never run by itself" in str(caught.value)
    assert "Allowed" not in str(caught.value)
    load_plugins([file])
    assert load_model(tmp_path / "run").model.cfg.residual == "mine" and caplog.text == ""

    forget_plugins()
    write(tmp_path, RULE.replace("0.9", "0.8"))
    load_plugins([file])
    load_model(tmp_path / "run")
    assert "was trained with another version of the plug-in mine.py (digest" in caplog.text


@pytest.mark.parametrize(
    "records",
    [None, {}, [3], [{"adds": 3}], [{"adds": [3, ["residual rule"], [[], {}]]}], [{"adds": [["a\x1b", "b"]]}]],
)
def test_other_records_than_ours_are_ignored(records: Any, caplog: pytest.LogCaptureFixture) -> None:
    remember_plugins(records, "a model")
    assert "choose one of x" in unknown_message("residual rule", "mine", ["x"])
    assert caplog.text == ""


def test_a_helper_that_is_imported_later_is_read_before_training(tmp_path: Path) -> None:
    write(tmp_path, "x = = 1\n", "later.py")
    load_plugins([write(tmp_path, RULE.replace("    return", "    from . import later\n    return"))])
    with pytest.raises(PluginError, match=r"plug-in later.py of mine.py:1: SyntaxError: invalid syntax"):
        plugin_lines()
