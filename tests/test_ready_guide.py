import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_servers import directions_of, vector_of

from gistfast.errors import DataError, VectorError
from gistfast.guides.batch_done import BatchDone
from gistfast.guides.ready_guide import load_ready_guide

TEXTS = [f"text {number}" for number in range(23)]


def vectors_of(texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return np.stack([vector_of(text) for text in texts])


def lists(values: Any, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([list(row) for row in values], kind or pa.list_(pa.float32()))


def tensors(values: Any) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def write(path: Path, rows_per_group: int = 5, **columns: Any) -> str:
    arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=rows_per_group)
    return str(path)


def write_lines(path: Path, **columns: Sequence[Any]) -> str:
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "column",
    [
        lists,
        tensors,
        lambda values: lists(values, pa.large_list(pa.float64())),
        lambda values: lists(values, pa.list_(pa.float32(), 8)),
        lambda values: lists(values.astype(np.float16), pa.list_(pa.float16())),
    ],
)
@pytest.mark.parametrize("at_once", [2, 4096])
def test_column_of_vectors_is_looked_up_by_text(
    tmp_path: Path, column: Callable[[Any], pa.Array], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.guides.ready_vectors.ROWS_AT_ONCE", at_once)
    guide = load_ready_guide(write(tmp_path / "vectors.parquet", text=TEXTS, embedding=column(vectors_of(TEXTS))))
    wanted = [TEXTS[number] for number in (22, 3, 4, 4, 0, 9, 10, 14, 21)]
    vectors = guide.embed(wanted, "query")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, directions_of(wanted), atol=1e-3)
    assert guide.embed([], "query").shape == (0, 8)


def test_files_of_a_glob_are_one_guide(tmp_path: Path) -> None:
    for number in range(3):
        texts = TEXTS[number::3]
        write(tmp_path / f"{number}.parquet", sentence=texts, vector=lists(vectors_of(texts)))
    for source in (tmp_path / "*.parquet", tmp_path):
        guide = load_ready_guide(str(source))
        np.testing.assert_allclose(guide.embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet", "texts.csv"])
def test_array_beside_the_texts_is_found(tmp_path: Path, name: str, dtype: str) -> None:
    np.save(tmp_path / "texts.npy", vectors_of(TEXTS).astype(dtype))
    if name.endswith("jsonl"):
        write_lines(tmp_path / name, text=TEXTS)
    elif name.endswith("csv"):
        (tmp_path / name).write_text("\n".join(["text", *TEXTS]))
    else:
        write(tmp_path / name, text=TEXTS)
    guide = load_ready_guide(str(tmp_path / name))
    np.testing.assert_allclose(guide.embed(TEXTS[::-1], "query"), directions_of(TEXTS[::-1]), atol=1e-3)
    assert guide.info.name == name


@pytest.mark.parametrize("at", ["beside", "from the working folder", "absolute"])
def test_pairs_have_vectors_for_each_column(tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, positives = TEXTS[:4], TEXTS[4:8]
    folder = tmp_path / "pairs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    np.save(folder / "a.npy", vectors_of(anchors))
    np.save(folder / "p.npy", vectors_of(positives))
    prefix = {"beside": "", "from the working folder": "pairs/", "absolute": f"{folder}/"}[at]
    source = write_lines(folder / "pairs.jsonl", anchor=anchors, positive=positives)
    guide = load_ready_guide(source, vectors={"anchor": f"{prefix}a.npy", "positive": f"{prefix}p.npy"})
    wanted = [positives[2], anchors[3], positives[0]]
    np.testing.assert_allclose(guide.embed(wanted, "document"), directions_of(wanted), atol=1e-6)


def test_columns_of_vectors_are_mapped(tmp_path: Path) -> None:
    anchors, positives = TEXTS[:4], TEXTS[4:8]
    source = write(
        tmp_path / "pairs.parquet",
        anchor=anchors,
        positive=positives,
        anchor_vec=lists(vectors_of(anchors)),
        positive_vec=lists(vectors_of(positives)),
    )
    guide = load_ready_guide(source, vectors={"anchor": "anchor_vec", "positive": "positive_vec"})
    wanted = [*positives, *anchors]
    np.testing.assert_allclose(guide.embed(wanted, "query"), directions_of(wanted), atol=1e-6)


def test_text_without_a_vector_is_named_and_others_counted(tmp_path: Path) -> None:
    guide = load_ready_guide(write(tmp_path / "v.parquet", text=TEXTS, embedding=lists(vectors_of(TEXTS))))
    for _ in range(2):
        with pytest.raises(DataError, match=r"v\.parquet lacks the vectors of 2 of 4 texts, the first is 'river': add"):
            guide.embed([TEXTS[0], "river", TEXTS[1], "violin"], "query")
    guide.embed(TEXTS, "query")


def test_texts_are_the_same_when_unicode_says_so(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    guide = load_ready_guide(write(tmp_path / "v.parquet", text=[composed], embedding=lists(vectors_of(["x"]))))
    np.testing.assert_allclose(guide.embed([decomposed], "query"), directions_of(["x"]), atol=1e-6)


def test_prompts_are_looked_up_with_their_texts(tmp_path: Path) -> None:
    texts = ["query: river", "passage: river"]
    source = write(tmp_path / "v.parquet", text=texts, embedding=lists(vectors_of(texts)))
    guide = load_ready_guide(source, query_prompt="query: ", document_prompt="passage: ")
    np.testing.assert_allclose(guide.embed(["river"], "query"), directions_of(texts[:1]), atol=1e-6)
    np.testing.assert_allclose(guide.embed(["river"], "document"), directions_of(texts[1:]), atol=1e-6)
    with pytest.raises(DataError, match="the first is 'query: rover'"):
        guide.embed(["rover"], "query")


def test_same_text_may_have_nearly_the_same_vector_again(tmp_path: Path) -> None:
    vectors = vectors_of([*TEXTS, *TEXTS])
    vectors[len(TEXTS) :] *= 3
    vectors += np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32) * 1e-3
    source = write(tmp_path / "v.parquet", text=[*TEXTS, *TEXTS], embedding=lists(vectors))
    np.testing.assert_allclose(load_ready_guide(source).embed(TEXTS, "query"), directions_of(TEXTS), atol=1e-2)


@pytest.mark.parametrize("pairs_at_once", [1, 16_384])
def test_different_vectors_of_one_text_are_refused(
    tmp_path: Path, pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.guides.ready_guide.PAIRS_AT_ONCE", pairs_at_once)
    anchors, positives = [*TEXTS[:5], TEXTS[7]], [*TEXTS[5:10], "river"]
    vectors = vectors_of(positives)
    vectors[2] = vector_of("another")
    source = write(tmp_path / "v.parquet", a=anchors, p=positives, av=lists(vectors_of(anchors)), pv=lists(vectors))
    message = (
        r"v\.parquet, row 6, column 'av' and v\.parquet, row 3, column 'pv' hold different vectors "
        r"\(cosine [-0-9.]+\) for the text 'text 7': keep one"
    )
    with pytest.raises(DataError, match=message):
        load_ready_guide(source, vectors={"a": "av", "p": "pv"})


@pytest.mark.parametrize(
    ("value", "error", "what"),
    [
        (None, DataError, "holds no vector: mend or remove the row"),
        ([], DataError, "holds no vector: mend or remove the row"),
        ([1.0, 2.0], DataError, "is 2 wide, the first vector 8"),
        ([0.0] * 8, VectorError, "the vector has length 0"),
        ([float("nan")] * 8, VectorError, "the vector is not finite"),
        ([None] * 8, VectorError, "the vector is not finite"),
    ],
)
def test_bad_vector_is_named_by_its_row(tmp_path: Path, value: Any, error: type[Exception], what: str) -> None:
    vectors: list[Any] = [list(vector) for vector in vectors_of(TEXTS)]
    vectors[12] = value
    source = write(tmp_path / "v.parquet", text=TEXTS, embedding=pa.array(vectors, pa.list_(pa.float32())))
    with pytest.raises(error, match=f"v.parquet, row 13, column 'embedding':? {what}"):
        load_ready_guide(source).embed(TEXTS, "query")


@pytest.mark.parametrize(("value", "what"), [(0.0, "has length 0"), (np.inf, "is not finite"), (1e39, "is not finite")])
def test_bad_row_of_an_array_is_named(tmp_path: Path, value: float, what: str) -> None:
    vectors = vectors_of(TEXTS).astype(np.float64)
    vectors[3] = value
    np.save(tmp_path / "texts.npy", vectors)
    guide = load_ready_guide(write_lines(tmp_path / "texts.jsonl", text=TEXTS))
    guide.embed(TEXTS[4:], "query")
    with pytest.raises(VectorError, match=f"texts.npy, row 4: the vector {what}"):
        guide.embed(TEXTS, "query")


def test_row_without_a_text_is_named(tmp_path: Path) -> None:
    for bad in (None, 3, "\ud800"):
        source = write_lines(tmp_path / "texts.jsonl", text=["a", "b", bad])
        np.save(tmp_path / "texts.npy", vectors_of(TEXTS[:3]))
        with pytest.raises(DataError, match=r"texts\.jsonl, row 3: has no text in column 'text': mend"):
            load_ready_guide(source)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"title": "embedding"}, "has no column 'title', it has text, embedding, short, number: mend --vectors"),
        ({"text": "vec"}, "has no column 'vec', it has text, embedding, short, number: mend --vectors"),
        ({"text": "number"}, "column 'number' holds int64, expected lists of floats: name another with --vectors"),
        ({"text": "nothing.npy"}, "nothing.npy is not there: expected a .npy file of vectors, mend --vectors"),
        (
            {"text": "few.npy"},
            "has 23 texts in 'text' and 3 vectors for them: expected one for each row: save them",
        ),
        ({"text": "flat.npy"}, r"flat.npy holds float32 of shape \(8,\), expected floats of shape \(texts, width\)"),
        ({"text": "whole.npy"}, r"whole.npy holds int64 of shape \(3, 8\), expected floats"),
        ({"text": "objects.npy"}, r"objects.npy is not a readable .npy file \(.*Python objects.*\): save floats"),
        ({"text": "embedding", "short": "short.npy"}, r"has vectors \[4, 8\] wide, expected one width"),
    ],
)
def test_mapping_that_does_not_fit_is_refused(tmp_path: Path, mapping: dict[str, str], message: str) -> None:
    vectors = vectors_of(TEXTS)
    np.save(tmp_path / "few.npy", vectors[:3])
    np.save(tmp_path / "flat.npy", vectors[0])
    np.save(tmp_path / "short.npy", vectors[:, :4])
    np.save(tmp_path / "whole.npy", np.ones((3, 8), np.int64))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    columns = {"embedding": lists(vectors), "short": TEXTS, "number": list(range(len(TEXTS)))}
    source = write(tmp_path / "v.parquet", text=TEXTS, **columns)
    with pytest.raises(DataError, match=message) as refusal:
        load_ready_guide(source, vectors=mapping)
    assert "\n" not in str(refusal.value)


def test_columns_that_no_name_tells_are_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "v.parquet", body=TEXTS, embedding=lists(vectors_of(TEXTS)))
    with pytest.raises(DataError, match=r"none for texts \(text, sentence\): name them with --vectors TEXT=VECTOR"):
        load_ready_guide(source)
    source = write_lines(tmp_path / "t.jsonl", text=TEXTS)
    with pytest.raises(DataError, match=r"none for vectors \(vector, embedding, embeddings\): name them"):
        load_ready_guide(source)


def test_vectors_within_json_are_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", text=TEXTS, embedding=vectors_of(TEXTS).tolist())
    with pytest.raises(DataError, match=r"must lie in \.parquet files: convert it, or save a \.npy"):
        load_ready_guide(source)


def test_damaged_file_gives_one_line(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "v.parquet", text=TEXTS, embedding=lists(vectors_of(TEXTS))))
    source.write_bytes(source.read_bytes()[:200])
    with pytest.raises(DataError, match=r"v\.parquet is not a readable Parquet file \(.*\): restore it") as refusal:
        load_ready_guide(str(source))
    assert "\n" not in str(refusal.value)


def test_guide_is_known_by_its_contents(tmp_path: Path) -> None:
    vectors = vectors_of(TEXTS)
    first = load_ready_guide(write(tmp_path / "v.parquet", text=TEXTS, embedding=lists(vectors))).info
    assert (first.name, first.width, first.pooling, first.max_length) == ("v.parquet", 8, "ready", None)
    again = load_ready_guide(write(tmp_path / "w.parquet", text=TEXTS, embedding=lists(vectors))).info
    assert again.weights_hash == first.weights_hash
    vectors[0, 0] += 1
    other = load_ready_guide(write(tmp_path / "w.parquet", text=TEXTS, embedding=lists(vectors))).info
    assert other.weights_hash != first.weights_hash
    source = write_lines(tmp_path / "t.jsonl", text=TEXTS)
    hashes = set()
    for number in range(2):
        np.save(tmp_path / "t.npy", vectors + number)
        hashes.add(load_ready_guide(source).info.weights_hash)
    write_lines(tmp_path / "t.jsonl", text=TEXTS[::-1])
    assert len({*hashes, load_ready_guide(source).info.weights_hash}) == 3


def test_only_the_row_groups_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = load_ready_guide(write(tmp_path / "v.parquet", text=TEXTS, embedding=lists(vectors_of(TEXTS))))
    read: list[int] = []
    whole = pq.ParquetFile.iter_batches

    def noting(self: pq.ParquetFile, *args: Any, row_groups: list[int], **options: Any) -> Any:
        read.extend(row_groups)
        return whole(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)
    guide.embed([TEXTS[11], TEXTS[2], TEXTS[10]], "query")
    assert read == [0, 2]


def test_every_text_is_reported_as_done(tmp_path: Path) -> None:
    guide = load_ready_guide(write(tmp_path / "v.parquet", text=TEXTS, embedding=lists(vectors_of(TEXTS))))
    done: list[BatchDone] = []
    guide.embed([*TEXTS, *TEXTS], "query", done.append)
    assert len(done) > 1
    assert sum(batch.num_texts for batch in done) == 2 * len(TEXTS)
