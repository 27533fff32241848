"""Lecture 2: three targets, one objective.

A network that predicts x0, eps or v, and means the same image by it, should have the same weighted loss.
Something in `weight_for` is wrong: it runs, and one of the three losses differs.
Put eq. 2, x_t = alpha x0 + sigma eps, into v = alpha eps - sigma x0, and find on paper by which factor the squared
error of v is larger than that of x0; alpha^2 + sigma^2 = 1 and SNR = alpha^2 / sigma^2.
Then compare with `target_factor` in diffusion.py, and mend the function below.
Check with `python -m pytest exercises -k lecture2`.
"""


def weight_for(target, w, snr):
    """Weight of the squared error in the target's own space, like w.

    target is "x0", "eps" or "v". w (T,) is the weight of the squared error of x0. snr (T,) is the SNR.
    """
    if target == "x0":
        return w
    if target == "eps":
        return w / snr
    return w / (snr + 1)
