"""Continuous batching: a request has the tokens that it would have alone, whoever else is in the batch."""

import copy
import shutil
from typing import Any

import pytest
import torch

from ngpt.config.base import build
from ngpt.generation.batch import BatchDecoder, NoFreeSlotError, StepResult
from ngpt.generation.contexts import bucket, groups
from ngpt.generation.plain import generate_tokens
from ngpt.generation.sampling import Sampling
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT

VOCAB = 50
SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": VOCAB, "logit_scale": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "lerp": {},
    "grouped": {"n_kv_head": 2, "value_residual": 0.5, "residual": "slerp"},
    "gpt": {"residual": "add", "n_kv_head": 1, "tied": True, "softcap": 5.0, "mlp": "relu2"},
    "biases": {"qk_norm": False, "residual": "add", "norm_gain": True, "qkv_bias": True, "norm_eps": 1e-3},
    "nvidia": {"rope": "nvidia", "norm_mode": "ema", "alpha_kind": "head"},
    "short": {"block_size": 3, "rope_scaling": "yarn", "rope_factor": 4.0},
}
SAMPLINGS = (Sampling(temperature=0.0), Sampling(top_p=0.9), Sampling(temperature=0.7, top_k=5), Sampling())


def model_of(**changes: Any) -> GPT:
    """A model with random weights everywhere, since the head of a new GPT is zero."""
    model = GPT(build(ModelConfig, SIZE | changes)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def prompt(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def alone(model: GPT, tokens: list[int], count: int, sampling: Sampling, seed: int) -> list[int]:
    """The tokens of the plain loop."""
    generator = torch.Generator().manual_seed(seed)
    how = dict(sampling) | {"generator": generator, "vocab_size": 40}
    return [int(token) for token in generate_tokens(model, torch.tensor([tokens]), count, **how)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_requests_that_come_and_go_have_the_tokens_of_the_plain_loop(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    decoder = BatchDecoder(model, slots=3, vocab_size=40)
    waiting = [(prompt(length), 16 + 5 * index) for index, length in enumerate((3, 1, 30, 11, 24, 2))]
    numbers, found = list(range(len(waiting)))[::-1], [list[int]() for _ in waiting]
    running: dict[int, int] = {}
    while numbers or running:
        while numbers and decoder.free_slots:
            number = numbers.pop()
            running[decoder.add(waiting[number][0], SAMPLINGS[number % 4], number)] = number
        for result in decoder.step():
            number = running[result.slot]
            found[number].append(result.token)
            if len(found[number]) == waiting[number][1]:
                decoder.free(result.slot)
                del running[result.slot]
    assert decoder.free_slots == 3 and decoder.step() == []
    for number, (tokens, count) in enumerate(waiting):
        assert found[number] == alone(model, tokens, count, SAMPLINGS[number % 4], number), number


def test_bfloat16_has_the_tokens_of_autocast() -> None:
    model = model_of(logit_scale=40.0)
    decoder = BatchDecoder(model, slots=2, dtype="bfloat16", vocab_size=40)
    for length in (9, 4):
        decoder.add(prompt(length), SAMPLINGS[0])
    found = [[result.token for result in decoder.step()] for _ in range(12)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = [alone(model, prompt(length), 12, SAMPLINGS[0], 0) for length in (9, 4)]
    assert [list(row) for row in zip(*found, strict=True)] == expected


def test_log_probabilities_are_those_of_the_model() -> None:
    model = model_of()
    decoder = BatchDecoder(model, slots=3)
    slots = [decoder.add(prompt(5), Sampling(temperature=0.5), 1, logprobs=asked) for asked in (3, 0, None)]
    results = {result.slot: result for result in decoder.step()}
    with torch.no_grad():
        scores = model(torch.tensor([prompt(5)]))[0, -1].log_softmax(-1)
    best = scores.topk(3)
    first, second, third = (results[slot] for slot in slots)
    assert first.token == second.token == third.token
    assert first.logprob == second.logprob == pytest.approx(float(scores[first.token]), abs=1e-5)
    assert [token for token, _ in first.top_logprobs] == best.indices.tolist()
    assert [value for _, value in first.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert second.top_logprobs == () and third == StepResult(slots[2], third.token)


def test_what_a_decoder_cannot_take_is_refused() -> None:
    decoder = BatchDecoder(model_of(), slots=1)
    for tokens, message in (([], "no tokens"), ([1, 50], "has the token 50; the model's vocabulary is 0 to 49")):
        with pytest.raises(ValueError, match=message):
            decoder.add(tokens, SAMPLINGS[0])
    slot = decoder.add([1], SAMPLINGS[0])
    assert decoder.free_slots == 0
    with pytest.raises(NoFreeSlotError, match="all 1 slots are taken"):
        decoder.add([1], SAMPLINGS[0])
    decoder.free(slot)
    with pytest.raises(ValueError, match=f"slot {slot} is not in use"):
        decoder.free(slot)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        BatchDecoder(model_of(), slots=0)


def test_prompts_are_encoded_in_groups_of_similar_length_and_limited_size() -> None:
    prompts = [(row, [0] * length) for row, length in enumerate((100, 1, 0, 60, 55, 3, 4000, 4000, 4000))]
    sizes = [[len(tokens) for _, tokens in group] for group in groups(prompts)]
    assert sizes == [[4000, 4000], [4000], [100, 60, 55], [3], [1]]


def test_compiled_code_exists_for_few_lengths() -> None:
    assert sorted({bucket(length, 1000) for length in range(1, 1001)}) == [128, 256, 512, 1000]
    assert {bucket(length, 24) for length in range(1, 25)} == {24}


@pytest.mark.slow  # compiles for half a minute
@pytest.mark.filterwarnings("default")  # from torch's compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_step_has_the_same_tokens() -> None:
    model = model_of(**VARIANTS["nvidia"], **VARIANTS["grouped"] | {"residual": "lerp"})
    unchanged = copy.deepcopy(model)
    decoders = [BatchDecoder(model, slots=3, vocab_size=40, compiled=compiled) for compiled in (False, True)]
    for decoder in decoders:
        for number, length in enumerate((3, 24)):
            decoder.add(prompt(length), SAMPLINGS[number], number)
    for step in range(40):
        plain, compiled = (decoder.step() for decoder in decoders)
        assert plain == compiled
        if step == 20:
            for decoder in decoders:
                decoder.free(plain[0].slot)
                decoder.add(prompt(7), SAMPLINGS[3], 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for compiled in (False, True):  # the same code with other weights
        decoder = BatchDecoder(model, slots=3, vocab_size=40, compiled=compiled)
        decoder.add(prompt(24), SAMPLINGS[0])
        results.append([decoder.step()[0].token for _ in range(12)])
    assert results[0] == results[1] != alone(unchanged, prompt(24), 12, SAMPLINGS[0], 0)
