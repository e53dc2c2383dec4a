"""A text ends with the tokens that the tokenizer's own program uses for it, and with the document separator."""

from pathlib import Path
from typing import Any

import pytest

from ngpt.data.dataset import Dataset
from ngpt.data.tokens.end_tokens import end_tokens
from ngpt.data.tokens.tokenizer import load_tokenizer
from tests.helpers.vocabularies import write_gpt2, write_llama, write_marked, write_ranks


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("llama", (2, 1)),  # </s> after each text, <s> before it
        ("gpt2", (259,)),  # <|endoftext|> between texts
        ("llama3", (268, 267)),  # <|end_of_text|>, <|begin_of_text|>
        ("hf-begins", (3, 2)),
        ("hf", (3,)),
    ],
)
def test_each_family_has_its_own(tmp_path: Path, kind: str, ends: tuple[int, ...]) -> None:
    make: dict[str, Any] = {
        "llama": lambda: str(write_llama(tmp_path / "llama.model")),
        "gpt2": lambda: f"gpt2:{write_gpt2(tmp_path / 'gpt2')}",
        "llama3": lambda: f"tiktoken:llama3:{write_ranks(tmp_path / 'ranks.tiktoken')}",
        "hf-begins": lambda: str(write_marked(tmp_path / "begins.json", begins=True)),
        "hf": lambda: str(write_marked(tmp_path / "plain.json", begins=False)),
    }
    assert end_tokens(load_tokenizer(make[kind](), None)) == ends


def test_a_tokenizer_that_is_trained_here_has_none(dataset: Dataset) -> None:
    assert end_tokens(load_tokenizer("sentencepiece:400", dataset.folder)) == ()
