"""A tokenizer.json encodes as the tokenizer does, in `tokenizers` and transformers, or is not written."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import transformers

from ngpt.data.tokens.end_tokens import end_tokens
from ngpt.data.tokens.tiktoken_bpe import ENCODINGS
from ngpt.data.tokens.tokenizer import load_tokenizer, read_model, train_sentencepiece
from ngpt.downstream.special_tokens import prefix_token, puts_prefix
from ngpt.export import tokenizer_files as module
from ngpt.export.tokenizer_files import LITERAL_META, sample_texts, tokenizer_files
from tests.helpers.vocabularies import write_gpt2, write_llama, write_ranks

# Not among the texts that the export itself compares.
OTHER = (
    "The <s>quick</s>  brown\tfox's 12345678 jumps;\r\n    über <|endoftext|>日本語🙂▁ \n\n\n " + topics["for"][-2000:]
)
# What ends a text, by the names that each family has for it.
ENDS = {"sentencepiece": None, "gpt2": "<|endoftext|>", "cl100k": "<|endoftext|>", "llama3": "<|end_of_text|>"}


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(topics.values(), 700, folder / "own.model")
    ranks = write_ranks(folder / "ranks.tiktoken")
    return {
        "sentencepiece": str(folder / "own.model"),
        "gpt2": f"gpt2:{write_gpt2(folder / 'gpt2')}",
        "cl100k": f"tiktoken:cl100k_base:{ranks}",
        "llama3": f"tiktoken:llama3:{ranks}",
        "llama": str(write_llama(folder / "llama.model")),
        "unigram": str(write_llama(folder / "unigram.model", model_type="unigram", vocab_size=290)),
    }


@pytest.mark.parametrize("kind", ENDS)
def test_transformers_encodes_and_decodes_as_our_tokenizer_does(
    kind: str, specs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in the real one, some ids near the end have no token.
    gaps = ENCODINGS["cl100k_base"]._replace(special={"<|endoftext|>": 270, "<|fim_prefix|>": 275})
    monkeypatch.setitem(ENCODINGS, "cl100k_base", gaps)
    tokenizer = load_tokenizer(specs[kind], None)
    found = tokenizer_files(tokenizer, read_model(specs[kind]), context=10**6)
    assert found.missing == ""
    for name, content in found.files.items():
        (tmp_path / name).write_bytes(content)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (OTHER, *sample_texts()):
        ids = tokenizer.encode(text).tolist()
        assert read(text, add_special_tokens=False)["input_ids"] == ids
        assert read.decode(ids) == text
    assert (read.eos_token, read.bos_token_id) == (ENDS[kind], tokenizer.document_separator)
    ends = {read.eos_token_id, read.bos_token_id} - {None}  # a model that was trained here ends a text with the latter
    given = found.eos_token_id
    assert {*(given if isinstance(given, list) else [given])} - {None} == ends
    assert read.pad_token_id == found.pad_token_id is not None
    assert len(read) == tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "llama3", "llama"])
def test_texts_start_and_end_with_the_same_tokens_after_a_round_trip(
    kind: str, specs: dict[str, str], tmp_path: Path
) -> None:
    """Otherwise lm-eval would score the exported model, or the one converted back, after other start tokens."""
    tokenizer = load_tokenizer(specs[kind], None)
    for name, content in tokenizer_files(tokenizer, read_model(specs[kind]), context=64).files.items():
        (tmp_path / name).write_bytes(content)
    back = load_tokenizer(f"hf:{tmp_path}", None)
    for of in (prefix_token, puts_prefix, end_tokens, lambda each: each.document_separator):
        assert of(back) == of(tokenizer)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    start = [prefix_token(tokenizer)] if kind in ("llama3", "llama") else []
    assert read("The fox")["input_ids"] == [*start, *tokenizer.encode("The fox").tolist()]


def test_a_tokenizer_json_is_kept_as_it_is(specs: dict[str, str], tmp_path: Path) -> None:
    given = tokenizer_files(load_tokenizer(specs["gpt2"], None), None, context=64).files["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_bytes(given)
    found = tokenizer_files(load_tokenizer(f"hf:{tmp_path}", None), given, context=64)
    assert found.files["tokenizer.json"] == given
    assert json.loads(found.files["tokenizer_config.json"])["model_max_length"] == 64


def test_a_model_that_cannot_be_expressed_is_kept_and_what_is_missing_told(specs: dict[str, str]) -> None:
    found = tokenizer_files(load_tokenizer(specs["unigram"], None), read_model(specs["unigram"]), context=64)
    assert {name: content == Path(specs["unigram"]).read_bytes() for name, content in found.files.items()} == {
        "tokenizer.model": True
    }
    assert found.missing == (
        "tokenizer.json: the sentencepiece model is not BPE; tokenizer.model is there, for sentencepiece"
    )
    assert tokenizer_files(None, None, context=64).missing == "a tokenizer: the model was trained on token ids"


def test_what_is_encoded_otherwise_is_told(specs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA's models put a space before a text, and ours also before what follows a literal U+2581."""
    llama, content = load_tokenizer(specs["llama"], None), read_model(specs["llama"])
    found = tokenizer_files(llama, content, context=64)
    assert found.missing == "exactness for texts with the sign ▁ (U+2581), which are encoded otherwise"
    monkeypatch.setattr(module, "sample_texts", lambda: (LITERAL_META,))
    found = tokenizer_files(llama, content, context=64)
    assert "it would encode a sample text otherwise, from token " in found.missing
    assert "tokenizer.json" not in found.files
