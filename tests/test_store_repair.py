"""What is bad in a store is made again, and nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_servers import embedding_server, well
from store_cases import KINDS, FullDisk, commit_file, contents, file_of, files_of, flip_bit, refusal_of, shard_file

from gistfast.errors import ConfigError, StoreError
from gistfast.guides.guide import ModelGuide, load_guide
from gistfast.settings.store import StoreRepairSettings
from gistfast.stages.precompute import precompute
from gistfast.stages.repair import Repaired, repair
from gistfast.store import GuideStore
from gistfast.store.garbage import collect_garbage
from gistfast.store.plan import read_plan
from gistfast.store.verify import check_store

Pairs = list[tuple[str, str]]
Mend = Callable[..., Repaired]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards from few rows, and no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 4)


@pytest.fixture
def real(pairs_file: Path, tiny_student: Path, tmp_path: Path) -> Path:
    return precompute(pairs_file, guide=tiny_student, out=tmp_path / "real", holdout=0.3, negatives=2).path


@pytest.fixture
def mend(real: Path, tiny_student: Path) -> Mend:
    return lambda **options: repair(real, **{"guide": tiny_student, **options})


def test_sound_store_is_left_alone(real: Path, mend: Mend) -> None:
    before = files_of(real)
    assert mend() == Repaired()
    assert files_of(real) == before


@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
@pytest.mark.parametrize("kind", [*KINDS, "index"])
def test_bad_files_are_made_again_bit_for_bit_and_no_others(
    real: Path, mend: Mend, pairs_file: Path, embedded: list[str], kind: str, damage: str
) -> None:
    before, path = files_of(real), file_of(real, kind)
    texts = GuideStore.open(real).texts[4:8]
    if damage == "bit":
        flip_bit(path, path.stat().st_size // 2)
    elif damage == "cut":
        os.truncate(path, 100)
    else:
        path.unlink()
    done = mend(source=pairs_file)
    assert (len(done.mended), done.left) == (1, [])
    assert check_store(real, deep=True).problems == []
    assert embedded == (texts if kind == "vectors" else [])
    after = files_of(real)
    assert len(after) == len(before)
    changed = {name.split("/")[0] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # The index keeps its name.
    assert changed <= {"index"} if kind == "index" else changed == {"commits", kind}
    contents = {(name.rpartition("/")[0], data) for name, (_, data) in before.items() if "commits" not in name}
    assert {(name.rpartition("/")[0], data) for name, (_, data) in after.items() if "commits" not in name} == contents


@pytest.mark.parametrize("text", [None, "", '{"file": 7}'])
@pytest.mark.parametrize("kind", KINDS)
def test_lost_and_damaged_commits_are_made_again(
    real: Path, mend: Mend, pairs_file: Path, kind: str, text: str | None
) -> None:
    seen = contents(GuideStore.open(real)), GuideStore.open(real).pair_scores.tolist()
    path, old = commit_file(real, kind, 1), file_of(real, kind)
    path.unlink() if text is None else path.write_text(text)
    done = mend(source=pairs_file)
    assert done.left == []
    assert check_store(real, deep=True).problems == []
    mended = GuideStore.open(real)
    assert (contents(mended), mended.pair_scores.tolist()) == seen
    # Nothing says that the old file was sound: it waits to be cleared up.
    assert [item.path for item in collect_garbage(real, now=True).garbage] == [old]


@pytest.mark.parametrize("kind", KINDS)
def test_commit_that_names_the_file_of_another_shard_leaves_that_alone(
    real: Path, mend: Mend, pairs_file: Path, kind: str
) -> None:
    shutil.copy(commit_file(real, kind, 2), commit_file(real, kind, 1))
    assert mend(source=pairs_file).left == []
    assert check_store(real, deep=True).problems == []


def test_scores_and_index_follow_vectors_whose_bits_have_changed(
    real: Path, mend: Mend, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [shard_file(real, "scores", shard) for shard in range(3)]
    # Where it is lost what the bits were, the index knows.
    commit_file(real, "vectors", 1).unlink()
    assert mend().mended == [f"{GuideStore.open(real).manifest.vectors[0]} shard 1"]
    file_of(real, "vectors").unlink()
    original = ModelGuide.embed
    monkeypatch.setattr(ModelGuide, "embed", lambda *given: original(*given) * np.float32(1 + 1e-3))
    assert mend().mended[1:] == ["index"]
    assert not any(path.exists() for path in scores)
    store = GuideStore.open(real)
    assert store.verify(deep=False) == []
    anchors, positives = (store.gather(torch.from_numpy(store.rows[:, column])).float() for column in (0, 1))
    expected = torch.nn.functional.cosine_similarity(anchors, positives)
    np.testing.assert_allclose(store.pair_scores[:, 0], expected, atol=1e-6)


def test_scores_of_vectors_that_were_replaced_are_found_and_made_again(
    real: Path, mend: Mend, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = GuideStore.open(real).pair_scores.copy()
    file_of(real, "vectors").unlink()
    original = ModelGuide.embed
    with monkeypatch.context() as patch:
        patch.setattr(ModelGuide, "embed", lambda *given: np.roll(original(*given), 1, axis=1))
        # Stopped between vectors and scores, which are whole and know nothing of it.
        patch.setattr("gistfast.stages.repair.score_pairs", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mend()
    problems = check_store(real, deep=True).problems
    assert any("has a score of" in problem and "where the vectors give" in problem for problem in problems)
    assert any(line.startswith("scores/") for line in mend().mended)
    assert check_store(real, deep=True).problems == []
    assert not np.allclose(GuideStore.open(real).pair_scores, before, atol=1e-4)


def test_readers_keep_what_they_have_and_find_what_is_new(real: Path, mend: Mend) -> None:
    late, early = GuideStore.open(real), GuideStore.open(real)
    seen = contents(early)
    flip_bit(file_of(real, "vectors"), 600)
    mend()
    assert contents(late) == seen
    assert contents(early)[:2] == seen[:2]


def test_reader_that_meets_a_repair_takes_the_new_file(real: Path, mend: Mend, monkeypatch: pytest.MonkeyPatch) -> None:
    from gistfast.store import shards

    original, once = shards.read_commit, [None]

    def read_commit(*given: Any) -> Any:
        commit = original(*given)
        if "vectors" in given[1] and given[2] == 1 and once:
            once.clear()
            flip_bit(file_of(real, "vectors"), 600)
            mend()
        return commit

    seen = contents(GuideStore.open(real))
    monkeypatch.setattr(shards, "read_commit", read_commit)
    assert contents(GuideStore.open(real)) == seen
    assert not once


def test_repair_that_stops_anywhere_goes_on(
    real: Path, mend: Mend, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is tested is the writing: the guide is loaded once.
    monkeypatch.setattr("gistfast.guides.open_guide.load_guide", cache(load_guide))
    sound, refusals = contents(GuideStore.open(real)), []
    whole = real.rename(tmp_path / "whole")
    for call in range(1, 100, 3):
        shutil.rmtree(real, ignore_errors=True)
        shutil.copytree(whole, real)
        for kind in KINDS:
            flip_bit(file_of(real, kind), 500)
        disk = FullDisk(call)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk)
            refusals.append(refusal_of(lambda: mend(source=pairs_file)))
        assert mend(source=pairs_file).left == []
        assert check_store(real, deep=True).problems == []
        assert contents(GuideStore.open(real)) == sound
        if disk.calls_left > 0:
            break
    assert refusals.pop() is None
    assert len(refusals) > 5
    assert all(line and "No space left on device" in line and "\n" not in line for line in refusals)


def test_other_guide_is_refused_by_the_field_that_differs(
    real: Path, mend: Mend, guide_folder: Path, tiny_student: Path
) -> None:
    file_of(real, "vectors").unlink()
    before = files_of(real)
    (left,) = mend(guide=guide_folder).left
    assert f"{GuideStore.open(real).manifest.vectors[0]} shard 1: " in left
    assert "is not the guide that made it: guide.name: store has" in left
    (left,) = mend(guide=None).left
    assert "cannot be loaded by its name" in left
    assert left.endswith("give --guide")
    (left,) = mend(decode_with=str(tiny_student)).left
    assert "guide.decoded_with: store has None" in left
    assert files_of(real) == before


def test_prompts_and_pooling_come_from_the_store(pairs_file: Path, tiny_student: Path, tmp_path: Path) -> None:
    encoder = tiny_student.parent / "encoder"
    options: dict[str, Any] = {"pooling": "cls", "max_length": 9, "dtype": "bfloat16", "query_prompt": "query: "}
    store = precompute(pairs_file, guide=encoder, out=tmp_path / "store", index="none", **options)
    seen = contents(store)
    file_of(store.path, "vectors").unlink()
    assert repair(store.path, guide=encoder).left == []
    assert contents(GuideStore.open(store.path)) == seen


def test_bad_texts_and_rows_need_their_source(real: Path, mend: Mend, pairs_file: Path) -> None:
    for kind in ("texts", "rows", "vectors"):
        file_of(real, kind).unlink()
    left = mend().left
    fingerprint = GuideStore.open(real).manifest.data.fingerprint
    for line in left[:2]:
        assert f"give --source with pairs.jsonl (fingerprint {fingerprint}), restore it, or make the store" in line
    assert left[2].endswith("mend its texts first")
    other = pairs_file.with_name("other.jsonl")
    other.write_text(pairs_file.read_text().replace("violin", "viola"))
    with pytest.raises(StoreError, match=r"other\.jsonl \(\w+\) is not what the bad texts and rows .* came from"):
        mend(source=other)
    assert mend(source=pairs_file).left == []
    assert check_store(real, deep=True).problems == []


def test_each_segment_is_read_from_its_own_source(
    real: Path, mend: Mend, pairs: Pairs, pairs_file: Path, tiny_student: Path
) -> None:
    more = pairs_file.with_name("more.jsonl")
    rows = [(f"more {anchor}", positive, "b") for anchor, positive in pairs] + [(*pairs[0], "a")]
    names = ("anchor", "positive", "task")
    more.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    store = precompute(more, guide=tiny_student, out=real, append=True)
    assert store.manifest.data.segments[1].repeated == 1
    seen, tasks = contents(store), store.task_of_rows.tolist()
    for shard in (0, 3):
        shard_file(real, "rows", shard).unlink()
        shard_file(real, "texts", shard + 2).unlink()
    done = mend(source=more)
    assert [line.rpartition("/")[2].partition(":")[0] for line in done.left][:2] == [
        "texts shard 2",
        "rows shard 0",
    ]
    assert done.left[-1].endswith("mend the texts and rows that came in before it first")
    assert len(mend(source=pairs_file).mended) == 2
    assert mend(source=more).left == []
    mended = GuideStore.open(real)
    assert mended.verify() == []
    assert (contents(mended), mended.task_of_rows.tolist()) == (seen, tasks)


def test_each_guide_mends_its_own_vectors(
    real: Path, mend: Mend, pairs_file: Path, tiny_student: Path, guide_folder: Path
) -> None:
    both = precompute(pairs_file, guide=guide_folder, out=real, add_guide=True, holdout=0.3)
    seen = contents(both)
    bad = [next((real / kind).glob("00001-*")) for kind in both.manifest.vectors]
    for path in bad:
        flip_bit(path, 600)
    done = mend(guide=guide_folder)
    assert (done.mended, len(done.left)) == ([f"{both.manifest.vectors[1]} shard 1"], 1)
    assert mend(guide=tiny_student).left == []
    assert contents(GuideStore.open(real)) == seen


def test_unfinished_store_is_mended_too(
    real: Path, mend: Mend, pairs_file: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = pairs_file.with_name("more.jsonl")
    more.write_text(pairs_file.read_text().replace('"anchor": "', '"anchor": "more '))
    with monkeypatch.context() as patch:
        patch.setattr("gistfast.stages.precompute.score_pairs", lambda store: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            precompute(more, guide=tiny_student, out=real, append=True)
    plan = read_plan(real)
    last = len(plan.plan.texts) - 1
    shard_file(real, "vectors", last).unlink()
    shard_file(real, "vectors", 0).unlink()
    assert mend().mended == [f"{plan.vectors[0]} shard {shard}" for shard in (0, last)]
    store = precompute(more, guide=tiny_student, out=real, resume=True)
    assert store.num_rows == 24
    assert store.verify() == []


def test_options_of_a_source_need_one() -> None:
    with pytest.raises(ConfigError, match="belong to --source"):
        StoreRepairSettings(store="s", columns={"anchor": "a"})


def test_server_mends_what_it_made(
    real: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with embedding_server() as server:
        store = precompute(pairs_file, guide=server.url, guide_model="m", out=tmp_path / "served")
        seen = contents(store)
        shard_file(store.path, "vectors", 0).unlink()
        (left,) = repair(store.path).left
        assert left.endswith("the guide m was no model: give --guide with its address or file")
        assert repair(store.path, guide=server.url).left == []
        assert contents(GuideStore.open(store.path)) == seen
        shard_file(store.path, "vectors", 0).unlink()
        server.always = lambda handler, texts: well(handler, [f"{text}?" for text in texts])
        (left,) = repair(store.path, guide=server.url).left
        assert "that guide m no longer gives" in left


def test_ready_vectors_are_taken_again(pairs_file: Path, pairs: Pairs, tmp_path: Path) -> None:
    texts = sorted({text for pair in pairs for text in pair})
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(tmp_path / "own.npy", np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32))
    given = {"guide": tmp_path / "texts.jsonl", "vectors": {"text": "own.npy"}}
    store = precompute(pairs_file, out=tmp_path / "ready", **given)
    seen = contents(store)
    file_of(store.path, "vectors").unlink()
    assert repair(store.path, **given).left == []
    assert contents(GuideStore.open(store.path)) == seen
