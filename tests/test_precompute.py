import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from store_cases import FullDisk, refusal_of

from gistfast.engines import shards
from gistfast.errors import (
    ConfigError,
    DataError,
    DependencyError,
    ModelError,
    StoreError,
    VectorError,
)
from gistfast.guides.guide import load_guide
from gistfast.neighbours.index import load_index, read_report
from gistfast.stages import precompute as stage
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore

Pairs = list[tuple[str, str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four texts or rows a shard, so that twelve rows make several, which are embedded from the first on."""
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 4)
    monkeypatch.setattr("gistfast.engines.shards.random.sample", lambda shards, count: list(shards))


def same(first: GuideStore, second: GuideStore) -> bool:
    """Whether two stores hold the same rows, texts, vectors and scores, bit for bit."""
    ids = torch.arange(first.num_texts)
    return (
        first.fingerprint == second.fingerprint
        and list(first.texts) == list(second.texts)
        and np.array_equal(first.rows, second.rows)
        and np.array_equal(first.held_out, second.held_out)
        and torch.equal(first.gather(ids), second.gather(ids))
        and np.array_equal(first.pair_scores, second.pair_scores)
        and read_report(first) == read_report(second)
    )


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_store_holds_what_the_guide_gives(pairs: Pairs, pairs_file: Path, guide_folder: Path, out: Path) -> None:
    store = precompute(pairs_file, guide=guide_folder, out=out, store_dtype="float32", dtype="float32")
    texts = list(store.texts)
    assert len(texts) == len({text for pair in pairs for text in pair})
    assert [tuple(texts[entry] for entry in row) for row in store.rows] == pairs
    expected = SentenceTransformer(str(guide_folder), device="cpu").encode(texts)
    vectors = store.gather(torch.arange(store.num_texts)).numpy()
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    scores = np.einsum("rg,rg->r", expected[store.rows[:, 0]], expected[store.rows[:, 1]])
    np.testing.assert_allclose(store.pair_scores[:, 0], scores, atol=2e-6)
    _, found = load_index(store).search(vectors, 1)
    assert found[:, 0].tolist() == list(range(store.num_texts))
    assert store.manifest.guide.dtype == "float32"
    assert store.manifest.data.columns == ("anchor", "positive")
    assert store.verify() == []


def test_each_distinct_text_is_embedded_once(
    pairs: Pairs, pairs_file: Path, tiny_student: Path, out: Path, embedded: list[str]
) -> None:
    precompute(pairs_file, guide=tiny_student, out=out)
    assert sorted(embedded) == sorted({text for pair in pairs for text in pair})


def test_half_precision_store_is_within_its_rounding(pairs_file: Path, tiny_student: Path, tmp_path: Path) -> None:
    half = precompute(pairs_file, guide=tiny_student, out=tmp_path / "half")
    full = precompute(pairs_file, guide=tiny_student, out=tmp_path / "full", store_dtype="float32")
    ids = torch.arange(half.num_texts)
    assert half.gather(ids).dtype == torch.float16
    torch.testing.assert_close(half.gather(ids).float(), full.gather(ids), atol=5e-4, rtol=0)


def test_prompts_reach_the_texts_of_their_role(tmp_path: Path, tiny_student: Path, out: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"anchor": "river", "positive": "river"}))
    store = precompute(source, guide=tiny_student, out=out, guide_prompt="d: ", query_prompt="q: ", dtype="float32")
    anchor, positive = store.rows[0].tolist()
    assert anchor != positive
    assert store.identity(torch.tensor([anchor])) == store.identity(torch.tensor([positive]))
    model = SentenceTransformer(str(tiny_student), device="cpu")
    expected = model.encode(["q: river", "d: river"], normalize_embeddings=True)
    vectors = store.gather(torch.tensor([anchor, positive])).float().numpy()
    np.testing.assert_allclose(vectors, expected, atol=5e-4)


def test_options_reach_the_record(pairs_file: Path, tiny_student: Path, out: Path) -> None:
    encoder = tiny_student.parent / "encoder"
    store = precompute(
        pairs_file,
        guide=encoder,
        out=out,
        pooling="cls",
        max_length=9,
        dtype="bfloat16",
        holdout=0.4,
        decode_with=str(tiny_student),
        index="none",
        tokens_per_batch=32,
        device="cpu",
    )
    guide, data = store.manifest.guide, store.manifest.data
    assert (guide.pooling, guide.max_length, guide.compute_dtype) == ("cls", 9, "bfloat16")
    assert guide.decoded_with is not None
    assert guide.decoded_with.startswith(f"{tiny_student.parent.name}/student@")
    assert data.holdout == 0.4
    assert 0 < store.held_out.sum() < store.num_rows
    assert not (out / "index").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("missing.jsonl", "missing.jsonl"),
        ("empty.jsonl", "empty.jsonl"),
        ("bad.jsonl", r"bad\.jsonl, row 2: .*positive"),
        ("columns.jsonl", "title"),
    ],
)
def test_bad_source_is_refused_and_leaves_nothing(tmp_path: Path, tiny_student: Path, source: str, reason: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    good, bad = {"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": ""}
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    (tmp_path / "columns.jsonl").write_text(json.dumps({"title": "a", "body": "b"}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=reason):
        precompute(tmp_path / source, guide=tiny_student, out=tmp_path / "store")
    assert sorted(tmp_path.iterdir()) == before


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, tiny_student: Path, out: Path) -> None:
    rows = [
        {"anchor": "a", "positive": "b"},
        {"anchor": "a", "positive": ""},
        {"anchor": "c", "positive": "d"},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    store = precompute(source, guide=tiny_student, out=out, on_bad_row="skip")
    assert (store.num_rows, store.manifest.data.skipped) == (2, 1)


def test_guide_that_is_no_model_is_refused_and_leaves_nothing(pairs_file: Path, tmp_path: Path, out: Path) -> None:
    with pytest.raises(ModelError, match="is not a model"):
        precompute(pairs_file, guide=tmp_path, out=out)
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        precompute(pairs_file, guide="nobody/nothing", out=out)
    assert not out.exists()


def test_unknown_option_names_the_nearest(pairs_file: Path, tiny_student: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_length'"):
        precompute(pairs_file, guide=tiny_student, out=out, max_lenght=3)


def test_missing_faiss_is_said_before_anything_is_embedded(
    pairs_file: Path, tiny_student: Path, out: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise DependencyError("pip install gistfast[cpu]")

    monkeypatch.setattr(stage, "import_faiss", absent)
    with pytest.raises(DependencyError):
        precompute(pairs_file, guide=tiny_student, out=out)
    assert not out.exists()
    assert not embedded
    assert precompute(pairs_file, guide=tiny_student, out=out, index="none").num_rows == 12


def test_store_that_exists_is_refused_untouched(pairs_file: Path, tiny_student: Path, out: Path) -> None:
    precompute(pairs_file, guide=tiny_student, out=out)
    before = state_of(out)
    with pytest.raises(StoreError, match="exists: go on with --resume, add rows with --append"):
        precompute(pairs_file, guide=tiny_student, out=out)
    assert state_of(out) == before


def test_resuming_a_finished_store_embeds_nothing(
    pairs_file: Path, tiny_student: Path, out: Path, embedded: list[str]
) -> None:
    precompute(pairs_file, guide=tiny_student, out=out)
    before = state_of(out)
    embedded.clear()
    precompute(pairs_file, guide=tiny_student, out=out, resume=True)
    assert not embedded
    assert state_of(out) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"query_prompt": "query: "}, "guide.query_prompt: store has '', asked for 'query: '"),
        ({"document_prompt": "doc: "}, "guide.document_prompt"),
        ({"pooling": "cls"}, "guide.pooling: store has 'mean', asked for 'cls'"),
        ({"max_length": 7}, "guide.max_length: store has 32, asked for 7"),
        ({"dtype": "float16"}, "guide.compute_dtype"),
        ({"store_dtype": "float32"}, "guide.dtype"),
        ({"decode_with": "STUDENT"}, "guide.decoded_with"),
        ({"guide": "OTHER"}, "guide.name"),
        ({"holdout": 0.5}, "data.holdout"),
        ({"source": "OTHER"}, "data.fingerprint"),
        ({"columns": {"anchor": "positive", "positive": "anchor"}}, "data.fingerprint"),
    ],
)
def test_store_of_something_else_is_refused_by_its_field(
    pairs_file: Path, tiny_student: Path, guide_folder: Path, out: Path, changes: dict[str, Any], field: str
) -> None:
    precompute(pairs_file, guide=tiny_student, out=out, index="none")
    before = state_of(out)
    other = pairs_file.with_name("other.jsonl")
    other.write_text(pairs_file.read_text().replace("violin", "viola"))
    options: dict[str, Any] = {"source": pairs_file, "guide": tiny_student, **changes}
    options["source"] = other if options["source"] == "OTHER" else pairs_file
    options["guide"] = guide_folder if options["guide"] == "OTHER" else tiny_student
    if "decode_with" in options:
        options["decode_with"] = str(tiny_student)
    with pytest.raises(StoreError, match=field):
        precompute(options.pop("source"), out=out, index="none", resume=True, **options)
    assert state_of(out) == before


def interrupt_at(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = shards.embed_by_role
    calls = iter(range(shard + 1))

    def embed(*arguments: Any) -> Any:
        if next(calls) == shard:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(shards, "embed_by_role", embed)


@pytest.mark.usefixtures("small_shards")
def test_interrupted_store_is_refused_until_resumed(
    pairs_file: Path, tiny_student: Path, tmp_path: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = precompute(pairs_file, guide=tiny_student, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            precompute(pairs_file, guide=tiny_student, out=tmp_path / "stopped")
    with pytest.raises(StoreError, match=r"is not finished: stage 1 has 2 of \d shards"):
        GuideStore.open(tmp_path / "stopped")
    embedded.clear()
    resumed = precompute(pairs_file, guide=tiny_student, out=tmp_path / "stopped", resume=True)
    assert embedded == list(whole.texts)[8:]
    assert same(resumed, whole)


def test_stop_while_reading_leaves_nothing_and_resume_begins(
    pairs_file: Path, tiny_student: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*ignored: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(out.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("gistfast.store.StoreWriter.add_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            precompute(pairs_file, guide=tiny_student, out=out)
    assert sorted(out.parent.iterdir()) == before
    assert precompute(pairs_file, guide=tiny_student, out=out, resume=True).num_rows == 12


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_full_at_any_write_loses_nothing(
    pairs_file: Path, tiny_student: Path, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = precompute(pairs_file, guide=tiny_student, out=tmp_path / "whole")
    # What is tested is the writing: the guide is loaded once.
    monkeypatch.setattr("gistfast.guides.open_guide.load_guide", cache(load_guide))
    monkeypatch.setattr(os, "fsync", FullDisk(0))
    again = {"overwrite": True} if overwrite else {"resume": True}
    refusals = []
    for call in range(1, 200, 3):
        out = tmp_path / f"store-{call}"
        if overwrite:
            precompute(pairs_file, guide=tiny_student, out=out, max_length=4, index="none")
        disk = FullDisk(call)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk)
            run = partial(precompute, pairs_file, guide=tiny_student, out=out, overwrite=overwrite)
            refusals.append(refusal_of(run))
        if disk.calls_left > 0:
            break
        if overwrite:
            assert GuideStore.open(out).num_rows == 12
        assert same(precompute(pairs_file, guide=tiny_student, out=out, **again), whole)
    assert refusals.pop() is None
    assert len(refusals) > 5
    assert all(line and "No space left on device" in line and "\n" not in line for line in refusals)


@pytest.mark.usefixtures("small_shards")
def test_interrupted_overwrite_leaves_the_old_store(
    pairs_file: Path, tiny_student: Path, out: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(pairs_file, guide=tiny_student, out=out)
    old = state_of(out)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            precompute(pairs_file, guide=tiny_student, out=out, max_length=4, overwrite=True)
    assert state_of(out) == old
    embedded.clear()
    new = precompute(pairs_file, guide=tiny_student, out=out, max_length=4, overwrite=True)
    assert embedded == list(new.texts)[8:]
    assert new.manifest.guide.max_length == 4
    assert new.verify() == []


@pytest.mark.usefixtures("small_shards")
def test_bad_vector_is_named_by_its_text_and_what_is_done_is_kept(
    pairs_file: Path, tiny_student: Path, tmp_path: Path, out: Path
) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    folder = tmp_path / "poisoned"
    model.save(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][model.tokenizer.convert_tokens_to_ids("violin")] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VectorError, match="text 'violin': the vector is not finite"):
        precompute(pairs_file, guide=folder, out=out)
    with pytest.raises(StoreError, match=r"stage 1 has [1-9] of \d shards"):
        GuideStore.open(out)


# The long file makes so many shards of eight texts.
NUM_LONG_SHARDS = 12

# Runs the command line itself with shards of that size.
COMMAND = """
import sys
import torch
from gistfast.store import ingest
torch.set_num_threads(1)
ingest.ROWS_PER_SHARD = 8
from gistfast.cli.main import main
sys.argv[0] = "gistfast"
main()
"""


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """Rows that keep the guide busy for a second or two."""
    path = tmp_path / "long.jsonl"
    words = ["river", "bank", "water", "bread", "violin", "sleep", "wheel", "stone", "cloud", "letter"]

    def text(seed: int) -> str:
        return " ".join(np.random.default_rng(seed).choice(words, 60))

    rows = ({"anchor": text(2 * row), "positive": text(2 * row + 1)} for row in range(4 * NUM_LONG_SHARDS))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def run_command() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `gistfast precompute` in a process of its own; none outlives the test."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMMAND, "precompute", *map(str, arguments)]
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        with process:
            pass


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_command_resumes_without_repeating_shards(
    long_file: Path,
    guide_folder: Path,
    out: Path,
    embedded: list[str],
    run_command: Callable[..., subprocess.Popen[str]],
    number: signal.Signals,
    code: int,
    processes: int,
) -> None:
    process = run_command(
        long_file, "--guide", guide_folder, "--out", out, "--processes", processes, "--dtype", "float32"
    )
    while process.poll() is None and len(list((out / "commits").glob("vectors-*.json"))) < 2:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    # No worker outlives the process that started it.
    assert not psutil.wait_procs(workers, timeout=60)[1]
    if number == signal.SIGINT:
        assert said.splitlines()[-1] == (
            "gistfast: stopped: the same command goes on from here, with --resume where it makes a new store"
        )
    done = {int(path.stem[-5:]) for path in (out / "commits").glob("vectors-*.json")}
    assert 2 <= len(done) < NUM_LONG_SHARDS
    with pytest.raises(StoreError, match=f"stage 1 has {len(done)} of {NUM_LONG_SHARDS} shards"):
        GuideStore.open(out)

    store = precompute(long_file, guide=guide_folder, out=out, resume=True, dtype="float32")
    texts = list(store.texts)
    assert sorted(embedded) == sorted(text for entry, text in enumerate(texts) if entry // 8 not in done)
    assert store.verify() == []
    expected = SentenceTransformer(str(guide_folder), device="cpu").encode(texts)
    vectors = store.gather(torch.arange(store.num_texts)).float().numpy()
    np.testing.assert_allclose(vectors, expected, atol=5e-4)
