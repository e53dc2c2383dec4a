"""Addresses of object stores, such as `s3://bucket/prefix`, in the place of a local folder."""

import argparse
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from ngpt.config.secrets import HIDDEN, is_secret_name

SCHEMES = ("s3", "gs", "gcs", "hdfs", "file")  # of pyarrow's file systems
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True)
class Uri:
    """An address that may hold credentials: only `str()` of it may be shown or stored."""

    text: str = field(repr=False)

    def child(self, name: str) -> "Uri":
        """The address of an entry of this folder; options after `?` stay."""
        parts = urlsplit(self.text)
        return Uri(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return urlsplit(self.text).path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Uri":
        """The address of the folder that holds this one."""
        parts = urlsplit(self.text)
        return Uri(urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0])))

    @property
    def public(self) -> str:
        """The address that another host may get, without credentials and without the options that hold some."""
        parts = urlsplit(str(self))
        options = [(name, value) for name, value in parse_qsl(parts.query) if not is_secret_name(name)]
        return urlunsplit(parts._replace(query=urlencode(options, safe="*:/")))

    def __str__(self) -> str:
        """The address without credentials."""
        parts = urlsplit(self.text)
        user, _, host = parts.netloc.rpartition("@")
        netloc = host if ":" in user or parts.scheme == "s3" else parts.netloc
        options = parse_qsl(parts.query, keep_blank_values=True)
        shown = [(name, HIDDEN if is_secret_name(name) else value) for name, value in options]
        return urlunsplit(parts._replace(netloc=netloc, query=urlencode(shown, safe="*:/")))


def parse_location(text: str) -> Path | Uri:
    """The local folder or the address that an argument of the command line means.

    Raises:
        ArgumentTypeError: the address has a scheme that is not supported, or no bucket or host.
    """
    if not (found := _SCHEME.match(text)):
        return Path(text)
    scheme = found[1].lower()
    if scheme == "file":
        return Path(unquote(urlsplit(text).path))
    if scheme not in SCHEMES:
        nearest = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}://?" if nearest else ""
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise argparse.ArgumentTypeError(f"results can be in a folder or at {allowed}, not at {scheme}://{hint}")
    if not urlsplit(text).netloc.rpartition("@")[2]:
        raise argparse.ArgumentTypeError(f"{scheme}:// needs a bucket or host, as in {scheme}://bucket/results")
    return Uri(text)


def without_credentials(argument: str) -> str:
    """An argument of the command line as it may be recorded: an address in it has no credentials."""
    found = re.search(rf"(?:{'|'.join(SCHEMES)})://", argument)
    return argument[: found.start()] + str(Uri(argument[found.start() :])) if found else argument
