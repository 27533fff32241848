"""Consistency, interpolation and the Hessian's spectrum against formulas and exact values; the DCGAN; the commands."""
import argparse
import copy
import csv
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import finish, fork
from test_train import distance
from torch import nn

import stability
from data import built_in
from diffusion import Diffusion
from model_vit import ViT
from sample import read, to_uint8


def table(path):
    return list(csv.DictReader(path.open()))


# ------------------------------------------------------------------------------------- consistency, interpolation

def test_psnr_by_hand():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0, 0], b[1] = 48, 51                                             # MSE 48^2 / 48 = 48, and 51^2: 255 / 5
    assert stability.psnr(a, b).tolist() == pytest.approx([10 * math.log10(255 ** 2 / 48), 20 * math.log10(5)])
    assert stability.psnr(b, a).tolist() == stability.psnr(a, b).tolist()
    best = stability.psnr(a[0], a[0])
    b[0, 0, 0, 0] = 1                                                        # equal images: as one byte off by 1
    assert best == stability.psnr(a[0], b[0]) == pytest.approx(10 * math.log10(255 ** 2 * 48))
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(stability.psnr(x, -x), stability.psnr(to_uint8(x), to_uint8(-x)))


def test_consistency_is_equation_1():
    N, M = 3, 5
    q = torch.randint(256, (N, M, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    C = 0.0
    for i in range(M):
        for j in range(1, N):
            mse = np.mean((q[0, i].numpy().astype(float) - q[j, i].numpy()) ** 2)
            C += 10 * math.log10(255 ** 2 / mse) / (N - 1) / M
    assert stability.consistency(q) == pytest.approx(C)
    assert stability.consistency(q.flip(0)) != pytest.approx(C)              # the first model is the reference
    assert stability.consistency(q.flip(1)) == pytest.approx(C)


def quadratic(seed=0):
    """A module of 12 parameters, a loss sum (theta - part's target)^2 with theta = its parameters, and parts."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(1, 2)).double()
    flat = lambda m: torch.cat([p.flatten() for p in m.parameters()])
    loss = lambda m, part: (flat(m) - part[0]).square().sum(1).mean()
    targets = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return module, loss, [(targets[:3],), (targets[3:],)], flat, targets


def test_interpolation_of_a_quadratic_is_its_parabola():
    (a, loss, parts, flat, targets), (b, *_) = quadratic(0), quadratic(7)
    before = flat(a).clone(), flat(b).clone()
    for alpha in (0, 0.25, 0.7, 1):
        theta = alpha * before[0] + (1 - alpha) * before[1]
        mixed = stability.interpolate(a, b, alpha)
        expected = (theta - targets).square().sum(1).mean()
        assert stability.mean_loss(mixed, loss, parts) == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(flat(a), before[0]) and torch.equal(flat(b), before[1])
    assert torch.equal(flat(stability.interpolate(a, b, 1.0)), before[0])    # to the bit
    assert torch.equal(flat(stability.interpolate(a, b, 0.0)), before[1])


def test_roughness():
    assert stability.roughness([5, 3, 2, -1]) == stability.roughness([0, 1, 9]) == 1
    assert stability.roughness([0, 1, 0, 1, 0]) == 4 and stability.roughness([2, 0, 1]) == 1.5
    curve = np.random.default_rng(0).standard_normal(21)
    assert stability.roughness(7 * curve + 3) == pytest.approx(stability.roughness(curve))
    assert stability.roughness([2, 2, 2]) == 1


# ---------------------------------------------------------------------------------------------- Hessian spectrum

def known(values, seed=0):
    """A symmetric matrix (P,P) of doubles with these eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))[0]
    return Q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ Q.T


def test_lanczos_of_a_known_spectrum():
    values = torch.cat([torch.linspace(-1, 1, 298, dtype=torch.float64), torch.tensor([30.0, -7.0])])
    H = known(values)
    v = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, weights, residuals = stability.lanczos(lambda x: H @ x, v, 25)
    assert len(found) == 25 and found[-1] == pytest.approx(30, rel=1e-9) and found[0] == pytest.approx(-7, rel=1e-9)
    assert (np.abs(found[:, None] - values.numpy()).min(1) <= residuals + 1e-9).all() and residuals[5] > 1e-3
    assert residuals[[0, -1]].max() < 1e-6                                   # the ends have converged
    power = v / v.norm()
    for degree in range(2 * 25):                                             # the quadrature is exact below 2 k
        assert weights @ found ** degree == pytest.approx(float(power @ v / v.norm()), rel=1e-8), degree
        power = H @ power
    everything = stability.lanczos(lambda x: H @ x, v, 1000)                 # more steps than dimensions
    assert np.allclose(everything[0], np.sort(values.numpy()), atol=1e-9)    # orthogonality did not get lost


def test_lanczos_ends_where_nothing_new_comes():
    H = known([2.0] * 6 + [5.0] * 4)
    v = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, weights, residuals = stability.lanczos(lambda x: H @ x, v, 8)
    assert np.allclose(values, [2, 5]) and weights.sum() == pytest.approx(1) and residuals.max() < 1e-12
    assert np.allclose(stability.lanczos(lambda x: 0 * x, v, 8)[0], 0)


@pytest.fixture(scope="module")
def exact():
    """A ViT of fewer than 2,000 parameters, its loss over different t, and the exact Hessian (P,P), in doubles."""
    torch.manual_seed(0)
    model = ViT(8, 4, 3, 8, dim=4, depth=2, heads=2, T=10).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    diffusion, g = Diffusion("cosine", 10), torch.Generator().manual_seed(0)
    x0, y = built_in(8).batch(range(5))                                      # batch 5, width 4
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    whole = (x0.double(), torch.tensor([9, 0, 4, 4, 7]), noise, y)
    loss = lambda model, part: diffusion.loss(model, *part)[0].mean()
    parts = [[x[:3] for x in whole], [x[3:] for x in whole]]
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(loss(model, whole), params, create_graph=True)
        flat = torch.cat([grad.flatten() for grad in grads])
        rows = torch.autograd.grad(flat, params, torch.eye(len(flat), dtype=torch.float64), is_grads_batched=True,
                                   allow_unused=True, materialize_grads=True)
        H = torch.cat([part.flatten(1) for part in rows], 1)
    assert len(H) < 2000
    return model, loss, parts, H


def test_hessian_vector_product_is_that_of_the_exact_hessian(exact):
    model, loss, parts, H = exact
    assert (H - H.T).abs().max() < 1e-12 * H.abs().max()
    v = torch.randn(len(H), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(stability.hvp(model, loss, parts, v), H @ v, rtol=1e-9, atol=1e-12)
    single = stability.hvp(copy.deepcopy(model).float(), loss, [[x.float() if x.is_floating_point() else x for x in part]
                                                                for part in parts], v.float())
    assert (single - H @ v).norm() < 1e-5 * (H @ v).norm()                   # as the command runs, in float32


def test_spectrum_is_that_of_the_exact_hessian(exact):
    model, loss, parts, H = exact
    values = torch.linalg.eigvalsh(H).numpy()
    found = stability.spectrum(model, loss, parts, 40, 1)
    (ritz, _, residuals), = found
    for i in (-1, 0):
        assert ritz[i] == pytest.approx(values[i], rel=1e-4)
        assert abs(ritz[i] - values[i]) <= residuals[i] + 1e-9
    again, other = stability.spectrum(model, loss, parts, 2, 2), stability.spectrum(model, loss, parts, 2, 1, seed=1)
    assert not np.array_equal(again[0][0], again[1][0]) and not np.array_equal(again[0][0], other[0][0])
    assert np.array_equal(again[0][0], stability.spectrum(model, loss, parts, 2, 1)[0][0])


def test_moments_are_those_of_the_exact_hessian(exact):
    """Probes of random signs err by 1 / sqrt(their number), so that 1 % would take thousands: here they are the P' >= P
    rows of a Hadamard matrix, cut to P, over which the estimates of both moments are exact for every matrix.
    """
    H = exact[3]
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < len(H):
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    found = [stability.lanczos(lambda x: H @ x, row[:len(H)], 2) for row in rows]
    mean, variance = stability.moments(found)
    values = torch.linalg.eigvalsh(H)
    assert mean == pytest.approx(float(values.mean()), rel=1e-8)
    assert variance == pytest.approx(float(values.var(correction=0)), rel=1e-8)


def test_density_integrates_to_1_and_has_the_moments(exact):
    found, width = stability.spectrum(*exact[:3], 20, 3), 0.05
    low, high = (end([end(values) for values, *_ in found]) for end in (min, max))
    x = np.linspace(low - 8 * width, high + 8 * width, 20_001)
    f = stability.density(found, x, width)
    step = x[1] - x[0]
    mean, variance = stability.moments(found)
    assert f.min() >= 0 and f.sum() * step == pytest.approx(1, abs=1e-9)
    assert (f * x).sum() * step == pytest.approx(mean, rel=1e-6)
    assert (f * (x - mean) ** 2).sum() * step == pytest.approx(variance + width ** 2, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- DCGAN

def test_dcgan_has_the_shapes_and_the_first_weights_of_its_paper():
    for size, layers in ((8, 1), (16, 2), (32, 3), (64, 4)):
        torch.manual_seed(0)
        model = stability.DCGAN(size)
        z = torch.randn(2, 100, 1, 1)
        images = model.generator(z)
        assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
        assert model.discriminator(images).shape == (2, 1, 1, 1)
        strided = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.stride == (2, 2)]
        assert len(strided) == 2 * layers
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 2 * layers - 1                                  # not beside the image or the logit
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 4}
    assert all(0.018 < p.std() < 0.022 and p.mean().abs() < 2e-3 for p in weights.values())
    assert all(0.9 < m.weight.mean() < 1.1 and m.weight.std() > 0.01 and (m.bias == 0).all() for m in norms)
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    for size in (4, 12, 48):
        with pytest.raises(ValueError, match=str(size)):
            stability.DCGAN(size)


def test_losses_of_a_gan_by_hand():
    logits = {"real": torch.tensor([2.0, -1.0]), "fake": torch.tensor([0.5, -3.0])}
    p = {name: torch.sigmoid(x) for name, x in logits.items()}
    expected = -p["real"].log().mean() - (1 - p["fake"]).log().mean()
    assert stability.discriminator_loss(logits.get, "real", "fake") == pytest.approx(expected.item())
    assert stability.generator_loss(logits.get, "fake") == pytest.approx(-p["fake"].log().mean().item())


def train_gan(out, steps=20, seed=0, **other):
    stability.gan(argparse.Namespace(**{**dict(out=out, steps=steps, seed=seed, size=8, data=None), **other}))
    return read(out)


def test_two_steps_of_a_gan_by_hand(tmp_path):
    """Radford et al.: Adam 2e-4, (0.5, 0.999); the discriminator first, and the generator against the new one."""
    found = train_gan(tmp_path / "run", steps=2, seed=3)["model"]
    torch.manual_seed(3)
    model = stability.DCGAN(8)
    G, D = model.generator, model.discriminator
    adam = [torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in (D, G)]
    for step in range(2):
        x, z = stability.gan_batch(built_in(8), "gan", 3, step)
        fake = G(z)
        model.zero_grad()
        (-D(x).sigmoid().log().mean() - (1 - D(fake.detach()).sigmoid()).log().mean()).backward()
        adam[0].step()
        model.zero_grad()
        (-D(fake).sigmoid().log().mean()).backward()
        adam[1].step()
    assert distance(model.state_dict(), found) < 1e-4


def test_gan_run_is_its_seeds_and_killed_and_resumed_the_same_to_the_bit(tmp_path, monkeypatch):
    whole = train_gan(tmp_path / "whole")
    assert whole["step"] == 20 and read(tmp_path / "whole/early.pt")["step"] == 2
    assert distance(whole["model"], read(tmp_path / "whole/early.pt")["model"]) > 1e-3
    train_gan(tmp_path / "other", seed=1)
    assert distance(*(read(tmp_path / name / "early.pt")["model"] for name in ("whole", "other"))) > 0.02    # not batches alone
    batch, killed = stability.gan_batch, []

    def kill(data, purpose, seed, k, *n):
        if k == 13 and not killed:
            killed.append(k)
            raise KeyboardInterrupt
        return batch(data, purpose, seed, k, *n)
    monkeypatch.setattr(stability, "gan_batch", kill)
    with pytest.raises(KeyboardInterrupt):
        train_gan(tmp_path / "parts")
    assert read(tmp_path / "parts")["step"] == 12
    torch.manual_seed(99)
    parts = train_gan(tmp_path / "parts")
    assert distance(whole["model"], parts["model"]) == 0
    for a, b in zip(whole["optimizer"], parts["optimizer"]):
        assert distance(a, b) == 0
    before = (tmp_path / "parts/ckpt.pt").stat().st_mtime_ns
    train_gan(tmp_path / "parts")                                            # done: nothing is left to do
    assert (tmp_path / "parts/ckpt.pt").stat().st_mtime_ns == before
    for other in (dict(seed=1), dict(steps=30), dict(size=16)):
        with pytest.raises(ValueError, match="holds another run"):
            train_gan(tmp_path / "parts", **other)


def test_losses_of_a_gan_depend_on_parameters_alone(gans):
    args = argparse.Namespace(n=70, seed=0, data=None, target=None)
    what, losses = stability.landscape(gans / "g/early.pt", args)
    model = stability.open_model(gans / "g/early.pt")[0].train()
    for i, (name, (module, loss, parts)) in enumerate(losses.items()):
        assert [len(part[0]) for part in parts] == [64, 6] and name == ["generator", "discriminator"][i]
        first = stability.mean_loss(module, loss, parts)
        v = torch.randn(sum(p.numel() for p in module.parameters()), generator=torch.Generator().manual_seed(0))
        H_v = stability.hvp(module, loss, parts, v)
        assert stability.mean_loss(module, loss, parts) == first and torch.equal(stability.hvp(module, loss, parts, v), H_v)
        own = getattr(model, name)
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), module.parameters()))
        saved = read(gans / "g/early.pt")["model"]
        assert all(torch.equal(b, saved[f"{name}.{key}"]) for key, b in module.state_dict().items() if "running" in key)
    (x, z), (x_, fake) = losses["generator"][2][0], losses["discriminator"][2][0]
    assert torch.equal(x, x_) and torch.allclose(model.generator(z), fake)   # statistics of the batch
    assert not torch.allclose(model.eval().generator(z), fake)
    expected = (64 * stability.generator_loss(model.train().discriminator, fake) + 6 * stability.generator_loss(
        model.discriminator, losses["discriminator"][2][1][1])) / 70
    assert stability.mean_loss(*losses["generator"]) == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- command line

@pytest.fixture(scope="module")
def gans(tmp_path_factory):
    """A folder with a DCGAN of ten steps, g, and another seed's, h."""
    folder = tmp_path_factory.mktemp("gans")
    for name, seed in (("g", 0), ("h", 1)):
        train_gan(folder / name, 10, seed)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of ten steps: a, eps, and one of side 16."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in (("a", ["--size", 8]), ("large", ["--size", 16, "--patch", 8]),
                        ("eps", ["--size", 8, "--target", "eps", "--weighting", "snr"])):
        flags = ["--steps", 10, "--batch-size", 8, "--sample-steps", 1, "--decay", 0, "--T", 100, *words, "--out", folder / name]
        assert finish([fork(folder / f"{name}.txt", folder, "train.py", *flags)]) == 0
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command("hessian", ...) runs stability.py in this process, in an empty folder -> what it printed."""
    def call(*words):
        if words[0] != "gan":
            pytest.importorskip("matplotlib", reason="figures need matplotlib")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["stability.py", *map(str, words)])
        stability.main()
        return capsys.readouterr().out
    return call


def ckpts(*paths):
    return [word for path in paths for word in ("--ckpt", path)]


def test_consistency_command(command, runs, gans, tmp_path):
    pytest.importorskip("matplotlib")
    text = command("consistency", *ckpts(runs / "a", runs / "eps/ckpt.pt", gans / "g", runs / "a"), "--count", 5, "--heun", 3)
    rows, args = table(tmp_path / "consistency.csv"), argparse.Namespace(count=5, seed=0, target=None, heun=3, vae=None)
    q = torch.stack([stability.pictures(path, args) for path in (runs / "a", runs / "eps", gans / "g", runs / "a")])
    assert q.shape == (4, 5, 3, 8, 8) and len(rows) == 3 * 5 and (tmp_path / "consistency.png").stat().st_size > 5000
    assert f"consistency {stability.consistency(q):.2f} dB" in text
    other = stability.psnr(q[:1], q[1:, [4, 0, 1, 2, 3]]).mean()             # each beside the one before it
    assert f"with other images {other:.2f} dB" in text
    args.heun = 2
    assert not torch.equal(stability.pictures(runs / "a", args), q[0])
    args.heun = 3
    for row, expected in zip(rows, stability.psnr(q[:1], q[1:]).flatten().tolist()):
        assert float(row["psnr_to_first"]) == pytest.approx(expected, rel=1e-5)
    assert float(rows[-1]["psnr_to_first"]) == pytest.approx(10 * math.log10(255 ** 2 * 192), rel=1e-5)
    args.count = 2                                                           # image k is the same in any number
    assert torch.equal(stability.pictures(gans / "g", args), q[2, :2]) and torch.equal(stability.pictures(runs / "a", args), q[0, :2])
    args.seed = 1
    assert not torch.equal(stability.pictures(gans / "g", args), q[2, :2])


def test_interpolate_command_ends_at_the_checkpoints_own_losses(command, runs, gans, tmp_path):
    text = command("interpolate", *ckpts(gans / "g/early.pt", gans / "g"), "--points", 3, "--n", 6, "--out", "g.svg")
    rows = table(tmp_path / "g.csv")
    assert [row["loss"] for row in rows] == ["generator"] * 3 + ["discriminator"] * 3 and "generator" in text
    assert [float(row["alpha"]) for row in rows[:3]] == [0, 0.5, 1]
    a, b = runs / "a/ckpt.pt", runs / "c.pt"
    state = read(a)
    state["model"] = {key: 1.1 * value for key, value in state["model"].items()}
    torch.save(state, b)
    command("interpolate", *ckpts(a, b), "--points", 2, "--n", 6, "--t", 70, 3, "--out", "d.png")
    rows, args = table(tmp_path / "d.csv"), argparse.Namespace(n=6, seed=0, t=[70, 3], data=None, target=None, K=1)
    assert [row["loss"] for row in rows] == ["t = 70"] * 2 + ["t = 3"] * 2 + ["all t"] * 2
    for row, path in zip(rows, 3 * [b, a]):                                  # alpha 0 is B, 1 is A
        expected = stability.mean_loss(*stability.landscape(path, args)[1][row["loss"]])
        assert float(row["value"]) == pytest.approx(expected, rel=1e-5)


def test_losses_of_a_diffusion_model_are_those_of_its_training(runs):
    args = argparse.Namespace(n=70, seed=0, t=None, data=None, target=None, K=1)
    what, losses = stability.landscape(runs / "eps", args)
    assert what == ["eps", "snr", 5.0, "cosine", 100] and [*losses] == ["t = 10", "t = 50", "t = 90", "all t"]
    raw = read(runs / "eps")["model"]
    for name, (model, loss, parts) in losses.items():
        assert all(torch.equal(p, raw[key]) for key, p in model.named_parameters())      # not the EMA
        x0, t, noise, y = (torch.cat(part) for part in zip(*parts))
        assert len(t) == 70 and (t.unique().tolist() == [int(name[4:])] if name != "all t" else len(t.unique()) > 30 and t.max() > 90)
        x_t = Diffusion("cosine", 100).q_sample(x0, t, noise)
        expected = (model(x_t, t, y) - noise).square().mean()                # snr on x0 = plain on eps
        assert stability.mean_loss(model, loss, parts) == pytest.approx(expected.item(), rel=1e-4)
    model, loss, parts = stability.landscape(runs / "a", args)[1]["all t"]
    x0, t, noise, y = (torch.cat(part) for part in zip(*parts))
    diffusion = Diffusion("cosine", 100)
    mse = (model(diffusion.q_sample(x0, t, noise), t, y) - x0).square().flatten(1).mean(1)
    assert stability.mean_loss(model, loss, parts) == pytest.approx((diffusion.snr[t].clamp(max=5) * mse).mean().item(), rel=1e-4)


def test_hessian_command(command, runs, gans, tmp_path):
    words = ("--n", 4, "--lanczos", 4, "--probes", 2)
    text = command("hessian", *ckpts(runs / "a", gans / "g"), *words, "--t", 50)
    rows = table(tmp_path / "hessian.csv")
    assert [row["loss"] for row in rows] == ["t = 50", "all t", "generator", "discriminator"]
    args = argparse.Namespace(n=4, seed=0, t=[50], data=None, target=None, K=1)
    module, loss, parts = stability.landscape(runs / "a", args)[1]["all t"]
    found = stability.spectrum(module, loss, parts, 4, 2)
    (mean, variance), row = stability.moments(found), rows[1]
    expected = dict(lambda_1=max(f[0][-1] for f in found), lambda_P=min(f[0][0] for f in found), mean=mean,
                    variance=variance, value=stability.mean_loss(module, loss, parts),
                    ritz_variance=np.mean([((f[0] - f[0].mean()) ** 2).mean() for f in found]))
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-4)
    best = max(found, key=lambda f: f[0][-1])
    assert float(row["error_1"]) == pytest.approx(best[2][-1], rel=1e-3) and f"{mean:.3g}" in text


@pytest.mark.slow
def test_miniature(command, script, tmp_path):
    words = ("miniature", "--steps", 10, "--size", 8, "--seeds", 2, "--n", 4, "--count", 3, "--lanczos", 3, "--t", 500,
             "--points", 3, "--out", "mini")
    text, out = command(*words), tmp_path / "mini"
    assert "run 6 / 6" in text and len(list(out.glob("*/early.pt"))) == 6
    assert [read(out / name / "early.pt")["step"] for name in ("seed1", "unet", "gan1")] == [1, 1, 3]
    assert read(out / "gan0")["step"] == 30 and read(out / "eps")["config"]["target"] == "eps"
    assert all((out / f"{name}.{kind}").exists() for name in ("consistency", "interpolate", "hessian") for kind in ("png", "csv"))
    assert len(table(out / "hessian.csv")) == 2 * 2 + 2 * 2 and len(table(out / "interpolate.csv")) == 3 * 8
    numbers, stamp = table(out / "hessian.csv"), (out / "seed0/ckpt.pt").stat().st_mtime_ns
    (out / "gan1/ckpt.pt").unlink()                                          # killed in its last run
    for name in ("early.pt", "ckpt.pt", "ckpt_previous.pt"):                  # not begun
        (out / "unet" / name).unlink()
    command(*words)
    assert (out / "seed0/ckpt.pt").stat().st_mtime_ns == stamp and table(out / "hessian.csv") == numbers
    assert [read(out / name / "early.pt")["step"] for name in ("seed1", "unet", "gan1")] == [1, 1, 3]
    assert "other flags" in script("stability.py", *words, "--steps", 20, code=2)
    assert table(out / "hessian.csv") == numbers


def test_the_step_at_which_a_level_is_reached():
    curve = {200: 8.0, 400: 2.0, 600: 1.0}
    assert stability.reached(curve, 4.0) == pytest.approx(300) and stability.reached(curve, 2.0) == pytest.approx(400)
    assert stability.reached(curve, 1.0) == pytest.approx(600) and stability.reached(curve, 0.9) == math.inf
    assert stability.reached(curve, 9.0) == 200 and stability.reached({5: 1.0}, 2.0) == 5
    assert stability.reached({}, 1.0) == math.inf
    assert stability.reached({200: 8.0, 400: 1.0, 600: 3.0}, 2.0) == pytest.approx(200 + 200 * math.log(4) / math.log(8))


@pytest.mark.slow
def test_densities(command, tmp_path):
    words = ("densities", "--steps", 1, "--size", 8, "--seeds", 1, "--count", 8, "--out", "d")
    text, out = command(*words), tmp_path / "d"
    assert "run 6 / 6" in text and (out / "densities.png").exists()
    found = {(read(path)["config"]["timesteps"], read(path)["config"]["weighting"]) for path in out.glob("*/ckpt.pt")}
    assert found == {(t, w) for t in ("uniform", "clts:0.3:1", "laplace") for w in ("const", "min_snr")}
    rows = table(out / "densities.csv")
    assert len(rows) == 6 * 2 and {row["column"] for row in rows} == {"x0_mse", "fd_pixels"}
    last = table(out / "uniform_min_snr_seed0/quality.csv")[-1]
    for j, key in enumerate(("x0_mse", "fd_pixels")):
        level = float(last[key])
        assert float(re.search(r"x0 error of (\S+) and FD-pixels of (\S+),", text)[1 + j]) == pytest.approx(level, rel=1e-2)
    lines = {line.split("timesteps")[1].split()[0]: line.split()[-2:] for line in text.splitlines() if line.startswith("min-SNR-5")}
    times = [float(x) for x in lines["uniform"]]
    assert times == [1, 1] and set(lines) == {"uniform", "clts:0.3:1", "laplace"}


def test_a_damaged_gan_is_refused(script, gans, tmp_path):
    for key, value in (("step", "x"), ("step", -4), ("step", 10 ** 9), ("optimizer", 5), ("optimizer", []), ("optimizer", None)):
        state = read(gans / "g")
        (tmp_path / "bad").mkdir(exist_ok=True)
        torch.save({**state, key: value}, tmp_path / "bad/ckpt.pt")
        words = [word for name in ("size", "seed", "steps") for word in (f"--{name}", state["config"][name])]
        assert "damaged" in script("stability.py", "gan", "--out", "bad", *words, code=2), (key, value)
    assert "seed 0 for 7" in script("stability.py", "gan", "--out", gans / "g", *words[:2], "--seed", 7, *words[4:], code=2)


def test_the_landscape_of_a_ugd_run_has_its_weights(runs, tmp_path):
    state = read(runs / "a")
    state["config"]["weighting"], state["weight"] = "ugd", torch.linspace(0, 2, 100, dtype=torch.float64)
    torch.save(state, tmp_path / "ugd.pt")
    args = argparse.Namespace(n=4, seed=0, t=[50], data=None, target=None, K=1)
    values = []
    for path in (runs / "a", tmp_path / "ugd.pt"):
        model, loss, parts = stability.landscape(path, args)[1]["t = 50"]
        values.append(stability.mean_loss(model, loss, parts))
    weight = Diffusion("cosine", 100).weight[50]
    assert values[1] / values[0] == pytest.approx(float(state["weight"][50] / weight), rel=1e-5)
    for weight in (None, torch.ones(7), torch.full((100,), float("nan"))):
        torch.save({**state, "weight": weight}, tmp_path / "ugd.pt")
        with pytest.raises(stability.BadInput, match="damaged"):
            stability.landscape(tmp_path / "ugd.pt", args)


def test_gan_command(command, tmp_path):
    text = command("gan", "--size", 8, "--steps", 2, "--out", "g", "--seed", 3)
    state = torch.load(tmp_path / "g/ckpt.pt", weights_only=True)
    assert state["config"] == dict(model="dcgan", data=None, size=8, seed=3, steps=2) and "2 / 2" in text


def test_refusals(script, runs, gans, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    a, g = ckpts(runs / "a"), ckpts(gans / "g")
    for words, why in (((), "command"), (("spectrum",), "spectrum"), (("consistency", *a), "found 1 --ckpt"),
                       (("interpolate", *a, *a, *a), "found 3 --ckpt"), (("hessian",), "found 0 --ckpt"), (("gan", *a), "--ckpt"),
                       (("consistency", *a, *ckpts("none")), "none: no such file"), (("consistency", *a, *ckpts(runs / "large")), "(3, 16, 16)"),
                       (("interpolate", *a, *g), "one kind"), (("interpolate", *a, *ckpts(runs / "eps")), "one kind"),
                       (("interpolate", *a, *ckpts(runs / "large")), "other shapes"), (("hessian", *a, "--t", 100), "--t"),
                       (("hessian", *a, "--t", -1), "--t"), (("hessian", *a, "--budget", 1e-4), "--budget"),
                       (("hessian", *a, "--lanczos", 1), "--lanczos"), (("hessian", *a, "--n", 0), "--n"), (("hessian", *a, "--probes", 0), "--probes"),
                       (("interpolate", *a, *a, "--points", 1), "--points"), (("consistency", *a, *a, "--count", 1), "--count"),
                       (("hessian", *a, "--budget", "nan"), "--budget"), (("miniature", "--seeds", 1), "--seeds"), (("gan", "--steps", 0), "--steps"),
                       (("miniature", "--size", 12), "size"), (("miniature", "--t", 1000), "--t"), (("consistency", *a, *a, "--heun", 0), "--heun"),
                       (("miniature", "--data", "none"), "--data"), (("hessian", *a, "--out", "x.jpg"), "--out"), (("gan", "--size", 12), "size"),
                       (("gan", "--data", "none"), "none"), (("hessian", *g, "--data", "none"), "none"), (("gan", "--out", runs / "a"), "holds another run")):
        assert why in script("stability.py", *words, code=2), words
    for source, part in ((runs / "a", "model"), (runs / "a", "ema"), (gans / "g", "model")):
        state = read(source)
        next(iter(state[part].values())).view(-1)[0] = float("nan")
        torch.save(state, tmp_path / "nan.pt")
        figure = "consistency" if part == "ema" else "hessian"
        assert "not finite" in script("stability.py", figure, *ckpts("nan.pt"), *(a if part == "ema" else []), code=2)
    state["model"].popitem()
    torch.save(state, tmp_path / "cut.pt")
    assert "cut.pt: damaged" in script("stability.py", "hessian", *ckpts("cut.pt"), code=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in script("stability.py", "hessian", *a, code=2)
