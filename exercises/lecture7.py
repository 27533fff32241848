"""Lecture 7: how good is it?

The Frechet distance of two sets is |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), of their means and
covariances.
Two things in `frechet` are wrong: it runs, and a set is not at distance 0 from itself.
Both covariances should divide by n - 1, and the root is a matrix root: its trace is the sum of the roots of the
eigenvalues of S1 S2, of which rounding makes some slightly negative.
Read `Statistics` and `frechet_distance` in fid.py.
Check with `python -m pytest exercises -k lecture7`.
"""


def frechet(a, b):
    """Frechet distance of two sets of features, float64 (N,D) and (M,D) -> a float, 0 or more."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a = (a - mean_a).T @ (a - mean_a) / (len(a) - 1)
    cov_b = (b - mean_b).T @ (b - mean_b) / len(b)
    root = (cov_a @ cov_b).clamp(min=0).sqrt().trace()
    shift = (mean_a - mean_b).square().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * root)
