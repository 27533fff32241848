"""Lecture 1: the last level is exactly 0, the first stays, and the roots alpha are rescaled linearly."""
import pytest
import torch
from lecture1 import rescale


def test_three_levels_by_hand():
    """The roots 0.9, 0.5, 0.3 become 0.9, 0.3, 0: first 0.3 less, then 1.5 times as large."""
    table = torch.tensor([0.81, 0.25, 0.09], dtype=torch.float64)
    assert rescale(table).tolist() == pytest.approx([0.81, 0.09, 0], rel=1e-9, abs=0)
    assert table.tolist() == [0.81, 0.25, 0.09], "the argument was changed"


def test_another_table():
    """The roots 0.8, 0.6, 0.4 become 0.8, 0.4, 0: first 0.4 less, then twice as large."""
    table = torch.tensor([0.64, 0.36, 0.16], dtype=torch.float64)
    assert rescale(table).tolist() == pytest.approx([0.64, 0.16, 0], rel=1e-9, abs=1e-30)
