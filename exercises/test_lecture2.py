"""Lecture 2: the same guess costs as much in x0, eps and v."""
import pytest
from lecture2 import weight_for


@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (0.8, 0.6)])
def test_same_guess_has_the_same_loss(alpha, sigma):
    """A guess that is wrong by 1 in x0 is wrong by alpha / sigma in eps and by 1 / sigma in v."""
    for target, error in ("x0", 1), ("eps", alpha / sigma), ("v", 1 / sigma):
        loss = weight_for(target, 2, (alpha / sigma) ** 2) * error ** 2
        assert loss == pytest.approx(2), f"the loss of {target} is not that of x0"
