"""Lecture 2, solved: |v error|^2 = (SNR + 1) |x0 error|^2."""


def weight_for(target, w, snr):
    """Weight of the squared error in the target's own space, a number.

    target is "x0", "eps" or "v". w is the weight of the squared error of x0. snr is the SNR, above 0.
    """
    if target == "x0":
        return w
    if target == "eps":
        return w / snr
    return w / (snr + 1)
