"""The benchmark of a step: contenders train, and what they are asked is what is measured."""

import json
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gistfast.errors import GistfastError
from gistfast.store import GuideStore
from gistfast.training import bench as step_bench
from gistfast.training.bench import CASES, Case, main
from gistfast.training.bench_contenders import OURS, PEERS, Task
from gistfast.training.bench_measure import measure_steps
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


def test_rows_come_from_a_file(guide_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"query": f"question {number}", "answer": f"answer {number}"}) for number in range(9)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    store = GuideStore.open(
        make_store(tmp_path / "stores", "minilm", guide_folder, 2, source=str(tmp_path / "own.jsonl"))
    )
    assert list(store.texts) == ["question 0", "answer 0", "question 1", "answer 1"]


def kill_itself(pipe: Connection, task: Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_contender_that_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gistfast.training.bench_measure.serve", kill_itself)
    task = Task("gistfast", tmp_path, tmp_path, tmp_path, 8, 32, 1, tmp_path)
    with pytest.raises(GistfastError, match="gistfast was killed, most likely for want of memory"):
        measure_steps([task], 1, warm_up=False)


@pytest.mark.slow
def test_students_of_every_seed_are_judged(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(
        "quality-2048", 8, ("gistfast cached", "gistfast tolerance 0.05"), 2, num_rows=40, max_length=16, seeds=2
    )
    monkeypatch.setattr(step_bench, "CASES", (case,))
    monkeypatch.setattr(step_bench, "demo_guide", lambda: tiny_student)
    monkeypatch.setattr("gistfast.training.bench_quality._LAYERS", (0,))
    assert main(["--cases", "quality-2048", "--threads", "1"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| gistfast")]
    assert [row[1].strip() for row in rows] == list(case.contenders)
    assert all(0 < float(value) <= 1 for row in rows for value in row[2].split(","))
