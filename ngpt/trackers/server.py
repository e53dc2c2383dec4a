"""Whether the server of a tracking tool answers."""

import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

PROBE_TIMEOUT = 2.5  # seconds


def server_problem(url: str, *, timeout: float) -> str | None:
    """Why no web server answers at `url`, or None if one does. Takes at most `timeout` seconds."""
    host = urlsplit(url).hostname  # the address may hold a password
    answers: list[str | None] = []

    def probe() -> None:
        """Notes why the server does not answer, or None."""
        try:
            urllib.request.urlopen(url, timeout=timeout).close()
            answers.append(None)
        except urllib.error.HTTPError as error:  # any status below 500 means that the server is up
            error.close()
            answers.append(f"{host} answers with status {error.code}" if error.code >= 500 else None)
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            answers.append(f"{host} cannot be reached ({reason or type(error).__name__})")

    # In a thread, since a DNS lookup has no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers[0] if answers else f"{host} does not answer within {timeout:g} s"
