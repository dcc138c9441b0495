"""What a guide reports as it embeds, and how the progress bar shows it."""

from collections.abc import Callable
from dataclasses import dataclass

from gistfast.progress import Bar


@dataclass(frozen=True)
class BatchDone:
    """One batch of texts that is embedded.

    Attributes:
        num_texts: Texts in it.
        num_tokens: Tokens of these texts; 0 when the guide does not know.
        num_padded: Tokens that were computed, padding included; 0 likewise.
    """

    num_texts: int
    num_tokens: int = 0
    num_padded: int = 0


OnBatch = Callable[[BatchDone], None]


def advancing(bar: Bar) -> OnBatch:
    """A function that advances the bar by each batch and notes the padding factor of all so far beside it.

    The padding factor is tokens computed over tokens of texts: 1 when nothing is wasted.
    """
    num_tokens = num_padded = 0

    def on_batch(done: BatchDone) -> None:
        nonlocal num_tokens, num_padded
        num_tokens += done.num_tokens
        num_padded += done.num_padded
        bar.advance(done.num_texts, note=f"padding {num_padded / num_tokens:.3f}x" if num_tokens else "")

    return on_batch
