"""Lecture 7: a set has distance 0 from itself, and two sets in the plane have the distance of the closed form."""
import pytest
import torch
from lecture7 import frechet

A, B = torch.randn(2, 30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
A = A @ torch.tensor([[3.0, 1.0], [0.0, 0.5]]).double()
B = B[:20] + 1                                                               # fewer, elsewhere, of another shape


@pytest.mark.parametrize("n, D", [(30, 2), (5, 8)], ids=["plane", "fewer images than features"])
def test_set_has_distance_0_from_itself(n, D):
    rows = torch.arange(n * D, dtype=torch.float64).sin().view(n, D)
    assert 0 <= frechet(rows, rows) < 1e-6


def test_distance_is_the_closed_form_of_the_plane():
    """For 2 x 2 matrices, tr (S1 S2)^1/2 = sqrt(tr S1 S2 + 2 sqrt(det S1 S2))."""
    S1, S2 = A.T.cov(), B.T.cov()
    root = ((S1 @ S2).trace() + 2 * (S1 @ S2).det().sqrt()).sqrt()
    expected = (A.mean(0) - B.mean(0)).square().sum() + (S1 + S2).trace() - 2 * root
    assert frechet(A, B) == pytest.approx(float(expected))


def test_distance_is_the_same_both_ways():
    assert frechet(A, B) == pytest.approx(frechet(B, A))
