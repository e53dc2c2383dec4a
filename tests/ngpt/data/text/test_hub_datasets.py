"""Data sets of the hub by name: which files are read, and that they stay the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ngpt.data.text.hub as downloading
from ngpt.config.base import ConfigError
from ngpt.data.dataset import DataConfig, fingerprint, open_dataset, prepare
from ngpt.data.text.hub import HubFile, HubListing
from ngpt.data.text.hub_datasets import HubName, choose_files, parse_uri
from tests.helpers.hub import Hub
from tests.helpers.vocabularies import write_gpt2
from tests.ngpt.data.text.test_documents import write_parquet


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf://a/b", HubName("a/b")),
        ("hf://datasets/a/b.c-d", HubName("a/b.c-d")),
        ("hf://a/b@v1.0/en/news:test", HubName("a/b", "v1.0", "en/news", "test")),
        ("hf://a/b@refs/convert/parquet/en", HubName("a/b", "refs/convert/parquet", "en")),
        ("hf://a/b:train_sft", HubName("a/b", split="train_sft")),
    ],
)
def test_a_name_has_a_data_set_a_revision_a_subset_and_a_split(uri: str, name: HubName) -> None:
    assert parse_uri(uri) == name


@pytest.mark.parametrize("uri", ["hf://", "hf://a", "hf://../b", "hf://a/b/../../c", "hf://a/b@", "hf://a b/c"])
def test_a_malformed_name_is_refused_with_the_form(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"write hf://OWNER/NAME\[@REVISION\]\[/SUBSET\]\[:SPLIT\]"):
        parse_uri(uri)


def listing(paths: list[str], configs: list[dict[str, Any]] | None = None) -> HubListing:
    files = [HubFile(path, url="", size=1, sha256="0" * 64) for path in sorted([*paths, "README.md", ".gitattributes"])]
    return HubListing("8" * 40, files, configs or [])


def choose(found: HubListing, uri: str) -> dict[str, str]:
    return {file.path: name for file, name in choose_files(found, parse_uri(uri))}


EN_FR = [
    {
        "config_name": "en",
        "data_files": [{"split": "train", "path": "en/a-*"}, {"split": "test", "path": ["en/b.jsonl"]}],
    },
    {"config_name": "fr", "data_dir": "fr"},
]
EN_FR_PATHS = ["en/a-0.jsonl", "en/a-1.jsonl", "en/a-2/x.jsonl", "en/b.jsonl", "fr/x/train.jsonl"]


@pytest.mark.parametrize(
    ("paths", "configs", "uri", "chosen"),
    [
        (EN_FR_PATHS, EN_FR, "hf://o/n/en", {"en/a-0.jsonl": "train", "en/a-1.jsonl": "train", "en/b.jsonl": "test"}),
        (EN_FR_PATHS, EN_FR, "hf://o/n/en:test", {"en/b.jsonl": "test"}),
        (EN_FR_PATHS, EN_FR, "hf://o/n/fr", {"fr/x/train.jsonl": "fr/x/train.jsonl"}),
        (EN_FR_PATHS, [EN_FR[0] | {"default": True}, EN_FR[1]], "hf://o/n:test", {"en/b.jsonl": "test"}),
        (["x/a.parquet", "b"], [{"data_files": "**/*.parquet"}], "hf://o/n", {"x/a.parquet": "x/a.parquet"}),
        (["a.parquet", "b"], [{"data_files": "**/*.parquet"}], "hf://o/n", {"a.parquet": "a.parquet"}),
        (["0.txt", "1.txt"], [{"data_files": {"dev": "[!0].txt"}}], "hf://o/n", {"1.txt": "dev"}),
        # Without a declaration: the most structured files, below the folder of the subset.
        (["a.jsonl", "x/train-0.parquet"], [], "hf://o/n", {"x/train-0.parquet": "x/train-0.parquet"}),
        (["en/a.jsonl.gz", "fr/a.jsonl.gz"], [], "hf://o/n/en", {"en/a.jsonl.gz": "en/a.jsonl.gz"}),
        (["x/train-0.json", "x/train_sft-0.json"], [], "hf://o/n:train", {"x/train-0.json": "x/train-0.json"}),
        (["dataset_infos.json", "x.json"], [], "hf://o/n", {"x.json": "x.json"}),
    ],
)  # fmt: skip
def test_the_files_of_a_subset_are_those_that_it_declares(
    paths: list[str], configs: list[dict[str, Any]], uri: str, chosen: dict[str, str]
) -> None:
    assert choose(listing(paths, configs), uri) == chosen


@pytest.mark.parametrize(
    ("paths", "configs", "uri", "message"),
    [
        (EN_FR_PATHS, EN_FR, "hf://o/n", "has the subsets en, fr: write hf://o/n/SUBSET"),
        (EN_FR_PATHS, EN_FR, "hf://o/n/enn", "unknown subset 'enn', did you mean 'en'"),
        (EN_FR_PATHS, EN_FR, "hf://o/n/en:val", "hf://o/n/en has no split val; it has train, test"),
        (["en/a.jsonl"], [], "hf://o/n/de", "unknown subset 'de'"),
        (
            ["load.py", "a.zip"],
            [],
            "hf://o/n",
            "no Parquet, Arrow, JSON, CSV or text files; .*hf://o/n@refs/convert/parquet",
        ),
        (["en/0.parquet", "fr/0.parquet"], [], "hf://o/n@refs/convert/parquet", "has the subsets en, fr"),
        (["a.jsonl"], [{"data_files": "b-*"}], "hf://o/n", "declares b-\\*, and no file that can be read is called so"),
        (
            ["a.jsonl"],
            [{"data_files": {"train": "a*", "test": "*"}}],
            "hf://o/n",
            "a.jsonl in the splits train and test",
        ),
    ],
)
def test_what_a_name_does_not_decide_is_asked_for(
    paths: list[str], configs: list[dict[str, Any]], uri: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose(listing(paths, configs), uri)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A data set with the subset `en`: two training files in Parquet, and a small one in JSON lines for validation."""
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(downloading, "FIRST_PAUSE", 0.0)
    with Hub("someone/pages") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for part in range(2):
            texts = [f"Page {part}.{number} of the book.\n" for number in range(30)]
            hub.files[f"en/part-{part}.parquet"] = write_parquet(
                tmp_path / "x.parquet", texts, column="body"
            ).read_bytes()
        held = [{"body": f"Held out {number}.\n"} for number in range(20)] + [{"body": None}]
        hub.files["en/held.jsonl"] = "".join(json.dumps(row) + "\n" for row in held).encode()
        hub.files["fr/part-0.parquet"] = b"not read"
        hub.small = {"en/held.jsonl"}
        files = [{"split": "train", "path": "en/part-*.parquet"}, {"split": "validation", "path": "en/held.jsonl"}]
        hub.card = {"license": "mit", "configs": [{"config_name": "en", "data_files": files}]}
        yield hub


def config(tmp_path: Path, uri: str = "hf://someone/pages/en", **settings: Any) -> DataConfig:
    tokenizer = f"gpt2:{write_gpt2(tmp_path / 'gpt2')}"
    return DataConfig(corpus=uri, tokenizer=tokenizer, text_column="body", **settings)


def test_a_corpus_of_the_hub_is_read_by_name_with_its_published_splits(hub: Hub, tmp_path: Path) -> None:
    before = fingerprint(config(tmp_path))
    assert hub.requests == []  # known from the list of files
    manifest = open_dataset(config(tmp_path)).manifest
    assert manifest["fingerprint"] == before and manifest["corpus"] == "hf://someone/pages/en"
    assert manifest["hub"] == {
        "dataset": "someone/pages", "revision": "main", "subset": "en", "split": None, "commit": hub.commit,
    }  # fmt: skip
    assert {path for path, _ in hub.requests} == {"en/part-0.parquet", "en/part-1.parquet", "en/held.jsonl"}
    assert manifest["splits"]["train"]["bytes"] == sum(
        len(f"Page {p}.{n} of the book.\n") for p in range(2) for n in range(30)
    )
    assert manifest["splits"]["val"]["bytes"] == sum(len(f"Held out {n}.\n") for n in range(20))
    assert manifest["left_out"]["null"] == 1
    held = open_dataset(config(tmp_path, "hf://someone/pages/en:validation", val_fraction=0.5)).manifest
    assert sum(split["bytes"] for split in held["splits"].values()) == manifest["splits"]["val"]["bytes"]


def test_a_revision_stays_the_commit_that_it_first_was(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint(config(tmp_path))
    prepare(config(tmp_path))
    old, hub.commit = hub.commit, "9" * 40
    hub.files["en/held.jsonl"] = b'{"body": "Another text.\\n"}\n' * 9
    assert fingerprint(config(tmp_path)) == first and hub.listed == 1
    newer = config(tmp_path, f"hf://someone/pages@{hub.commit}/en")
    assert fingerprint(newer) != first
    assert open_dataset(newer).manifest["hub"]["commit"] == hub.commit
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert open_dataset(config(tmp_path)).manifest["hub"]["commit"] == old  # needs no network


def test_a_small_file_is_checked_by_the_id_that_git_gives_it(hub: Hub, tmp_path: Path) -> None:
    hub.published["en/held.jsonl"] = "ab" * 20
    with pytest.raises(ConfigError, match=r"held\.jsonl: its git id is not abababababab"):
        prepare(config(tmp_path))


def test_a_plain_text_file_of_the_hub_needs_no_text_column(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"tiny-train.txt": b"One day. " * 99, "tiny-valid.txt": b"The end. " * 9}
    hub.small, hub.card = set(), {}
    settings = config(tmp_path, "hf://someone/pages").model_copy(update={"text_column": "text"})
    manifest = open_dataset(settings).manifest
    assert [manifest["splits"][split]["bytes"] for split in ("train", "val")] == [891, 81]
    assert "left_out" not in manifest
