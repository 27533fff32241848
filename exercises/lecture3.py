"""Lecture 3: two timesteps that conflict.

Two timesteps have the gradients g1 and g2, and a step against their sum may raise the loss of one of them.
Write `share`: the a for which d = a g1 + (1 - a) g2 is as short as it can be (eq. 10 for two timesteps).
The squared length of d is a parabola in a; find its lowest point, and do not leave the segment from 0 to 1.
A small step against this d raises neither loss; experiments/pareto.py, in `exact` and `common_descent`, has
the same for any number of timesteps.
Check with `python -m pytest exercises -k lecture3`.
"""


def share(g1, g2):
    """Gradients, float64 (N,) each -> a in [0, 1], a float. For g1 = g2 any a will do, but not nan."""
    raise NotImplementedError("lecture 3: find the a of the shortest direction")
