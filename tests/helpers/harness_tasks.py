"""Small tasks in the YAML format of lm-evaluation-harness, with their data in local files."""

import json
import random
import string
from pathlib import Path
from typing import Any

from tests.helpers.vocabularies import ENGLISH

WORDS = ENGLISH.split()
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASKS: dict[str, dict[str, Any]] = {
    "letters": {  # answers of one token, which share a forward pass
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nAnswer:",
        "doc_to_choice": list(string.printable[:94]),
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "endings": {  # answers of several tokens, after two examples
        "output_type": "multiple_choice",
        "num_fewshot": 2,
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "go_on": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n", "z"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, *, n: int = 10) -> Path:
    """Writes the tasks with `n` examples each; returns the folder for `--include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    rows = [
        {
            "text": text(draw.randint(1, 25)),
            "long": text(draw.randint(30, 90)),
            "word": draw.choice(WORDS),
            "endings": [f" {text(draw.randint(1, 5))}" for _ in range(3)],
            "gold": draw.randrange(3),
        }
        for _ in range(n)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "num_fewshot": 0} | source | task))
    return folder
