"""The benchmark of a step: contenders train, and what they are asked is what is measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gistfast.store import GuideStore
from gistfast.training import bench as step_bench
from gistfast.training.bench import CASES, Case, main
from gistfast.training.bench_contenders import OURS, PEERS
from gistfast.training.bench_rows import docstring_pairs, make_store

SMALL = Case("mixed-64", 8, ("mnrl", "gistfast"), steps=2, num_rows=24, max_length=32)


def test_contenders_are_known() -> None:
    assert {name for case in CASES for name in case.contenders} <= {*OURS, *PEERS}


def test_rows_are_docstrings_always_the_same() -> None:
    pairs = list(docstring_pairs(20))
    assert len(dict(pairs)) == 20
    assert pairs == list(docstring_pairs(20))
    assert all("\n" not in text for pair in pairs for text in pair)


def test_equal_texts_fill_the_length(guide_folder: Path, tmp_path: Path) -> None:
    store = GuideStore.open(make_store(tmp_path, "minilm", guide_folder, 4, equal_length=32))
    tokens = AutoTokenizer.from_pretrained(guide_folder)(list(store.texts), truncation=True, max_length=32)
    assert {len(ids) for ids in tokens["input_ids"]} == {32}


@pytest.mark.slow
def test_table_has_each_contender(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(SMALL, name="whole-64", steps=2, whole=True)
    monkeypatch.setattr(step_bench, "CASES", (SMALL, whole))
    monkeypatch.setattr(step_bench, "demo_guide", lambda: tiny_student)
    assert main(["--cases", "mixed-64", "whole-64", "--threads", "1", "--json", str(tmp_path / "found.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n| {name} | ") == 2 for name in SMALL.contenders)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [record["contender"] for record in found] == 2 * list(SMALL.contenders)
    assert all(len(record["seconds"]) == 1 for record in found if record["whole"])
    for record in found[: len(SMALL.contenders)]:
        assert len(record["seconds"]) == SMALL.steps
        assert all(0 < other < whole for other, whole in zip(record["other_s"], record["seconds"], strict=True))
        assert record["peak_mib"] > 100
