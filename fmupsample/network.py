"""Whether the Hugging Face hub, or another server, can be used now: known within seconds."""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
from collections.abc import Iterator
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

CONNECT_SECONDS = 6.0


def endpoint() -> str:
    """Address of the hub (set by HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def offline() -> str:
    """Why nothing may be downloaded, as words for a message, or ``""``."""
    from huggingface_hub import constants

    return "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""


def unreachable(address: str) -> str:
    """Why the server of ``address`` cannot be used now, as words for a message, or ``""``.

    The hub's own client retries for minutes, so one request with a short limit comes first. In a
    thread, because looking up a host name cannot be given a time limit. Proxies are those of the
    environment.
    """
    host = urlparse(address).hostname or address
    answers: list[str] = []

    def ask() -> None:
        request = Request(address, method="HEAD", headers={"User-Agent": "fmupsample"})
        try:
            with urlopen(request, timeout=CONNECT_SECONDS):
                answers.append("")
        except HTTPError as error:  # below 500 it works, and the download will say what is wrong
            answers.append(
                f"{host} is out of order (HTTP {error.code})" if error.code >= 500 else ""
            )
        except URLError as error:
            # Certificates are the business of the hub's client, which may know more of them.
            if isinstance(error.reason, ssl.SSLError):
                answers.append("")
        except (OSError, HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answers[0] if answers else f"{host} cannot be reached"


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """The hub's client without its log lines about retries; what matters is in our message."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
