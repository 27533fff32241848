"""Lecture 3, solved: |d|^2 is lowest at a = (g2 - g1).g2 / |g2 - g1|^2, cut to [0, 1]."""


def share(g1, g2):
    """Gradients, float64 (N,) each -> a in [0, 1], a float. For g1 = g2 any a will do, but not nan."""
    apart = g2 - g1
    if not apart.any():
        return 0.5
    lowest = apart @ g2 / (apart @ apart)
    return float(lowest.clamp(0, 1))
