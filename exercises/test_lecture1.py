"""Lecture 1: the schedule ends in pure noise, and its roots are rescaled linearly."""
import pytest
import torch
from lecture1 import rescale

from diffusion import Diffusion, alphas_cumprod


def test_three_levels_by_hand():
    """The roots 0.9, 0.5, 0.3 become 0.9, 0.3, 0: all less 0.3, then all times 1.5."""
    table = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64) ** 2
    assert rescale(table).tolist() == pytest.approx([0.81, 0.09, 0])


def test_linear_schedule_ends_at_snr_0_and_begins_as_before():
    table = alphas_cumprod("linear")
    before, after = Diffusion(table).snr, Diffusion(rescale(table)).snr
    assert after[-1] == 0, "the last SNR is to be 0, exactly"
    assert float(after[0]) == pytest.approx(float(before[0])), "the first SNR is to stay"
    assert torch.equal(table, alphas_cumprod("linear")), "the argument is to stay as it is"
