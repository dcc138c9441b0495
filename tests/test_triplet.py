from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import Batch, make_batch, outcome, truth, with_guides
from torch import Tensor
from torch.nn.functional import normalize
from train_cases import ROWS, resumes_exactly, steps, train_small

from gistfast.errors import ConfigError
from gistfast.kernels.fused import each_guide
from gistfast.losses.functional import guided_contrastive_loss
from gistfast.losses.triplet import _terms, triplet_terms
from gistfast.settings.stages import TrainSettings, build

KINDS = ("soft", "hard")


def by_hand(
    batch: Batch,
    kind: str,
    triplet_margin: float,
    *,
    margin: float = 0.0,
    contrast_anchors: bool = True,
    guide_widths: Sequence[int] = (),
    lowest: bool = False,
) -> list[Tensor]:
    """The terms, row by row and candidate by candidate, in float64."""
    student = [normalize(role.double()) for role in batch.student]
    guides = [[normalize(role.double()) for role in one] for one in each_guide(batch.guide, guide_widths).values()]
    num_texts = sum(map(len, batch.student))
    every = torch.arange(num_texts).split([len(role) for role in batch.student])
    ids = batch.ids or list(every)

    def guide_score(row: int, role: int, place: int) -> float:
        scores = [float(one[0][row] @ one[role][place]) for one in guides]
        return min(scores) if lowest else max(scores)

    terms = []
    for row in range(len(student[0])):
        positives, negatives = [], []
        for role in (1, *range(2, len(student)), *([0] if contrast_anchors else [])):
            for place in range(len(student[role])):
                distance = 1 - student[0][row] @ student[role][place]
                own = role == 1 and place == row
                if not own and ids[role][place] == ids[0][row]:
                    continue
                same = ids[role][place] == ids[1][row]
                above = bool(guides) and guide_score(row, role, place) > guide_score(row, 1, row) - margin
                (positives if own or same or above else negatives).append(distance)
        if not negatives:
            terms.append(torch.zeros((), dtype=torch.float64))
            continue
        near, far = torch.stack(negatives), torch.stack(positives)
        gap = far.mean() - near.mean() if kind == "soft" else far.max() - near.min()
        terms.append(torch.relu(gap + triplet_margin))
    return terms


def terms_of(batch: Batch, kind: Any, **options: Any) -> Tensor:
    """The terms by the module, of all rows."""
    every = torch.arange(sum(map(len, batch.student))).split([len(role) for role in batch.student])
    defaults: dict[str, Any] = {
        "triplet_margin": 0.3,
        "margin": 0.0,
        "relative": False,
        "contrast_anchors": True,
        "guide_widths": (),
        "lowest": False,
        "row_offset": 0,
        "num_rows": len(batch.student[0]),
    }
    return triplet_terms(batch.student, batch.guide, batch.ids or list(every), kind=kind, **defaults | options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 0), (2, 1), (29, 0), (29, 11)], ids=str)
@pytest.mark.parametrize("options", [{}, {"margin": 0.1}, {"contrast_anchors": False}], ids=str)
def test_terms_are_those_of_the_formula(kind: str, sizes: tuple[int, int], options: dict[str, Any]) -> None:
    batch = make_batch(*sizes)
    found = terms_of(batch, kind, **options)
    torch.testing.assert_close(found, torch.stack(by_hand(batch, kind, 0.3, **options)), atol=1e-9, rtol=0)
    assert sizes[0] == 1 or bool((found > 0).any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lowest", [False, True])
def test_several_guides_judge_by_their_lowest_or_highest_score(kind: str, lowest: bool) -> None:
    batch = with_guides(make_batch(13, 5), 16, 8)
    options: dict[str, Any] = {"guide_widths": (16, 8), "lowest": lowest}
    expected = torch.stack(by_hand(batch, kind, 0.3, **options))
    torch.testing.assert_close(terms_of(batch, kind, **options), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_text_is_a_positive_and_the_anchor_itself_is_neither(kind: str) -> None:
    batch = make_batch(4, 3)
    # Rows 0 and 1 share a positive, which is anchor 1, too; negative 0 is anchor 2, negative 1 is positive 3.
    ids = [torch.tensor([0, 5, 2, 3]), torch.tensor([5, 5, 6, 7]), torch.tensor([2, 7, 9])]
    batch = Batch(batch.student, [], ids)
    torch.testing.assert_close(terms_of(batch, kind), torch.stack(by_hand(batch, kind, 0.3)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_same_terms_and_gradients(kind: str) -> None:
    batch = make_batch(29, 11)
    found = []
    for chunk_bytes in (0, 1, 7 * 4 * 69 * 8):
        student = [role.clone().requires_grad_() for role in batch.student]
        terms = terms_of(Batch(student, batch.guide), kind, chunk_bytes=chunk_bytes)
        (terms * torch.linspace(1, 2, 29, dtype=torch.float64)).sum().backward()
        found.append([terms.detach(), *(role.grad for role in student)])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(one, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_bytes", [0, 1])
def test_gradients_are_those_of_finite_differences(kind: str, chunk_bytes: int) -> None:
    batch = make_batch(5, 2, 6)
    student = [role.clone().requires_grad_() for role in batch.student]

    def terms(*student: Tensor) -> Tensor:
        return terms_of(Batch(list(student), batch.guide), kind, chunk_bytes=chunk_bytes, triplet_margin=2.0)

    assert torch.autograd.gradcheck(terms, student)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_rows_are_those_of_the_whole(kind: str) -> None:
    batch = make_batch(29, 11)
    whole = terms_of(batch, kind)
    parts = [terms_of(batch, kind, row_offset=first, num_rows=count) for first, count in ((0, 10), (10, 19))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_contrastive_one_and_the_term(kind: str, backend: str) -> None:
    batch = make_batch(29, 11)
    options: dict[str, Any] = {"temperature": 0.05, "margin": 0.05}
    plain = outcome(batch, backend, **options)
    found = outcome(batch, backend, triplet=kind, triplet_margin=0.4, **options)
    expected = torch.stack(by_hand(batch, kind, 0.4, margin=0.05)).mean()
    assert float(found.loss - plain.loss) == pytest.approx(float(expected), abs=1e-9)
    assert float(found.stats.means()["triplet"]) == pytest.approx(float(expected), abs=1e-9)
    assert "triplet" not in plain.stats.means()
    each, _ = guided_contrastive_loss(
        **batch.arguments(), triplet=kind, triplet_margin=0.4, reduction="none", return_stats=True, **options
    )
    assert float(each.mean()) == pytest.approx(float(found.loss), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_precision_is_that_of_fp32_at_least(kind: str, dtype: torch.dtype) -> None:
    batch = make_batch(29, 11).to(dtype)
    options: dict[str, Any] = {"temperature": 0.05, "triplet": kind, "triplet_margin": 0.4}
    found, right = outcome(batch, "chunked", **options), truth(batch, **options)
    assert found.stats.triplet is not None
    assert right.stats.triplet is not None
    torch.testing.assert_close(found.stats.triplet.double(), right.stats.triplet, atol=1e-5, rtol=0)


def test_compiled_whole_it_gives_the_same() -> None:
    batch = make_batch(6, 3).to(torch.float32)
    options: dict[str, Any] = {"triplet": "soft", "triplet_margin": 0.4}
    eager = outcome(batch, "chunked", **options)
    torch.compiler.reset()
    compiled = torch.compile(guided_contrastive_loss, fullgraph=True, backend="aot_eager")
    student = [role.clone().requires_grad_() for role in batch.student]
    compiled(**Batch(student, batch.guide).arguments(), backend="chunked", **options).backward()
    for role, expected in zip(student, eager.gradients, strict=True):
        torch.testing.assert_close(role.grad, expected, atol=1e-6, rtol=1e-5)


def test_tiles_are_not_kept_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(64, 0)

    def kept_numbers() -> int:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            return kept.setdefault(tensor.data_ptr(), tensor)

        student = [role.clone().requires_grad_() for role in batch.student]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms_of(Batch(student, batch.guide), "hard", chunk_bytes=8 * 4 * 128 * 8)
        return sum(tensor.numel() for tensor in kept.values())

    found = kept_numbers()
    monkeypatch.setattr("gistfast.losses.triplet._computed_again", _terms)
    assert found < 64 * 128 + kept_numbers() / 4
    assert kept_numbers() > 2 * 64 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triplet": "mild"}, "triplet is 'mild': choose soft or hard"),
        ({"triplet": "soft", "triplet_margin": -0.1}, "triplet_margin is -0.1: give a distance of cosines"),
    ],
)
def test_bad_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guided_contrastive_loss(**make_batch(3).arguments(), **options)


# In a training run.


@pytest.fixture
def run(make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path) -> Callable[..., Any]:
    return partial(train_small, store=make_store(ROWS).path, student=tiny_student, out=tmp_path / "student")


@pytest.mark.parametrize("kind", KINDS)
def test_run_logs_the_term_and_resumes_exactly(kind: str, run: Callable[..., Any], tmp_path: Path) -> None:
    report, _ = resumes_exactly(run, tmp_path, triplet=kind, triplet_margin=0.5)
    assert all(record["triplet"] > 0 for record in steps(report.path))
    cached = run(out=tmp_path / "cached", triplet=kind, triplet_margin=0.5, cached=True, dropout=0.0)
    plain = run(out=tmp_path / "plain", triplet=kind, triplet_margin=0.5, dropout=0.0)
    for one, other in zip(steps(cached.path), steps(plain.path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_margin_without_a_term_is_refused() -> None:
    with pytest.raises(ConfigError, match="--triplet-margin does nothing without --triplet"):
        build(TrainSettings, {"store": "s", "student": "s", "out": "o", "triplet_margin": 0.1})
