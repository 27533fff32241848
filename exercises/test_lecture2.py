"""Lecture 2: the same guess has the same weighted loss, whichever target it is told in."""
import pytest
import torch
from lecture2 import weight_for

from diffusion import TARGETS, alphas_cumprod


@pytest.mark.parametrize("target", TARGETS)
def test_weighted_loss_is_that_of_x0(target):
    alpha2 = alphas_cumprod()
    alpha, sigma = alpha2.sqrt(), (1 - alpha2).sqrt()
    x0, eps, guess, w = torch.rand(4, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guess_eps = eps + alpha * (x0 - guess) / sigma                           # x_t is the same (eq. 2)
    errors = {"x0": guess - x0, "eps": guess_eps - eps}
    errors["v"] = alpha * errors["eps"] - sigma * errors["x0"]               # v = alpha eps - sigma x0
    found = weight_for(target, w, alpha2 / (1 - alpha2)) * errors[target] ** 2
    worst = (found / (w * errors["x0"] ** 2) - 1).abs().max()
    assert worst < 1e-6, f"the weighted loss of {target} is not that of x0"
