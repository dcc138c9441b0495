"""The public function: what it computes, what it refuses, and how it stands in PyTorch's ways."""

import logging
import math
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import Batch, make_batch, outcome, truth, with_guides, with_ids
from torch import Tensor
from torch.nn.functional import normalize

from gistfast.errors import ConfigError, ShapeError, VectorError
from gistfast.losses import functional
from gistfast.losses.functional import guided_contrastive_loss

both_backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


def by_hand(batch: Batch, *, temperature: float = 0.01, **options: Any) -> tuple[list[float], dict[str, float]]:
    """Losses of the rows and dropped shares, candidate by candidate as the formula says."""
    widths = options.get("guide_widths") or [role.shape[1] for role in batch.guide[:1]]
    cut = zip(*(role.split(widths, 1) for role in batch.guide), strict=True)
    student, *guides = (
        [[(vector / vector.norm()).tolist() for vector in role.double()] for role in roles]
        for roles in (batch.student, *cut)
    )
    of_guides = {"min": min, "max": max}.get(options.get("guide_score", ""), mean)

    def guide_score(looker: int, i: int, seen: int, j: int) -> float:
        return of_guides([dot(guide[looker][i], guide[seen][j]) for guide in guides])

    # Without ids, every vector is a text of its own.
    ids = [role.tolist() for role in batch.ids] or [
        [(role, i) for i in range(len(v))] for role, v in enumerate(student)
    ]
    used = {"ap": True, "aa": options.get("contrast_anchors", True), "pp": options.get("contrast_positives", True)}
    blocks = [block for block in ("ap", "aa", "pp", "an") if used.get(block, len(student) == 3)]
    losses, dropped, met = [], dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
    for i in range(len(student[0])):
        own, total = dot(student[0][i], student[1][i]), 0.0
        threshold = threshold_by_hand(guide_score(0, i, 1, i), **options) if guides else math.inf
        for block in blocks:
            looker, seen = ("apn".index(letter) for letter in block)
            # Neither the own positive nor the row itself is a candidate.
            for j in (j for j in range(len(student[seen])) if block == "an" or j != i):
                score = dot(student[looker][i], student[seen][j])
                above = bool(guides) and guide_score(looker, i, seen, j) > threshold
                drop = above or ids[seen][j] in (ids[0][i], ids[1][i]) or (options.get("hard_only") and score < own)
                met[block] += 1
                dropped[block] += bool(drop)
                total += 0.0 if drop else math.exp((score - own) / temperature)
        losses.append(math.log1p(total))
    return losses, {block: dropped[block] / met[block] if met[block] else 0.0 for block in blocks}


def threshold_by_hand(own: float, margin: float = 0.0, margin_strategy: str = "absolute", **_: Any) -> float:
    """What a row's candidates are judged by."""
    return own - (abs(own) * margin if margin_strategy == "relative" else margin)


def dot(left: list[float], right: list[float]) -> float:
    """The product of two vectors."""
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    num_anchors=st.integers(1, 7),
    num_negatives=st.integers(0, 5),
    guided=st.booleans(),
    identified=st.booleans(),
    seed=st.integers(0, 99),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.02, 0.1, 1.0]),
            "margin": st.sampled_from([-0.25, 0.0, 0.125, 0.3]),
            "margin_strategy": st.sampled_from(["absolute", "relative"]),
            "contrast_anchors": st.booleans(),
            "contrast_positives": st.booleans(),
            "hard_only": st.booleans(),
        }
    ),
)
def test_losses_and_dropped_shares_are_those_of_the_formula(
    num_anchors: int, num_negatives: int, guided: bool, identified: bool, seed: int, options: dict[str, Any]
) -> None:
    batch = make_batch(num_anchors, num_negatives, 16, seed=seed, exact=True)
    batch = with_ids(batch, seed) if identified else batch
    batch = batch if guided else replace(batch, guide=[])
    losses, dropped = by_hand(batch, **options)
    for backend in ("reference", "chunked"):
        found, stats = guided_contrastive_loss(
            **batch.arguments(), backend=backend, reduction="none", return_stats=True, **options
        )
        assert found.tolist() == pytest.approx(losses, rel=1e-9, abs=1e-12)
        assert {block: float(share) for block, share in stats.dropped.items()} == pytest.approx(dropped)


@both_backends
@pytest.mark.parametrize("guide_score", ["mean", "min", "max"])
@pytest.mark.parametrize("margin", [0.0, 0.125, 1.25])
def test_several_guides_judge_by_their_mean_lowest_or_highest_score(
    backend: str, guide_score: str, margin: float
) -> None:
    # Four guides as long as each other and of exact products, so that the whole is their mean, and ties stay ties.
    batch = with_guides(make_batch(13, 5, seed=3), 16, 16, 16, 16)
    batch = replace(batch, guide=[normalize(role.double().view(-1, 4, 16), dim=2).flatten(1) for role in batch.guide])
    options: dict[str, Any] = {"guide_widths": [16] * 4, "guide_score": guide_score, "margin": margin}
    losses, dropped = by_hand(batch, temperature=0.1, **options)
    found = outcome(batch, backend, temperature=0.1, **options)
    assert float(found.loss) == pytest.approx(mean(losses), rel=1e-9)
    assert {block: float(share) for block, share in found.stats.dropped.items()} == pytest.approx(dropped, abs=1e-7)


@both_backends
def test_own_positive_survives_any_margin(backend: str) -> None:
    batch = make_batch(9, 4, seed=3)
    found = outcome(batch, backend, temperature=0.5, margin=1.9)
    # What is left of the candidates scores at most -0.9 by the guide; all else is dropped, the positive is not.
    losses, _ = by_hand(batch, temperature=0.5, margin=1.9)
    assert float(found.loss) == pytest.approx(sum(losses) / 9)
    assert float(outcome(batch, backend, margin=2.1).loss) == 0


@both_backends
@pytest.mark.parametrize("guide_score", ["min", "max"])
def test_own_positive_survives_what_several_guides_say(backend: str, guide_score: str) -> None:
    batch = with_guides(make_batch(9, 4, seed=3), 16, 4)
    # To one guide the positive is the anchor's opposite, and another text its twin.
    batch.guide[1][:, :16] = -batch.guide[0][:, :16]
    options: dict[str, Any] = {"guide_widths": (16, 4), "guide_score": guide_score, "temperature": 0.5}
    losses, _ = by_hand(batch, **options)
    assert float(outcome(batch, backend, **options).loss) == pytest.approx(mean(losses))
    assert float(outcome(batch, backend, margin=2.1, **options).loss) == 0


@both_backends
def test_positive_that_is_a_row_s_own_stays_the_target_when_ids_repeat_it(backend: str) -> None:
    batch = make_batch(3, seed=1)
    # All three rows have one positive text: nothing is left in ap and pp, and the loss still pulls to the own positive.
    ids = [torch.tensor([0, 1, 2]), torch.tensor([9, 9, 9])]
    found = outcome(replace(batch, guide=[], ids=ids), backend, temperature=1.0)
    assert float(found.stats.dropped["ap"]) == 1
    assert float(found.stats.dropped["pp"]) == 1
    assert float(found.stats.dropped["aa"]) == 0
    assert float(found.loss) > 0
    assert all(bool((gradient.norm(dim=1) > 0).all()) for gradient in found.gradients)


@both_backends
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_slices_of_rows_sum_to_the_joint_gradient(backend: str, learned: bool) -> None:
    temperature: float | Tensor = torch.tensor(0.1, dtype=torch.float64) if learned else 0.1
    batch = with_ids(make_batch(12, 5))
    joint = outcome(batch, backend, temperature=temperature, margin=0.1)
    slices = [(0, 4), (4, 5), (9, 3)]
    parts = [
        outcome(batch, backend, temperature=temperature, margin=0.1, row_offset=first, num_rows=num)
        for first, num in slices
    ]
    for number, gradient in enumerate(joint.gradients):
        summed = sum(part.gradients[number] * num / 12 for part, (_, num) in zip(parts, slices, strict=True))
        assert torch.allclose(gradient, summed, rtol=0, atol=1e-12 * float(gradient.abs().max()) + 1e-15)


@both_backends
def test_reduction_none_gives_a_loss_for_each_row(backend: str) -> None:
    batch = make_batch(7, 3)
    rows = guided_contrastive_loss(**batch.arguments(), backend=backend, reduction="none", temperature=0.1)
    mean = guided_contrastive_loss(**batch.arguments(), backend=backend, temperature=0.1)
    assert rows.shape == (7,)
    assert float(rows.mean()) == pytest.approx(float(mean))


@both_backends
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    batch = make_batch(4, 3, 5)
    leaves = [role.requires_grad_() for role in batch.student]
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def losses(temperature: Tensor, *student: Tensor) -> Any:
        arguments = replace(batch, student=list(student)).arguments()
        options = {"temperature": temperature, "backend": backend, "contrast_positives": False}
        return (
            guided_contrastive_loss(**arguments, **options),
            guided_contrastive_loss(**arguments, **options, reduction="none"),
        )

    assert torch.autograd.gradcheck(losses, (temperature, *leaves))


def test_gradients_reach_only_what_asks_for_them() -> None:
    anchor, positive = make_batch(4).student
    anchor.requires_grad_()
    guide = make_batch(4).guide[0].float().requires_grad_()
    guided_contrastive_loss(
        anchor, positive, guide_anchor=guide, guide_positive=make_batch(4).guide[1], temperature=0.5
    ).backward()
    assert anchor.grad is not None
    assert positive.grad is None
    assert guide.grad is None
    with torch.no_grad():
        loss = guided_contrastive_loss(anchor, positive, guide_anchor=None, guide_positive=None)
    assert not loss.requires_grad


@both_backends
def test_gradient_through_what_made_the_vectors_and_what_follows_the_loss(backend: str) -> None:
    batch = make_batch(5, 2)
    weight = torch.eye(24, dtype=torch.float64, requires_grad=True)
    arguments = replace(batch, student=[role @ weight for role in batch.student]).arguments()
    (3 * guided_contrastive_loss(**arguments, backend=backend, temperature=0.1)).backward()
    gradients = truth(batch, temperature=0.1).gradients
    expected = sum(role.T @ gradient for role, gradient in zip(batch.student, gradients, strict=True))
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 3 * expected, atol=1e-12)


@both_backends
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_graph_that_is_kept_gives_the_same_gradient_again(backend: str, weight: float) -> None:
    batch = make_batch(5, 2)
    student = [role.requires_grad_() for role in batch.student]
    loss = weight * guided_contrastive_loss(**batch.arguments(), backend=backend, temperature=0.1)
    loss.backward(retain_graph=True)
    once = [role.grad.clone() for role in student if role.grad is not None]
    loss.backward()
    assert all(torch.equal(2 * first, role.grad) for first, role in zip(once, student, strict=True))
    right = truth(batch, temperature=0.1).gradients
    assert all(torch.allclose(first, weight * exact, atol=1e-12) for first, exact in zip(once, right, strict=True))


@both_backends
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("whose", "role", "name"), [("student", 0, "anchor"), ("student", 2, "negative"), ("guide", 1, "positive")]
)
def test_unusable_vector_is_named(backend: str, whose: str, role: int, name: str, value: float) -> None:
    batch = make_batch(5, 7)
    roles = [vectors.clone() for vectors in getattr(batch, whose)]
    roles[role][3] = value
    roles[role][4] = value
    kind = "zero" if value == 0 else "not finite"
    with pytest.raises(VectorError, match=f"the {whose} vector of {name} 3 is {kind}: "):
        outcome(replace(batch, **{whose: roles}), backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": 0.0}, ConfigError, "temperature is 0.0"),
        ({"temperature": math.inf}, ConfigError, "temperature is inf"),
        ({"temperature": torch.ones(2)}, ConfigError, r"temperature has shape \(2,\)"),
        ({"margin": math.nan}, ConfigError, "margin is nan"),
        ({"margin_strategy": "both"}, ConfigError, "margin_strategy is 'both'"),
        ({"reduction": "sum"}, ConfigError, "reduction is 'sum'"),
        ({"chunk_mib": 0.0}, ConfigError, "chunk_mib is 0.0"),
        ({"backend": "cuda"}, ConfigError, "backend is 'cuda'"),
        ({"backend": "triton"}, ConfigError, "float64"),
        ({"row_offset": -1}, ShapeError, "rows -1 to 5"),
        ({"row_offset": 5}, ShapeError, "at least one row"),
        ({"row_offset": 2, "num_rows": 4}, ShapeError, "rows 2 to 6 were asked for, of 5 anchors"),
        ({"positive": torch.ones(4, 24)}, ShapeError, "5 student vectors of anchor and 4 of positive"),
        ({"positive": torch.ones(5, 23)}, ShapeError, "23 wide"),
        ({"negative": torch.ones(24)}, ShapeError, r"student vectors of negative have shape \(24,\)"),
        ({"anchor": torch.ones(5, 24, dtype=torch.int64)}, ShapeError, "floating-point"),
        ({"guide_positive": None}, ShapeError, "guide_positive is missing"),
        ({"guide_anchor": torch.ones(4, 16)}, ShapeError, "guide_anchor has 4 vectors"),
        ({"guide_negative": None}, ShapeError, "guide_negative is missing"),
        ({"negative": None}, ShapeError, "guide_negative is given without negative"),
        ({"guide_score": "sum"}, ConfigError, "guide_score is 'sum'"),
        ({"guide_score": "min"}, ConfigError, "guide_score is 'min' and guide_widths None"),
        ({"guide_score": "max", "guide_widths": [16]}, ConfigError, "give the width of each"),
        ({"guide_widths": (8, 7)}, ShapeError, r"guide_widths is \(8, 7\), guide vectors are 16 wide"),
        ({"guide_widths": (16, 0)}, ShapeError, r"guide_widths is \(16, 0\)"),
        ({"guide_widths": ()}, ShapeError, r"guide_widths is \(\)"),
        ({"anchor_ids": torch.arange(5)}, ShapeError, "positive_ids is missing"),
        (
            {"anchor_ids": torch.arange(5), "positive_ids": torch.arange(5), "negative_ids": torch.ones(3)},
            ShapeError,
            "negative_ids has shape",
        ),
    ],
)  # fmt: skip
def test_option_out_of_range_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        guided_contrastive_loss(**{**make_batch(5, 3).arguments(), **changes})


def test_automatic_choice_is_made_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    functional._announced.clear()  # whatever was said before in this process counts as unsaid
    batch = make_batch(3).to(torch.float32)
    with caplog.at_level(logging.INFO, logger="gistfast.losses.functional"):
        automatic, chunked = outcome(batch, "auto"), outcome(batch, "chunked")
        outcome(batch, "auto")
    assert torch.equal(automatic.loss, chunked.loss)
    assert [record.getMessage() for record in caplog.records] == [
        "guided loss: backend chunked (cpu is not a CUDA device)"
    ]


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_given_by_the_reference_and_refused_by_others(backend: str, reduction: str) -> None:
    batch = make_batch(3)
    student = [role.requires_grad_() for role in batch.student]
    loss = guided_contrastive_loss(**batch.arguments(), backend=backend, temperature=0.5, reduction=reduction).sum()
    if backend == "reference":
        (gradient,) = torch.autograd.grad(loss, student[:1], create_graph=True)
        assert torch.autograd.grad(gradient.sum(), student[:1])[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="cannot be differentiated twice: call backward without create_graph"):
            torch.autograd.grad(loss, student[:1], create_graph=True)


@both_backends
def test_autocast_changes_neither_dtype_nor_float64_s_precision(backend: str) -> None:
    batch = make_batch(6, 3)
    right = truth(batch, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(batch, backend, temperature=0.1)
    assert found.loss.dtype == torch.float64
    assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.1},
        {"temperature": torch.tensor(0.1)},
        {"temperature": torch.tensor(0.1), "row_weights": torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5, 3.0])},
        {"temperature": 0.1, "guide_widths": (10, 6), "guide_score": "min"},
    ],
    ids=["mean", "learned temperature", "none", "two guides"],
)
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_compiled_whole_it_gives_the_same(backend: str, options: dict[str, Any]) -> None:
    batch = make_batch(6, 3).to(torch.float32)
    eager = outcome(batch, "chunked", **options)
    torch.compiler.reset()
    # aot_eager: the graphs of forward and backward are made and run, without a C++ compiler.
    compiled = torch.compile(guided_contrastive_loss, fullgraph=True, backend="aot_eager")
    student = [role.clone().requires_grad_() for role in batch.student]
    weights = options.get("row_weights")
    temperature = options["temperature"]
    learned = [temperature.clone().requires_grad_()] if isinstance(temperature, Tensor) else []
    loss, stats = compiled(
        **replace(batch, student=student).arguments(),
        temperature=learned[0] if learned else temperature,
        reduction="mean" if weights is None else "none",
        backend=backend,
        return_stats=True,
        **{name: value for name, value in options.items() if name.startswith("guide_")},
    )
    (loss if weights is None else (loss * weights).sum()).backward()
    assert torch.equal(loss, eager.loss)
    assert torch.equal(stats.hardest_score, eager.stats.hardest_score)
    assert all(torch.equal(leaf.grad, right) for leaf, right in zip([*student, *learned], eager.gradients, strict=True))
