"""Figures for lectures: what they draw is what the formulas say."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import shapes
from experiments import figures


def columns(table, curve):
    """The columns of one curve's rows as arrays, without the curve's name."""
    rows = [list(row.values())[1:] for row in table() if curve in row.values()]
    return np.array(rows, float).T


def test_schedules_are_cosine_and_linear():
    t, alpha, sigma, log_snr = columns(figures.schedules, "cosine")
    _, below, _, _ = columns(figures.schedules, "linear")
    angle = ((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2
    assert alpha[:990] == pytest.approx(np.cos(angle[:990]), abs=1e-4)
    assert alpha ** 2 + sigma ** 2 == pytest.approx(1)
    assert log_snr == pytest.approx(2 * np.log(alpha / sigma), rel=1e-6)
    assert below[0] ** 2 == pytest.approx(1 - 1e-4)


@pytest.mark.parametrize("curve, weight", [
    ("snr", lambda snr: snr),
    ("min_snr 5", lambda snr: np.minimum(snr, 5)),
    ("p2", lambda snr: snr / (1 + snr)),
])
def test_weightings_are_drawn_for_every_target(curve, weight):
    log_snr, x0, eps, v = columns(figures.weightings, curve)
    snr = np.exp(log_snr)
    assert x0 == pytest.approx(weight(snr))
    assert eps == pytest.approx(weight(snr) / snr)
    assert v == pytest.approx(weight(snr) / (snr + 1))


def test_shares_add_up_to_all_of_the_weight():
    t, const = columns(figures.shares, "const")
    _, _, _, log_snr = columns(figures.schedules, "cosine")
    _, clamped = columns(figures.shares, "min_snr 5")
    weight = np.minimum(np.exp(log_snr), 5)
    assert const == pytest.approx((t + 1) / 10)
    assert clamped == pytest.approx(100 * np.cumsum(weight) / weight.sum())


def test_densities_are_shares_of_the_draws():
    means = [columns(figures.densities, name)[1].mean() for name in figures.DENSITIES]
    _, clts = columns(figures.densities, "clts")
    assert means == pytest.approx([1] * 5)
    assert clts.argmax() == 300                                              # at its end it is normal, mu = 0.3 T


def test_the_picture_ends_in_the_noise_that_all_levels_share():
    first, middle, last = figures.noisy(torch.tensor([0, 498, 999])).double() / 127.5 - 1
    picture = torch.from_numpy(shapes([6], 60)[0][0]) / 127.5 - 1
    mixed = (picture + last) * 0.5 ** 0.5                                    # at SNR 1
    inside = (last.abs() < 0.9) & (middle.abs() < 0.9)                       # the rest is clipped
    assert (first - picture).abs().max() < 0.05
    assert (middle - mixed)[inside].abs().max() < 0.02


def test_teach_draws_five_readable_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    monkeypatch.setattr(sys, "argv", ["figures", "teach", "--out", str(tmp_path / "new")])
    figures.main()
    files = sorted((tmp_path / "new").iterdir())
    for file in files:
        Image.open(file).verify()
    assert [file.stem for file in files] == ["densities", "noise", "schedules", "shares", "weightings"]
    assert max(file.stat().st_size for file in files) < 150_000
