import pytest
import torch
from loss_cases import make_batch, outcome, truth

from gistfast.losses.stats import LossStats, positive_score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 29), (7, 13)])
def test_positive_scores_are_the_cosines_of_the_rows_own_pairs(rows: tuple[int, int], dtype: torch.dtype) -> None:
    batch = make_batch(29, 11).to(dtype)
    first, count = rows
    found = outcome(batch, "chunked", row_offset=first, num_rows=count).stats.positive_score
    anchor, positive = (torch.nn.functional.normalize(role.double()) for role in batch.student[:2])
    right = (anchor * positive).sum(1)[first : first + count]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, atol=1e-6, rtol=0)
    whole = truth(batch).stats.positive_score
    torch.testing.assert_close(found.double(), whole[first : first + count], atol=1e-6, rtol=0)


def test_positive_scores_hold_for_short_vectors() -> None:
    anchor = torch.tensor([[3e-12, 4e-12]])
    assert positive_score(anchor, torch.tensor([[4e12, 3e12]]), 0, 1).item() == pytest.approx(0.96)


def test_hardest_score_is_the_mean_over_the_rows_that_have_one() -> None:
    hardest = torch.tensor([0.5, -torch.inf, 0.25])
    means = LossStats({"ap": torch.tensor(0.125)}, torch.tensor([1.0, 0.5, 0.0]), hardest).means()
    assert {name: mean.item() for name, mean in means.items()} == {
        "dropped/ap": 0.125,
        "score/positive": 0.5,
        "score/hardest": 0.375,
    }


def test_no_row_with_a_candidate_has_no_hardest_score() -> None:
    stats = outcome(make_batch(1).to(torch.float32), "chunked").stats
    assert stats.means()["score/hardest"].isnan()
