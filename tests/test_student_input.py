"""Features made of tokens are those that the student makes of texts."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from gistfast.errors import ModelError
from gistfast.students.input import input_form, same_features, text_set
from gistfast.students.tokenising import quickest_tokeniser, tokenise, tokenizer_record

TEXTS = [
    "oak",
    "a motor vehicle with four wheels",
    "Bänke, 銀行 and a text of so many words that it has to be cut at the length of the student, " * 3,
]
PROMPT = "a long prompt: "


@pytest.fixture
def bert(tiny_student: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_student), device="cpu")


def padded_left(bert: SentenceTransformer, folder: Path) -> SentenceTransformer:
    bert.tokenizer.padding_side = "left"
    return bert


def without_fast_tokenizer(bert: SentenceTransformer, folder: Path) -> SentenceTransformer:
    """A T5 of bytes, whose tokenizer is written in Python."""
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder), max_seq_length=32), Pooling(16)], device="cpu")


def static(bert: SentenceTransformer, folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[StaticEmbedding(bert.tokenizer, embedding_dim=16)], device="cpu")


def prompt_left_out(bert: SentenceTransformer, folder: Path) -> SentenceTransformer:
    bert.set_pooling_include_prompt(False)
    return bert


def as_it_is(bert: SentenceTransformer, folder: Path) -> SentenceTransformer:
    return bert


STUDENTS = [as_it_is, padded_left, without_fast_tokenizer, static, prompt_left_out]


@pytest.fixture(params=STUDENTS, ids=lambda make: make.__name__)
def student(request: pytest.FixtureRequest, bert: SentenceTransformer, tmp_path: Path) -> SentenceTransformer:
    made: SentenceTransformer = request.param(bert, tmp_path / "encoder")
    return made


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_quick_tokens_are_the_students_own(
    student: SentenceTransformer, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gistfast"):
        quick = quickest_tokeniser(student, prompt, TEXTS)
    slow = isinstance(student.tokenizer, ByT5Tokenizer)
    assert ("takes longer" in caplog.text) == slow
    for found, expected in zip(quick(TEXTS), tokenise(student, TEXTS, prompt), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_student_that_rewrites_its_texts_tokenises_by_itself(
    bert: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    preprocess = bert.preprocess
    monkeypatch.setattr(bert, "preprocess", lambda texts, **options: preprocess([f"{t}!" for t in texts], **options))
    with caplog.at_level(logging.INFO, "gistfast"):
        quick = quickest_tokeniser(bert, "", [])
    assert "takes longer" in caplog.text
    assert quick(["oak"])[0].tolist() == bert.tokenizer("oak!")["input_ids"]


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_features_of_tokens_are_the_students_own(student: SentenceTransformer, prompt: str) -> None:
    form = input_form(student, [prompt])
    tokens, lengths = tokenise(student, TEXTS, prompt)
    assert same_features(student, form, 0, prompt, TEXTS, tokens, lengths)
    # Other tokens are noticed.
    assert not same_features(student, form, 0, prompt, TEXTS, tokens + 1, lengths)


def test_vectors_of_tokens_are_the_students_own(student: SentenceTransformer) -> None:
    student.eval()
    form = input_form(student, [PROMPT])
    tokens, lengths = tokenise(student, TEXTS, PROMPT)
    # In two passes, the second of which does not begin at the first token.
    texts = text_set(tokens, lengths, np.array([(0, 1, 0), (1, 3, 0)]))
    parts = [student(form.features(texts, *forward))["sentence_embedding"] for forward in texts.forwards.tolist()]
    expected = [student.encode(some, prompt=PROMPT, convert_to_tensor=True) for some in (TEXTS[:1], TEXTS[1:])]
    torch.testing.assert_close(torch.cat(parts), torch.cat(expected))


def test_texts_may_be_cut_to_one_length(bert: SentenceTransformer) -> None:
    bert.max_seq_length = 3
    form = input_form(bert, [""])
    assert same_features(bert, form, 0, "", TEXTS, *quickest_tokeniser(bert, "", TEXTS)(TEXTS))


def test_prompts_make_two_kinds_only_where_pooling_leaves_them_out(bert: SentenceTransformer) -> None:
    assert input_form(bert, ["", PROMPT]).kind_of_prompt == (0, 0)
    bert.set_pooling_include_prompt(False)
    assert input_form(bert, ["", PROMPT]).kind_of_prompt == (0, 1)


def test_student_with_other_features_is_refused(bert: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = bert.preprocess

    def with_positions(texts: list[str], **options: Any) -> dict[str, Any]:
        features = preprocess(texts, **options)
        return features | {"positions": torch.arange(features["input_ids"].shape[1]).expand(len(texts), -1)}

    monkeypatch.setattr(bert, "preprocess", with_positions)
    with pytest.raises(ModelError, match=r"takes input_ids, .*positions.*gistfast\.GISTLoss"):
        input_form(bert, [""])


def test_student_with_routes_is_refused(bert: SentenceTransformer) -> None:
    routes = Router.for_query_document(query_modules=[bert[0]], document_modules=[bert[0]])
    with pytest.raises(ModelError, match="several routes"):
        input_form(SentenceTransformer(modules=[routes, bert[1]], device="cpu"), [""])


def shorter(model: SentenceTransformer) -> None:
    model.max_seq_length = 8


def one_more_token(model: SentenceTransformer) -> None:
    model.tokenizer.add_tokens(["giraffe-house"])


def cut_on_the_left(model: SentenceTransformer) -> None:
    model.tokenizer.truncation_side = "left"


@pytest.mark.parametrize("change", [shorter, one_more_token, cut_on_the_left], ids=lambda change: change.__name__)
def test_record_changes_with_what_decides_the_tokens(
    bert: SentenceTransformer, change: Callable[[SentenceTransformer], None]
) -> None:
    before = tokenizer_record(bert)
    # How it was used last does not count.
    bert.encode(TEXTS)
    assert tokenizer_record(bert) == before
    change(bert)
    assert tokenizer_record(bert) != before
