import json
import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Event
from typing import Any

import numpy as np
import pytest
from embedding_servers import (
    EmbeddingStub,
    Handler,
    answering,
    at_most,
    cut_off,
    directions_of,
    dropped,
    embedding_server,
    refusing,
    shuffled,
    truncated_json,
    well,
    with_numbers,
)

from gistfast.errors import ConfigError, GistfastError, ModelError, VectorError
from gistfast.guides.batch_done import BatchDone
from gistfast.guides.embedding_server import EmbeddingServer, endpoint_of
from gistfast.guides.server_guide import ServerGuide, load_server_guide

TEXTS = [f"text {number} " + "long " * (number % 7) for number in range(50)]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[EmbeddingStub]:
    with embedding_server() as stub:
        yield stub


def guide_of(server: EmbeddingStub, **options: Any) -> ServerGuide:
    quick = {"first_pause_s": 1e-3, "timeout_s": 5.0, "texts_per_request": 8, "concurrency": 4}
    return load_server_guide(server.url, **{"model": "m", **quick, **options})


def test_vectors_come_in_the_order_of_the_texts_and_of_length_one(server: EmbeddingStub) -> None:
    guide = guide_of(server)
    vectors = guide.embed(TEXTS, "query")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, directions_of(TEXTS), atol=1e-6)
    assert all(len(question["input"]) <= 8 and question["model"] == "m" for question in server.questions)
    assert {question["path"] for question in server.questions} == {"/v1/embeddings"}


def test_lists_of_numbers_and_other_orders_are_understood(server: EmbeddingStub) -> None:
    guide = guide_of(server)
    server.faults = [with_numbers, shuffled, with_numbers]
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)


def test_server_that_knows_no_base64_is_asked_for_numbers(server: EmbeddingStub) -> None:
    server.always = lambda handler, texts: (
        refusing(400)(handler, texts)
        if server.questions[-1]["encoding_format"] == "base64"
        else with_numbers(handler, texts)
    )
    np.testing.assert_allclose(guide_of(server).embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)
    assert [question["encoding_format"] for question in server.questions].count("base64") == 1


def test_prompts_stand_before_the_texts_of_their_role(server: EmbeddingStub) -> None:
    guide = guide_of(server, query_prompt="query: ", document_prompt="passage: ")
    np.testing.assert_allclose(guide.embed(["a"], "query"), directions_of(["query: a"]), atol=1e-6)
    np.testing.assert_allclose(guide.embed(["a"], "document"), directions_of(["passage: a"]), atol=1e-6)


def test_every_text_is_reported_as_done(server: EmbeddingStub) -> None:
    done: list[BatchDone] = []
    guide_of(server).embed(TEXTS, "query", done.append)
    assert len(done) == math.ceil(len(TEXTS) / 8)
    assert sum(batch.num_texts for batch in done) == len(TEXTS)


def test_no_texts_ask_nothing(server: EmbeddingStub) -> None:
    guide = guide_of(server)
    server.questions.clear()
    assert guide.embed([], "query").shape == (0, 8)
    assert not server.questions


@pytest.mark.parametrize(
    "fault",
    [
        refusing(500),
        refusing(502, b"<html>bad gateway</html>"),
        refusing(503),
        refusing(408),
        refusing(409),
        refusing(425),
        refusing(429),
        dropped,
        cut_off,
        truncated_json,
    ],
)
def test_failures_that_may_pass_are_asked_again(server: EmbeddingStub, fault: Any) -> None:
    guide = guide_of(server)
    server.faults = [fault, fault, well, fault]
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)


def test_server_that_stalls_is_asked_again(server: EmbeddingStub) -> None:
    release = Event()
    guide = guide_of(server, timeout_s=0.1)
    server.faults = [lambda handler, texts: void(release.wait(10))]
    try:
        np.testing.assert_allclose(guide.embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)
    finally:
        release.set()


def void(value: object) -> None:
    """Let a lambda return nothing."""


def test_server_that_keeps_failing_is_given_up(server: EmbeddingStub) -> None:
    guide = guide_of(server, retries=2, concurrency=1)
    server.questions.clear()
    server.always = refusing(503, {"message": "the model is loading"})
    with pytest.raises(
        ModelError, match="failed 3 times, at last it answered 503, 'the model is loading': go on later"
    ):
        guide.embed(TEXTS, "query")
    assert len(server.questions) == 3


class Pauses(Event):
    """Notes pauses and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return False


def server_at(url: str, **options: Any) -> EmbeddingServer:
    asked = {"key": None, "key_env": "KEY", "connections": 1, "timeout_s": 5.0, "retries": 6, "first_pause_s": 1.0}
    return EmbeddingServer(url, "m", **{**asked, **options})


def test_pause_is_as_long_as_the_server_asks(server: EmbeddingStub) -> None:
    server.faults = [refusing(429, Retry_After="7"), refusing(503, Retry_After="soon"), refusing(503)]
    pauses = Pauses()
    server_at(server.url, first_pause_s=0.0).embed(["a"], pauses)
    assert pauses.seconds == [7, 0, 0]


def test_pauses_double(server: EmbeddingStub) -> None:
    server.faults = [refusing(500)] * 6
    pauses = Pauses()
    server_at(server.url).embed(["a"], pauses)
    assert len(pauses.seconds) == 6
    assert all(0.5 * 2**number <= pause <= 1.5 * 2**number for number, pause in enumerate(pauses.seconds))


def test_server_that_was_there_before_is_waited_for() -> None:
    with embedding_server() as stub:
        server = server_at(stub.url)
        server.embed(["a"], Pauses())
        # Connections that are open outlive the server that took them.
        stub.always = dropped
    with ExitStack() as stack:

        class Restarting(Pauses):
            def wait(self, timeout: float | None = None) -> bool:
                if len(self.seconds) == 1:
                    stack.enter_context(embedding_server(stub.server_address[1]))
                return super().wait(timeout)

        pauses = Restarting()
        assert server.embed(["a"], pauses).shape == (1, 8)
        assert len(pauses.seconds) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_requests_are_halved_and_later_ones_are_smaller(server: EmbeddingStub, status: int) -> None:
    guide = guide_of(server, texts_per_request=32, concurrency=1)
    server.always = at_most(5, status)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)
    server.questions.clear()
    guide.embed(TEXTS, "query")
    assert {len(question["input"]) for question in server.questions} <= {4, 2}


def test_request_refused_for_its_texts_leaves_others_as_large(server: EmbeddingStub) -> None:
    guide = guide_of(server, concurrency=1)
    guide.embed(TEXTS, "query")
    server.faults = [refusing(413)]
    server.questions.clear()
    guide.embed(TEXTS[:24], "query")
    assert sorted(len(question["input"]) for question in server.questions) == [4, 4, 8, 8, 8]


def test_text_that_is_refused_alone_is_named(server: EmbeddingStub) -> None:
    guide = guide_of(server)
    server.always = lambda handler, texts: (
        refusing(400, {"error": {"message": "maximum context length is 512 tokens\nor so"}})(handler, texts)
        if any("word" in text for text in texts)
        else well(handler, texts)
    )
    with pytest.raises(ModelError, match="answered 400, 'maximum context length is 512 tokens' to the text 'word word"):
        guide.embed([*TEXTS, "word " * 100], "query")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"error": {"message": "no such model", "type": "x"}}, "'no such model'"),
        ({"error": "no such model", "error_type": "x"}, "'no such model'"),
        ({"object": "error", "message": "no such model\nat all"}, "'no such model'"),
        ({"detail": [{"msg": "no such model"}]}, "'no such model'"),
        ({"code": 3}, """'{"code": 3}'"""),
        (b"no such model\nat all", "'no such model'"),
        (b"", "''"),
    ],
)
def test_other_refusals_stop_at_once_with_what_the_server_says(server: EmbeddingStub, record: Any, said: str) -> None:
    server.always = refusing(404, record)
    with pytest.raises(ModelError) as refusal:
        guide_of(server)
    assert f"answered 404, {said}: check the address and --guide-model" in str(refusal.value)
    assert len(server.questions) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items[:-1], "answered 8 texts with 7 vectors"),
        (lambda items: [*items, items[0]], "answered 8 texts with 9 vectors"),
        (lambda items: [{**item, "index": 0} for item in items], r"of the texts \[0, 0, 0"),
        (lambda items: [{**items[0], "embedding": [1.0]}, *items[1:]], r"vectors \[1, 8\] wide, expected one width"),
        (lambda items: [{**item, "embedding": [1.0, 2.0]} for item in items], "vectors 2 wide, the first one was 8"),
        (lambda items: [{**item, "embedding": []} for item in items], r"vectors \[0\] wide"),
        (lambda items: [{**item, "embedding": "?"} for item in items], "does not answer as /v1/embeddings does"),
        (lambda items: [{**item, "embedding": ["x"]} for item in items], "does not answer as /v1/embeddings does"),
        (lambda items: [{**item, "embedding": [[1.0]]} for item in items], "does not answer as /v1/embeddings does"),
        (lambda items: [{**item, "embedding": 1.0} for item in items], "does not answer as /v1/embeddings does"),
        (lambda items: None, "does not answer as /v1/embeddings does"),
    ],
)
def test_answers_that_do_not_fit_are_refused(server: EmbeddingStub, change: Any, message: str) -> None:
    guide = guide_of(server)
    server.always = answering(change)
    with pytest.raises(ModelError, match=message) as refusal:
        guide.embed(TEXTS[:8], "query")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ([math.nan] * 8, "is not finite"),
        ([None] * 8, "is not finite"),
        ([1e39] + [1.0] * 7, "is not finite"),
        ([0.0] * 8, "has length 0"),
    ],
)
def test_vector_without_direction_is_named_by_its_text(server: EmbeddingStub, numbers: Any, what: str) -> None:
    guide = guide_of(server)
    server.always = answering(lambda items: [*items[:-1], {**items[-1], "embedding": numbers}])
    with pytest.raises(VectorError, match=f"guide m, text 'violin': the vector {what}"):
        guide.embed(["a large natural stream", "violin"], "query")


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_page_in_place_of_an_answer_is_refused_at_once(server: EmbeddingStub, kind: str) -> None:
    server.always = lambda handler, texts: handler.answer(b"\n <html>\n</html>", Content_Type=kind)
    with pytest.raises(ModelError, match=r"with something that is not JSON \('<html>'\): check the address"):
        guide_of(server)
    assert len(server.questions) == 1


@pytest.mark.parametrize("begun", [b"", b' {"data": [', b"{"])
@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_answer_that_breaks_off_is_asked_for_again(server: EmbeddingStub, begun: bytes, kind: str) -> None:
    guide = guide_of(server)
    server.faults = [lambda handler, texts: handler.answer(begun, Content_Type=kind)]
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)


def test_address_where_nobody_answers_is_refused_at_once(server: EmbeddingStub) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(ModelError, match=r"cannot be reached .*: check the address, and that the server runs"):
        guide_of(server)


def test_key_is_sent_and_never_told(
    server: EmbeddingStub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    guide = guide_of(server, api_key_env="MY_KEY", retries=1)
    assert server.questions[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    server.always = refusing(500, {"error": f"I do not like {KEY}"})
    with pytest.raises(GistfastError) as failure:
        guide.embed(["a"], "query")
    server.always = refusing(401, {"error": f"wrong key {KEY}"})
    with pytest.raises(
        ModelError, match=r"401, 'wrong key \*\*\*': the environment variable MY_KEY does not"
    ) as refusal:
        guide.embed(["a"], "query")
    told = [str(failure.value), str(refusal.value), repr(guide), repr(vars(guide)), json.dumps(vars(guide.info))]
    assert caplog.text
    assert not any(KEY in text for text in (*told, caplog.text))


def test_server_that_wants_a_key_names_the_variable(server: EmbeddingStub) -> None:
    server.always = refusing(401)
    with pytest.raises(ModelError, match="the environment variable GISTFAST_API_KEY holds no key"):
        guide_of(server)
    assert "Authorization" not in server.questions[0]["headers"]


def test_key_that_no_header_holds_is_refused_without_showing_it(
    server: EmbeddingStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ConfigError, match="MY_KEY holds characters that no key has") as refusal:
        guide_of(server, api_key_env="MY_KEY")
    assert KEY not in str(refusal.value)


def test_failures_of_one_kind_are_logged_once(server: EmbeddingStub, caplog: pytest.LogCaptureFixture) -> None:
    guide = guide_of(server)
    server.faults = [refusing(429, {"error": f"limit of request {number}"}) for number in range(9)]
    guide.embed(TEXTS, "query")
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_nobody_waits_for_other_requests_when_one_fails(server: EmbeddingStub) -> None:
    guide = guide_of(server, timeout_s=60.0, concurrency=2)
    release = Event()
    server.faults = [stuck(release), refusing(404)]
    try:
        with pytest.raises(ModelError, match="404"):
            guide.embed(TEXTS, "query")
        assert not release.is_set()
    finally:
        release.set()


def test_nobody_waits_for_requests_after_ctrl_c(server: EmbeddingStub) -> None:
    guide = guide_of(server, timeout_s=60.0)
    release = Event()
    main_thread = threading.get_ident()

    def interrupting(handler: Handler, texts: list[str]) -> None:
        # A true signal: it wakes the thread that waits for an answer.
        signal.pthread_kill(main_thread, signal.SIGINT)
        release.wait(60)

    server.always = stuck(release)
    server.faults = [interrupting]
    # A shell may have started the tests with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            guide.embed(TEXTS, "query")
    finally:
        signal.signal(signal.SIGINT, before)
        release.set()


def stuck(release: Event) -> Any:
    return lambda handler, texts: void(release.wait(60))


def test_guide_is_known_by_model_and_prompts_and_not_by_address(server: EmbeddingStub) -> None:
    info = guide_of(server).info
    with embedding_server() as other:
        assert guide_of(other).info == info
    assert guide_of(server, model="n").info.weights_hash != info.weights_hash
    assert (info.name, info.width, info.max_length, info.pooling) == ("m", 8, None, "server")


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("https://host/v1", "https://host/v1/embeddings"),
        ("https://host/v1/", "https://host/v1/embeddings"),
        ("http://host:8000/v1/embeddings", "http://host:8000/v1/embeddings"),
    ],
)
def test_endpoint_is_found(url: str, endpoint: str) -> None:
    assert endpoint_of(url) == endpoint


@pytest.mark.parametrize("url", ["https://me:secret@host/v1", "https://host/v1?key=secret", "https:///v1"])
def test_address_with_a_password_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="without user, password and query") as refusal:
        endpoint_of(url)
    assert "secret" not in str(refusal.value)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--guide http://\[host/v1 is no address"):
        endpoint_of("http://[host/v1")


def test_key_sent_in_the_open_is_warned_of(
    server: EmbeddingStub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    guide_of(server, api_key_env="MY_KEY")
    assert "the key in MY_KEY goes to http://127.0.0.1" in caplog.text
