"""Lecture 4: the clamp without a corner is exact at p = 1, near min-SNR at p = 50, and a row of WEIGHTINGS."""
import torch
from lecture4 import smooth_min

from diffusion import WEIGHTINGS, Diffusion

SNR = torch.logspace(-9, 5, 500, dtype=torch.float64)


def test_p_1_is_soft_min_snr():
    expected = WEIGHTINGS["soft_min_snr"](SNR, 5.0)
    assert torch.allclose(smooth_min(SNR, 5.0, 1), expected, rtol=1e-9, atol=0)


def test_p_50_is_min_snr_far_from_the_corner_and_just_below_it_at_the_corner():
    """It is min(SNR, gamma) times (1 + r^p)^(-1/p), where r is the smaller of the two over the larger."""
    low, high = SNR.clamp(max=5), SNR.clamp(min=5)
    expected = low * (1 + (low / high) ** 50) ** (-1 / 50)
    assert torch.allclose(smooth_min(SNR, 5.0, 50), expected, rtol=1e-9, atol=0), "overflow, or another formula"


def test_the_row_trains_under_its_name():
    diffusion = Diffusion(weighting="smooth_min", gamma=3.0)
    expected = (diffusion.snr ** -8 + 3.0 ** -8) ** (-1 / 8)
    assert torch.allclose(diffusion.weight, expected, rtol=1e-9, atol=0), "the row is not p = 8"
