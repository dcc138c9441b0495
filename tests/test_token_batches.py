from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gistfast.errors import ModelError
from gistfast.guides.token_batches import Padding, TokenBatch, TokenWindow, cut_windows, tokenise

LENGTHS = [3, 1, 6, 2, 6, 4, 1]


def window(*, left: bool, masked: bool = True, lengths: list[int] = LENGTHS) -> TokenWindow:
    """Texts of the given lengths; the tokens of a text are 1, 2, 3 ..., those of padding 0 and 9."""
    order = np.argsort(-np.array(lengths), kind="stable")
    tokens = np.concatenate([np.arange(1, lengths[number] + 1) for number in order])
    padding = Padding(left, {"input_ids": 0, "token_type_ids": 9}, masked)
    return TokenWindow(
        order, np.array(lengths)[order], {"input_ids": tokens, "token_type_ids": tokens}, {"prompt_length": 2}, padding
    )


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_batches_hold_each_text_once_within_the_budget(left: bool, budget: int) -> None:
    seen: list[int] = []
    for batch in window(left=left).batches(budget):
        ids, kinds, mask = (batch.features[key] for key in ("input_ids", "token_type_ids", "attention_mask"))
        assert ids.shape == kinds.shape == mask.shape
        assert batch.features["prompt_length"] == 2
        assert len(batch.numbers) == 1 or ids.numel() <= budget
        assert (batch.num_padded, batch.num_tokens) == (ids.numel(), int(mask.sum()))
        assert torch.equal(kinds == 9, mask == 0)
        for number, row in zip(batch.numbers, ids, strict=True):
            real = row[-LENGTHS[number] :] if left else row[: LENGTHS[number]]
            assert real.tolist() == list(range(1, LENGTHS[number] + 1))
            assert (row > 0).sum() == LENGTHS[number]
        assert mask.sum(dim=1).max() == ids.shape[1]
        seen.extend(batch.numbers.tolist())
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_batches_of_one_length_have_no_mask_where_the_model_needs_none() -> None:
    def masks(masked: bool) -> list[bool]:
        batches = window(left=False, masked=masked).batches(12)
        return ["attention_mask" in batch.features for batch in batches]

    # Lengths 6 and 6, then 4, 3 and 2, then 1 and 1.
    assert masks(False) == [False, True, False]
    assert masks(True) == [True, True, True]


def test_text_without_tokens_is_padding_alone() -> None:
    (batch,) = window(left=False, lengths=[0]).batches(8)
    assert batch.features["input_ids"].tolist() == [[0]]
    assert batch.features["attention_mask"].tolist() == [[0]]
    assert (batch.num_tokens, batch.num_padded) == (0, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_what_the_tokenizer_shows(tiny_student: Path, side: str) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    model.tokenizer.padding_side = side
    assert Padding.of(model) == Padding(side == "left", {"input_ids": 0, "token_type_ids": 0}, masked=False)


def test_tokenizer_that_cannot_pad_is_refused(tiny_student: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    model.tokenizer.pad_token = None
    with pytest.raises(ModelError, match="tokenizer cannot bring texts to one length: Asking to pad"):
        Padding.of(model)


def test_models_of_others_are_always_given_a_mask(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    monkeypatch.setattr(type(model[0].model), "__module__", "transformers_modules.some.model")
    padding = Padding.of(model)
    assert padding is not None
    assert padding.masked


@pytest.mark.parametrize("prompt", ["", "query: "])
def test_tokens_are_those_of_sentence_transformers(tiny_student: Path, prompt: str) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    texts = ["river", "a bowed stringed instrument", "", "to be or not to be " * 80]
    expected = model.preprocess(texts, prompt=prompt or None)
    (batch,) = tokenise(model, texts, np.arange(4), prompt, Padding.of(model)).batches(1000)
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch.features[key], expected[key][batch.numbers])
    assert batch.features.get("prompt_length") == expected.get("prompt_length")


def test_tokens_that_a_module_padded_are_those_of_one_that_did_not(tiny_student: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    padding, texts = Padding.of(model), ["river", "a bowed stringed instrument", ""]
    expected = list(tokenise(model, texts, np.arange(3), "", padding).batches(8))

    class Foreign(torch.nn.Module):
        """A first module that knows no option but the texts."""

        def preprocess(self, inputs: list[str]) -> dict[str, Any]:
            features: dict[str, Any] = inner.preprocess(inputs)
            return features

    inner = model[0]
    foreign = SentenceTransformer(modules=[Foreign()], device="cpu")
    found = list(tokenise(foreign, texts, np.arange(3), "", padding).batches(8))
    assert len(found) == len(expected) > 1
    for batch, other in zip(found, expected, strict=True):
        assert_same(batch, other)


def assert_same(batch: TokenBatch, other: TokenBatch) -> None:
    assert batch.numbers.tolist() == other.numbers.tolist()
    assert torch.equal(batch.features["input_ids"], other.features["input_ids"])


def test_windows_hold_every_text_once_and_the_longest_first() -> None:
    texts = ["x" * (number * 37 % 101) for number in range(500)]
    windows = cut_windows(texts, chars_per_window=1000)
    assert sorted(np.concatenate(windows).tolist()) == list(range(500))
    assert max(map(len, texts)) == len(texts[windows[0][0]])
    for numbers in windows:
        lengths = [len(texts[number]) for number in numbers]
        # Of texts between one and a hundred characters.
        assert max(lengths) - min(lengths) <= 20
        assert sum(lengths) <= 1100


def test_windows_after_the_first_come_in_an_order_that_foretells_the_rest() -> None:
    texts = ["x" * number for number in range(2000)]
    windows = cut_windows(texts, chars_per_window=10_000)
    shares = [sum(len(texts[number]) for number in numbers) for numbers in windows[1:]]
    half = len(shares) // 2
    texts_in = [sum(len(numbers) for numbers in part) for part in (windows[1 : half + 1], windows[half + 1 :])]
    assert min(texts_in) > 0.3 * sum(texts_in)
    assert [numbers.tolist() for numbers in windows] == [
        numbers.tolist() for numbers in cut_windows(texts, chars_per_window=10_000)
    ]
