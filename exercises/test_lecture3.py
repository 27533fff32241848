"""Lecture 3: a small step against d raises neither loss."""
import torch
from lecture3 import share


def test_direction_is_the_shortest():
    """A step against d lowers the loss of g by g.d. Only for the shortest d are both g.d at least |d|^2."""
    torch.manual_seed(0)
    pairs = torch.randn(200, 2, 3).double() ** 3         # of very different lengths
    pairs[0, 0] = pairs[0, 1]
    for pair in pairs:
        a = share(*pair)
        d = a * pair[0] + (1 - a) * pair[1]
        assert 0 <= a <= 1, "d leaves the segment"
        assert (pair @ d).min() > d @ d - 1e-9, "d is not the shortest"
