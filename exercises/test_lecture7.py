"""Lecture 7: a set has distance 0 from itself, and from a moved set the mean square of the shortest moves."""
import torch
from lecture7 import frechet

A = (torch.arange(40.0).double() ** 2).sin().view(5, 8)  # fewer images than features


def test_set_has_distance_0_from_itself():
    assert abs(frechet(A, A)) < 1e-6


def test_distance_is_the_mean_square_of_the_moves():
    """A symmetric positive map moves a Gaussian by the shortest way, so its moves are the distance."""
    moves = A @ (A.T @ A) + 1
    expected = moves.var(0).sum() + moves.mean(0).square().sum()
    for found in frechet(A, A + moves), frechet(A + moves, A):
        assert abs(found / expected - 1) < 1e-6
