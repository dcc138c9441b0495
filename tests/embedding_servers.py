"""A real HTTP server on loopback that embeds, and fails in the ways that it is told to."""

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import numpy as np

WIDTH = 8
# What a fault gets: the handler, to answer as it likes, and the texts of the request.
Fault = Callable[["Handler", list[str]], None]


def vector_of(text: str, width: int = WIDTH) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The vector that the server gives to a text; not of length 1."""
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=width).astype(np.float32)


def directions_of(texts: list[str]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """What a guide behind the server makes of them."""
    vectors = np.stack([vector_of(text) for text in texts])
    directions: np.ndarray[Any, np.dtype[np.float32]] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return directions


class Handler(BaseHTTPRequestHandler):
    """Takes the next fault for each request, and answers well when none is left."""

    protocol_version = "HTTP/1.1"
    # Headers and body are two packets; held back, the second would wait 40 ms for the first's receipt.
    disable_nagle_algorithm = True
    server: "EmbeddingStub"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)
        with self.server.lock:
            self.server.questions.append({"path": self.path, "headers": dict(self.headers), **question})
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        fault(self, question["input"])

    def answer(self, record: Any, status: int = 200, **headers: str) -> None:
        """Send a record as JSON, or bytes as they are."""
        body = record if isinstance(record, bytes) else json.dumps(record).encode()
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class EmbeddingStub(ThreadingHTTPServer):
    """Attributes: `questions` that were asked, `faults` still to show, and what is `always` done without one."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.questions: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.always: Fault = well
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""


@contextmanager
def embedding_server(port: int = 0) -> Iterator[EmbeddingStub]:
    server = EmbeddingStub(port)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def data_of(texts: list[str]) -> list[dict[str, Any]]:
    """The items of a good answer in base64."""
    return [
        {"index": number, "embedding": base64.b64encode(vector_of(text).astype("<f4").tobytes()).decode()}
        for number, text in enumerate(texts)
    ]


def well(handler: Handler, texts: list[str]) -> None:
    handler.answer({"object": "list", "data": data_of(texts), "model": "any"})


def with_numbers(handler: Handler, texts: list[str]) -> None:
    """As servers answer that know no base64."""
    items = [{"index": number, "embedding": vector_of(text).tolist()} for number, text in enumerate(texts)]
    handler.answer({"data": items})


def shuffled(handler: Handler, texts: list[str]) -> None:
    handler.answer({"data": data_of(texts)[::-1]})


def answering(items: Callable[[list[dict[str, Any]]], Any]) -> Fault:
    """Answers with what `items` makes of the good items."""
    return lambda handler, texts: handler.answer({"data": items(data_of(texts))})


def refusing(status: int, record: Any = None, **headers: str) -> Fault:
    said = {"error": {"message": f"refused with {status}"}} if record is None else record
    return lambda handler, texts: handler.answer(said, status, **headers)


def at_most(num_texts: int, status: int = 413) -> Fault:
    """Takes no more texts than so many in a request."""

    def fault(handler: Handler, texts: list[str]) -> None:
        if len(texts) > num_texts:
            handler.answer({"error": f"batch size {len(texts)} > {num_texts}"}, status)
        else:
            well(handler, texts)

    return fault


def dropped(handler: Handler, texts: list[str]) -> None:
    """Closes the connection without a word."""
    handler.close_connection = True


def cut_off(handler: Handler, texts: list[str]) -> None:
    """Promises more bytes than it sends."""
    body = json.dumps({"data": data_of(texts)}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def truncated_json(handler: Handler, texts: list[str]) -> None:
    """A whole answer to HTTP, and half of one to JSON."""
    body = json.dumps({"data": data_of(texts)}).encode()
    handler.answer(body[: len(body) // 2])
