"""Lecture 6, solved: Heun's second slope; guidance starts from uncond."""


def step(x, sigma, next_sigma, denoise):
    """x at noise level sigma -> x at next_sigma, which is lower, perhaps 0.

    x = x0 + sigma eps. denoise(x, sigma) returns the estimate of x0, like x.
    """
    slope = (x - denoise(x, sigma)) / sigma
    ahead = x + (next_sigma - sigma) * slope
    if next_sigma == 0:
        return ahead
    slope_ahead = (ahead - denoise(ahead, next_sigma)) / next_sigma
    return x + (next_sigma - sigma) * (slope + slope_ahead) / 2


def guide(cond, uncond, scale):
    """The x0 estimates with and without the class, like each other -> the guided estimate."""
    return uncond + scale * (cond - uncond)
