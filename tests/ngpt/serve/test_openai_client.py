"""OpenAI's own client against a real server process: what it gets equals what `ngpt.generate` and the model say."""

import json
import math
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch

from ngpt import generate
from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import LoadedModel, load_model
from tests.helpers.served import TEMPLATE, Served, served
from tests.helpers.tiny_run import run

CONTEXT = 2048
CAPACITY = 20  # 8 slots and a queue of 12
PROMPTS = ("The iterator", "A list", "for key in", "Return the", "An object é", "", "x = ", "def f(")


@pytest.fixture(scope="module")
def run_folder(tiny: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "first"
    run(override(tiny, {"steps": 60, "batch_size": 16, "eval_every": 60, "optim.lr": 0.05}), folder, dataset)
    return folder


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[Served]:
    template = run_folder.parent / "chat.jinja"
    template.write_text(TEMPLATE)
    options = ("--slots", "8", "--queue", "12", "--chat-template", str(template), "--max-body", "50000")
    with served(run_folder, run_folder.parent, *options, "--set", f"block_size={CONTEXT}") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> LoadedModel:
    return load_model(run_folder, block_size=CONTEXT)


def streamed(client: openai.OpenAI, **request: Any) -> str:
    chunks = client.completions.create(model="first", stream=True, **request)
    return "".join(chunk.choices[0].text for chunk in chunks)


def completed(client: openai.OpenAI, **request: Any) -> str:
    return client.completions.create(model="first", **request).choices[0].text


def test_each_of_17_requests_at_a_time_gets_its_undisturbed_text(
    server: Served, client: openai.OpenAI, loaded: LoadedModel
) -> None:
    """Nine wait for one of eight slots; half are streamed, a third is greedy, lengths differ."""
    requests: list[dict[str, Any]] = [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "max_tokens": 8 + 3 * i,
            "seed": i,
            "temperature": (0.0, 0.8, 1.0)[i % 3],
        }
        for i in range(17)
    ]
    with ThreadPoolExecutor(17) as pool:
        found = list(pool.map(lambda i: (streamed, completed)[i % 2](client, **requests[i]), range(17)))
    assert found == [generate(loaded, **request) for request in requests]
    assert len(set(found)) == 17
    assert server.metric("ngpt_decoding_steps_total") < 0.8 * sum(request["max_tokens"] for request in requests)


def test_a_stop_string_ends_the_text_wherever_the_tokens_end(client: openai.OpenAI, loaded: LoadedModel) -> None:
    request: dict[str, Any] = {"prompt": "The iterator", "max_tokens": 60, "seed": 3}
    text = generate(loaded, **request)
    for start, size in ((0, 1), (5, 3), (9, 7), (20, 12)):
        stop = text[start : start + size]
        for asked in (stop, ["\N{SNOWMAN}", stop, text[start:] + "é"]):
            for get in (streamed, completed):
                assert get(client, **request, stop=asked) == text[: text.index(stop)]
    answer = client.completions.create(model="first", **request, stop=text[5:8])
    assert (answer.choices[0].finish_reason, answer.usage and answer.usage.completion_tokens < 60) == ("stop", True)
    assert completed(client, **request, stop=text[-3:] + "\N{SNOWMAN}") == text  # only its start occurs, at the end


def reference_logprobs(loaded: LoadedModel, tokens: list[int]) -> np.ndarray:
    """Log-probabilities (T - 1, V) of what follows each token, in float64 with NumPy, from the logits of one pass."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens]))[0, :-1].double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_logprobs_of_prompt_and_text_are_those_of_the_model(client: openai.OpenAI, loaded: LoadedModel) -> None:
    assert loaded.tokenizer is not None
    request: dict[str, Any] = {"model": "first", "prompt": "An object is", "max_tokens": 12, "seed": 1, "echo": True}
    request["temperature"] = 0.7  # hardly any byte of a longer character
    whole = client.completions.create(**request, logprobs=3).choices[0]
    found = whole.logprobs
    assert found and found.tokens and found.token_logprobs and found.text_offset and found.top_logprobs
    assert (whole.text[:12], "".join(found.tokens)) == ("An object is", whole.text)
    assert [
        whole.text[at : at + len(token)] for at, token in zip(found.text_offset, found.tokens, strict=True)
    ] == found.tokens
    ids = [int(loaded.tokenizer.encode(token)[0]) for token in found.tokens]
    expected = reference_logprobs(loaded, ids)
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1:], expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    for best, row in zip(found.top_logprobs[1:], expected, strict=True):
        np.testing.assert_allclose(sorted(best.values())[-3:], np.sort(row)[-3:], atol=1e-4)
    chunks = list(client.completions.create(**request, logprobs=3, stream=True))
    parts = [part for chunk in chunks if (part := chunk.choices[0].logprobs)]
    assert [token for part in parts for token in part.tokens or []] == found.tokens
    scored = client.completions.create(**request | {"max_tokens": 0}, logprobs=0).choices[0]
    assert scored.text == "An object is" and scored.logprobs
    assert scored.logprobs.token_logprobs == found.token_logprobs[: len(scored.logprobs.token_logprobs or [])]


def test_choices_are_numbered_seeded_and_counted(client: openai.OpenAI, loaded: LoadedModel) -> None:
    request: dict[str, Any] = {"model": "first", "max_tokens": 15, "seed": 7, "n": 3}
    together = client.completions.create(prompt=["A list", "x = "], **request)
    texts = [choice.text for choice in together.choices]
    assert [choice.index for choice in together.choices] == list(range(6)) and len(set(texts)) == 6
    assert texts[::3] == [generate(loaded, prompt, max_tokens=15, seed=7) for prompt in ("A list", "x = ")]
    assert [choice.text for choice in client.completions.create(prompt="x = ", **request).choices] == texts[3:]
    assert loaded.tokenizer is not None
    ids = [loaded.tokenizer.encode(prompt).tolist() for prompt in ("A list", "x = ")]
    assert [choice.text for choice in client.completions.create(prompt=ids, **request).choices] == texts
    counted = {"prompt_tokens": sum(map(len, ids)), "completion_tokens": 90, "total_tokens": sum(map(len, ids)) + 90}
    assert together.usage and counted.items() <= together.usage.to_dict().items()
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(prompt=["A list", "x = "], **request, **options)
    assert (last.choices, last.usage) == ([], together.usage) and {chunk.usage for chunk in chunks} == {None}
    got = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == index) for index in range(6)]
    assert got == texts


def test_a_chat_is_the_completion_of_its_template(client: openai.OpenAI, loaded: LoadedModel) -> None:
    messages: Any = [{"role": "user", "content": "Say {{ 1 + 1 }}"}]
    prompt = "user: Say {{ 1 + 1 }}\nassistant:"
    expected = generate(loaded, prompt, max_tokens=10, seed=2)
    request: dict[str, Any] = {"model": "first", "messages": messages, "max_completion_tokens": 10, "seed": 2}
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2).choices[0]
    assert (answer.message.role, answer.message.content, answer.finish_reason) == ("assistant", expected, "length")
    assert answer.logprobs and answer.logprobs.content
    assert b"".join(bytes(each.bytes or []) for each in answer.logprobs.content).decode(errors="replace") == expected
    assert all(math.isfinite(each.logprob) and len(each.top_logprobs) == 2 for each in answer.logprobs.content)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    with pytest.raises(openai.BadRequestError, match="a user speaks first"):
        client.chat.completions.create(model="first", messages=[{"role": "system", "content": "Be brief"}])


def test_a_full_server_answers_429_until_a_client_that_hangs_up_frees_its_slots(
    server: Served, client: openai.OpenAI
) -> None:
    long: dict[str, Any] = {"model": "first", "prompt": "A", "max_tokens": CONTEXT - 10}
    stream = client.completions.create(**long, n=CAPACITY, stream=True)
    next(iter(stream))
    assert server.metric("ngpt_choices_running") == 8
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**long)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.code == "rate_limit_exceeded"
    stream.close()
    server.until(lambda: server.metric("ngpt_choices_running") == server.metric("ngpt_choices_waiting") == 0)
    assert server.metric('ngpt_choices_total{reason="cancelled"}') == CAPACITY
    assert completed(client, prompt="A", max_tokens=2) != ""


OK: dict[str, Any] = {"model": "first", "prompt": "A"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"model": ', 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"model": "first", "prompt": "\xff"}', 400, "not UTF-8"),
        (b'{"model": "first", "prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b"[" * 40_000, 400, "nested too deeply"),
        (b'{"model": "first", "prompt": "A", "temperature": NaN}', 400, "NaN is not a number"),
        (b'{"model": "first", "prompt": "A", "temperature": 1e999}', 400, "finite number"),
        (b'{"model": "first", "prompt": "A", "prompt": "B"}', 400, "'prompt' is given twice"),
        (b'{"model": "first", "prompt": "' + b"a" * 60_000 + b'"}', 413, "larger than 50,000 bytes"),
        ({**OK, "temperature": 2.1}, 400, "0 to 2 is possible"),
        ({**OK, "max_tokens": -1}, 400, "max_tokens: .* got -1"),
        ({**OK, "max_tokens": True}, 400, "max_tokens: .* got True"),
        ({**OK, "max_tokens": CONTEXT + 5}, 400, "context has 2048 tokens; the prompt has 1 and max_tokens is 2053"),
        ({**OK, "prompt": "a" * 49_000}, 400, "context has 2048 tokens"),
        ({**OK, "prompt": [1, 400]}, 400, "token 400; there are 0 to 399"),
        ({**OK, "prompt": []}, 400, "none empty"),
        ({**OK, "n": CAPACITY + 1}, 400, "21 choices .* at most 20"),
        ({**OK, "stop": list("abcde")}, 400, "at most 4"),
        ({**OK, "stop": ""}, 400, "1 to 1,000 characters"),
        ({**OK, "logit_bias": {"5": -100}}, 400, "logit_bias is not supported"),
        ({**OK, "presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({**OK, "max_token": 5}, 400, "did you mean 'max_tokens'"),
        ({**OK, "model": "gpt-4"}, 404, "this server has 'first'"),
        ({**OK, "stream": True, "logprobs": 6}, 400, "0 to 5 is possible"),
    ],
    ids=lambda value: None if isinstance(value, int | str) else repr(value)[:40],
)
def test_what_is_wrong_is_refused_in_openais_words(
    server: Served, body: bytes | dict[str, Any], status: int, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.post("/completions", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert re.search(words, error["message"]), error


def test_a_body_without_a_length_is_cut_off_too(server: Served) -> None:
    parts = (b"x" * 10_000 for _ in range(20))
    answer = server.post("/completions", content=parts, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_the_server_names_its_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["first"]
    assert client.models.retrieve("first").object == "model"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


@pytest.mark.slow
def test_a_killed_server_starts_again_and_a_terminated_one_finishes_what_runs(run_folder: Path, tmp_path: Path) -> None:
    long: dict[str, Any] = {"model": "first", "prompt": "A", "max_tokens": 1000, "seed": 1}
    options = ("--slots", "2", "--grace", "3600", "--set", f"block_size={CONTEXT}")
    with served(run_folder, tmp_path, *options) as server, server.client() as client:
        port = int(server.root.rpartition(":")[2])
        stream = client.completions.create(**long, stream=True)
        next(iter(stream))
        server.process.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
    with served(run_folder, tmp_path, *options, port=port) as server, server.client() as client:
        expected = completed(client, **{name: value for name, value in long.items() if name != "model"})
        stream = client.completions.create(**long, n=3, stream=True)
        first = next(iter(stream))
        server.process.terminate()
        server.until(lambda: httpx.get(f"{server.root}/health").json() == {"status": "closing"})
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(**long)
        texts = [first.choices[0].text, "", ""] if first.choices[0].index == 0 else ["", "", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts[0] == expected and len({*texts}) == 3 and all(texts)
        assert server.process.wait(60) == 0
        assert "finishing what runs" in server.errors.read_text()


@pytest.mark.slow
def test_what_still_runs_at_the_end_of_the_grace_is_cut_off(run_folder: Path, tmp_path: Path) -> None:
    options = ("--slots", "1", "--grace", "0.1", "--set", "block_size=65536")
    with served(run_folder, tmp_path, *options) as server, server.client() as client:
        stream = client.completions.create(model="first", prompt="A", max_tokens=65_000, stream=True)
        next(iter(stream))
        server.process.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_server_under_load_answers_everybody_and_grows_no_more(
    server: Served, client: openai.OpenAI, loaded: LoadedModel
) -> None:
    """A hundred requests of 40 clients: more than it takes at a time, so that they come again after a 429."""
    requests = [
        {"prompt": PROMPTS[i % 8], "max_tokens": 5 + i % 20, "seed": i % 16, "temperature": 0.9} for i in range(100)
    ]
    expected = {str(request): generate(loaded, **request) for request in requests}
    refused = 0

    def ask(request: dict[str, Any]) -> str:
        nonlocal refused
        while True:
            try:
                return completed(client, **request)
            except openai.RateLimitError:
                refused += 1
                time.sleep(0.2)

    def load() -> int:
        with ThreadPoolExecutor(40) as pool:
            assert list(pool.map(ask, requests)) == [expected[str(request)] for request in requests]
        return psutil.Process(server.process.pid).memory_info().rss

    load()
    before, after = load(), load()
    assert refused > 0
    assert after < before + 20 * 2**20
    assert server.metric("ngpt_choices_running") == server.metric("ngpt_choices_waiting") == 0
