"""Lecture 4: the clamp is right at every SNR for p = 1 and p = 50, and a row of WEIGHTINGS."""
import torch
from lecture4 import smooth_min

from diffusion import Diffusion

SNR = torch.logspace(-9, 5, 99, dtype=torch.float64)


def test_p_1_is_soft_min_snr():
    ratio = smooth_min(SNR, 5.0, 1) * (SNR + 5) / (5 * SNR)
    assert (ratio - 1).abs().max() < 1e-9


def test_p_50_is_nearly_min_snr():
    """The ratio is between 2^(-1/50) and 1."""
    ratio = smooth_min(SNR, 5.0, 50) / SNR.clamp(max=5)
    assert (ratio - 1).abs().max() < 0.014, "SNR^-50 overflows"


def test_corner_is_rounded_off():
    """At SNR = gamma the two terms are equal."""
    at_gamma = torch.tensor([5.0], dtype=torch.float64)
    for p in 8, 50:
        assert abs(smooth_min(at_gamma, 5.0, p).item() / (5 * 2 ** (-1 / p)) - 1) < 1e-9


def test_row_has_p_8():
    diffusion = Diffusion(weighting="smooth_min", gamma=3.0)
    assert torch.allclose(diffusion.weight, smooth_min(diffusion.snr, 3.0, 8), rtol=1e-9, atol=0)
