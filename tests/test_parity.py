"""The loss beside others' code: values of the original GISTEmbed, and the losses of sentence-transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from loss_cases import Batch, make_batch, outcome
from packaging import version
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent / "data" / "gistembed_golden.json").read_text(encoding="utf-8"))
ROLES = ("anchor", "positive", "negative")
both_backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


def closed_form(width: int, a: float, b: float, c: float) -> Tensor:
    """The vectors that the golden values were made with, (6, width) float64."""
    i, d = torch.arange(6, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.sin(a * (i + 1) * (d + 1) + b) + c * torch.cos(0.61 * (i + 2) * (d + 3))


def golden_batch() -> Batch:
    """Student and guide vectors of the golden values."""
    student = [(0.37, 0.1, 0.2), (0.37, 1.15, 1.1), (0.41, 0.6, 0.9)]
    guide = [(0.29, 0.2, 0.3), (0.31, 1.1, 1.4), (0.27, 0.6, 1.2)]
    return Batch([closed_form(8, *terms) for terms in student], [closed_form(10, *terms) for terms in guide])


@both_backends
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['name']}-{case['temperature']}")
def test_loss_and_gradients_are_those_of_the_original(case: dict[str, Any], backend: str) -> None:
    batch = golden_batch()
    if case["name"] == "guided_noguide":
        batch = replace(batch, guide=[])
    name, _, triplet_margin = case["name"].partition("_m")
    triplet: dict[str, Any] = {"triplet": "soft", "triplet_margin": float(triplet_margin)} if triplet_margin else {}
    found = outcome(batch, backend, temperature=case["temperature"], hard_only=name == "guided_hard", **triplet)
    assert float(found.loss) == pytest.approx(case["loss"], rel=1e-9)
    for role, gradient in zip(ROLES, found.gradients, strict=True):
        assert float(gradient.abs().sum()) == pytest.approx(case["grad_sum_abs"][role], rel=1e-9)
        assert gradient[0].tolist() == pytest.approx(case["grad_row0"][role], rel=1e-9, abs=1e-12)


@both_backends
def test_mask_is_that_of_the_original(backend: str) -> None:
    # Each row's candidates in the order ap, an, aa, pp, six each; 1 where dropped, as the diagonals of aa and pp are.
    masks = torch.tensor([[int(flag) for flag in row] for row in GOLDEN["guide_mask_rows"]]).view(6, 4, 6)
    dropped = dict(zip(("ap", "an", "aa", "pp"), masks.sum((0, 2)).tolist(), strict=True))
    shares = outcome(golden_batch(), backend).stats.dropped
    assert float(shares["ap"]) * 30 == pytest.approx(dropped["ap"], abs=1e-6)
    assert float(shares["an"]) * 36 == pytest.approx(dropped["an"], abs=1e-6)
    assert float(shares["aa"]) * 30 + 6 == pytest.approx(dropped["aa"], abs=1e-6)
    assert float(shares["pp"]) * 30 + 6 == pytest.approx(dropped["pp"], abs=1e-6)


def stand_in(vectors: Tensor) -> Any:
    """A model that knows the vector of each text by number, as far as sentence-transformers' losses look."""
    from tokenizers import Tokenizer, models
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    class Known(nn.Sequential):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        max_seq_length = 1

        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.vectors = nn.Parameter(vectors.clone())

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return features | {"sentence_embedding": self.vectors[features["input_ids"][:, 0]]}

    return Known()


def theirs(batch: Batch, num_columns: int, cached: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss, and gradient on all vectors, of sentence-transformers; negatives are as many columns as they fill."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    student, guide = (stand_in(torch.cat(roles).double()) for roles in (batch.student, batch.guide))
    numbers = torch.arange(len(student.vectors)).view(num_columns, -1, 1)
    features = [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in numbers]
    kind = losses.CachedGISTEmbedLoss if cached else losses.GISTEmbedLoss
    loss = kind(student, guide, **options, **({"mini_batch_size": 4} if cached else {}))(features, None)
    loss.backward()
    return loss.detach(), student.vectors.grad


@both_backends
@pytest.mark.parametrize(
    ("cached", "num_negatives"),
    [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)],
    ids=["pairs", "triplets", "cached pairs", "cached triplets", "cached, two negatives"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.05, "margin": 0.1},
        {"temperature": 0.05, "margin": -0.1},
        {"temperature": 0.05, "margin": 0.2, "margin_strategy": "relative"},
        {"temperature": 0.05, "margin": -0.2, "margin_strategy": "relative"},
        {"temperature": 0.1, "contrast_anchors": False},
        {"temperature": 0.1, "contrast_positives": False, "margin": 0.05},
        {"temperature": 1.0, "contrast_anchors": False, "contrast_positives": False},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "defaults",
)
def test_equal_to_sentence_transformers(
    options: dict[str, Any], num_negatives: int, cached: bool, backend: str
) -> None:
    # Guide products are exact, with ties; no positive is its anchor's copy, which theirs would contrast with itself.
    batch = make_batch(11, 11 * num_negatives, guide_width=64, seed=2)
    loss, gradient = theirs(batch, 2 + num_negatives, cached, **options)
    found = outcome(batch, backend, **{"temperature": 0.01, **options})
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-9)
    # Before 6.2 their cached loss carries gradients in fp32, whatever the vectors are.
    close = 1e-6 if cached and version.parse(sentence_transformers.__version__) < version.parse("6.2") else 1e-9
    assert torch.allclose(torch.cat(found.gradients), gradient, rtol=0, atol=close * float(gradient.abs().max()))
    assert any(0 < float(share) < 1 for share in found.stats.dropped.values())
