"""How many tokens a forward pass takes: measured where nobody can know."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from gistfast.guides.token_batches import TokenBatch, TokenWindow

logger = logging.getLogger(__name__)

# A CPU is fastest when what a batch needs fits its caches.
TOKENS_PER_CPU_BATCH = 1024
TOKENS_PER_GPU_BATCH = 32_768
GPU_BUDGETS = tuple(1 << power for power in range(12, 19))
# A larger budget must be this much faster than a smaller one to be worth its memory.
WORTHWHILE = 1.03


def measure_budget(
    window: TokenWindow,
    forward: Callable[[TokenBatch], object],
    *,
    budgets: Sequence[int] = GPU_BUDGETS,
    clock_s: Callable[[], float] = time.perf_counter,
) -> int | None:
    """The budget with which the device embeds most tokens a second; None when the texts are too few to tell.

    Args:
        window: Tokenised texts, the longest of all among them, because they need most memory.
        forward: Embeds a batch; returns when it is done.
        budgets: To try, smallest first.
        clock_s: Seconds, from whenever.
    """

    def rate_of(budget: int) -> float | None:
        batch = next(window.batches(budget))
        if batch.num_padded * 2 <= budget:
            return None
        # Once for the allocator and the choice of kernels, which later batches find ready.
        forward(batch)
        begun_s = clock_s()
        forward(batch)
        return batch.num_tokens / (clock_s() - begun_s)

    # Below the longest text all budgets are the same.
    return choose_budget(rate_of, [budget for budget in budgets if budget >= window.lengths[0]] or budgets[-1:])


def choose_budget(rate_of: Callable[[int], float | None], budgets: Iterable[int]) -> int | None:
    """The fastest budget: they are tried until the rate no longer rises, or memory or the tokens run out.

    Args:
        rate_of: Tokens a second with a budget, or None when there are not so many tokens.
        budgets: To try, smallest first.
    """
    best, best_rate, reason = None, 0.0, "there were no more texts to try"
    for budget in budgets:
        try:
            rate = rate_of(budget)
        except torch.OutOfMemoryError:
            reason = f"{budget:,} do not fit in memory"
            break
        if rate is None:
            break
        if rate < best_rate * WORTHWHILE:
            reason = f"{budget:,} gave {rate:,.0f}"
            break
        best, best_rate = budget, rate
    if best is not None:
        logger.info("%s tokens a batch: %s tokens/s, and %s", f"{best:,}", f"{best_rate:,.0f}", reason)
    return best
