"""Lecture 2: three targets, one objective.

A network that predicts x0, eps or v, and means the same image by it, should have the same weighted loss.
Something in `weight_for` is wrong: it runs, and one of the three losses differs.
Solve x_t = alpha x0 + sigma eps (eq. 2) for eps, put it into v = alpha eps - sigma x0, and find by which
factor the squared error of v is larger than that of x0, where alpha^2 + sigma^2 = 1 and SNR = alpha^2 /
sigma^2.
Compare with `target_factor` in diffusion.py, and mend the function below.
Check with `python -m pytest exercises -k lecture2`.
"""


def weight_for(target, w, snr):
    """Weight of the squared error in the target's own space, a number.

    target is "x0", "eps" or "v". w is the weight of the squared error of x0. snr is the SNR, above 0.
    """
    if target == "x0":
        return w
    if target == "eps":
        return w / snr
    return w / (snr + 1)
