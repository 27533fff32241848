"""bench.py: the counted FLOPs, the arithmetic of a line, and every part once, small."""
import sys

import numpy as np
import pytest
import torch

from experiments import bench
from model_vit import ViT


def test_flops_of_a_vit_are_the_formula():
    """24 N D^2 + 4 N^2 D a block of N tokens, and 2 n (4 4 3) D for the patches and again for the head."""
    model = ViT(24, 4, 3, 8, dim=32, depth=3, heads=2)
    x = torch.randn(5, 3, 24, 24)
    t = torch.arange(5)
    N, n, D = 38, 36, 32
    block = 24 * N * D ** 2 + 4 * N ** 2 * D
    ends = 4 * n * 48 * D
    found = bench.flops(lambda: model(x, t, t))
    assert found == 5 * (3 * block + ends)


def test_a_line_by_hand(monkeypatch, capsys):
    """Medians over rounds of ratios; MFU from each round's own product of 10 x 10 matrices, 2,000 FLOPs."""
    monkeypatch.setattr(bench, "PRODUCT", 10)
    rounds = np.array([[2, 1, 1], [4, 8, 2], [3, 1, 3]])
    bench.report("x", 6, 1000, 0.5, rounds, "other")
    found = capsys.readouterr().out.split()
    assert found == ["x", "6", "2", "3000", "3.33e-10", "25.0%", "0.5", "2", "other"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "PRODUCT", 256)
    monkeypatch.setattr(bench, "SIDE", 32)
    monkeypatch.setattr(bench, "ROUNDS", 3)


def test_a_call_takes_as_long_as_itself(small, capsys):
    call = torch.randn(300, 300).exp
    bench.compare("x", 1, call, call, "itself")
    *_, ratio, _ = capsys.readouterr().out.split()
    assert 0.5 < float(ratio) < 2


@pytest.mark.parametrize("part, lines", [
    ("train", 1),
    ("sample", 3),
    ("vae", 2),
    ("fid", 1),
])
def test_every_part_once(small, monkeypatch, capsys, part, lines):
    words = ["bench", part, "--batch-size", "2", "--size", "8", "--sample-steps", "2"]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    _, _, *found = capsys.readouterr().out.splitlines()
    assert len(found) == lines
    for line in found:
        images, rate, *_ = line[36:].split()
        assert images == "2"
        assert float(rate) > 0
