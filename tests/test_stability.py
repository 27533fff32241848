"""Consistency, interpolation, Hessian spectra and DCGAN against formulas and exact values; the commands."""
import csv
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

import sample
from data import built_in
from diffusion import Diffusion
from experiments import dcgan, stability
from experiments.pareto import draw_bin
from files import read, run
from model_vit import ViT


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def normal(*shape, seed=0):
    """Unit normal doubles, always the same."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).double()


def flat(module):
    return parameters_to_vector(module.parameters()).detach()


# -------------------------------------------------------------------------------- consistency, interpolation

def test_psnr_by_hand():
    a = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0, 0] = 48                                                       # MSE 48^2 / 48
    b[1] = 51                                                                # MSE 51^2
    different, other, equal = stability.psnr(a, b).tolist()
    assert different == pytest.approx(10 * math.log10(255 ** 2 / 48))
    assert other == pytest.approx(20 * math.log10(5))
    one_byte_off_by_1 = 10 * math.log10(255 ** 2 * 48)
    assert equal == pytest.approx(one_byte_off_by_1)


@pytest.mark.parametrize("curve, expected", [
    ([5, 3, 2, -1], 1),                                                      # falls alone
    ([0, 1, 0, 1, 0], 4),
    ([2, 0, 1], 1.5),
    ([14, 0, 7], 1.5),                                                       # another scale
])
def test_roughness_counts_the_turns(curve, expected):
    assert stability.roughness(curve) == expected


# ------------------------------------------------------------------------------------------ Hessian spectrum

def symmetric(values):
    """A symmetric matrix (P,P) of doubles with these eigenvalues, and a vector (P,) to start from."""
    values = torch.as_tensor(values, dtype=torch.float64)
    P = len(values)
    Q, _ = torch.linalg.qr(normal(P, P))
    return Q @ torch.diag(values) @ Q.T, normal(P, seed=1)


SPECTRUM = np.append(np.linspace(-1, 1, 298), [30.0, -7.0])


def test_lanczos_gives_a_quadrature_exact_below_degree_2k():
    H, v = symmetric(SPECTRUM)
    values, weights, _ = stability.lanczos(lambda x: H @ x, v, 25)
    v = v / v.norm()
    power = v
    for degree in range(2 * 25):
        exact = (v @ power).item()
        assert weights @ values ** degree == pytest.approx(exact, rel=1e-8), degree
        power = H @ power


def test_a_residual_of_lanczos_bounds_the_distance_to_an_eigenvalue():
    H, v = symmetric(SPECTRUM)
    values, _, residuals = stability.lanczos(lambda x: H @ x, v, 25)
    nearest = np.abs(values[:, None] - SPECTRUM).min(1)
    assert (nearest <= residuals + 1e-9).all()


def test_lanczos_keeps_its_vectors_orthogonal():
    H, v = symmetric(SPECTRUM)
    values, *_ = stability.lanczos(lambda x: H @ x, v, 1000)                 # more steps than dimensions
    assert np.allclose(values, np.sort(SPECTRUM), atol=1e-9)


def test_lanczos_ends_where_nothing_new_comes():
    H, v = symmetric([2.0] * 6 + [5.0] * 4)
    values, weights, residuals = stability.lanczos(lambda x: H @ x, v, 8)
    assert np.allclose(values, [2, 5])
    assert weights.sum() == pytest.approx(1)
    assert residuals.max() < 1e-12


@pytest.fixture(scope="module")
def exact():
    """A small ViT, its loss at different t, and the exact Hessian (P,P) of that, all in doubles."""
    torch.manual_seed(0)
    module = ViT(8, 4, 3, 8, dim=4, depth=1, heads=2, T=10)
    theta = flat(module.double())
    theta = theta + 0.1 * torch.randn(len(theta))
    x0, y = built_in(8).batch(range(5))                                      # batch 5, width 4
    x0 = x0.double()
    t = torch.tensor([9, 0, 4, 4, 7])
    noise = normal(*x0.shape)
    diffusion = Diffusion("cosine", 10)

    def loss(theta):
        model = stability.network(module, theta)
        losses, _ = diffusion.loss(model, x0, t, noise, y)
        return losses.mean()

    with sdpa_kernel(SDPBackend.MATH):
        H = torch.autograd.functional.hessian(loss, theta)
    return loss, theta, H


def test_network_has_the_parameters_of_the_vector():
    a = dcgan.DCGAN(8).generator
    b = dcgan.DCGAN(8).generator
    z = torch.randn(5, 100, 1, 1)
    found = stability.network(a, flat(b))
    assert torch.equal(found(z), b(z))


def test_spectrum_has_the_ends_of_the_exact_hessian(exact):
    loss, theta, H = exact
    values = torch.linalg.eigvalsh(H).numpy()
    ritz, _, _ = stability.spectrum(loss, theta, 40, 1, seed=0)
    assert ritz[[0, -1]] == pytest.approx(values[[0, -1]], rel=1e-4)


def test_probes_of_a_spectrum_depend_on_their_number_and_the_seed(exact):
    loss, theta, _ = exact
    both, _, _ = stability.spectrum(loss, theta, 2, 2, seed=0)
    first, _, _ = stability.spectrum(loss, theta, 2, 1, seed=0)
    other, _, _ = stability.spectrum(loss, theta, 2, 1, seed=1)
    assert np.array_equal(first, both[:2])
    assert not np.array_equal(first, both[2:])
    assert not np.array_equal(first, other)


def test_summary_takes_the_ends_over_all_probes():
    values = np.array([-2.0, 5.0, -3.0, 4.0])
    weights = np.full(4, 0.25)
    residuals = np.array([0.1, 0.2, 0.3, 0.4])
    found = stability.summary(values, weights, residuals)
    ends = dict(lambda_1=5, error_1=0.2, lambda_P=-3, error_P=0.3)
    moments = dict(mean=1, variance=12.5, ritz_variance=12.5)
    assert found == pytest.approx(ends | moments)


def test_density_has_the_mass_and_the_moments_of_the_spectrum(exact):
    loss, theta, _ = exact
    values, weights, residuals = stability.spectrum(loss, theta, 20, 3, seed=0)
    moments = stability.summary(values, weights, residuals)
    x, y = stability.density(values, weights)
    mean = np.trapezoid(y * x, x)
    variance = np.trapezoid(y * (x - mean) ** 2, x)
    width = 0.01 * np.ptp(values)
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
    assert mean == pytest.approx(moments["mean"], abs=1e-3 * width)
    assert variance == pytest.approx(moments["variance"] + width ** 2, rel=1e-2)


# ----------------------------------------------------------------------------------------------------- DCGAN

def call(module, *words):
    """Run a script of experiments/ in this process, as from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        run(module.main)


def refusal(capsys, module, *words):
    """The one line with which a script refuses its flags."""
    with pytest.raises(SystemExit) as exit:
        call(module, *words)
    assert exit.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("size, layers", [
    (8, 1),
    (16, 2),
    (64, 4),
])
def test_dcgan_has_the_shapes_and_first_weights_of_its_paper(size, layers):
    torch.manual_seed(0)
    model = dcgan.DCGAN(size)
    images = model.generator(torch.randn(2, 100, 1, 1))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert model.discriminator(images).shape == (2, 1, 1, 1)
    assert model.discriminator[1].negative_slope == 0.2
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 * layers - 1                                      # none beside images and logits
    first, last = model.generator[0], model.discriminator[-1]
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert last.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_losses_of_a_gan_by_hand():
    p, q = torch.tensor([0.9, 0.2]), torch.tensor([0.6, 0.1])                # D of real, of generated images
    logits = dict(real=p.logit(), fake=q.logit())
    D = logits.get
    of_D = -p.log().mean() - (1 - q).log().mean()
    of_G = -q.log().mean()
    assert torch.allclose(dcgan.discriminator_loss(D, "real", "fake"), of_D)
    assert torch.allclose(dcgan.generator_loss(D, "fake"), of_G)


def test_two_steps_of_a_gan_by_hand(tmp_path):
    """Radford et al.: Adam 2e-4, (0.5, 0.999). The discriminator first, the generator against the new one."""
    call(dcgan, "--out", tmp_path, "--steps", 2, "--seed", 3)
    torch.manual_seed(3)
    model = dcgan.DCGAN(16)
    G, D = model.generator, model.discriminator
    how = dict(lr=2e-4, betas=(0.5, 0.999))
    adam_D = torch.optim.Adam(D.parameters(), **how)
    adam_G = torch.optim.Adam(G.parameters(), **how)
    for step in range(2):
        x, z = dcgan.batch(built_in(16), "gan", 3, step)
        fake = G(z)
        model.zero_grad()
        dcgan.discriminator_loss(D, x, fake.detach()).backward()
        adam_D.step()
        model.zero_grad()
        dcgan.generator_loss(D, fake).backward()
        adam_G.step()
    found, expected = read(tmp_path)["gan"], model.state_dict()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_gan_does_not_write_over_another_run(tmp_path, gan, capsys):
    assert "holds a run" in refusal(capsys, dcgan, "--out", gan, "--seed", 1)


# ------------------------------------------------------------------------------------- losses of checkpoints

@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """The folder of a DCGAN of three steps."""
    folder = tmp_path_factory.mktemp("gan")
    call(dcgan, "--out", folder, "--steps", 3)
    return folder


def flags(**other):
    """What the command line gives to `landscape` and `pictures`."""
    args = dict(n=6, seed=0, t=[], data=None, count=3, vae=None)
    args.update(other)
    return SimpleNamespace(**args)


def test_losses_of_a_gan_are_those_of_its_training(gan):
    losses = stability.landscape(gan, flags())
    model, _ = dcgan.load(gan)
    G, D = model.generator, model.discriminator
    x, z = dcgan.batch(built_in(16), "landscape", 0, 0, 6)
    of_G, of_D = [loss(theta) for theta, loss in losses.values()]
    assert of_G == dcgan.generator_loss(D, G(z))
    assert of_D == dcgan.discriminator_loss(D, x, G(z))


def test_pictures_of_a_gan_depend_on_their_number_and_the_seed(gan):
    three = stability.pictures(gan, flags(count=3))
    two = stability.pictures(gan, flags(count=2))
    others = stability.pictures(gan, flags(seed=1))
    assert torch.equal(two, three[:2])
    assert not torch.equal(others, three)


def checkpoint(path, target="x0", weighting="min_snr", **other):
    """A checkpoint as train.py writes it, of a small ViT on 8 x 8 shapes; its EMA are other weights."""
    side = dict(img_size=8, patch_size=4, in_channels=3, num_classes=8)
    network = dict(side, dim=8, depth=1, heads=2, T=100)
    data = dict(dataset="shapes", data=None, flip=False)
    loss = dict(schedule="cosine", T=100, target=target, weighting=weighting, gamma=5.0)
    config = dict(model="vit-tiny", network=network, **data, **loss)
    model = ViT(**network)
    ema = ViT(**network)
    for p in [*model.parameters(), *ema.parameters()]:
        p.data += 0.1 * torch.randn(p.shape)                                 # a fresh head is close to 0
    weights = dict(model=model.state_dict(), ema=ema.state_dict())
    torch.save(dict(weights, step=1, config=config, **other), path)
    return model, ema


DIFFUSION = Diffusion("cosine", 100)
TABLE = torch.linspace(0, 2, 100, dtype=torch.float64)


@pytest.mark.parametrize("target, weighting, weight", [
    ("eps", "snr", torch.ones(100)),                                         # plain eps loss
    ("x0", "min_snr", DIFFUSION.snr.clamp(max=5)),
    ("x0", TABLE.tolist(), TABLE),                                           # a table of a file
])
def test_loss_is_that_of_training_at_the_raw_weights(tmp_path, target, weighting, weight):
    raw, _ = checkpoint(tmp_path / "a.pt", target, weighting)
    losses = stability.landscape(tmp_path / "a.pt", flags(n=70, t=[30]))
    bins = {"t = 30": (100, 30), "all t": (1, 0)}
    for name, (K, k) in bins.items():
        parts = draw_bin(built_in(8), 100, K, k, 70, 0)
        samples = [torch.cat(part) for part in zip(*parts)]                  # 64 and 6
        x0, t, noise, y = samples
        output = raw(DIFFUSION.q_sample(x0, t, noise), t, y)
        wanted = x0 if target == "x0" else noise
        error = output - wanted
        mse = error.square().flatten(1).mean(1)
        expected = (weight[t] * mse).mean().item()
        theta, loss = losses[f"ViT-8 {target} {name}"]
        assert loss(theta).item() == pytest.approx(expected, rel=1e-4)


def test_pictures_of_a_diffusion_model_are_those_of_its_ema(tmp_path):
    _, ema = checkpoint(tmp_path / "a.pt")
    config = read(tmp_path / "a.pt")["config"]
    expected = sample.draw(ema.eval(), config, range(3), seed=4, steps=18)
    found = stability.pictures(tmp_path / "a.pt", flags(seed=4))
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------- command line

def test_consistency_is_equation_1(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    for path in paths:
        checkpoint(path)
    call(stability, "consistency", "--ckpt", *paths, "--count", 3, "--out", tmp_path / "c.csv")
    first, *others = [stability.pictures(path, flags()) for path in paths]
    expected = [stability.psnr(first, images).mean().item() for images in others]
    found = [float(row["psnr"]) for row in table(tmp_path / "c.csv")]
    assert found == pytest.approx(expected)
    assert f"consistency {np.mean(expected):.2f} dB" in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_interpolation_is_equation_2(tmp_path):
    b, a = tmp_path / "b.pt", tmp_path / "a.pt"
    checkpoint(b)
    checkpoint(a)
    call(stability, "interpolate", "--ckpt", b, a, "--n", 6, "--out", tmp_path / "i.csv")
    (theta_b, loss), = stability.landscape(b, flags()).values()
    (theta_a, _), = stability.landscape(a, flags()).values()
    rows = table(tmp_path / "i.csv")
    assert len(rows) == 21
    for row in rows[::10]:                                                   # 0, 0.5, 1
        alpha = float(row["alpha"])
        mixed = alpha * theta_a + (1 - alpha) * theta_b
        expected = loss(mixed).item()
        assert float(row["value"]) == pytest.approx(expected, rel=1e-5)
    assert float(rows[-1]["alpha"]) == 1


def test_the_hessian_command_writes_the_spectrum_of_every_loss(tmp_path, gan):
    words = ["--n", 6, "--lanczos", 4, "--probes", 2, "--out", tmp_path / "h.csv"]
    call(stability, "hessian", "--ckpt", gan, *words)
    rows = table(tmp_path / "h.csv")
    curves = table(tmp_path / "h_density.csv")
    losses = stability.landscape(gan, flags())
    assert [row["loss"] for row in rows] == list(losses)
    for row in rows:
        theta, loss = losses[row["loss"]]
        values, weights, residuals = stability.spectrum(loss, theta, 4, 2, seed=0)
        expected = stability.summary(values, weights, residuals)
        for key, value in expected.items():
            assert float(row[key]) == pytest.approx(value, rel=1e-4), key
    assert {point["loss"] for point in curves} == set(losses)


@pytest.mark.parametrize("words, why", [
    ("hessian --ckpt a.pt --t 100", "--t"),
    ("hessian --ckpt a.pt --count 4", "--count"),                            # a flag of another command
    ("hessian --ckpt none", "none"),
    ("consistency --ckpt a.pt", "two or more"),
    ("interpolate --ckpt a.pt", "pairs"),
    ("interpolate --ckpt a.pt eps.pt", "one network"),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    checkpoint("a.pt")
    checkpoint("eps.pt", "eps")
    assert why in refusal(capsys, stability, *words.split())


@pytest.mark.slow
def test_runs_of_train_are_measured(script, tmp_path):
    flags = ["--size", 8, "--steps", 2, "--batch-size", 8, "--sample-steps", 1]
    paths = [tmp_path / "run0", tmp_path / "run1"]
    for seed, path in enumerate(paths):
        script("train.py", *flags, "--seed", seed, "--out", path)
    for command in ("consistency", "interpolate", "hessian"):
        call(stability, command, "--ckpt", *paths, "--out", tmp_path / f"{command}.csv")
    assert len(table(tmp_path / "hessian.csv")) == 2
