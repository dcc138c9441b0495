from typing import Any

import numpy as np
import pytest
import torch

from gistfast.guides.token_batches import Padding, TokenBatch, TokenWindow
from gistfast.guides.token_budget import choose_budget, measure_budget

BUDGETS = (4, 8, 16, 32, 64)


def window(num_texts: int, length: int) -> TokenWindow:
    tokens = {"input_ids": np.ones(num_texts * length, np.int64)}
    padding = Padding(False, {"input_ids": 0}, masked=False)
    return TokenWindow(np.arange(num_texts), np.full(num_texts, length), tokens, {}, padding)


class FakeDevice:
    """Takes a second for each forward pass and each `tokens_a_second`; runs out of memory above `memory` tokens."""

    def __init__(self, tokens_a_second: float, memory: int = 1 << 30) -> None:
        self.now_s = 0.0
        self.sizes: list[int] = []
        self._tokens_a_second = tokens_a_second
        self._memory = memory

    def forward(self, batch: TokenBatch) -> None:
        if batch.num_padded > self._memory:
            raise torch.OutOfMemoryError
        self.sizes.append(batch.num_padded)
        self.now_s += 1 + batch.num_padded / self._tokens_a_second

    def measure(self, texts: TokenWindow, budgets: tuple[int, ...] = BUDGETS) -> int | None:
        return measure_budget(texts, self.forward, budgets=budgets, clock_s=lambda: self.now_s)


def test_budget_grows_while_the_rate_does() -> None:
    # A pass costs a second whatever its size, so more is always better.
    device = FakeDevice(tokens_a_second=1e9)
    assert device.measure(window(100, 2)) == 64
    assert device.sizes == [4, 4, 8, 8, 16, 16, 32, 32, 64, 64]


def test_budget_stops_where_more_gain_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gistfast")
    # A second for each 0.1 tokens: what a pass costs beside them is soon nothing.
    device = FakeDevice(tokens_a_second=0.1)
    assert device.measure(window(100, 2)) == 4
    assert "4 tokens a batch: 0 tokens/s, and 8 gave 0" in caplog.text


def test_budget_stays_below_what_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gistfast")
    assert FakeDevice(1e9, memory=20).measure(window(100, 2)) == 16
    assert "16 tokens a batch" in caplog.text
    assert "32 do not fit in memory" in caplog.text


def test_first_pass_with_a_budget_is_not_timed() -> None:
    class WarmingUp(FakeDevice):
        def forward(self, batch: TokenBatch) -> None:
            first = batch.num_padded not in self.sizes
            super().forward(batch)
            self.now_s += 1000 * batch.num_padded if first else 0

    assert WarmingUp(1e9).measure(window(100, 2)) == 64


def test_budgets_below_the_longest_text_are_not_tried() -> None:
    device = FakeDevice(1e9)
    assert device.measure(window(100, 11)) == 64
    assert device.sizes[0] == 11
    assert device.sizes[2] == 22


def test_text_longer_than_every_budget_leaves_the_largest() -> None:
    assert FakeDevice(1e9).measure(window(2, 100)) == 64


def test_too_few_texts_tell_nothing() -> None:
    device = FakeDevice(1e9)
    assert device.measure(window(1, 2)) is None
    assert device.sizes == []


def test_budget_is_the_largest_that_the_texts_could_tell_of() -> None:
    assert FakeDevice(1e9).measure(window(10, 2)) == 32


def test_nothing_that_fits_is_no_choice() -> None:
    def rate_of(budget: int) -> Any:
        raise torch.OutOfMemoryError

    assert choose_budget(rate_of, BUDGETS) is None
