"""Stage 1 with mined negatives, through the function: made, kept over an append, made anew for other settings."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from gistfast.errors import ConfigError
from gistfast.neighbours import mining
from gistfast.neighbours.index import read_report
from gistfast.stages.precompute import precompute

Pairs = list[tuple[str, str]]


def write_pairs(path: Path, pairs: Pairs) -> Path:
    path.write_text("".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in pairs), encoding="utf-8")
    return path


def test_negatives_are_mined_where_they_are_asked_for(pairs_file: Path, guide_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    plain = precompute(pairs_file, guide=guide_folder, out=out)
    assert not (out / "mined").exists()
    store = precompute(pairs_file, guide=guide_folder, out=out, resume=True, negatives=3)
    assert store.fingerprint == plain.fingerprint
    assert store.mined.negatives.shape == (12, 3)
    # The guide does not know that "staff of life" is bread; of the two meanings of "bank" it prefers the first.
    assert store.mined.positive_rank.tolist() == [1] * 9 + [7, 1, 4]
    assert (store.mined.negatives[9] == -1).all()
    # The other meaning of "bank" is no false negative, but what else comes before the second one is.
    assert store.mined.false_negatives.tolist() == [0] * 9 + [6, 0, 2]
    texts = np.array(list(store.texts))
    anchors = texts[store.rows[:, 0]]
    for anchor, ids in zip(anchors, store.mined.negatives, strict=True):
        negatives = texts[ids[ids >= 0]]
        known = texts[store.rows[anchors == anchor, 1]]
        assert not {*known, anchor} & set(negatives)
    assert (store.mined.negative_scores <= store.pair_scores * 0.95 + 1e-6).all()


def test_append_mines_the_grown_store_as_it_was_mined_before(pairs: Pairs, tiny_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    options = {"guide": tiny_student, "out": out}
    mining_options = {"negatives": 2, "negatives_margin": 0.001, "negatives_margin_strategy": "absolute"}
    old = precompute(write_pairs(tmp_path / "first.jsonl", pairs[:7]), **options, **mining_options)
    old_kind = old.mined_kind
    new = precompute(write_pairs(tmp_path / "second.jsonl", pairs[7:]), **options, append=True)
    whole = precompute(
        write_pairs(tmp_path / "all.jsonl", pairs), guide=tiny_student, out=tmp_path / "whole", **mining_options
    )
    assert new.mined.negatives.tolist() == whole.mined.negatives.tolist()
    assert new.mined.positive_rank.tolist() == whole.mined.positive_rank.tolist()
    assert not (out / old_kind).exists()
    assert len(list((out / "index").iterdir())) == 2
    assert read_report(new) is not None
    assert new.verify() == []


def test_other_settings_make_them_anew_and_the_same_ones_nothing(
    pairs_file: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"guide": tiny_student, "out": tmp_path / "store", "index": "none", "resume": True}
    precompute(pairs_file, **options, negatives=2)
    assert precompute(pairs_file, **options, negatives=3).mined.negatives.shape == (12, 3)
    relaxed = precompute(pairs_file, **options, negatives=3, negatives_margin=0.0)
    assert len(list((tmp_path / "store" / "mined").iterdir())) == 2
    monkeypatch.setattr(mining, "_mine_shard", lambda *ignored: pytest.fail("mined again"))
    monkeypatch.setattr(mining, "finish_mined", lambda *ignored: pytest.fail("written again"))
    again = precompute(pairs_file, **options)
    assert again.mined.negatives.tolist() == relaxed.mined.negatives.tolist()


def test_margin_without_negatives_is_refused(pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong to mined negatives: give --negatives"):
        precompute(pairs_file, guide="guide", out=tmp_path / "store", negatives_margin=0.1)


def test_index_memory_bounds_the_index(
    pairs_file: Path,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("gistfast.neighbours.index_types.FLAT_AT_MOST", 5)
    options = {"guide": tiny_student, "out": tmp_path / "store"}
    with pytest.raises(ConfigError, match="--index pq learns its codes from 10,000 vectors at least"):
        precompute(pairs_file, **options, index_memory=1e-6)
    # Said before hours of embedding, not after them.
    assert not (tmp_path / "store" / "vectors").exists()
    with caplog.at_level(logging.INFO):
        precompute(pairs_file, **options, resume=True, index_memory=0.001)
    assert "index of 18 vectors: ivf" in caplog.text
