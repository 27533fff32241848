"""Lecture 6: Heun's step is of second order, and guidance of scale 1 is none."""
from lecture6 import guide, step


def denoise(x, sigma):
    """E[x0 | x] for x0 ~ N(0, 1)."""
    return x / (1 + sigma ** 2)


def error(steps):
    """From sigma = 2 to 1, along which x / sqrt(1 + sigma^2) stays the same."""
    x = 5.0
    for k in range(steps):
        x = step(x, 2 - k / steps, 2 - (k + 1) / steps, denoise)
    return x - 10 ** 0.5


def test_twice_the_steps_are_a_quarter_of_the_error():
    assert 3.6 < error(20) / error(40) < 4.4, "first order is 2, second order is 4"


def test_step_to_0_is_the_denoised_image():
    assert step(5.0, 2, 0, denoise) == 1


def test_scale_0_is_uncond_and_1_is_cond_and_3_goes_on_along_the_line():
    assert [guide(5.0, 1.0, scale) for scale in (0, 1, 3)] == [1, 5, 13]
