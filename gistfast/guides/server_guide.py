"""A guide behind an OpenAI-compatible server: several requests at a time, each as large as the server takes.

# N texts, G guide width
"""

import logging
import os
from collections.abc import Sequence

import numpy as np

from gistfast.errors import ConfigError, ModelError
from gistfast.guides.batch_done import BatchDone, OnBatch
from gistfast.guides.directions import Vectors, shown, unit_vectors
from gistfast.guides.embedding_server import EmbeddingServer
from gistfast.guides.server_requests import Requests, RequestSize
from gistfast.models.prompts import Role
from gistfast.store import GuideInfo

logger = logging.getLogger(__name__)

# Asked for once, to learn how wide vectors are before a store is begun.
FIRST_TEXT = "a large natural stream of water"


class ServerGuide:
    """A model behind an embedding server as a guide."""

    def __init__(self, server: EmbeddingServer, info: GuideInfo, *, concurrency: int, texts_per_request: int) -> None:
        """Use `load_server_guide`, which asks the server how wide its vectors are.

        Args:
            server: The server.
            info: What the vectors depend on, as far as it can be known.
            concurrency: Requests on their way at once.
            texts_per_request: At most.
        """
        self._server = server
        self._info = info
        self._concurrency = concurrency
        self._request_size = RequestSize(texts_per_request)

    @property
    def info(self) -> GuideInfo:
        """What the vectors depend on, as far as a server lets it be known."""
        return self._info

    def embed(self, texts: Sequence[str], role: Role, on_batch: OnBatch | None = None) -> Vectors:
        """The vectors (N, G) of the texts, in their order, of length 1.

        The longest texts come first: one that the server does not take stops the work at once. When it stops,
        by an error or Ctrl-C, nobody waits for answers that are still to come.

        Args:
            texts: N texts, without prompts.
            role: Whose prompt stands before each of them.
            on_batch: Called with the texts of each answer.

        Raises:
            ModelError: When the server refuses, keeps failing, or answers something else than vectors.
            VectorError: When a vector is zero or not finite; its text is named.
        """
        vectors = np.empty((len(texts), self._info.width), np.float32)
        by_length = np.array(sorted(range(len(texts)), key=lambda number: -len(texts[number])), dtype=np.int64)
        prompt = self._info.prompt_of(role)
        prompted = [prompt + texts[number] for number in by_length]
        left = len(texts)
        with Requests(self._server, prompted, self._request_size, self._concurrency) as requests:
            while left:
                part, answer = requests.next_answer()
                numbers = by_length[part]
                vectors[numbers] = self._directions(answer, [texts[number] for number in numbers])
                left -= len(numbers)
                if on_batch is not None:
                    on_batch(BatchDone(len(numbers)))
        return vectors

    def _directions(self, answer: Vectors, texts: list[str]) -> Vectors:
        if answer.shape[1] != self._info.width:
            raise ModelError(
                f"{self._server.url} answered with vectors {answer.shape[1]} wide, the first one was "
                f"{self._info.width} wide: check that one model answers"
            )
        return unit_vectors(answer, texts, self._name_of, "remove the text, or check the server")

    def _name_of(self, text: str) -> str:
        return f"guide {self._info.name}, text {shown(text)}"


def load_server_guide(
    url: str,
    *,
    model: str,
    query_prompt: str = "",
    document_prompt: str = "",
    concurrency: int = 8,
    texts_per_request: int = 32,
    timeout_s: float = 120.0,
    retries: int = 6,
    api_key_env: str = "GISTFAST_API_KEY",
    first_pause_s: float = 0.5,
) -> ServerGuide:
    """A guide behind an OpenAI-compatible server; one text is embedded to learn how wide its vectors are.

    Args:
        url: Up to `/v1`.
        model: What the server calls the model.
        query_prompt: Put before anchors.
        document_prompt: Put before positives and negatives.
        concurrency: Requests on their way at once.
        texts_per_request: At most; halved where the server refuses so many.
        timeout_s: For connecting, and for each read of an answer.
        retries: How often a request is sent again.
        api_key_env: Environment variable with the key; no key is sent when it is not set.
        first_pause_s: Pause before the first retry, on average; it doubles with each.

    Raises:
        ConfigError: When the address or the key is none.
        ModelError: When the server cannot be reached, refuses, or does not answer as `/v1/embeddings` does.
    """
    server = EmbeddingServer(
        url,
        model,
        key=_key_from(api_key_env),
        key_env=api_key_env,
        connections=concurrency,
        timeout_s=timeout_s,
        retries=retries,
        first_pause_s=first_pause_s,
    )
    with Requests(server, [query_prompt + FIRST_TEXT], RequestSize(1), 1) as requests:
        _, first = requests.next_answer()
    info = GuideInfo.of_vectors(
        model,
        "server",
        width=first.shape[1],
        # The address may change, and a server shows no weights: `check_same_guide` compares vectors instead.
        vectors_hash=f"served as {model}",
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    logger.info(
        "guide %s at %s: %d wide, %d requests of %d texts at a time",
        *(model, server.url, info.width, concurrency, texts_per_request),
    )
    return ServerGuide(server, info, concurrency=concurrency, texts_per_request=texts_per_request)


def _key_from(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} holds characters that no key has: set it to the key alone")
    return key or None
