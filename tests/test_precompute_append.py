"""Stage 1 on a store that is there: rows appended, guides added, through the function and the command line."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gistfast.errors import ConfigError, StoreError
from gistfast.neighbours.index import load_index
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore

Pairs = list[tuple[str, str]]


def write_pairs(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in rows), encoding="utf-8")
    return path


@pytest.fixture
def halves(pairs: Pairs, tmp_path: Path) -> tuple[Path, Path]:
    """The pairs in two files; the second begins with a row of the first."""
    return write_pairs(tmp_path / "first.jsonl", pairs[:7]), write_pairs(tmp_path / "second.jsonl", pairs[6:])


def test_appended_store_is_that_of_all_rows(
    halves: tuple[Path, Path], pairs_file: Path, guide_folder: Path, tmp_path: Path
) -> None:
    for half in halves:
        grown = precompute(half, guide=guide_folder, out=tmp_path / "grown", append=True, store_dtype="float32")
    whole = precompute(pairs_file, guide=guide_folder, out=tmp_path / "whole", store_dtype="float32")
    ids = torch.arange(whole.num_texts)
    assert list(grown.texts) == list(whole.texts)
    assert np.array_equal(grown.rows, whole.rows)
    assert (grown.gather(ids) - whole.gather(ids)).abs().max() < 1e-5
    assert np.abs(grown.pair_scores - whole.pair_scores).max() < 1e-5
    assert load_index(grown).ntotal == whole.num_texts
    assert grown.verify() == []


def test_append_takes_the_share_that_the_store_holds_out(
    halves: tuple[Path, Path], pairs_file: Path, tiny_student: Path, tmp_path: Path
) -> None:
    precompute(halves[0], guide=tiny_student, out=tmp_path / "grown", holdout=0.4)
    grown = precompute(halves[1], guide=tiny_student, out=tmp_path / "grown", append=True)
    whole = precompute(pairs_file, guide=tiny_student, out=tmp_path / "whole", holdout=0.4)
    assert np.array_equal(grown.held_out, whole.held_out)


def test_append_with_another_prompt_is_refused_by_its_field(
    halves: tuple[Path, Path], tiny_student: Path, tmp_path: Path
) -> None:
    precompute(halves[0], guide=tiny_student, out=tmp_path / "store")
    with pytest.raises(StoreError, match=r"guide\.query_prompt: store has '', asked for 'search: '"):
        precompute(halves[1], guide=tiny_student, out=tmp_path / "store", append=True, query_prompt="search: ")


def test_two_guides_score_as_their_mean(
    pairs_file: Path, guide_folder: Path, tiny_student: Path, tmp_path: Path
) -> None:
    kinds = {"store_dtype": "float32", "index": "none"}
    scores = [
        precompute(pairs_file, guide=guide, out=tmp_path / f"alone-{number}", **kinds).pair_scores
        for number, guide in enumerate((guide_folder, tiny_student))
    ]
    precompute(pairs_file, guide=guide_folder, out=tmp_path / "both", **kinds)
    both = precompute(pairs_file, guide=tiny_student, out=tmp_path / "both", add_guide=True, guide_weight=3.0, **kinds)
    assert np.abs(both.pair_scores - (scores[0] + 3 * scores[1]) / 4).max() < 1e-6


def test_rows_of_several_guides_appear_when_each_has_embedded_them(
    halves: tuple[Path, Path], guide_folder: Path, tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "store"
    precompute(halves[0], guide=guide_folder, out=out)
    precompute(halves[0], guide=tiny_student, out=out, add_guide=True)
    with caplog.at_level(logging.WARNING):
        unfinished = precompute(halves[1], guide=tiny_student, out=out, append=True)
    assert unfinished.num_rows == 7
    assert "still lacks 1 shards of the new texts: run the same command with that guide" in caplog.text
    assert precompute(halves[1], guide=guide_folder, out=out, append=True).num_rows == 12
    assert GuideStore.open(out).verify() == []


def test_weight_without_an_added_guide_is_refused(pairs_file: Path, tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --add-guide"):
        precompute(pairs_file, guide=tiny_student, out=tmp_path / "store", guide_weight=2.0)
