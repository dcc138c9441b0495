"""Many texts to an embedding server: several requests at a time, each as large as the server takes.

# N texts, G guide width
"""

import logging
from queue import SimpleQueue
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

import numpy as np

from gistfast.errors import ModelError
from gistfast.guides.directions import Vectors, shown
from gistfast.guides.embedding_server import EmbeddingServer, StoppedError, TooLargeError

logger = logging.getLogger(__name__)


class RequestSize:
    """How many texts go into one request: fewer, once the server has refused as many and never taken them.

    A refusal after it took as many lies with those texts, which are longer, and holds for them alone.
    """

    def __init__(self, texts: int) -> None:
        """At most `texts`."""
        self.texts = texts
        self._most_taken = 0
        self._lock = Lock()

    def taken(self, num_texts: int) -> None:
        """Note that the server took a request."""
        with self._lock:
            self._most_taken = max(self._most_taken, num_texts)

    def refused(self, num_texts: int, reason: str) -> None:
        """Note that the server refused a request."""
        with self._lock:
            smaller = max(num_texts // 2, self._most_taken)
            if num_texts > self._most_taken and smaller < self.texts:
                self.texts = smaller
                logger.warning("the server %s to %d texts: sending %d at most", reason, num_texts, smaller)


class Requests:
    """The texts of one call, sent by threads part by part; a context that lets go of the threads at its end."""

    def __init__(self, server: EmbeddingServer, texts: list[str], size: RequestSize, concurrency: int) -> None:
        """Threads start when the context is entered.

        Args:
            server: The server.
            texts: N texts, with prompts.
            size: Of a request.
            concurrency: Number of threads.
        """
        self._server = server
        self._texts = texts
        self._size = size
        self._concurrency = concurrency
        self._answers: SimpleQueue[tuple[slice, Vectors] | BaseException] = SimpleQueue()
        self._stop = Event()
        self._lock = Lock()
        self._next = 0

    def next_answer(self) -> tuple[slice, Vectors]:
        """The next part that was answered, with its vectors; parts come in any order.

        Raises:
            BaseException: Whatever a thread met.
        """
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> Self:
        # A daemon does not keep the process from ending while it waits for a server that is stuck.
        for _ in range(min(self._concurrency, len(self._texts))):
            Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _work(self) -> None:
        try:
            while not self._stop.is_set() and (part := self._take_part()):
                self._answers.put((part, self._embed(self._texts[part])))
        except StoppedError:
            pass
        except BaseException as error:  # goes to the thread that waits
            self._answers.put(error)

    def _take_part(self) -> slice | None:
        with self._lock:
            first = self._next
            self._next = min(first + self._size.texts, len(self._texts))
            return slice(first, self._next) if first < len(self._texts) else None

    def _embed(self, texts: list[str]) -> Vectors:
        """The vectors of the texts, in as many requests as the server wants."""
        try:
            vectors = self._server.embed(texts, self._stop)
        except TooLargeError as error:
            if len(texts) == 1:
                raise ModelError(
                    f"{self._server.url} {error} to the text {shown(texts[0])} alone: "
                    "shorten or remove it if it is too long, else check --guide-model"
                ) from error
            self._size.refused(len(texts), str(error))
            half = len(texts) // 2
            return np.concatenate([self._embed(texts[:half]), self._embed(texts[half:])])
        self._size.taken(len(texts))
        return vectors
