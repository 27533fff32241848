"""Lecture 7, solved: n - 1 for both sets; the trace of the root is the sum of the roots of the eigenvalues."""
import torch


def frechet(a, b):
    """Frechet distance of two sets of features, float64 (N,D) and (M,D) -> a float, 0 or more."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a = (a - mean_a).T @ (a - mean_a) / (len(a) - 1)
    cov_b = (b - mean_b).T @ (b - mean_b) / (len(b) - 1)
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real
    root = eigenvalues.clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    distance = shift + cov_a.trace() + cov_b.trace() - 2 * root
    return float(distance.clamp(min=0))
