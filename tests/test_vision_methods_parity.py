"""The recorded outputs of the official implementations, and properties of the selection functions beside them."""

from __future__ import annotations

import itertools

import parity_vision
import pytest
import torch
from golden_data import BESIDE, SHIPPED

from corematching.methods.bipartite import bipartite_match
from corematching.methods.cdpruner import determinantal_picks
from corematching.methods.dart import add_dissimilar
from corematching.methods.divprune import most_diverse
from corematching.methods.pooling import pooled_grid
from corematching.methods.prumerge import count_outliers, merge_centres

CASES = {f"{path.parent.name}/{path.stem}": path for root in (BESIDE, SHIPPED) for path in parity_vision.paths(root)}


def test_every_method_ships_a_recorded_case():
    shipped = {path.parent.name for path in parity_vision.paths(SHIPPED)}
    assert shipped == set(parity_vision.CHECKS)


@pytest.mark.parametrize("case", CASES)
def test_recorded_case_is_reproduced(case):
    row = parity_vision.compare(CASES[case])
    assert row.indices_equal
    assert row.ok, f"largest difference {row.max_difference}"


def test_merging_conserves_the_weighted_sum():
    torch.manual_seed(0)
    metric, hidden = torch.randn(2, 21, 5), torch.randn(2, 21, 3)
    sizes = torch.randint(1, 4, (2, 21, 1)).float()
    merged = bipartite_match(metric, 6, class_token=True).merge(hidden, sizes, torch.arange(21).expand(2, -1))
    assert merged.hidden.shape == (2, 15, 3)
    torch.testing.assert_close(merged.sizes.sum(1), sizes.sum(1))
    torch.testing.assert_close((merged.hidden * merged.sizes).sum(1), (hidden * sizes).sum(1))
    torch.testing.assert_close(merged.hidden[:, 0], hidden[:, 0])  # the class token is left alone
    assert torch.equal(merged.sizes[:, 0], sizes[:, 0])


def test_no_pairs_to_merge_is_none():
    assert bipartite_match(torch.randn(1, 8, 4), 0, class_token=False) is None
    assert bipartite_match(torch.randn(1, 2, 4), 5, class_token=True) is None


def test_greedy_determinant_picks_match_exhaustive_search_step_by_step():
    torch.manual_seed(0)
    tokens, weights = torch.randn(1, 9, 4), torch.rand(1, 9) + 0.1
    picks = determinantal_picks(tokens, weights, 4)[0].tolist()
    unit = torch.nn.functional.normalize(tokens[0].double(), dim=-1) * weights[0].double()[:, None]
    kernel, chosen = unit @ unit.T, []
    for _ in range(4):
        gains = {i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]) for i in range(9) if i not in chosen}
        chosen.append(max(gains, key=gains.get))
    assert picks == chosen


def test_picks_beyond_the_rank_are_still_distinct():
    tokens = torch.randn(2, 10, 2).repeat_interleave(2, 1)
    assert all(len(set(row.tolist())) == 9 for row in determinantal_picks(tokens, torch.ones(2, 20), 9))
    assert all(len(set(row.tolist())) == 15 for row in most_diverse(tokens, 15))


def test_diverse_picks_maximise_the_smallest_distance_greedily():
    torch.manual_seed(1)
    tokens = torch.randn(1, 12, 6)
    unit = torch.nn.functional.normalize(tokens[0], dim=-1)
    distance = 1 - unit @ unit.T
    distance.fill_diagonal_(2.5)
    chosen = [int(distance.amin(1).argmax())]
    for _ in range(5):
        rest = [i for i in range(12) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distance[i, chosen].min())))
    assert most_diverse(tokens, 6)[0].tolist() == chosen


def test_each_pivot_takes_what_resembles_it_least():
    states = torch.eye(6)[None]
    pivots = torch.tensor([[[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]]])
    taken = torch.tensor([[False, True, False, False, False, False]])
    kept = add_dissimilar(states, pivots, taken, torch.tensor([[1, 2]]))
    # The first takes 0 (1 is out); the second the least similar of what is left: 5 and 4.
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5]


def test_outliers_are_counted_per_image():
    flat = torch.ones(1, 100).cumsum(1)
    spiky = flat.clone()
    spiky[0, :3] = 1000
    assert count_outliers(torch.cat([flat, spiky])) == [0, 3]


def test_image_without_outliers_is_one_summed_token():
    features, scores = torch.randn(8, 3), torch.rand(8)
    tokens = merge_centres(features, scores, torch.randn(8, 4), torch.tensor([], dtype=torch.long))
    torch.testing.assert_close(tokens, (features * scores[:, None]).sum(0, keepdim=True))


@pytest.mark.parametrize(
    ("keep", "grid"), [(144, (12, 12)), (64, (8, 8)), (192, (16, 12)), (1, (1, 1)), (576, (24, 24))]
)
def test_pooled_grids_of_the_usual_budgets(keep, grid):
    assert pooled_grid(keep, 24, 24) == grid


def test_pooled_grid_is_the_largest_that_fits():
    for keep, (rows, columns) in itertools.product(range(1, 41), [(5, 8), (6, 6)]):
        r, c = pooled_grid(keep, rows, columns)
        fitting = [a * b for a in range(1, rows + 1) for b in range(1, columns + 1) if a * b <= keep]
        assert (r <= rows, c <= columns, r * c) == (True, True, max(fitting))
