"""Sends this project's code to the nodes of a cluster, which then need Python and the dependencies only.

What is sent is what this process has imported, from a checkout or an installed wheel. It takes precedence over any copy
on a node: the working directory of the workers is the sent one, so that Ray does not add the campaign's own folders to
their path, where another version may lie on another host.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ngpt
import tune
from ngpt.code.plugins import SHIPPED
from ngpt.system.cache import CACHE_VARIABLE
from tune.cluster.address import JOB_VARIABLE

PACKAGES = (ngpt, tune)
OVERRIDE_VARIABLE = "RAY_OVERRIDE_JOB_RUNTIME_ENV"  # lets Ray add this environment to that of its job


def stage_code(folder: Path) -> list[Path]:
    """Copies the packages into `folder`, without what Python or an editor has left there; returns their folders."""
    copies = []
    for package in PACKAGES:
        source = Path(package.__path__[0])
        copies.append(folder / source.name)
        shutil.copytree(source, copies[-1], ignore=shutil.ignore_patterns("__pycache__", ".*", "*~"))
    return copies


def stage_plugins(folder: Path, files: Mapping[str, Mapping[str, Path]]) -> list[Path]:
    """Copies plug-ins that are plain files, with their helpers, into a package in `folder`; returns its folder.

    `files` are those of each plug-in, by its module and by where they lie beside it. Modules of installed packages are
    not sent: every node has to have these.
    """
    if not files:
        return []
    package = folder / SHIPPED
    package.mkdir()
    (package / "__init__.py").touch()
    for module, own in files.items():
        for name, path in own.items():
            copy = package / module / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return [package]


def code_environment(folder: Path, plugins: Mapping[str, Mapping[str, Path]] | None = None) -> dict[str, Any]:
    """Stages the code in `folder` and returns the runtime environment with which Ray sends it to every node.

    `plugins` are the files of plug-ins, see `stage_plugins`.

    Inside a Ray job, the code is added to the environment of the job. NGPT_CACHE, if set here, holds on all nodes.
    """
    packages = [*stage_code(folder), *stage_plugins(folder, plugins or {})]
    environment: dict[str, Any] = {}
    if cache := os.environ.get(CACHE_VARIABLE):
        environment["env_vars"] = {CACHE_VARIABLE: cache}
    job = job_environment()
    if "working_dir" not in job:
        return environment | {"working_dir": str(folder)}
    os.environ[OVERRIDE_VARIABLE] = "1"
    return environment | {"py_modules": [*job.get("py_modules", []), *map(str, packages)]}


def job_environment() -> dict[str, Any]:
    """The runtime environment of the Ray job in which this process runs; empty outside of a job."""
    try:
        environment = json.loads(os.environ.get(JOB_VARIABLE) or "{}")["runtime_env"]
    except (ValueError, KeyError, TypeError):
        return {}
    return environment if isinstance(environment, dict) else {}
