"""Puts the fake GPUs into every Python process that inherits this folder in PYTHONPATH: Ray's workers, too.

Python imports this module at its start. It must stay cheap, since all of Ray's processes import it: torch is not
imported here, and the product's modules are changed when they are imported.
"""

import importlib.util
import os
from pathlib import Path

if "NGPT_TEST_FAKE_GPUS" in os.environ:
    spec = importlib.util.spec_from_file_location("fake_gpus", Path(__file__).parents[1] / "fake_gpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install_on_import()
