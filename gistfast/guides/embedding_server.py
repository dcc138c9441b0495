"""One model behind an OpenAI-compatible `/v1/embeddings`: a request's texts in, its checked vectors out.

A request that fails for a reason that may pass is sent again, after a pause that grows or that the server asks for.

# N texts of a request, G guide width
"""

import json
import logging
import random
from itertools import count
from threading import Event
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import (
    HTTPError,
    InvalidHeader,
    LocationParseError,
    NewConnectionError,
    ProtocolError,
    SSLError,
    TimeoutError,
)

from gistfast.errors import ConfigError, ModelError, first_line
from gistfast.guides.directions import Vectors
from gistfast.guides.server_answers import is_broken_off, message_of, vectors_of

logger = logging.getLogger(__name__)

# Beside 5xx. 424 is how TEI says that its backend failed.
PASSING = frozenset((408, 409, 424, 425, 429))
# What servers answer to more, or longer, texts than they take; also to requests that are bad in another way.
PERHAPS_TOO_LARGE = frozenset((400, 413, 422))
LONGEST_PAUSE_S = 60.0


class TooLargeError(Exception):
    """The server refused a request that it may take in parts."""


class StoppedError(Exception):
    """Nobody waits for the vectors any more."""


class _PassingError(Exception):
    """The request failed for a reason that may pass.

    Attributes:
        pause_s: How long the server asks to wait; None when it says nothing.
    """

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class EmbeddingServer:
    """Embeds texts by requests to a server; any number of threads may use it at once.

    Attributes:
        url: Where requests go to.
        model: What the server calls the model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None,
        key_env: str,
        connections: int,
        timeout_s: float,
        retries: int,
        first_pause_s: float = 0.5,
    ) -> None:
        """A server that was not asked anything yet.

        Args:
            url: As people write it, up to `/v1`.
            model: What the server calls the model.
            key: Sent as bearer token when given. It stays out of all messages.
            key_env: The environment variable that it came from or would come from, for messages.
            connections: Kept open.
            timeout_s: For connecting, and for each read of an answer.
            retries: How often a request is sent again.
            first_pause_s: Pause before the first retry, on average; it doubles with each.
        """
        self.url = endpoint_of(url)
        self.model = model
        self._key = key
        self._key_env = key_env
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
            if self.url.startswith("http://"):
                logger.warning("the key in %s goes to %s as plain text: https would hide it", key_env, self.url)
        self._pool = _connection_pool(self.url, connections, timeout_s)
        self._timeout_s = timeout_s
        self._retries = retries
        self._first_pause_s = first_pause_s
        self._answered = False
        # A third of the bytes of numbers in decimals, and quicker to read.
        self._encoding = "base64"
        self._reported: set[str] = set()

    def embed(self, texts: list[str], stop: Event) -> Vectors:
        """The vectors (N, G) of the texts, in their order, as the server gives them.

        Args:
            texts: Sent in one request.
            stop: Ends the pauses between retries when it is set.

        Raises:
            ModelError: When the server refuses, cannot be reached, keeps failing, or does not answer as
                `/v1/embeddings` does.
            StoppedError: When `stop` was set during a pause.
            TooLargeError: When the request may be too large.
        """
        for attempt in count():
            try:
                vectors = self._ask(texts)
            except _PassingError as error:
                if attempt == self._retries:
                    raise ModelError(
                        f"{self.url} failed {attempt + 1} times, at last it {error}: go on later with --resume, "
                        "or try a smaller --server-concurrency or --server-batch"
                    ) from error
                pause_s = error.pause_s
                if pause_s is None:
                    # Threads that failed together should not come back together.
                    pause_s = min(self._first_pause_s * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
                self._report(str(error), pause_s)
            else:
                self._answered = True
                return vectors
            if stop.wait(pause_s):
                break
        raise StoppedError

    def _ask(self, texts: list[str]) -> Vectors:
        """The vectors of one request that is sent once."""
        question = {"model": self.model, "input": texts, "encoding_format": self._encoding}
        try:
            response = self._pool.request("POST", self.url, json=question, headers=self._headers, retries=False)
        except HTTPError as error:
            self._refuse_wrong_address(error)
            raise _PassingError(_in_words(error, self._timeout_s)) from error
        if response.status in PERHAPS_TOO_LARGE and not self._answered and self._encoding == "base64":
            logger.info("%s answered %d: asking for lists of numbers in place of base64", self.url, response.status)
            self._encoding = "float"
            return self._ask(texts)
        if response.status != 200:
            self._refuse(response)
        try:
            answer = json.loads(response.data)
        except ValueError as error:
            if is_broken_off(response.data):
                raise _PassingError("broke off its answer") from error
            said = self._without_key(message_of(response.data))
            raise ModelError(
                f"{self.url} answered with something that is not JSON ({said!r}): check the address, such as "
                "https://host/v1"
            ) from error
        return vectors_of(answer, len(texts), self.url)

    def _refuse_wrong_address(self, error: HTTPError) -> None:
        """Refuse what no retry helps against; a server that has answered before may come back."""
        unreachable = isinstance(error, NewConnectionError | SSLError) and not self._answered
        if unreachable or isinstance(error, LocationParseError):
            raise ModelError(
                f"{self.url} cannot be reached ({first_line(error)}): check the address, and that the server runs"
            ) from error

    def _refuse(self, response: urllib3.BaseHTTPResponse) -> None:
        status = response.status
        said = f"answered {status}, {self._without_key(message_of(response.data))!r}"
        if status in PASSING or status >= 500:
            raise _PassingError(said, _asked_pause_s(response))
        if status in PERHAPS_TOO_LARGE:
            raise TooLargeError(said)
        advice = "check the address and --guide-model"
        if status in (401, 403):
            holds = "does not hold a key that it takes" if self._key else "holds no key"
            advice = f"the environment variable {self._key_env} {holds}"
        raise ModelError(f"{self.url} {said}: {advice}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _report(self, reason: str, pause_s: float) -> None:
        """Log each kind of failure once, such as "answered 503"."""
        kind = reason.partition(",")[0]
        level = logging.DEBUG if kind in self._reported else logging.WARNING
        self._reported.add(kind)
        logger.log(level, "%s %s: asking again in %.1f s", self.url, reason, pause_s)


def endpoint_of(url: str) -> str:
    """The address that requests go to, from one that ends with `/v1` or with the whole path.

    Raises:
        ConfigError: When it is no address, or holds a password or more than a path.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(
            f"--guide {url} is no address ({first_line(error)}): give one like https://host/v1"
        ) from error
    if parts.username is not None or parts.query or parts.fragment or not parts.hostname:
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        raise ConfigError(
            f"--guide must be an address like https://host/v1, without user, password and query (found {plain!r}): "
            "name the environment variable that holds the key with --api-key-env"
        )
    stem = url.rstrip("/")
    return stem if stem.endswith("/embeddings") else f"{stem}/embeddings"


def _asked_pause_s(response: urllib3.BaseHTTPResponse) -> float | None:
    try:
        return urllib3.Retry().get_retry_after(response)
    except InvalidHeader:
        return None


def _in_words(error: HTTPError, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"did not answer within {timeout_s:g} s"
    if isinstance(error, ProtocolError):
        return "broke off the connection"
    return f"could not be asked ({first_line(error)})"


def _connection_pool(url: str, connections: int, timeout_s: float) -> urllib3.PoolManager:
    """A pool that goes through the proxy that the environment names, if it names one for this host."""
    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    options: dict[str, Any] = {"maxsize": connections, "timeout": timeout_s}
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
