"""A small bundle in the format of nanochat's `eval_bundle`, with a task of each type."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

from tests.helpers.vocabularies import ENGLISH

N = 12  # examples of each task
WORDS = ENGLISH.split()
SEPARATOR = "\u2028"  # which ends a line of text, but none of JSON lines
TASKS = """\
icl_tasks:
-
  label: answers
  dataset_uri: reading/answers.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
  has_categories: true
-
  label: contexts
  dataset_uri: contexts.jsonl
  num_fewshot: [0]
  icl_task_type: schema
-
  label: endings
  dataset_uri: endings.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
"""
BASELINES = "Eval Task,Task Category,Random baseline\nanswers,reading,25\ncontexts,language,50.0\nendings,language,0\n"


def write_bundle(folder: Path, *, tasks: str = TASKS, baselines: str = BASELINES, n: int = N) -> Path:
    """Writes the bundle into a new folder; the examples are the same each time."""
    draw = random.Random(4)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    rows: dict[str, list[dict[str, Any]]] = {
        "reading/answers": [
            {"query": f"\u2028{text(4)}", "choices": [text(3) for _ in range(4)], "gold": draw.randrange(4)}
            for _ in range(n)
        ],
        "contexts": [
            {"context_options": [text(5), text(5)], "continuation": text(3), "gold": draw.randrange(2)}
            for _ in range(n)
        ],
        "endings": [{"context": f" {text(6)} \n", "continuation": draw.choice("aeiotn")} for _ in range(n)],
    }
    for name, examples in rows.items():
        path = folder / "eval_data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(example, ensure_ascii=False)}\n" for example in examples))
    (folder / "core.yaml").write_text(tasks)
    (folder / "eval_meta_data.csv").write_text(baselines)
    return folder


def pack(folder: Path, archive: Path) -> Path:
    """Packs a bundle as nanochat's is, inside a folder."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, Path("eval_bundle") / path.relative_to(folder))
    return archive
