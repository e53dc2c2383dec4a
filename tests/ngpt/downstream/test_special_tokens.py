"""A prompt starts, and a text ends, with the tokens that the tokenizer's own program uses for it."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors

from ngpt.data.dataset import Dataset
from ngpt.data.tokens.tokenizer import load_tokenizer
from ngpt.downstream.special_tokens import end_tokens, prefix_token, puts_prefix
from tests.helpers.vocabularies import write_gpt2, write_llama, write_ranks


def write_hf(path: Path, *, begins: bool) -> Path:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "prefix", "puts", "ends"),
    [
        ("llama", 1, True, {1, 2}),  # <s> before each text, </s> after it
        ("gpt2", 259, False, {259}),  # <|endoftext|> between texts
        ("llama3", 267, True, {267, 268}),  # <|begin_of_text|>, <|end_of_text|>
        ("hf-begins", 2, True, {2, 3}),
        ("hf", 3, False, {3}),
    ],
)
def test_each_family_has_its_own(tmp_path: Path, kind: str, prefix: int, puts: bool, ends: set[int]) -> None:
    make: dict[str, Any] = {
        "llama": lambda: str(write_llama(tmp_path / "llama.model")),
        "gpt2": lambda: f"gpt2:{write_gpt2(tmp_path / 'gpt2')}",
        "llama3": lambda: f"tiktoken:llama3:{write_ranks(tmp_path / 'ranks.tiktoken')}",
        "hf-begins": lambda: str(write_hf(tmp_path / "begins.json", begins=True)),
        "hf": lambda: str(write_hf(tmp_path / "plain.json", begins=False)),
    }
    tokenizer = load_tokenizer(make[kind](), None)
    assert (prefix_token(tokenizer), puts_prefix(tokenizer), end_tokens(tokenizer)) == (prefix, puts, ends)


def test_a_tokenizer_that_is_trained_here_has_none_and_starts_with_a_newline(dataset: Dataset) -> None:
    tokenizer = load_tokenizer("sentencepiece:400", dataset.folder)
    assert tokenizer.decode([prefix_token(tokenizer)]) == "\n"
    assert not puts_prefix(tokenizer) and end_tokens(tokenizer) == set()
