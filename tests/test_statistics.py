"""The statistics on made-up numbers whose answers are known."""

import math

import pytest
import scipy.stats
import torch

from ses_fast import statistics
from ses_fast.statistics import Interval


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(150, 30, generator=generator, dtype=torch.float64)
    intervals = [statistics.mean_of(sample.tolist()) for sample in samples]
    held = sum(low <= 0 <= high for _, low, high in intervals) / len(intervals)
    assert 0.89 <= held <= 0.985
    widths = torch.tensor([high - low for _, low, high in intervals])
    assert widths.mean().item() == pytest.approx(2 * 1.96 / 30**0.5, rel=0.08)


def test_an_interval_is_the_same_each_time_and_leaves_out_what_is_unknown():
    values = [1.0, 2.0, math.nan, 6.0]
    assert statistics.mean_of(values) == statistics.mean_of(values)
    assert statistics.mean_of(values).value == 3.0
    assert statistics.mean_of([2.0] * 4) == Interval(2.0, 2.0, 2.0)
    assert statistics.mean_of([2.0]).value == 2.0 and all(map(math.isnan, statistics.mean_of([2.0])[1:]))
    assert all(map(math.isnan, statistics.pooled_correlation([[1, 2, 3]], [[1, 2, 4]])[1:])), "nor of one prompt"
    assert all(map(math.isnan, statistics.mean_of([])))


def test_ranks_of_equal_scores_share_their_places():
    assert statistics.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_scipys_with_ties(seed):
    one, other = torch.randint(6, (2, 40), generator=torch.Generator().manual_seed(seed)).tolist()
    assert statistics.spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)


def test_a_correlation_with_what_does_not_vary_is_unknown():
    assert math.isnan(statistics.spearman([1, 2, 3], [5, 5, 5]))


def test_prompts_of_another_level_do_not_correlate_by_it():
    ones, others = [[1, 2, 3], [101, 102, 103]], [[3, 2, 1], [103, 102, 101]]
    assert statistics.pooled_correlation(ones, others) == pytest.approx((-1, -1, -1))
    uneven = statistics.pooled_correlation([[1, 2, 3, 4], [5, 3, 4, 2]], [[2, 4, 6, 8], [-5, -3, -4, -2]])
    assert uneven.value == pytest.approx(5 / 250**0.5), "products 10 and -5, squares 5 + 5 and 20 + 5"
    assert (uneven.low, uneven.high) == pytest.approx((-1, 1)), "either prompt may be drawn twice"


def test_the_overlap_counts_the_best_of_both():
    assert statistics.overlap([5, 4, 3, 2, 1], [5, 3, 4, 0, 9], 2) == 0.5
    assert statistics.best([1, 7, 7, 3], 2) == [1, 2]


def test_the_best_of_some_is_the_mean_over_all_ways_to_draw_them():
    scores = [4.0, 1.0, 2.0, 8.0]
    assert statistics.best_of(scores, 1) == pytest.approx(3.75)
    assert statistics.best_of(scores, 2) == pytest.approx((4 + 4 + 8 + 2 + 8 + 8) / 6)
    assert statistics.best_of(scores, 4) == 8
    assert statistics.best_of(scores, 1.5) == pytest.approx((3.75 + 34 / 6) / 2)


def test_what_a_pick_is_worth_is_the_number_of_scores_whose_best_it_is():
    scores = [[4.0, 1.0, 2.0, 8.0], [40.0, 10.0, 20.0, 80.0]]
    for count in (1, 2, 3, 4):
        picks = [statistics.best_of(each, count) for each in scores]
        assert statistics.worth(scores, picks) == pytest.approx(count, abs=1e-3)
    assert statistics.worth(scores, [0.0, 0.0]) == 1


def test_the_time_to_a_score_is_read_between_the_points():
    seconds, scores = [1.0, 2.0, 4.0], [10.0, 20.0, 30.0]

    def reached(level, scores=scores):
        return statistics.value_at(statistics.place_of(level, scores), seconds)

    assert (reached(25.0), reached(20.0), reached(30.0)) == (3.0, 2.0, 4.0)
    assert reached(5.0) == 1.0 and reached(31.0) == math.inf
    assert reached(15.0, [10.0, 20.0, 12.0]) == 1.5, "the first time counts"
    assert reached(15.0, [10.0, 10.0, 20.0]) == 3.0
    assert statistics.value_at(1.25, [5.0, -1.0, 3.0]) == 0.0


def test_resampled_means_of_several_figures_stay_paired():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    means = statistics.resampled(values)
    assert means.shape == (1 + statistics.RESAMPLES, 2) and means[0].tolist() == [3, 30]
    assert torch.equal(means, statistics.resampled(values)) and means[1:, 0].std() > 0.5
    torch.testing.assert_close(means[:, 1], 10 * means[:, 0])
    assert statistics.interval_of(means[:, 0].tolist()) == statistics.mean_of([1.0, 2.0, 6.0])
    assert statistics.interval_of([7.0, *range(2001)]) == Interval(7.0, 50, 1950)
