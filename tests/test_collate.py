"""What a batch is made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gistfast.neighbours.index_search import ExactSearch
from gistfast.neighbours.mining import mine
from gistfast.store import GuideStore
from gistfast.store.export import rows_with_negatives
from gistfast.store.mined import MinedInfo
from gistfast.students.input import TextSet
from gistfast.training.collate import COUNTS, Collator, Rows
from gistfast.training.feed import feed

# "automobile" is an anchor, a positive and a negative; two rows share a positive; "bank" comes twice.
ROWS = [
    ("car", "a motor vehicle with four wheels", "a boat with sails"),
    ("automobile", "a motor vehicle with four wheels", "a road for vehicles"),
    ("a carriage with an engine", "automobile", "a drink of water"),
    ("bank", "a financial institution that accepts deposits", "automobile"),
    ("bank", "sloping land beside a body of water", "flat land"),
]
PROMPTS = [{}, {"anchor": "word: "}, {"anchor": "text: ", "positive": "text: ", "negative_1": "text: "}]


@pytest.fixture
def student(tiny_student: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_student), device="cpu")


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS)


@pytest.fixture
def collator(student: SentenceTransformer, store: GuideStore, tmp_path: Path) -> Callable[..., Collator]:
    """A collator of small passes for some prompts."""

    def make(prompts: dict[str, str]) -> Collator:
        return feed(student, [store], prompts, spare_folder=tmp_path, tokens_per_forward=24, on_cpu=True)[1][0]

    return make


@pytest.mark.parametrize("prompts", PROMPTS, ids=["none", "of anchors", "one"])
def test_every_cell_finds_its_tokens_guide_vector_and_identity(
    collator: Callable[..., Collator], student: SentenceTransformer, store: GuideStore, prompts: dict[str, str]
) -> None:
    rows = np.array([4, 0, 1, 2, 3, 1])
    batch = collator(prompts)(rows)
    texts = TextSet(**batch["texts"])
    ids = torch.from_numpy(store.rows[rows])
    assert torch.equal(batch["guide"][batch["places"]], store.gather(ids))
    assert torch.equal(batch["identity"], store.identity(ids))
    assert texts.lengths.tolist() == texts.sizes.tolist()
    for row, places in zip(rows, batch["places"].tolist(), strict=True):
        for column, text, place in zip(store.columns, ROWS[row], places, strict=True):
            start, length = int(texts.starts[place]), int(texts.lengths[place])
            expected = student.tokenizer(prompts.get(column, "") + text, truncation=True)["input_ids"]
            assert texts.tokens[start : start + length].tolist() == expected


def test_text_is_embedded_once_for_each_prompt(collator: Callable[..., Collator]) -> None:
    cells = [(text, column == 0) for row in ROWS for column, text in enumerate(row)]
    for prompts, distinct in [({}, {text for text, _ in cells}), (PROMPTS[1], set(cells))]:
        batch = collator(prompts)(np.arange(len(ROWS)))
        counts = dict(zip(COUNTS, batch["counts"].tolist(), strict=True))
        assert counts["distinct_texts"] == len(batch["guide"]) == len(distinct)
        assert counts["texts"] == len(cells)
        assert counts["tokens"] == len(batch["texts"]["tokens"]) <= counts["padded_tokens"]


def test_texts_are_sorted_by_length_in_passes_within_the_budget(collator: Callable[..., Collator]) -> None:
    texts = TextSet(**collator({})(np.arange(len(ROWS)))["texts"])
    assert (np.diff(texts.sizes) <= 0).all()
    first, end, _ = texts.forwards.T
    assert len(first) > 1
    assert (first[1:] == end[:-1]).all()
    assert ((end - first) * texts.sizes[first] <= 24).all()


def test_kinds_share_no_pass(student: SentenceTransformer, store: GuideStore, tmp_path: Path) -> None:
    student.set_pooling_include_prompt(False)
    _, (collator,) = feed(student, [store], {"anchor": "a word: "}, spare_folder=tmp_path, on_cpu=True)
    forwards = collator(np.arange(len(ROWS)))["texts"]["forwards"]
    assert forwards[:, 2].tolist() == sorted(forwards[:, 2])
    assert set(forwards[:, 2]) == {0, 1}


def test_mined_negatives_stand_behind_the_columns_with_the_prompt_of_documents(
    student: SentenceTransformer, store: GuideStore, tmp_path: Path
) -> None:
    info = MinedInfo(negatives=2, margin=0.0, margin_strategy="absolute", store_fingerprint=store.fingerprint)
    mine(store, info, ExactSearch(store, "cpu"))
    prompts = {"positive": "text: ", "negative_1": "text: "}
    _, (collator,) = feed(student, [store], prompts, spare_folder=tmp_path, mined_negatives=2, on_cpu=True)
    batch = collator(np.arange(len(ROWS)))
    texts = TextSet(**batch["texts"])
    ids = torch.from_numpy(rows_with_negatives(store, np.arange(len(ROWS)), 2))
    assert ids.shape == (len(ROWS), 5)
    assert torch.equal(batch["identity"], store.identity(ids))
    assert torch.equal(batch["guide"][batch["places"]], store.gather(ids))
    for entry, place in zip(ids[:, 3:].flatten().tolist(), batch["places"][:, 3:].flatten().tolist(), strict=True):
        start, length = int(texts.starts[place]), int(texts.lengths[place])
        expected = student.tokenizer("text: " + store.texts[entry], truncation=True)["input_ids"]
        assert texts.tokens[start : start + length].tolist() == expected


def test_rows_of_a_split_are_those_of_its_dataset(make_store: Callable[..., GuideStore]) -> None:
    store = make_store(ROWS, name="split", holdout=0.4)
    train, held_out = Rows(store, "train"), Rows(store, "held_out")
    assert len(train) > 0
    assert len(held_out) > 0
    assert sorted([*train.numbers, *held_out.numbers]) == list(range(len(ROWS)))
    assert store.rows[train.__getitems__([1, 0])].tolist() == store.to_dataset("train")["label"][1::-1]
    assert (train[1], train.split) == (train.numbers[1], "train")
