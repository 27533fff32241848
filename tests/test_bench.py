"""bench.py: FLOPs against the published counts, the arithmetic of a line, and every part run once."""
import re
from argparse import Namespace

import numpy as np
import pytest
import torch

import bench
import train
from diffusion import Diffusion
from sample import build_model


@pytest.mark.parametrize("model, dataset, forward", [  # GFLOP an image: counted by hand or by others on these networks
    ("vit-b", "imagenet256", 46.3), ("vit-l", "imagenet64", 142.1), ("unet-adm", "imagenet64", 219.3)])
def test_flops(model, dataset, forward):
    _, config = bench.configured(dataset, model)
    shape = config["network"]
    x, t = torch.zeros(1, shape["in_channels"], shape["img_size"], shape["img_size"]), torch.zeros(1, dtype=torch.long)
    assert bench.flops(lambda: build_model(config), x, t, t) / 1e9 == pytest.approx(forward, rel=2e-3)


def test_flops_of_the_autoencoder():
    assert bench.flops(lambda: bench.VAE().encoder, torch.zeros(1, 3, 256, 256)) / 1e9 == pytest.approx(272.7, rel=2e-3)


def test_flops_are_the_formula():
    """Linear layers 2 N D (3 D + D + 8 D) and attention 4 N^2 D a block, patches and head 2 n (p p C) D each."""
    _, config = bench.configured("shapes", "vit-tiny")
    config["network"].update(dim=96, depth=3, img_size=24)
    N, n, D = 38, 36, 96
    x, t = torch.zeros(1, 3, 24, 24), torch.zeros(1, dtype=torch.long)
    assert bench.flops(lambda: build_model(config), x, t, t) == 3 * (24 * N * D * D + 4 * N * N * D) + 4 * n * 48 * D


def test_a_line(capsys):
    """Medians of the ratios, not ratios of the medians; MFU from each round's own matrix product."""
    rate = bench.product()[1]
    bench.show("x", 10, np.array([[2, 1, 1], [4, 8, 2], [3, 1, 3]]), "other", work=rate / 2, gib=0.5)
    assert capsys.readouterr().out.split() == ["x", "10", "3.333", "3,000", "0.50", "25.0%", "2", "other"]


def test_turns():
    """Every call in every round, after each other, the quick ones repeated."""
    calls = []
    seconds = bench.turns(3, lambda: calls.append("a"), lambda: (calls.append("b"), bench.time.sleep(0.11)))
    assert seconds.shape == (3, 2) and (seconds[:, 1] >= 0.11).all() and (seconds[:, 0] < 0.01).all()
    order = re.sub(r"(.)\1+", r"\1", "".join(calls))
    assert order == "ab" * 4 and calls.count("b") == 5 and calls.count("a") > 100


def test_a_step_never_waits_for_the_device(monkeypatch):
    """Tensors without content have nothing that could be waited for: .item(), .cpu(), a mask raise."""
    real = train.adamw                                     # the fused one, and found_inf, are not made for them
    monkeypatch.setattr(train, "adamw", lambda *lists, fused, found_inf, **how: real(
        *lists[:5], [torch.ones(()) for _ in lists[5]], foreach=True, **how))
    _, config = bench.configured("shapes", "vit-tiny")
    B = config["batch_size"] = 6
    with torch.device("meta"):
        model, ema = build_model(config), build_model(config).requires_grad_(False)
        tally = torch.zeros(10, 4, dtype=torch.float64)
        x0, noise = torch.randn(2, B, 3, 16, 16)
        t, y, scale = torch.zeros(B, dtype=torch.long), torch.zeros(B, dtype=torch.long), torch.ones(B)
        moments = train.zero_moments(model)
    diffusion = Diffusion().to("meta")
    skips = torch.zeros(3, dtype=torch.long, device="meta")
    for step in range(2):
        train.backward(model, diffusion, (x0, t, noise, y, scale), tally, config, accum=3)
        train.update(model, ema, moments, config, step, skips)
    with pytest.raises(Exception, match="meta"):
        tally.sum().item()


def test_refusals(script):
    assert "trian: expected some of train, sample" in script("bench.py", "trian", code=2)
    assert "--rounds: found 0" in script("bench.py", "--rounds", 0, code=2)
    assert "expected a clone" in script("bench.py", "--official", "nowhere", code=2)


def table(text):
    """Name of each line of a table -> images, images/s, ms, and what else there is."""
    rows = {}
    for line in text.splitlines():
        words = line[41:].replace(",", "").replace("%", "").split()
        if line[:41].strip() and len(words) > 2 and words[0].isdecimal():
            rows[line[:41].strip()] = [float(word) for word in words if re.fullmatch(r"[\d.]+(e[+-]\d+)?", word)]
    return rows


@pytest.mark.slow
def test_a_training_line(script):
    text = script("bench.py", "train", "--model", "vit-tiny", "--batch-size", 4, "--rounds", 1)
    n, rate, ms, gib, mfu, plain, passes = table(text)["shapes vit-tiny"]
    assert n == 4 and rate == pytest.approx(4e3 / ms, rel=1e-2) and 0.1 < gib < 4 and 0 < mfu < 120
    assert 0.3 < plain < 3 and 0.8 < passes < 4


@pytest.mark.slow
def test_other_parts_once_small(capsys):
    args = Namespace(rounds=1)
    bench.autoencoder(args, 32, 1)
    bench.features(args, 32, 2)
    bench.distance(args, 64)
    bench.reading(args, 64, 8)
    bench.packing(args, 16, 16)
    rows = table(capsys.readouterr().out)
    assert len(rows) == 7 and all(row[1] > 0 for row in rows.values()), rows
