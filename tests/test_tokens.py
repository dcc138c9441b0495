"""The student's tokens of a store: what is in them, and when they are made."""

import errno
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from gistfast.errors import StoreError
from gistfast.store import GuideStore
from gistfast.students import tokens as module
from gistfast.students.tokens import Tokens, student_tokens

ROWS = [
    ("car", "a motor vehicle with four wheels", "a toy"),
    ("river", "a large natural stream of water", "a motor vehicle with four wheels"),
    ("to sleep", "be at rest with the mind and body switched off", "car"),
    ("oak", "a tree that bears acorns", "a large natural stream of water, and more words than the student sees" * 9),
]


@pytest.fixture
def student(tiny_student: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_student), device="cpu")


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS)


@pytest.fixture
def make(student: SentenceTransformer, store: GuideStore, tmp_path: Path) -> Callable[..., Tokens]:
    """Tokens of all columns without a prompt, unless told otherwise."""

    def call(**changes: Any) -> Tokens:
        given = {"model": student, "store": store, "prompt": "", "columns": [0, 1, 2], "spare_folder": tmp_path / "run"}
        return student_tokens(**given | changes)

    return call


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("tokens were made again")


@pytest.mark.parametrize("prompt", ["", "meaning: "])
def test_tokens_are_those_of_the_tokenizer(
    make: Callable[..., Tokens],
    student: SentenceTransformer,
    store: GuideStore,
    prompt: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Windows and batches that end in the middle.
    monkeypatch.setattr(module, "_WINDOW", 5)
    monkeypatch.setattr(module, "_BATCH", 2)
    made = make(prompt=prompt)
    expected = student.tokenizer([prompt + text for text in store.texts], truncation=True)["input_ids"]
    assert [made.gather(np.array([entry])).tolist() for entry in range(store.num_texts)] == expected
    some = np.array([3, 0, 3])
    assert made.gather(some).tolist() == expected[3] + expected[0] + expected[3]
    assert made.lengths(some).tolist() == [len(expected[entry]) for entry in some]
    assert made.path.parent == store.path / "tokens"
    assert made.ids.dtype == np.uint16


def test_wide_ids_for_a_large_vocabulary(make: Callable[..., Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tokenizer_record", lambda model: {"largest_id": 1 << 16})
    assert make().ids.dtype == np.int32


def test_texts_of_other_columns_are_left_out(make: Callable[..., Tokens], store: GuideStore) -> None:
    made = make(columns=[0])
    held = np.unique(store.rows[:, 0])
    others = np.setdiff1d(np.arange(store.num_texts), held)
    assert made.lengths(held).all()
    assert not made.lengths(others).any()


def test_tokens_are_made_once(make: Callable[..., Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    monkeypatch.setattr(module, "quickest_tokeniser", refuse)
    assert make().path == made.path


def test_tokens_are_made_anew_for_another_prompt_length_or_store(
    make: Callable[..., Tokens], make_store: Callable[..., GuideStore], student: SentenceTransformer
) -> None:
    found = [make(), make(prompt="word: "), make(columns=[0]), make(store=make_store(ROWS[:3], name="other"))]
    student.max_seq_length = 5
    found.append(make())
    assert len({made.path.name for made in found}) == len(found)
    assert found[-1].lengths(np.arange(3)).max() == 5


def test_tokens_go_to_the_run_where_the_store_cannot_be_written(
    make: Callable[..., Tokens],
    store: GuideStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mkdir = Path.mkdir

    def read_only(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(store.path):
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with caplog.at_level(logging.INFO, "gistfast"):
        made = make()
    assert made.path.parent == tmp_path / "run" / "tokens"
    assert "cannot be written (Read-only file system)" in caplog.text
    monkeypatch.setattr(module, "quickest_tokeniser", refuse)
    assert make().path == made.path


def test_full_disk_is_one_line_and_leaves_nothing(
    make: Callable[..., Tokens], store: GuideStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "quickest_tokeniser", full)
    with pytest.raises(StoreError, match="No space left on device: make room") as caught:
        make()
    assert "\n" not in str(caught.value)
    assert not list((store.path / "tokens").iterdir())


def test_damaged_tokens_are_named(make: Callable[..., Tokens]) -> None:
    ids = make().path / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"ids\.npy is damaged .*: delete"):
        make().gather(np.array([0]))


def test_tokens_travel_as_their_path(make: Callable[..., Tokens]) -> None:
    made = make()
    some = np.array([1, 0])
    expected = made.gather(some)
    sent = pickle.dumps(made)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).gather(some), expected)
