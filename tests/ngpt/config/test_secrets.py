"""What counts as a secret, by its name, its shape, or because the environment holds it."""

import pytest

from ngpt.config.base import ConfigError
from ngpt.config.secrets import HIDDEN, find_secrets, is_secret_name, redact, refuse_secrets

ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "HF_TOKEN": "canary-hf-0815-4711",
    "MY_PASSWORD": "short",
    "HOME": "/home/someone",
}


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "api-key", "tracker.apikey", "GH_TOKEN"],
)
def test_names_of_secrets_are_recognized(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "eval_tokens",
        "data.tokenizer",
        "TOKENIZERS_PARALLELISM",
        "tokens_per_second",
        "RAY_AUTH_TOKEN_PATH",
        "HOME",
        "keep_last",
    ],
)
def test_other_names_are_not_secrets(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
        ("a: hf_abcdefghijklmnopqrstuvwxyz", "a Hugging Face token"),
        ("a: wandb_v1_abcdefghijklmnopqrstuv", "a W&B key"),
        (f"a: ghp_{'a1' * 18}", "a GitHub token"),
        ("a: sk-abcdefghijklmnopqrstuvwxyz", "an API key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("path: https://me:open-sesame@example.com/x", "a password in an address"),
        ("# api_key: 0123456789abcdef", "a secret by its name"),
        ("AWS_SECRET_ACCESS_KEY=abcdefghijklmnop", "a secret by its name"),
        (f"x: {ENVIRONMENT['WANDB_API_KEY']}", "the value of $WANDB_API_KEY"),
    ],
)
def test_a_secret_is_found_by_its_shape_or_in_the_environment(text: str, what: str) -> None:
    assert what in [found for _, found in find_secrets(text, ENVIRONMENT)]
    hidden = redact(text, ENVIRONMENT)
    assert HIDDEN in hidden and not list(find_secrets(hidden, ENVIRONMENT))


@pytest.mark.parametrize(
    "text",
    [
        "eval_tokens: 4_194_304",
        "tokenizer: sentencepiece:2048",
        "commit 3f2a9c1d3f2a9c1d3f2a9c1d3f2a9c1d3f2a9c1d",
        "source: https://example.com/paper:3@v2",
        "password: short",
        "says: a token costs 0.3 ms; the key is the value's neighbour",
    ],
)
def test_ordinary_campaign_text_is_not_a_secret(text: str) -> None:
    assert list(find_secrets(text, ENVIRONMENT)) == []
    assert redact(text, ENVIRONMENT) == text


def test_a_file_with_a_secret_is_refused_with_its_position_but_not_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(f"campaign: x\n# {ENVIRONMENT['HF_TOKEN']}\n", "x.yaml")
    assert str(caught.value).startswith("x.yaml:2:3: the value of $HF_TOKEN: secrets do not belong in a file")
    assert "canary" not in str(caught.value)
    refuse_secrets("campaign: x\n", "x.yaml")
