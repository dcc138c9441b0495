import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from gistfast.errors import ConfigError, DataError, DependencyError, GistfastError, ModelError
from gistfast.evaluation.retrieval import held_out_retrieval
from gistfast.stages.evaluate import evaluate
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore

QUERIES = {"007": "a fast vehicle", "q2": "a musical instrument", "q3": "nobody looks for this"}
DOCUMENTS = {
    "d1": "a sports car with a strong engine",
    "d2": "a violin made by a master",
    "d3": "bread and butter",
    "d4": "a cello",
}
QRELS = [("007", "d1", 1), ("q2", "d2", 2), ("q2", "d4", 1), ("q3", "d3", 0)]
PAIRS = [
    ("A man plays a guitar.", "A man is playing the guitar.", 5.0),
    ("A man plays a guitar.", "A woman plays a flute.", 2.0),
    ("A man plays a guitar.", "The stock market fell.", 0.0),
    ("A dog runs.", "A dog is running.", 4.8),
]


@pytest.fixture(scope="module")
def store(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GuideStore:
    """Rows with a repeated anchor and repeated positives, half of the positives held out."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [(f"word {row % 7}", f"meaning {row % 10}", f"another meaning {row}") for row in range(20)]
    lines = [json.dumps(dict(zip(("anchor", "positive", "negative"), row, strict=True))) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return precompute(
        folder / "rows.jsonl",
        guide=guide_folder,
        out=folder / "store",
        holdout=0.5,
        index="none",
        device="cpu",
        document_prompt="a meaning: ",
    )


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format of the path's ending."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return str(path)
    separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
    lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A retrieval task as BEIR lays it out."""
    qrels = [{"query-id": query, "corpus-id": document, "score": score} for query, document, score in QRELS]
    return {
        "queries": write(tmp_path / "queries.jsonl", [{"_id": id, "text": text} for id, text in QUERIES.items()]),
        "corpus": write(
            tmp_path / "corpus.jsonl",
            [{"_id": id, "title": "", "text": text} for id, text in DOCUMENTS.items()],
        ),
        "qrels": write(tmp_path / "qrels.tsv", qrels),
    }


def test_held_out_rows_become_queries_documents_and_what_belongs_together(store: GuideStore) -> None:
    task = held_out_retrieval(store)
    rows = store.rows[store.held_out]
    text = store.texts
    pairs = {(text[anchor], text[positive]) for anchor, positive, _ in rows.tolist()}
    found = {
        (task.queries[query], task.documents[document])
        for query, documents in task.relevant.items()
        for document in documents
    }
    assert found == pairs
    assert set(task.documents.values()) == {text[id] for row in rows.tolist() for id in row[1:]}
    # Each text once.
    assert len(set(task.documents.values())) == len(task.documents)
    assert len(set(task.queries.values())) == len(task.queries)


def test_store_gives_retrieval_scores(store: GuideStore, guide_folder: Path, tmp_path: Path) -> None:
    results = evaluate(guide_folder, store=store.path, device="cpu", out=tmp_path / "deep" / "results.json")
    scores = results["retrieval"]
    assert scores["queries"] == len(held_out_retrieval(store).queries)
    assert all(0 <= scores[name] <= 1 for name in ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100"))
    assert scores["recall@1"] <= scores["recall@10"] <= scores["recall@100"]
    assert json.loads((tmp_path / "deep" / "results.json").read_text()) == results


def test_files_give_retrieval_scores(files: dict[str, str], guide_folder: Path) -> None:
    scores = evaluate(guide_folder, **files, device="cpu")["retrieval"]
    # The query without a relevant document is left out; the model finds the rest first.
    assert (scores["queries"], scores["documents"]) == (2, 4)
    assert scores["mrr@10"] == scores["ndcg@10"] == scores["recall@10"] == 1.0
    assert scores["recall@1"] == pytest.approx(0.75)


def test_prompts_of_the_call_and_of_the_model_are_used(
    files: dict[str, str], tiny_student: Path, tmp_path: Path
) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    model.prompts = {"query": "a b c d e f: ", "document": "x y z: "}
    model.save(str(tmp_path / "prompted"))
    own = evaluate(tmp_path / "prompted", **files, device="cpu")["retrieval"]
    given = evaluate(tiny_student, **files, device="cpu", query_prompt="a b c d e f: ", document_prompt="x y z: ")
    assert own == given["retrieval"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_scored_pairs_give_spearman(ending: str, guide_folder: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": one, "sentence2": two, "score": score} for one, two, score in PAIRS]
    path = write(tmp_path / f"sts{ending}", rows)
    sts = evaluate(guide_folder, sts=path, device="cpu")["sts"]
    assert sts["pairs"] == 4
    assert sts["spearman"] == pytest.approx(1.0)


def test_tasks_run_through_mteb(guide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mteb = ModuleType("mteb")

    def evaluate_tasks(model: Any, tasks: list[str], *, cache: None, **options: Any) -> SimpleNamespace:
        assert isinstance(model, SentenceTransformer)
        assert cache is None
        results = [SimpleNamespace(task_name=task, get_score=lambda: 0.5) for task in tasks]
        return SimpleNamespace(task_results=results)

    mteb.get_tasks, mteb.evaluate = lambda tasks: tasks, evaluate_tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mteb", mteb)
    assert evaluate(guide_folder, tasks=("STS22.v2", "SciFact"), device="cpu")["mteb"] == {
        "STS22.v2": 0.5,
        "SciFact": 0.5,
    }


def test_missing_mteb_names_the_extra(guide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(DependencyError, match=r"pip install gistfast\[mteb\]"):
        evaluate(guide_folder, tasks=("SciFact",))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "nothing to measure"),
        ({"queries": "q.jsonl"}, ConfigError, "--queries, --corpus and --qrels belong together"),
        ({"sts": "/no/such/file.jsonl"}, DataError, "/no/such/file.jsonl is not a file"),
        ({"sts": __file__}, DataError, r"give a \.jsonl, \.csv, \.tsv or \.parquet file"),
        ({"batch_size": 0, "sts": "x"}, ConfigError, "--batch-size must be at least 1, found 0"),
    ],
)
def test_bad_settings_are_one_line(
    options: dict[str, Any], error: type[GistfastError], message: str, guide_folder: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        evaluate(guide_folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence1": "a", "score": 1.0}], "has no column sentence2: found sentence1, score"),
        (
            [{"sentence1": "a", "sentence2": text, "score": score} for text, score in (("b", 1.0), ("", 0.0))],
            "row 2: column 'sentence2' has no text",
        ),
        ([{"sentence1": "a", "sentence2": "b", "score": "good"}], "row 1: column 'score' must be a number"),
        ([{"sentence1": "a", "sentence2": "b", "score": math.nan}], "must be a number, found nan"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1.0}], "1 pairs of one score"),
    ],
)
def test_bad_pairs_are_named(rows: list[dict[str, Any]], message: str, guide_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        evaluate(guide_folder, sts=write(tmp_path / "pairs.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_judgement_of_an_unknown_document_is_named(files: dict[str, str], guide_folder: Path) -> None:
    Path(files["qrels"]).write_text("query-id\tcorpus-id\tscore\n007\td1\t1\n007\td9\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"qrels\.tsv, row 2: id 'd9' is not in .*corpus\.jsonl"):
        evaluate(guide_folder, **files)


def test_store_without_held_out_rows_is_refused(guide_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    store = precompute(pairs_file, guide=guide_folder, out=tmp_path / "store", index="none", device="cpu")
    with pytest.raises(ConfigError, match="has no held-out rows: make the store with --holdout"):
        evaluate(guide_folder, store=store.path)


def test_model_that_is_none_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not a model"):
        evaluate(tmp_path / "empty", **files)
