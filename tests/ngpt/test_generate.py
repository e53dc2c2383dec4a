"""Generation: the cache does not change results, sampling follows its definition, and characters are shown whole."""

import dataclasses
import io
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from ngpt.config.base import ConfigError, build, override
from ngpt.data.dataset import Dataset
from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from ngpt.generate import Continuation, Sampling, encode_prompt, generate, generate_tokens, main, probabilities
from ngpt.generation.batch import BatchDecoder, StepResult
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.layers import KVCache
from ngpt.model.residual import RESIDUAL_RULES
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import load_model
from ngpt.training.loop import train

VOCAB = 50
VARIANTS: dict[str, dict[str, Any]] = {
    **{rule: {"residual": rule} for rule in RESIDUAL_RULES},
    "grouped": {"n_kv_head": 2, "value_residual": 0.5},
    "multi-query": {"n_kv_head": 1, "residual": "add"},
    "nvidia-rope": {"rope": "nvidia"},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0},
    "dotprod": {"norm_mode": "dotprod"},
    "ema-head": {"norm_mode": "ema", "alpha_kind": "head"},
    "ghost": {"norm_every": 3, "norm_probability": 0.5},
    "tied-softcap": {"tied": True, "softcap": 5.0, "mlp": "relu2"},
    "no-qk-norm": {"qk_norm": False, "residual": "add", "norm_gain": True, "qkv_bias": True, "norm_eps": 1e-3},
}


def model_of(**changes: Any) -> GPT:
    """A model with random weights everywhere, since the head of a new GPT is zero."""
    size = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": VOCAB, "logit_scale": 4.0}
    model = GPT(build(ModelConfig, size | changes)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def tokens(batch: int, time: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def rows(model: GPT, idx: torch.Tensor, count: int, **how: Any) -> list[list[int]]:
    return torch.stack(list(generate_tokens(model, idx, count, **how)), dim=1).tolist()


def by_hand(model: GPT, idx: torch.Tensor, count: int) -> list[list[int]]:
    """The greedy continuation without a cache. A full window continues with its newer half."""
    size, start = model.cfg.block_size, max(0, idx.shape[1] - model.cfg.block_size)
    for _ in range(count):
        if idx.shape[1] - start > size:
            start = idx.shape[1] - size // 2
        with torch.no_grad():
            idx = torch.cat([idx, model(idx[:, start:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx[:, -count:].tolist()


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_cache_changes_no_logit_however_the_text_is_split(variant: str) -> None:
    model, idx = model_of(**VARIANTS[variant]), tokens(3, 24)
    whole = model(idx)
    assert whole.std() > 0.1
    for chunk in (1, 5, 8, 23, 24):
        cache = KVCache(model.cfg, 3, device=idx.device)
        parts = [model(part, cache=cache) for part in idx.split(chunk, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def mixed() -> GPT:
    return model_of(norm_mode="dotprod", n_kv_head=2, alpha_kind="head", softcap=10.0)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 23)), seed=st.integers(0, 100))
def test_a_cache_changes_no_logit_wherever_the_text_is_split(mixed: GPT, cuts: set[int], seed: int) -> None:
    idx = tokens(2, 24, seed=seed)
    cache = KVCache(mixed.cfg, 2, device=idx.device)
    with torch.no_grad():
        parts = [mixed(part, cache=cache) for part in idx.tensor_split(sorted(cuts), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), mixed(idx), atol=1e-5, rtol=0)


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("prompt", "block_size"), [(3, 24), (23, 24), (24, 24), (40, 24), (5, 7), (1, 2), (2, 1)])
def test_greedy_tokens_equal_those_of_full_passes_beyond_block_size(prompt: int, block_size: int, cache: bool) -> None:
    model, idx = model_of(block_size=block_size), tokens(2, prompt)
    expected = by_hand(model, idx, 60) if block_size > 1 else by_hand_of_one(model, idx, 60)
    assert rows(model, idx, 60, temperature=0.0, cache=cache) == expected


def by_hand_of_one(model: GPT, idx: torch.Tensor, count: int) -> list[list[int]]:
    """With a window of one token, the next token depends on the last one only."""
    with torch.no_grad():
        following = model(torch.arange(VOCAB)[:, None])[:, -1].argmax(-1)
    found = [idx[:, -1]]
    for _ in range(count):
        found.append(following[found[-1]])
    return torch.stack(found[1:], dim=1).tolist()


def test_a_row_of_a_batch_equals_a_single_row() -> None:
    model, idx = model_of(residual="slerp"), tokens(5, 6)
    together = rows(model, idx, 30, temperature=0.0)
    assert len({tuple(row) for row in together}) > 1
    for index in range(5):
        assert rows(model, idx[index : index + 1], 30, temperature=0.0) == [together[index]]


def test_the_same_seed_draws_the_same_tokens_with_and_without_a_cache() -> None:
    model, idx = model_of(), tokens(3, 4)

    def drawn(seed: int, **how: Any) -> list[list[int]]:
        return rows(model, idx, 40, generator=torch.Generator().manual_seed(seed), top_p=0.9, **how)

    first = drawn(1)
    assert drawn(1) == first == drawn(1, cache=False)
    assert drawn(2) != first
    assert first[0] != first[1]  # rows draw independently


def test_tokens_outside_the_tokenizers_vocabulary_are_never_drawn() -> None:
    model = model_of()
    idx = tokens(50, 2)
    assert max(max(row) for row in rows(model, idx, 8, temperature=5.0)) > 9
    assert max(max(row) for row in rows(model, idx, 8, temperature=5.0, vocab_size=10)) <= 9


def test_generating_does_not_change_the_gradient_mode() -> None:
    model = model_of()
    for token in generate_tokens(model, tokens(1, 2), 3):
        assert torch.is_grad_enabled() and not token.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature: input should be greater than or equal to 0, got -1.0"),
        ({"top_k": 0}, "top_k: input should be greater than or equal to 1, got 0"),
        ({"top_p": 0.0}, "top_p: input should be greater than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p: input should be less than or equal to 1, got 1.5"),
    ],
)
def test_sampling_settings_that_exclude_every_token_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(generate_tokens(model_of(), tokens(1, 2), 3, **how))


# ---- the distribution ------------------------------------------------------------------------------------------------


def reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """One row in float64, token by token."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[:top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for index in order:
        kept.append(index)
        mass += weights[index] / total
        assume(top_p is None or abs(mass - top_p) > 1e-5)  # too close for float32
        if top_p is not None and mass >= top_p:
            break
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.01, 0.999),
)
def test_the_distribution_follows_its_definition(
    logits: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    values = np.array(logits) / 8
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = probabilities(torch.tensor(values, dtype=torch.float32)[None], sampling)[0]
    np.testing.assert_allclose(found.numpy(), reference(values, temperature, top_k, top_p), atol=2e-6)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    for top_p, kept in ((0.01, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.8, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        p = probabilities(logits, Sampling(top_p=top_p))[0]
        assert p.nonzero().flatten().tolist() == kept and float(p.sum()) == pytest.approx(1)
    p = probabilities(logits, Sampling(top_k=3, top_p=0.6))[0]  # of the three best 4/7 is the first's
    assert p.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 1e-30}, {"temperature": 1e-300}, {"top_p": 1e-300}]
)
def test_near_temperature_0_or_top_p_0_the_most_probable_token_is_certain(how: dict[str, Any]) -> None:
    p = probabilities(torch.tensor([[1.0, 3.0, 2.0], [-5.0, -9.0, -6.0]]), Sampling(**how))
    assert p.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    model, n = model_of(vocab_size=8), 5_000
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        scores = model(prompt)[0, -1].double().numpy()
    expected = np.exp(scores / 0.8) / np.exp(scores / 0.8).sum()
    draw = torch.Generator().manual_seed(0)
    (drawn,) = generate_tokens(model, prompt.expand(n, -1), 1, temperature=0.8, generator=draw)
    counts = np.bincount(drawn.numpy(), minlength=8)
    assert scipy.stats.chisquare(counts, expected * n).pvalue > 0.001
    assert scipy.stats.chisquare(counts, np.roll(expected, 1) * n).pvalue < 1e-9


# ---- text ------------------------------------------------------------------------------------------------------------


ENGLISH = "the quick brown fox jumps over the lazy dog\n    and then it sleeps\nwhile the dog thinks of the fox\n" * 20


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of this library, which spells rare characters in bytes."""
    folder = tmp_path_factory.mktemp("lossless")
    train_sentencepiece([ENGLISH], 330, folder / "tokenizer.model")
    return load_tokenizer("sentencepiece:330", folder)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece model with its usual defaults: a space before the text, and marks."""
    model = io.BytesIO()
    SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(ENGLISH.split("\n")), model_writer=model, vocab_size=36, minloglevel=2
    )
    path = tmp_path_factory.mktemp("foreign") / "foreign.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(str(path), None)


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    """The text that each token completes, and the text that the end adds."""
    continuation, lengths = Continuation(prompt, tokenizer), [0]
    for token in ids:
        continuation.add(token)
        lengths.append(len(continuation.unprinted))
    continuation.end()
    lengths.append(len(continuation.unprinted))
    return [continuation.unprinted[start:end] for start, end in itertools.pairwise(lengths)]


tricky = st.sampled_from(["é", "日本", "\U0001f600", "e\u0301", "the ", "\n", "  ", "\u2581"])
texts = st.lists(st.text(max_size=6) | tricky, max_size=8).map("".join)


@settings(max_examples=50, deadline=None)
@given(text=texts, prompt=texts)
def test_characters_are_shown_whole_and_none_is_lost(lossless: Tokenizer, text: str, prompt: str) -> None:
    assume("\ufffd" not in text)
    before, ids = (list(map(int, lossless.encode(part))) for part in (prompt, text))
    parts = streamed(lossless, ids, before)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""  # nothing waited for the end
    sizes = lossless.token_bytes()
    assert sizes is not None
    for count in range(len(ids) + 1):  # no character waits beyond its last byte
        done = text.encode()[: int(sizes[ids[:count]].sum())]
        assert "".join(parts[:count]) == done.decode(errors="ignore")


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 329) | st.integers(3, 258), max_size=20))
def test_invalid_bytes_become_replacement_characters(lossless: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(lossless, ids, [])) == lossless.decode(ids)


def test_spaces_survive_a_tokenizer_that_strips_the_first_one(foreign: Tokenizer) -> None:
    prompt = list(map(int, foreign.encode("the quick brown")))
    ids = list(map(int, foreign.encode("fox jumps over the lazy dog")))
    assert "".join(streamed(foreign, ids, prompt)) == " fox jumps over the lazy dog"
    assert "".join(streamed(foreign, ids, [])) == "fox jumps over the lazy dog"


@pytest.mark.parametrize("mark", [1, 2])  # <s>, which separates documents here, and </s>, as models of others learn it
def test_the_document_mark_and_the_end_of_a_text_end_a_text(foreign: Tokenizer, mark: int) -> None:
    assert (foreign.document_separator, foreign.decode_bytes([mark])) == (1, b"")
    continuation = Continuation(encode_prompt("", foreign), foreign)
    for token in [*map(int, foreign.encode("the dog")), mark, *map(int, foreign.encode("fox"))]:
        continuation.add(token)
    assert continuation.ended and continuation.unprinted == "the dog"


def test_an_empty_prompt_is_the_document_mark_or_a_newline(lossless: Tokenizer, foreign: Tokenizer) -> None:
    assert encode_prompt("", foreign) == [foreign.document_separator]
    assert lossless.decode(encode_prompt("", lossless)) == "\n"
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        encode_prompt("a\udcff", lossless)
    with pytest.raises(ConfigError, match=r"foreign\.model has no tokens for the prompt '\\n'"):
        encode_prompt("\n", foreign)


# ---- trained models: the function and the command line ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "run"
    config = override(tiny, {"steps": 60, "eval_every": 60, "optim.lr": 0.03, "logit_scale": 5.0})
    for _ in train(config, out, dataset=dataset):
        pass
    return out


def expected_text(run: Path, prompt: str, count: int, **changes: Any) -> str:
    model, tokenizer, _ = load_model(run, **changes)
    assert tokenizer is not None
    (ids,) = by_hand(model, torch.tensor(tokenizer.encode(prompt).astype(np.int64))[None], count)
    return tokenizer.decode(ids)


def test_the_function_returns_what_the_command_prints(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(trained))
    assert generate(loaded, "The value", max_tokens=40, temperature=0) == expected_text(trained, "The value", 40)
    prompts = ["An expression", "If", "The value"]
    assert generate(loaded, prompts, max_tokens=9, temperature=0, cache=False) == [
        expected_text(trained, prompt, 9) for prompt in prompts
    ]
    assert generate(loaded, [], max_tokens=9) == []
    arguments = ["--prompt", "If", "--seed", "3", "--max-tokens", "20", "--top-k", "5", "--device", "cpu"]
    assert main([str(trained), *arguments]) == 0
    drawn = generate(loaded.model, "If", tokenizer=loaded.tokenizer, seed=3, max_tokens=20, top_k=5)
    assert capsys.readouterr().out == drawn + "\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_tokens": 2.0}, "max_tokens must be a whole number of at least 1, got 2.0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"top_p": 2.0}, "top_p: "),
        ({"dtype": "float23"}, "unknown dtype 'float23', did you mean 'float32'"),
    ],
)
def test_the_function_refuses_what_is_out_of_range(trained: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        generate(load_model(trained), "If", **given)
    assert str(error.value).startswith(message)
    with pytest.raises(ConfigError, match="the model has no tokenizer: name it with `tokenizer`"):
        generate(model_of(), "If")


def test_stdout_holds_the_continuation_only(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(trained), "--prompt", "The value", "--temperature", "0", "--max-tokens", "40", "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == expected_text(trained, "The value", 40) + "\n"
    assert printed.err.startswith("40 tokens in ") and printed.err.endswith(" tokens/s\n")
    assert main([*arguments, "--no-cache"]) == 0
    assert capsys.readouterr().out == printed.out


def test_a_draft_changes_no_greedy_text_and_its_acceptance_is_said(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(trained), "--temperature", "0", "--max-tokens", "30", "--device", "cpu"]
    prompts = ["--prompt", "The value", "--prompt", "If"]
    assert main([*arguments, *prompts]) == 0
    plain = capsys.readouterr().out
    assert main([*arguments, *prompts, "--draft", str(trained), "--draft-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == plain
    first, last = printed.err.splitlines()
    assert re.fullmatch(r"100% of \d+ drafted tokens were accepted", first) and last.startswith("60 tokens in ")
    loaded, other = load_model(trained), model_of(vocab_size=400, n_layer=1)
    assert generate(loaded, "If", max_tokens=30, temperature=0, draft=other) == expected_text(trained, "If", 30)


def test_a_draft_that_does_not_fit_and_options_that_exclude_each_other_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(trained)
    data = loaded.checkpoint.data | {"tokenizer": {"spec": "gpt2", "sha256": "0" * 64}}
    foreign = loaded._replace(checkpoint=dataclasses.replace(loaded.checkpoint, data=data))
    with pytest.raises(ConfigError, match=r"^the draft was trained with another tokenizer than the model: .* and .*$"):
        generate(loaded, "If", draft=foreign)
    with pytest.raises(ConfigError, match=r"^the draft has a vocabulary of 50 tokens, the model one of 400$"):
        generate(loaded, "If", draft=model_of())
    with pytest.raises(ConfigError, match="compile does not go with draft: give one of them"):
        generate(loaded, "If", draft=loaded, compile=True)
    for option in (["--compile"], ["--draft", str(trained)]):
        assert main([str(trained), "--no-cache", *option]) == 2
        name = option[0]
        assert capsys.readouterr().err == f"{name} needs the cache of keys and values, which was turned off\n"


def test_prompts_and_samples_are_shown_in_order(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["An expression is a longer prompt", "If", "The value"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main([str(trained), *asked, "--samples", "2", "--temperature", "0", "--max-tokens", "12"]) == 0
    wanted = [
        f"--- prompt {p} of 3, sample {s} of 2\n{expected_text(trained, prompt, 12)}\n"
        for p, prompt in enumerate(prompts, start=1)
        for s in (1, 2)
    ]
    printed = capsys.readouterr()
    assert printed.out == "".join(wanted) and printed.err.startswith("72 tokens in ")


def test_the_same_seed_repeats_the_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*arguments: str) -> str:
        assert main([str(trained), "--samples", "2", "--max-tokens", "20", *arguments]) == 0
        return capsys.readouterr().out

    assert text("--seed", "5") == text("--seed", "5") != text("--seed", "6")
    assert text() != text()
    assert text("--seed", "5", "--top-k", "1") == text("--temperature", "0")


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_file_is_read_to_the_last_byte(
    source: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "prompt.txt", "A line\n  é\r\n"
    path.write_bytes(text.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    name = str(path) if source == "file" else "-"
    assert main([str(trained), "--prompt-file", name, "--temperature", "0", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == expected_text(trained, text, 9) + "\n"


def test_the_context_may_be_longer_than_in_training(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(trained), "--prompt", "The value of the", "--temperature", "0", "--max-tokens", "40"]
    changes = {"block_size": 64, "rope_scaling": "yarn", "rope_factor": 4}
    assert main([*arguments, "--set", *(f"{name}={value}" for name, value in changes.items())]) == 0
    text = capsys.readouterr().out
    assert text == expected_text(trained, "The value of the", 40, **changes) + "\n"
    assert text != expected_text(trained, "The value of the", 40) + "\n"


def test_text_is_streamed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of all earlier tokens is printed before the next token is computed."""
    model, tokenizer, _ = load_model(trained)
    assert tokenizer is not None
    seen: list[str] = []
    step = BatchDecoder.step

    def watched(decoder: BatchDecoder) -> list[StepResult]:
        results = step(decoder)
        seen.append(capsys.readouterr().out)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchDecoder, "step", watched)
        assert main([str(trained), "--prompt", "The", "--temperature", "0", "--max-tokens", "10"]) == 0
    (ids,) = rows(model, torch.tensor(tokenizer.encode("The").astype(np.int64))[None], 10, temperature=0.0)
    assert seen == ["", *(tokenizer.decode([token]) for token in ids[:-1])]
    assert capsys.readouterr().out == tokenizer.decode(ids[-1:]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "top_p: input should be less than or equal to 1, got 1.5"),
        (["--temperature", "nan"], "temperature: input should be a finite number"),
        (["--set", "alhpa=1"], "alhpa: unknown setting, did you mean 'alpha'?"),
        (["--set", "n_embd=32"], "model.n_embd=32 does not fit "),
        (["--set", "yarn"], "--set yarn: expected NAME=VALUE"),
        (["--prompt-file", "missing.txt"], "no such file: missing.txt"),
        (["--tokenizer", "gpt3"], "unknown tokenizer 'gpt3', did you mean 'gpt2'?"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), *arguments]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(message) and printed.out == ""


def test_a_folder_without_a_model_has_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "has no checkpoints"), (tmp_path / "missing", "no such folder")):
        assert main([str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--samples", "0"], ["--max-tokens", "-1"], ["--seed", "x"], ["--dtype", "int8"]]
)
def test_a_number_out_of_range_is_a_usage_error(
    arguments: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(trained), *arguments])
    assert left.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_an_unreadable_file_has_exit_code_74(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained), "--prompt-file", str(tmp_path)]) == 74
    assert capsys.readouterr().err == f"{tmp_path}: Is a directory\n"
    (tmp_path / "latin").write_bytes(b"caf\xe9 ")
    assert main([str(trained), "--prompt-file", str(tmp_path / "latin")]) == 2
    assert "latin is not UTF-8 text: " in capsys.readouterr().err


def test_a_closed_pipe_ends_the_command_quietly(trained: Path) -> None:
    command = [sys.executable, "-m", "ngpt.generate", str(trained), "--max-tokens", "1000000", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(5)) == 5
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
