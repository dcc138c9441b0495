import csv
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gistfast.errors import ConfigError, DataError
from gistfast.rows import json_array
from gistfast.rows.dataset import RowSource, read_rows

ROWS = [
    {"query": "What is a river?", "answer": "a large natural stream of water", "negative": "a road"},
    {"query": 'He said "go", twice', "answer": "line one\nline two", "negative": "naïve 漢字"},
    {"query": "  padded ", "answer": "café", "negative": "x"},
]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow_file(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=2)


def write_arrow_stream(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=2)


WRITERS = [
    ("rows.parquet", write_parquet),
    ("rows.jsonl", write_jsonl),
    ("lines.json", write_jsonl),
    ("array.json", write_json),
    ("rows.csv", write_csv),
    ("file.arrow", write_arrow_file),
    ("stream.arrow", write_arrow_stream),
]


def texts(source: RowSource, rows_per_batch: int = 10_000) -> list[tuple[str, ...]]:
    return [row for batch in source.batches(rows_per_batch) for row in zip(*batch.texts, strict=True)]


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
@pytest.mark.parametrize("rows_per_batch", [1, 2, 100])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[dict[str, Any]]], None], rows_per_batch: int
) -> None:
    write(tmp_path / name, ROWS)
    source = read_rows(tmp_path / name)
    assert source.columns == ("anchor", "positive", "negative_1")
    assert source.description == name
    assert texts(source, rows_per_batch) == [tuple(row.values()) for row in ROWS]
    assert source.num_rows in (None, 3)


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_missing_text_is_named_by_file_and_row(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[dict[str, Any]]], None]
) -> None:
    write(tmp_path / name, [*ROWS, {**ROWS[0], "answer": None}])
    # CSV cannot say None: it becomes the empty text.
    with pytest.raises(DataError, match=rf"^{name}, row 4: column 'answer' is (missing|empty): "):
        texts(read_rows(tmp_path / name), rows_per_batch=2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"anchor": "a"}', "column 'positive' is missing"),
        ('{"anchor": "a", "positive": ""}', "column 'positive' is empty"),
        ('{"anchor": " \\n", "positive": "p"}', "column 'anchor' is empty"),
        ('{"anchor": 7, "positive": "p"}', "column 'anchor' is int, expected text"),
        ('{"anchor": "a", "positive": ["p"]}', "column 'positive' is list, expected text"),
        ('{"anchor": "\\ud800", "positive": "p"}', "column 'anchor' is not valid Unicode"),
        ('{"anchor": "a", "posi', "is not valid JSON"),
        ('"a"', "is a JSON str, expected an object"),
    ],
)
def test_bad_row_stops_or_is_skipped_and_counted(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "pairs.jsonl"
    good = '{"anchor": "a", "positive": "p"}\n'
    path.write_text(good * 2 + line + "\n" + good, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        texts(read_rows(path))
    assert str(caught.value).startswith(f"pairs.jsonl, row 3: {problem}")
    assert "--on-bad-row skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    source = read_rows(path, on_bad_row="skip")
    assert texts(source) == [("a", "p")] * 3
    assert source.skipped == 1


def test_first_skipped_row_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"anchor": "a", "positive": "p"}\n' + '{"anchor": "a", "positive": ""}\n' * 3)
    with caplog.at_level(logging.WARNING):
        source = read_rows(path, on_bad_row="skip")
        list(source.batches(2))
        list(source.batches(2))
    assert source.skipped == 3
    lines = [record.message for record in caplog.records]
    assert lines == ["skipping bad rows, the first: pairs.jsonl, row 2: column 'positive' is empty"] * 2


def test_csv_row_of_another_length_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("anchor,positive\na,b\n\na,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"^pairs\.csv, row 2: has 3 fields, expected 2"):
        texts(read_rows(path))


def test_row_numbers_begin_anew_in_each_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", [ROWS[0], {**ROWS[1], "query": ""}])
    source = read_rows(tmp_path)
    with pytest.raises(DataError, match=r"^b\.jsonl, row 2: column 'query' is empty"):
        texts(source)
    write_jsonl(tmp_path / "b.jsonl", ROWS[:2])
    places = [(rows.origin, rows.first_row) for rows in source.batches(2)]
    assert places == [("a.jsonl", 1), ("a.jsonl", 3), ("b.jsonl", 1)]


@pytest.mark.parametrize("pattern", ["*.jsonl", "part-?.jsonl", "**/part-*.jsonl"])
def test_globs_take_files_in_order(tmp_path: Path, pattern: str) -> None:
    for number in (1, 0):
        write_jsonl(tmp_path / f"part-{number}.jsonl", [{"anchor": f"a{number}", "positive": "p"}])
    assert texts(read_rows(str(tmp_path / pattern))) == [("a0", "p"), ("a1", "p")]


def test_columns_are_mapped_or_found_by_name(tmp_path: Path) -> None:
    row = {"title": "t", "body": "b", "hard": "h", "sentence1": "s1", "sentence2": "s2", "negative_1": "n"}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    found = read_rows(tmp_path / "rows.jsonl")
    assert texts(found) == [("s1", "s2", "n")]
    mapped = read_rows(tmp_path / "rows.jsonl", columns={"positive": "body", "anchor": "title", "negative": "hard"})
    assert mapped.columns == ("anchor", "positive", "negative_1")
    assert texts(mapped) == [("t", "b", "h")]
    assert mapped.fingerprint != found.fingerprint


def test_several_negatives_keep_their_order(tmp_path: Path) -> None:
    row = {"query": "q", "pos": "p", "negative_1": "n1", "negative_2": "n2", "task_name": "t"}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    source = read_rows(tmp_path / "rows.jsonl")
    assert source.columns == ("anchor", "positive", "negative_1", "negative_2")
    assert texts(source) == [("q", "p", "n1", "n2")]


def test_unknown_columns_list_what_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"title": "t", "body": "b"}])
    with pytest.raises(DataError, match=r"has the columns title, body and none for the anchor \(anchor, query"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="none for the positive"):
        read_rows(tmp_path / "rows.jsonl", columns={"anchor": "title"})
    with pytest.raises(DataError, match="has no column 'text', it has title, body"):
        read_rows(tmp_path / "rows.jsonl", columns={"anchor": "text"})
    with pytest.raises(ConfigError, match="--columns names 'title', expected anchor"):
        read_rows(tmp_path / "rows.jsonl", columns={"title": "anchor"})


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", [{"query": "q", "text": "t"}])
    with pytest.raises(DataError, match=r"^b\.jsonl has the columns query, text and lacks answer, negative"):
        texts(read_rows(tmp_path))


MEDI = {
    "query": ["Represent the question;", "who?"],
    "pos": ["Represent the answer;", "she"],
    "neg": ["", "he"],
    "task_name": "nq",
}


@pytest.mark.parametrize("name", ["medi.json", "medi.jsonl", "medi.parquet"])
def test_medi_rows_lose_their_instructions(tmp_path: Path, name: str) -> None:
    dict(WRITERS, **{"medi.json": write_json, "medi.jsonl": write_jsonl, "medi.parquet": write_parquet})[name](
        tmp_path / name, [MEDI] * 2
    )
    assert texts(read_rows(tmp_path / name)) == [("who?", "she", "he")] * 2


def test_list_beside_a_plain_anchor_is_no_instruction(tmp_path: Path) -> None:
    # A list of two positives must not lose its first.
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["first positive", "second positive"]}])
    with pytest.raises(DataError, match="column 'pos' is list, expected text"):
        texts(read_rows(tmp_path / "rows.jsonl"))
    write_jsonl(tmp_path / "rows.jsonl", [{**MEDI, "pos": "she"}])
    with pytest.raises(DataError, match=r"column 'pos' is not \[instruction, text\] as the anchor is"):
        texts(read_rows(tmp_path / "rows.jsonl"))


def test_json_array_is_read_through_a_small_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK_CHARS", 7)
    rows = [{"anchor": "a" * length, "positive": "] , [{"} for length in (1, 5, 200)]
    write_json(tmp_path / "rows.json", rows)
    assert texts(read_rows(tmp_path / "rows.json")) == [tuple(row.values()) for row in rows]


@pytest.mark.parametrize("content", ['[{"anchor": "a", "positive": "p"}, {"anch', '[{"anchor": "a", "positive": "p"},'])
def test_json_array_that_is_cut_off_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=r"^rows\.json is not valid JSON: row 2: "):
        texts(read_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_damaged_file_is_one_clear_line(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[dict[str, Any]]], None]
) -> None:
    path = tmp_path / name
    write(path, ROWS * 100)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\xff" * 50
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        texts(read_rows(path))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", '{"anchor": "a", "posi', "row 1: is not valid JSON"),
        ("rows.jsonl", '{"anchor": "caf\xe9", "positive": "p"}', "row 1: is not valid JSON"),
        ("rows.json", "[1, 2]", "row 1: is a JSON int, expected an object"),
    ],
)
def test_file_whose_rows_are_all_bad_names_the_first(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=f"^{name}, {problem}.*: give one object a line, or one array of objects"):
        read_rows(tmp_path / name)


def test_source_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("anchor,positive\n")
    with pytest.raises(DataError, match=r"^rows\.csv has no rows: "):
        texts(read_rows(tmp_path / "rows.csv"))
    write_jsonl(tmp_path / "rows.jsonl", [{"anchor": "", "positive": "p"}])
    with pytest.raises(DataError, match=r"has no rows \(1 bad rows were skipped\)"):
        texts(read_rows(tmp_path / "rows.jsonl", on_bad_row="skip"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/pairs.jsonl", "is not there: expected a .parquet"),
        ("./pairs", "is not there"),
        ("*.jsonl", "matches no .parquet"),
        ("notes.txt", "ends in '.txt', expected one of .parquet"),
        (".", "holds files of several formats, .csv, .json"),
    ],
)
def test_source_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "a.csv", "b.json"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError) as caught:
        read_rows(source)
    assert source in str(caught.value)
    assert message in str(caught.value)


def test_unreachable_hub_is_one_clear_line() -> None:
    with pytest.raises(DataError, match="cannot load nobody/no-such-data as a data set: ") as caught:
        read_rows("nobody/no-such-data", subset="pair", split="train")
    assert "\n" not in str(caught.value)


def test_hub_options_are_refused_for_plain_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="--split train does not go with"):
        read_rows(tmp_path / "rows.jsonl", split="train")
    with pytest.raises(ConfigError, match="--revision main does not go with"):
        read_rows(tmp_path / "rows.jsonl", revision="main")


def test_fingerprint_follows_names_and_contents_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = read_rows(tmp_path / "rows.jsonl").fingerprint
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "rows.jsonl", ROWS)
    assert read_rows(tmp_path / "elsewhere").fingerprint == first
    write_jsonl(tmp_path / "elsewhere" / "rows.jsonl", ROWS[:2])
    assert read_rows(tmp_path / "elsewhere").fingerprint != first
    write_jsonl(tmp_path / "other.jsonl", ROWS)
    assert read_rows(tmp_path / "other.jsonl").fingerprint != first


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` caches out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_folder_saved_by_datasets_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "splits")
    expected = [tuple(row.values()) for row in ROWS]
    one = read_rows(tmp_path / "one")
    assert texts(one, 2) == expected
    assert one.num_rows == 3
    assert one.fingerprint == read_rows(tmp_path / "one").fingerprint
    assert texts(read_rows(tmp_path / "splits")) == expected
    assert texts(read_rows(tmp_path / "splits", split="dev")) == expected[1:2]
    with pytest.raises(DataError, match="has no split 'test', it has train, dev"):
        read_rows(tmp_path / "splits", split="test")
    with pytest.raises(ConfigError, match="--split dev does not go with"):
        read_rows(tmp_path / "one", split="dev")


@pytest.mark.usefixtures("cache")
def test_local_copy_of_a_hub_repository_is_read_by_config_and_split(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "pair").mkdir(parents=True)
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: pair\n  data_files:\n  - split: train\n    path: pair/train.parquet\n"
        "  - split: dev\n    path: pair/dev.parquet\n---\n"
    )
    write_parquet(repository / "pair" / "train.parquet", ROWS)
    write_parquet(repository / "pair" / "dev.parquet", ROWS[:1])
    source = read_rows(repository, subset="pair", split="dev")
    assert source.description.endswith("repository (pair, dev)")
    assert texts(source) == [tuple(ROWS[0].values())]
    assert texts(read_rows(repository, subset="pair")) == [tuple(row.values()) for row in ROWS]
    with pytest.raises(DataError, match=r"cannot load .*repository as a data set: "):
        read_rows(repository, subset="triplet")


def test_tasks_are_found_by_name_or_mapped_and_follow_their_rows(tmp_path: Path) -> None:
    rows = [("a", "b", "qa"), ("", "b", "bad"), ("c", "d", 7), ("e", "f", None)]
    named = [{"anchor": anchor, "positive": positive, "task": task} for anchor, positive, task in rows]
    mapped = [{"anchor": anchor, "positive": positive, "set": task} for anchor, positive, task in rows]
    for name, records, columns in (("named", named, None), ("mapped", mapped, {"task": "set"})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        (batch,) = read_rows(path, columns=columns, on_bad_row="skip").batches()
        assert batch.tasks == ["qa", "7", None]
        assert batch.texts[0] == ["a", "c", "e"]
