"""Lecture 3: a step against the shortest direction raises neither loss."""
import pytest
import torch
from lecture3 import share

PAIRS = [((3, 0), (0, 4)), ((1, 0), (4, 1)), ((4, 1), (1, 0)), ((1, -2), (-300, 1)), ((1, 1), (-2, -2)), ((2, 1), (2, 1))]


def test_right_angle_by_hand():
    """(a 3)^2 + ((1 - a) 4)^2 is lowest at a = 16 / 25."""
    g1, g2 = torch.tensor(PAIRS[0], dtype=torch.float64)
    assert share(g1, g2) == pytest.approx(0.64)


@pytest.mark.parametrize("pair", PAIRS)
def test_direction_is_the_shortest_and_both_losses_fall_or_stay(pair):
    """A loss falls by g.d for a small step against d. That is |d|^2 or more for both only if d is the shortest."""
    gradients = torch.tensor(pair, dtype=torch.float64)
    a = share(*gradients)
    assert 0 <= a <= 1, "a is to lie between 0 and 1"
    d = torch.tensor([a, 1 - a], dtype=torch.float64) @ gradients
    assert (gradients @ d).min() >= d @ d - 1e-9, "d is not the shortest direction"
