"""Figures for lectures: what they draw is what the formulas say."""
import sys
from math import exp, log, pi, sqrt

import pytest
import torch
from PIL import Image

from data import shapes
from experiments import figures


@pytest.mark.parametrize("table, curve, x, expected", [
    (figures.schedules, "linear", 0, [sqrt(0.9999), 0.01, log(9999)]),
    (figures.weightings, "min_snr 5", 10, [5, 5 / exp(10), 5 / (exp(10) + 1)]),
    (figures.shares, "const", 499, [50]),
    (figures.shares, "min_snr 20", 999, [100]),
    (figures.densities, "uniform", 7, [1]),
    (figures.densities, "clts", 999, [exp(-0.7 ** 2 / 2) / sqrt(2 * pi) / 0.376]),           # at its end
])
def test_the_numbers_drawn_are_the_formulas(table, curve, x, expected):
    rows = [row.values() for row in table()]
    [found] = [numbers for name, at, *numbers in rows if (name, at) == (curve, x)]
    assert torch.tensor(found).tolist() == pytest.approx(expected, rel=1e-3)


def test_the_picture_goes_from_the_shape_to_the_noise():
    first, last = figures.noisy(torch.tensor([0, 999])).double() / 127.5 - 1
    shape = torch.from_numpy(shapes([6], 60)[0][0]) / 127.5 - 1
    assert (first - shape).abs().max() < 0.05
    assert last.mean() == pytest.approx(0, abs=0.02)
    assert (last.abs() < 0.5).double().mean() == pytest.approx(0.383, abs=0.01)          # of a normal density


def test_teach_draws_five_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    monkeypatch.setattr(sys, "argv", ["figures", "teach", "--out", f"{tmp_path}/new"])
    figures.main()
    files = sorted(tmp_path.glob("new/*"))
    assert all(Image.open(file).width >= 500 for file in files)
    assert [file.stem for file in files] == ["densities", "noise", "schedules", "shares", "weightings"]
