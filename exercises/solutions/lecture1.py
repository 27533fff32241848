"""Lecture 1, solved: alpha goes linearly from [first, last] to [first, 0]."""


def rescale(alphas_cumprod):
    """alpha_t^2, float64 (T,), falling -> float64 (T,), with the same first entry and the last exactly 0."""
    alpha = alphas_cumprod.sqrt()
    first, last = alpha[0], alpha[-1]
    rescaled = first * (alpha - last) / (first - last)
    return rescaled.square()
