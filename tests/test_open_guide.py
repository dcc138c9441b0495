import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_servers import (
    EmbeddingStub,
    Handler,
    answering,
    directions_of,
    embedding_server,
    refusing,
    vector_of,
    well,
)

from gistfast.errors import ConfigError, DataError, ModelError, StoreError
from gistfast.guides.kinds import OPTIONS, READY_SUFFIXES, guide_kind
from gistfast.rows.formats import FORMATS
from gistfast.settings.base import flag_of
from gistfast.settings.stages import PrecomputeSettings, build
from gistfast.settings.store import StoreRepairSettings
from gistfast.stages.precompute import precompute

# A value other than the default for each option that only one kind of guide takes.
VALUES: dict[str, Any] = {
    "pooling": "cls",
    "max_length": 64,
    "dtype": "float32",
    "guide_revision": "main",
    "decode_with": "student",
    "device": "cpu",
    "tokens_per_batch": 512,
    "attention": "unpadded",
    "trust_remote_code": True,
    "guide_model": "m",
    "server_concurrency": 2,
    "server_batch": 2,
    "server_timeout_s": 2.0,
    "server_retries": 2,
    "api_key_env": "KEY",
    "vectors": "text=vector",
}
GUIDES: dict[str, dict[str, Any]] = {
    "model": {"guide": "BAAI/bge-small-en-v1.5"},
    "server": {"guide": "http://localhost:8000/v1", "guide_model": "m"},
    "ready": {"guide": "vectors.parquet"},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingStub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with embedding_server() as stub:
        yield stub


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("http://localhost:8000/v1", "server"),
        ("https://api.example.com/v1", "server"),
        ("vectors.parquet", "ready"),
        ("folder/*.parquet", "ready"),
        ("texts.jsonl", "ready"),
        ("BAAI/bge-small-en-v1.5", "model"),
        ("./model", "model"),
    ],
)
def test_kind_is_told_by_the_name(name: str, kind: str) -> None:
    assert guide_kind(name) == kind


def test_every_format_of_rows_may_hold_texts_with_ready_vectors() -> None:
    assert set(READY_SUFFIXES) == set(FORMATS)


@pytest.mark.parametrize("name", [name for names in OPTIONS.values() for name in names])
@pytest.mark.parametrize("kind", OPTIONS)
def test_option_is_taken_by_its_own_kind_and_refused_by_name_by_others(name: str, kind: Any) -> None:
    given = {"source": "pairs.jsonl", "out": "store", **GUIDES[kind], name: VALUES[name]}
    if name in OPTIONS[kind]:
        assert getattr(build(PrecomputeSettings, given), name)
        return
    flag = flag_of(PrecomputeSettings.__dataclass_fields__[name])
    with pytest.raises(ConfigError, match=rf"^{flag} .* does not go with --guide .*: leave it out$"):
        build(PrecomputeSettings, given)


def test_mapping_that_is_refused_is_shown_as_it_is_typed() -> None:
    given = {"source": "pairs.jsonl", "out": "store", **GUIDES["model"], "vectors": "text=vec,title=t.npy"}
    with pytest.raises(ConfigError, match=r"^--vectors text=vec,title=t\.npy does not go with --guide BAAI"):
        build(PrecomputeSettings, given)


@pytest.mark.parametrize("guide_model", [None, "m"])
@pytest.mark.parametrize("address", ["127.0.0.1:9101", "127.0.0.1:9101/v1", "gpu-3.local:80/", "[::1]:8000/v1"])
def test_address_without_its_scheme_is_refused(address: str, guide_model: str | None) -> None:
    message = f"--guide {re.escape(address)} is neither a folder nor a hub id: for a server begin with http://"
    with pytest.raises(ConfigError, match=message):
        build(
            PrecomputeSettings, {"source": "pairs.jsonl", "out": "store", "guide": address, "guide_model": guide_model}
        )
    with pytest.raises(ConfigError, match=message):
        build(StoreRepairSettings, {"store": "store", "guide": address})


def test_folder_that_is_called_like_an_address_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model:1").mkdir()
    assert build(PrecomputeSettings, {"source": "pairs.jsonl", "out": "store", "guide": "model:1"}).guide == "model:1"


def test_server_needs_the_name_of_its_model() -> None:
    with pytest.raises(ConfigError, match="--guide-model is needed with --guide http://localhost/v1"):
        build(PrecomputeSettings, {"source": "pairs.jsonl", "out": "store", "guide": "http://localhost/v1"})


@pytest.mark.parametrize("text", ["text", "=vector", "text=", ""])
def test_mapping_of_vectors_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="--vectors must look like text=embedding"):
        build(PrecomputeSettings, {"source": "pairs.jsonl", "out": "store", "guide": "v.parquet", "vectors": text})


def test_store_of_a_server_holds_its_vectors(
    server: EmbeddingStub, pairs_file: Path, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    store = precompute(
        pairs_file, guide=server.url, guide_model="m", out=tmp_path / "store", store_dtype="float32", query_prompt="q: "
    )
    ids = torch.from_numpy(store.rows)
    anchors, positives = zip(*pairs, strict=True)
    expected = directions_of([f"q: {anchor}" for anchor in anchors])
    np.testing.assert_allclose(store.gather(ids[:, 0]), expected, atol=1e-6)
    np.testing.assert_allclose(store.gather(ids[:, 1]), directions_of(list(positives)), atol=1e-6)
    assert store.verify() == []


def test_stopped_run_goes_on_with_the_same_model_at_another_address(
    server: EmbeddingStub, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 5)
    stop_at_the_second_shard(server, pairs_file, tmp_path / "store")
    with embedding_server() as other:
        store = precompute(pairs_file, guide=other.url, guide_model="m", out=tmp_path / "store", resume=True)
    texts = store.texts[:]
    np.testing.assert_allclose(store.gather(torch.arange(len(texts))), directions_of(texts), atol=1e-3)


def test_stopped_run_does_not_go_on_with_another_model_behind_the_server(
    server: EmbeddingStub, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 5)
    stop_at_the_second_shard(server, pairs_file, tmp_path / "store")
    server.always = otherwise
    with pytest.raises(StoreError, match=r"has a vector for the text '.*' that guide m no longer gives .*has changed"):
        precompute(pairs_file, guide=server.url, guide_model="m", out=tmp_path / "store", resume=True)
    with pytest.raises(StoreError, match=r"store has '(served as )?m', asked for '(served as )?n'"):
        precompute(pairs_file, guide=server.url, guide_model="n", out=tmp_path / "store", resume=True)


@pytest.mark.parametrize("prompt", ["", "q: "])
def test_rows_are_appended_with_the_model_that_made_the_store_alone(
    server: EmbeddingStub, pairs: list[tuple[str, str]], tmp_path: Path, prompt: str
) -> None:
    options = {"guide": server.url, "guide_model": "m", "out": tmp_path / "store", "query_prompt": prompt}
    precompute(write_vectors(tmp_path / "first.parquet", pairs[:8]), **options)
    rows = write_vectors(tmp_path / "second.parquet", pairs[8:])
    server.always = otherwise
    with pytest.raises(StoreError, match="no longer gives"):
        precompute(rows, **options, append=True)
    server.always = well
    store = precompute(rows, **options, append=True)
    assert store.num_rows == len(pairs)
    positives = torch.from_numpy(store.rows)[:, 1]
    np.testing.assert_allclose(store.gather(positives), directions_of([row[1] for row in pairs]), atol=1e-3)


def otherwise(handler: Handler, texts: list[str]) -> None:
    """As a server answers after its model was exchanged."""
    handler.answer({"data": [{"embedding": vector_of(text + " otherwise").tolist()} for text in texts]})


def stop_at_the_second_shard(server: EmbeddingStub, pairs_file: Path, out: Path) -> None:
    """Leave a store with one shard of vectors of five texts; the first request asks for the width."""
    server.faults = [well, well]
    server.always = refusing(404)
    with pytest.raises(ModelError, match="404"):
        precompute(pairs_file, guide=server.url, guide_model="m", out=out, server_concurrency=1)
    server.always = well


def write_vectors(path: Path, pairs: list[tuple[str, str]], before: tuple[str, str] = ("", "")) -> Path:
    columns = [
        [prompt + text for text in texts] for prompt, texts in zip(before, zip(*pairs, strict=True), strict=True)
    ]
    vectors = [pa.array([vector_of(text).tolist() for text in texts], pa.list_(pa.float32())) for texts in columns]
    table = {"anchor": columns[0], "positive": columns[1], "anchor_vec": vectors[0], "positive_vec": vectors[1]}
    pq.write_table(pa.table(table), path)
    return path


def test_store_of_ready_vectors_holds_them(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    source = write_vectors(tmp_path / "pairs.parquet", pairs)
    store = precompute(source, guide=source, vectors="anchor=anchor_vec,positive=positive_vec", out=tmp_path / "store")
    texts = store.texts[:]
    np.testing.assert_allclose(store.gather(torch.arange(len(texts))), directions_of(texts), atol=1e-3)
    assert store.manifest.guide.name == "pairs.parquet"


def test_guide_prompt_is_what_ready_texts_begin_with(
    tmp_path: Path, pairs: list[tuple[str, str]], pairs_file: Path
) -> None:
    ready = write_vectors(tmp_path / "ready.parquet", pairs, ("title: ", "title: "))
    mapping = {"anchor": "anchor_vec", "positive": "positive_vec"}
    options = {"guide": ready, "vectors": mapping, "out": tmp_path / "store"}
    with pytest.raises(DataError, match=r"ready\.parquet lacks the vectors of \d+ of \d+ texts, the first is 'car'"):
        precompute(pairs_file, **options)
    store = precompute(pairs_file, **options, guide_prompt="title: ", overwrite=True)
    texts = store.texts[:]
    expected = directions_of([f"title: {text}" for text in texts])
    np.testing.assert_allclose(store.gather(torch.arange(len(texts))), expected, atol=1e-3)


def test_order_of_a_servers_answers_changes_nothing_in_the_store(
    server: EmbeddingStub, pairs_file: Path, tmp_path: Path
) -> None:
    options = {"guide": server.url, "guide_model": "m", "server_batch": 3}
    whole = precompute(pairs_file, out=tmp_path / "whole", **options)
    server.always = answering(lambda items: items[::-1])
    again = precompute(pairs_file, out=tmp_path / "again", **options)
    assert again.fingerprint == whole.fingerprint
    ids = torch.arange(whole.num_texts)
    assert torch.equal(again.gather(ids), whole.gather(ids))
    assert again.manifest.guide.name == "m"


DOCUMENTED = [
    line
    for line in (Path(__file__).parents[1] / "docs" / "guides.md").read_text(encoding="utf-8").splitlines()
    if "gistfast precompute" in line
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_commands_are_valid(line: str) -> None:
    source, *words = shlex.split(line.partition("gistfast precompute ")[2])
    options = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    numbers = {name: int(value) for name, value in options.items() if value.isdigit()}
    assert build(PrecomputeSettings, {"source": source, **options, **numbers}).out == "store"
