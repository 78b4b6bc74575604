"""95% intervals: their formula, and how often they contain the truth."""

import math

import pytest
import torch

from trl_ext.statistics import half_width, wilson_interval


@pytest.mark.parametrize("right, count", [(0, 10), (3, 10), (250, 300), (300, 300)])
def test_wilson_interval_holds_the_proportions_that_the_data_do_not_reject(right, count):
    """At both ends the observed proportion is z standard errors away, the standard error being the end's own."""
    for end in wilson_interval(right, count):
        distance = abs(right / count - end)
        assert distance == pytest.approx(1.96 * math.sqrt(max(end * (1 - end), 0) / count), abs=1e-7)
    low, high = wilson_interval(right, count)
    assert -1e-12 <= low <= right / count <= high + 1e-12 <= 1 + 1e-9


def test_wilson_interval_needs_cases():
    with pytest.raises(ValueError, match="evaluate on at least one"):
        wilson_interval(0, 0)


def test_interval_of_a_mean_needs_two_values():
    with pytest.raises(ValueError, match="mean of 1 values has no interval"):
        half_width(torch.tensor([1.0]))


def test_the_interval_of_a_mean_holds_it_95_times_in_100():
    samples = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    held = sum(abs(sample.mean().item() - 3) <= half_width(sample) for sample in samples) / len(samples)
    assert held == pytest.approx(0.944, abs=0.01)  # Student's t with 49 degrees of freedom at 1.96
