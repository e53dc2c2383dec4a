"""Addresses of object stores on the command line; credentials in them are neither shown nor recorded."""

import argparse
from pathlib import Path

import pytest

from tune.remote.uri import Uri, parse_location, without_credentials

SECRET = "wJalrXUtnFEMI%2FK7MDENG"
WITH_SECRET = f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/runs?region=eu-west-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("results", Path("results")),
        ("/data/s3:/x", Path("/data/s3:/x")),
        ("file:///data/my%20results", Path("/data/my results")),
        ("s3://bucket/runs", Uri("s3://bucket/runs")),
        ("gs://bucket", Uri("gs://bucket")),
        ("hdfs://host:8020/runs", Uri("hdfs://host:8020/runs")),
    ],
)
def test_a_folder_and_an_address_are_told_apart(text: str, expected: Path | Uri) -> None:
    assert parse_location(text) == expected


@pytest.mark.parametrize(("text", "word"), [("s4://bucket/x", "did you mean s3"), ("ftp://host/x", "file://, not at")])
def test_an_unknown_scheme_is_refused_with_those_that_are_known(text: str, word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=word):
        parse_location(text)


@pytest.mark.parametrize("text", ["s3://", "s3:///runs", "s3://key:secret@/runs"])
def test_an_address_without_a_bucket_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="needs a bucket") as caught:
        parse_location(text)
    assert "secret" not in str(caught.value)


def test_entries_of_an_address_keep_its_options() -> None:
    campaign = Uri("s3://bucket/runs/?region=eu-west-1").child("tiny")
    assert str(campaign) == "s3://bucket/runs/tiny?region=eu-west-1"
    assert (campaign.name, str(campaign.parent)) == ("tiny", "s3://bucket/runs?region=eu-west-1")


def test_credentials_are_used_but_not_shown() -> None:
    uri = Uri(WITH_SECRET)
    assert uri.child("tiny").text == WITH_SECRET.replace("runs", "runs/tiny")
    assert str(uri) == "s3://bucket/runs?region=eu-west-1"
    assert SECRET not in repr(uri)
    assert str(Uri("s3://b/x?secret_key=abc&region=r")) == "s3://b/x?secret_key=***&region=r"
    assert str(Uri("hdfs://user@host:8020/x")) == "hdfs://user@host:8020/x"


@pytest.mark.parametrize("argument", [WITH_SECRET, f"--out={WITH_SECRET}"])
def test_an_argument_is_recorded_without_credentials(argument: str) -> None:
    recorded = without_credentials(argument)
    assert recorded.endswith("s3://bucket/runs?region=eu-west-1")
    assert recorded.startswith(argument[:4])
    assert SECRET not in recorded


def test_other_arguments_are_recorded_as_they_are() -> None:
    assert without_credentials("data.corpus=hf://owner/name") == "data.corpus=hf://owner/name"


def test_what_another_host_gets_of_an_address_has_no_credentials_and_all_other_options() -> None:
    address = Uri("s3://key:secret@bucket/runs?region=eu-1&secret_key=abc&endpoint_override=host:9000")
    assert address.public == "s3://bucket/runs?region=eu-1&endpoint_override=host:9000"
