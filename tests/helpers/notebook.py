"""Executes a notebook in a kernel of its own.

python -m tests.helpers.notebook docs/notebooks/quickstart.ipynb            executes it and keeps what it shows
python -m tests.helpers.notebook docs/notebooks/quickstart.ipynb COPY       the same, into another file

What is kept has neither the lines of progress, whose times are those of one machine, nor the text in place of a table.
"""

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.helpers import ROOT

TIMEOUT = 600  # seconds for a cell


def execute(path: Path, folder: Path) -> Any:
    """Executes a notebook with `folder` as its working directory; raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    asyncio.run(client.async_execute(env=os.environ | {"PYTHONPATH": places}))
    return notebook


def without_machine(notebook: Any) -> Any:
    """The notebook without what only its machine shows."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for data in (each.data for each in cell.outputs if "data" in each and "text/html" in each.data):
                data.pop("text/plain", None)
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(without_machine(execute(Path(sys.argv[1]), Path(folder))), sys.argv[-1])
