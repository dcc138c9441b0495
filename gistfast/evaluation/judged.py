"""Files of judged texts: queries, documents and judgements, or scored pairs.

.jsonl, .csv, .tsv and .parquet, columns by name; the names are those that BEIR and sentence-transformers use.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from gistfast.errors import DataError, first_line
from gistfast.evaluation.retrieval import RetrievalTask

_QUERY_COLUMNS = {"id": ("_id", "id", "query-id", "query_id"), "text": ("text", "query")}
_DOCUMENT_COLUMNS = {"id": ("_id", "id", "corpus-id", "corpus_id"), "text": ("text", "document")}
_QREL_COLUMNS = {
    "query": ("query-id", "query_id", "query"),
    "document": ("corpus-id", "corpus_id", "document"),
    "score": ("score",),
}
_PAIR_COLUMNS = {"sentence1": ("sentence1",), "sentence2": ("sentence2",), "score": ("score", "label")}


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of sentences with the scores that people gave them, columns of one length."""

    source: str
    sentences1: list[str]
    sentences2: list[str]
    scores: list[float]


def read_retrieval(queries: str, corpus: str, qrels: str) -> RetrievalTask:
    """The retrieval task of three files.

    A document's title, where there is one, is put before its text. Judgements with a score of 0 or less are
    not relevant; queries without a relevant document are left out.

    Raises:
        DataError: When a file is missing or damaged, a column or a text is not found, or nothing is relevant.
    """
    texts = _texts_by_id(queries, _QUERY_COLUMNS)
    documents = _texts_by_id(corpus, _DOCUMENT_COLUMNS)
    judgements = _read_columns(qrels, _QREL_COLUMNS)
    relevant: dict[str, set[str]] = {}
    for row, (query, document, score) in enumerate(
        zip(judgements["query"], judgements["document"], _numbers(qrels, judgements["score"]), strict=True),
        start=1,
    ):
        for id, known, file in ((str(query), texts, queries), (str(document), documents, corpus)):
            if id not in known:
                raise DataError(f"{qrels}, row {row}: id {id!r} is not in {file}: give files that belong together")
        if score > 0:
            relevant.setdefault(str(query), set()).add(str(document))
    if not relevant:
        raise DataError(f"{qrels} has no judgement with a score above 0: there is nothing to find")
    return RetrievalTask(Path(qrels).name, {id: texts[id] for id in relevant}, documents, relevant)


def read_scored_pairs(path: str) -> ScoredPairs:
    """The pairs of a file with columns sentence1, sentence2 and score.

    Raises:
        DataError: When the file is missing or damaged, its scores are all the same, or a column or a value is
            not found.
    """
    columns = _read_columns(path, _PAIR_COLUMNS)
    scores = _numbers(path, columns["score"])
    if len(set(scores)) < 2:
        raise DataError(f"{path} has {len(scores)} pairs of one score: a correlation needs different scores")
    sides = [_non_empty(path, columns[name], name) for name in ("sentence1", "sentence2")]
    return ScoredPairs(Path(path).name, sides[0], sides[1], scores)


def _texts_by_id(path: str, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    columns = _read_columns(path, wanted, optional="title")
    titles = columns["title"] or [""] * len(columns["text"])
    texts = [f"{title or ''} {text or ''}".strip() for title, text in zip(titles, columns["text"], strict=True)]
    return dict(zip(map(str, columns["id"]), _non_empty(path, texts, "text"), strict=True))


def _read_columns(
    path: str, wanted: Mapping[str, tuple[str, ...]], optional: str | None = None
) -> dict[str, list[Any]]:
    """The wanted columns as lists, each by the first of its names that is there; an optional one, or []."""
    texts = [name for column, names in wanted.items() if column != "score" for name in names]
    table = _read_table(Path(path), texts)
    found: dict[str, list[Any]] = {}
    for column, names in wanted.items():
        name = next((name for name in names if name in table.column_names), None)
        if name is None:
            raise DataError(f"{path} has no column {' or '.join(names)}: found {', '.join(table.column_names)}")
        found[column] = table.column(name).to_pylist()
    if optional is not None:
        found[optional] = table.column(optional).to_pylist() if optional in table.column_names else []
    return found


def _read_table(path: Path, texts: Sequence[str]) -> pa.Table:
    """The table in a file; the columns named `texts` are not taken for numbers, so that id 007 stays 007."""
    if not path.is_file():
        raise DataError(f"{path} is not a file: check the path")
    delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    try:
        if delimiter is not None:
            parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=delimiter == ",")
            # Tabs need no quotes, so a quote in a .tsv is a character like any other.
            parse.quote_char = '"' if delimiter == "," else False
            convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
            return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
        if path.suffix == ".jsonl":
            return pyarrow.json.read_json(path)
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}: mend the file") from error
    raise DataError(f"{path} is of no known kind: give a .jsonl, .csv, .tsv or .parquet file")


def _non_empty(path: str, texts: Sequence[Any], column: str) -> list[str]:
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, row {row}: column {column!r} has no text, found {text!r}")
    return list(texts)


def _numbers(path: str, values: Sequence[Any]) -> list[float]:
    for row, value in enumerate(values, start=1):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{path}, row {row}: column 'score' must be a number, found {value!r}")
    return [float(value) for value in values]
