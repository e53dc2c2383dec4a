"""A prompt starts with the token that the tokenizer's own program uses for it."""

from pathlib import Path
from typing import Any

import pytest

from ngpt.data.dataset import Dataset
from ngpt.data.tokens.tokenizer import load_tokenizer
from ngpt.downstream.special_tokens import prefix_token, puts_prefix
from tests.helpers.vocabularies import write_gpt2, write_llama, write_marked, write_ranks


@pytest.mark.parametrize(
    ("kind", "prefix", "puts"),
    [
        ("llama", 1, True),  # <s> before each text
        ("gpt2", 259, False),  # <|endoftext|> between texts
        ("llama3", 267, True),  # <|begin_of_text|>
        ("hf-begins", 2, True),
        ("hf", 3, False),
    ],
)
def test_each_family_has_its_own(tmp_path: Path, kind: str, prefix: int, puts: bool) -> None:
    make: dict[str, Any] = {
        "llama": lambda: str(write_llama(tmp_path / "llama.model")),
        "gpt2": lambda: f"gpt2:{write_gpt2(tmp_path / 'gpt2')}",
        "llama3": lambda: f"tiktoken:llama3:{write_ranks(tmp_path / 'ranks.tiktoken')}",
        "hf-begins": lambda: str(write_marked(tmp_path / "begins.json", begins=True)),
        "hf": lambda: str(write_marked(tmp_path / "plain.json", begins=False)),
    }
    tokenizer = load_tokenizer(make[kind](), None)
    assert (prefix_token(tokenizer), puts_prefix(tokenizer)) == (prefix, puts)


def test_a_tokenizer_that_is_trained_here_has_none_and_starts_with_a_newline(dataset: Dataset) -> None:
    tokenizer = load_tokenizer("sentencepiece:400", dataset.folder)
    assert tokenizer.decode([prefix_token(tokenizer)]) == "\n"
    assert not puts_prefix(tokenizer)
