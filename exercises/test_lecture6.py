"""Lecture 6: Heun's step is of second order, and guidance of scale 1 is none."""
import math

import pytest
import torch
from lecture6 import guide, step


def denoise(x, sigma):
    """The exact E[x0 | x] of x0 ~ N(0, 1) and x = x0 + sigma eps; the sampler's path is x / sqrt(1 + sigma^2) = const."""
    return x / (1 + sigma ** 2)


def error(steps):
    """Of the path from sigma = 2, x = 5 to sigma = 1, where x is 5 sqrt(2 / 5)."""
    x, sigmas = 5.0, [2 - k / steps for k in range(steps + 1)]
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        x = step(x, sigma, next_sigma, denoise)
    return abs(x - 5 * math.sqrt(2 / 5))


def test_one_step_by_hand():
    """The slopes are 2 at x = 5 and 1.5 at x = 3, where Euler's step lands."""
    assert step(5.0, 2, 1, denoise) == pytest.approx(3.25)


def test_half_the_step_is_a_quarter_of_the_error():
    ratio = error(20) / error(40)
    assert ratio == pytest.approx(4, rel=0.1), f"the error falls by {ratio:.2f}: first order is 2, second is 4"


def test_step_to_0_is_the_denoised_image():
    assert step(5.0, 2, 0, denoise) == pytest.approx(1.0)


@pytest.mark.parametrize("scale, expected", [(0, [1, 5]), (1, [2, 3]), (3, [4, -1])])
def test_scale_0_is_uncond_and_1_is_cond_and_more_goes_on_along_the_line(scale, expected):
    found = guide(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 5.0]), scale)
    assert found.tolist() == expected, f"scale {scale} of cond [2, 3], uncond [1, 5]"
