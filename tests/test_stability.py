"""Consistency, interpolation and the Hessian's spectrum against formulas and exact values; the DCGAN; the commands."""
import copy
import csv
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------- consistency, interpolation

def test_psnr_by_hand():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0, 0] = 48                                                       # MSE 48^2 / 48
    b[1] = 51                                                                # MSE 51^2
    first, second = stability.psnr(a, b).tolist()
    assert first == pytest.approx(10 * math.log10(255 ** 2 / 48))
    assert second == pytest.approx(20 * math.log10(5))


def test_psnr_of_equal_images_is_that_of_one_byte_off_by_1():
    a = torch.full((3, 4, 4), 9, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0] = 10
    assert stability.psnr(a, a) == stability.psnr(a, b)
    assert stability.psnr(a, b) == pytest.approx(10 * math.log10(255 ** 2 * 48))


def test_consistency_is_equation_1():
    N, M = 3, 5
    q = torch.randint(256, (N, M, 3, 4, 4), dtype=torch.uint8, generator=seeded(0))
    C = 0.0
    for i in range(M):
        for j in range(1, N):                                                # the first model is the reference
            difference = q[0, i].double() - q[j, i].double()
            mse = difference.square().mean().item()
            C += 10 * math.log10(255 ** 2 / mse) / (N - 1) / M
    assert stability.consistency(q) == pytest.approx(C)


def flat(module):
    return torch.cat([p.flatten() for p in module.parameters()])


def test_interpolation_is_equation_2():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    theta_a, theta_b = flat(a).clone(), flat(b).clone()
    for alpha in (0, 0.25, 1):
        mixed = stability.interpolate(a, b, alpha)
        assert torch.equal(flat(mixed), alpha * theta_a + (1 - alpha) * theta_b)
    assert torch.equal(flat(a), theta_a)
    assert torch.equal(flat(b), theta_b)


@pytest.mark.parametrize("curve, expected", [
    ([5, 3, 2, -1], 1),                                                      # falls alone
    ([0, 1, 0, 1, 0], 4),
    ([2, 0, 1], 1.5),
    ([14, 0, 7], 1.5),                                                       # another scale
    ([2, 2, 2], 1),
])
def test_roughness_counts_the_turns(curve, expected):
    assert stability.roughness(curve) == expected


# -------------------------------------------------------------------------------------------- Hessian spectrum

def symmetric(values):
    """A symmetric matrix (P,P) of doubles with these eigenvalues, and a vector (P,) to start from."""
    values = torch.as_tensor(values, dtype=torch.float64)
    P = len(values)
    Q, _ = torch.linalg.qr(torch.randn(P, P, generator=seeded(0)).double())
    v = torch.randn(P, generator=seeded(1)).double()
    return Q @ torch.diag(values) @ Q.T, v


SPECTRUM = np.append(np.linspace(-1, 1, 298), [30.0, -7.0])


def test_lanczos_finds_the_ends_of_a_known_spectrum():
    H, v = symmetric(SPECTRUM)
    values, _, residuals = stability.lanczos(lambda x: H @ x, v, 25)
    assert values[[0, -1]] == pytest.approx([-7, 30], rel=1e-9)
    assert residuals[[0, -1]].max() < 1e-6
    nearest = np.abs(values[:, None] - SPECTRUM).min(1)
    assert (nearest <= residuals + 1e-9).all()


def test_lanczos_gives_a_quadrature_exact_below_degree_2k():
    H, v = symmetric(SPECTRUM)
    values, weights, _ = stability.lanczos(lambda x: H @ x, v, 25)
    v = v / v.norm()
    power = v
    for degree in range(2 * 25):
        assert weights @ values ** degree == pytest.approx(float(v @ power), rel=1e-8), degree
        power = H @ power


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
    """A ViT of fewer than 2,000 parameters, its loss at different t, and the exact Hessian (P,P), in doubles."""
    torch.manual_seed(0)
    model = ViT(8, 4, 3, 8, dim=4, depth=2, heads=2, T=10).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    x0, y = built_in(8).batch(range(5))                                      # batch 5, width 4
    t = torch.tensor([9, 0, 4, 4, 7])
    noise = torch.randn(x0.shape, generator=seeded(0))
    diffusion = Diffusion("cosine", 10)

    def loss(model):
        dtype = next(model.parameters()).dtype
        return diffusion.loss(model, x0.to(dtype), t, noise.to(dtype), y)[0].mean()

    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(loss(model), params, create_graph=True)
        gradient = torch.cat([grad.flatten() for grad in grads])
        rows = torch.autograd.grad(gradient, params, torch.eye(len(gradient), dtype=torch.float64),
                                   is_grads_batched=True, allow_unused=True, materialize_grads=True)
    H = torch.cat([part.flatten(1) for part in rows], 1)
    assert len(H) < 2000
    return model, loss, H


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_hessian_vector_product_is_that_of_the_exact_hessian(exact, dtype, tolerance):
    model, loss, H = exact
    v = torch.randn(len(H), generator=seeded(3), dtype=torch.float64)
    found = stability.hvp(copy.deepcopy(model).to(dtype), loss, v.to(dtype))
    assert (found - H @ v).norm() < tolerance * (H @ v).norm()


def test_spectrum_has_the_ends_of_the_exact_hessian(exact):
    model, loss, H = exact
    values = torch.linalg.eigvalsh(H).numpy()
    (ritz, _, residuals), = stability.spectrum(model, loss, 40, 1)
    for i in (0, -1):
        assert ritz[i] == pytest.approx(values[i], rel=1e-4)
        assert abs(ritz[i] - values[i]) <= residuals[i] + 1e-9


def test_probes_of_a_spectrum_depend_on_their_number_and_the_seed(exact):
    model, loss, _ = exact
    first, second = stability.spectrum(model, loss, 2, 2)
    again, = stability.spectrum(model, loss, 2, 1)
    other, = stability.spectrum(model, loss, 2, 1, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_moments_are_those_of_the_exact_hessian(exact):
    """The P' >= P rows of a Hadamard matrix, cut to P, are probes over which both estimates are exact.

    Random signs err by 1 / sqrt(their number).
    """
    _, _, H = exact
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < len(H):
        rows = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), rows)
    found = [stability.lanczos(lambda x: H @ x, row[:len(H)], 2) for row in rows]
    values = torch.linalg.eigvalsh(H)
    expected = [values.mean().item(), values.var(correction=0).item()]
    assert stability.moments(found) == pytest.approx(expected, rel=1e-8)


def test_density_integrates_to_1_and_has_the_moments(exact):
    model, loss, _ = exact
    found = stability.spectrum(model, loss, 20, 3)
    width = 0.05
    values = np.concatenate([values for values, *_ in found])
    low, high = values.min() - 8 * width, values.max() + 8 * width
    x, dx = np.linspace(low, high, 20_001, retstep=True)
    mass = stability.density(found, x, width) * dx
    mean, variance = stability.moments(found)
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    assert mass @ x == pytest.approx(mean, rel=1e-6)
    assert mass @ (x - mean) ** 2 == pytest.approx(variance + width ** 2, rel=1e-6)


def test_density_curve_covers_the_spectrum():
    found = [(np.array([-1.0, 3.0]), np.array([0.25, 0.75]), None)]
    x, y = stability.density_curve(found).T
    assert y.sum() * (x[1] - x[0]) == pytest.approx(1, abs=1e-3)
    assert x[y.argmax()] == pytest.approx(3, abs=0.01)


# ------------------------------------------------------------------------------------------------------- DCGAN

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


@pytest.mark.parametrize("size, layers", [(8, 1), (16, 2), (64, 4)])
def test_dcgan_has_the_shapes_of_its_paper(size, layers):
    model = dcgan.DCGAN(size)
    images = model.generator(torch.randn(2, 100, 1, 1))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert model.discriminator(images).shape == (2, 1, 1, 1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 * layers - 1                                      # not beside the image or the logit


def test_dcgan_has_the_first_weights_of_its_paper():
    torch.manual_seed(0)
    for name, p in dcgan.DCGAN(32).named_parameters():
        mean, std = 0, 0.02
        if name.endswith("bias"):
            std = 0
        elif p.ndim == 1:                                                    # the scale of a norm
            mean = 1
        assert p.mean().item() == pytest.approx(mean, abs=1e-2), name
        assert p.std(correction=0).item() == pytest.approx(std, abs=5e-3), name


def test_losses_of_a_gan_by_hand():
    logits = {"real": torch.tensor([2.0, -1.0]), "fake": torch.tensor([0.5, -3.0])}
    D = logits.get
    real, fake = D("real").sigmoid(), D("fake").sigmoid()
    expected = -real.log().mean() - (1 - fake).log().mean()
    assert dcgan.discriminator_loss(D, "real", "fake").item() == pytest.approx(expected.item())
    assert dcgan.generator_loss(D, "fake").item() == pytest.approx(-fake.log().mean().item())


def test_two_steps_of_a_gan_by_hand(tmp_path):
    """Radford et al.: Adam 2e-4, (0.5, 0.999). The discriminator first, the generator against the new one."""
    call(dcgan, "--out", tmp_path, "--size", 8, "--steps", 2, "--seed", 3)
    torch.manual_seed(3)
    model = dcgan.DCGAN(8)
    G, D = model.generator, model.discriminator
    adam_D = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
    adam_G = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for step in range(2):
        x, z = dcgan.batch(built_in(8), "gan", 3, step)
        fake = G(z)
        p, q = D(x).sigmoid(), D(fake.detach()).sigmoid()
        model.zero_grad()
        (-p.log().mean() - (1 - q).log().mean()).backward()
        adam_D.step()
        model.zero_grad()
        (-D(fake).sigmoid().log().mean()).backward()
        adam_G.step()
    found = read(tmp_path)["model"]
    for key, value in model.state_dict().items():
        assert torch.allclose(found[key], value, atol=1e-4), key


def test_a_gan_trained_in_two_parts_is_the_same_to_the_bit(tmp_path):
    call(dcgan, "--out", tmp_path / "whole", "--size", 8, "--steps", 5)
    for steps in (2, 5):
        torch.manual_seed(99)
        call(dcgan, "--out", tmp_path / "parts", "--size", 8, "--steps", steps)
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert parts["step"] == 5
    for name in ("model", "adam_G", "adam_D"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0)


def test_a_gan_does_not_write_over_another_run(tmp_path, capsys):
    call(dcgan, "--out", tmp_path, "--size", 8, "--steps", 1)
    assert "another run" in refusal(capsys, dcgan, "--out", tmp_path, "--size", 8, "--seed", 1)
    assert read(tmp_path)["config"]["seed"] == 0


# ------------------------------------------------------------------------------------- losses of checkpoints

@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """The folder of a DCGAN of three steps."""
    folder = tmp_path_factory.mktemp("gan")
    call(dcgan, "--out", folder, "--size", 8, "--steps", 3)
    return folder


def flags(**other):
    return SimpleNamespace(**{**dict(n=6, seed=0, t=[], data=None, count=3, vae=None), **other})


def test_losses_of_a_gan_are_those_of_its_training(gan):
    kind, losses = stability.landscape(gan, flags())
    model, _ = dcgan.load(gan)
    G, D = model.train().generator, model.discriminator
    x, z = dcgan.batch(built_in(8), "landscape", 0, 0, 6)
    expected = dict(generator=dcgan.generator_loss(D, G(z)), discriminator=dcgan.discriminator_loss(D, x, G(z)))
    assert kind == "DCGAN-8"
    for name, (module, loss) in losses.items():
        assert torch.equal(loss(module), expected.pop(name))
        assert torch.equal(flat(module), flat(getattr(model, name)))
    assert not expected


def test_pictures_of_a_gan_depend_on_their_number_and_the_seed(gan):
    three = stability.pictures(gan, flags(count=3))
    assert three.shape == (3, 3, 8, 8)
    assert torch.equal(stability.pictures(gan, flags(count=2)), three[:2])
    assert not torch.equal(stability.pictures(gan, flags(seed=1)), three)


def checkpoint(path, target="x0", weighting="min_snr", **other):
    """A checkpoint as train.py writes it, of a small ViT on 8 x 8 shapes; its EMA are other weights."""
    network = dict(img_size=8, patch_size=4, in_channels=3, num_classes=8, dim=8, depth=1, heads=2, T=100)
    config = dict(model="vit-tiny", network=network, dataset="shapes", data=None, flip=False, schedule="cosine",
                  T=100, target=target, weighting=weighting, gamma=5.0)
    model, ema = ViT(**network), ViT(**network)
    state = dict(model=model.state_dict(), ema=ema.state_dict(), step=1, config=config, **other)
    torch.save(state, path)
    return model, ema


DIFFUSION = Diffusion("cosine", 100)
TABLE = torch.linspace(0, 2, 100, dtype=torch.float64)


@pytest.mark.parametrize("target, weighting, weight", [
    ("eps", "snr", torch.ones(100)),                                         # plain eps loss
    ("x0", "min_snr", DIFFUSION.snr.clamp(max=5)),
    ("x0", "file.csv", TABLE),
])
def test_loss_is_that_of_training_at_the_raw_weights(tmp_path, target, weighting, weight):
    other = dict(weight=TABLE) if weighting == "file.csv" else {}
    raw, _ = checkpoint(tmp_path / "a.pt", target, weighting, **other)
    kind, losses = stability.landscape(tmp_path / "a.pt", flags(n=70, t=[30]))
    assert kind == f"ViT-8 {target}"
    for name, bin in (("t = 30", (100, 30)), ("all t", (1, 0))):
        parts = draw_bin(built_in(8), 100, *bin, 70, 0)
        x0, t, noise, y = (torch.cat(part) for part in zip(*parts))          # 64 and 6 samples
        output = raw(DIFFUSION.q_sample(x0, t, noise), t, y)
        wanted = x0 if target == "x0" else noise
        mse = (output - wanted).square().flatten(1).mean(1)
        module, loss = losses[name]
        assert loss(module).item() == pytest.approx((weight[t] * mse).mean().item(), rel=1e-4)


def test_pictures_of_a_diffusion_model_are_those_of_its_ema(tmp_path):
    _, ema = checkpoint(tmp_path / "a.pt")
    config = read(tmp_path / "a.pt")["config"]
    expected = sample.draw(ema.eval(), config, range(3), seed=4, steps=18)
    assert torch.equal(stability.pictures(tmp_path / "a.pt", flags(seed=4)), expected)


# ------------------------------------------------------------------------------------------------ command line

def test_consistency_command(tmp_path, gan, capsys):
    paths = [tmp_path / "a.pt", tmp_path / "b.pt", gan]
    checkpoint(paths[0])
    checkpoint(paths[1])
    call(stability, "consistency", "--ckpt", *paths, "--count", 3, "--out", tmp_path / "c.csv")
    q = torch.stack([stability.pictures(path, flags()) for path in paths])
    expected = [stability.consistency(q[[0, j]]) for j in (1, 2)]
    assert [float(row["psnr"]) for row in table(tmp_path / "c.csv")] == pytest.approx(expected)
    assert f"consistency {stability.consistency(q):.2f} dB" in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_interpolate_command_goes_from_the_first_to_the_second_checkpoint(tmp_path, gan):
    paths = [tmp_path / "b.pt", tmp_path / "a.pt"]
    for path in paths:
        checkpoint(path)
    call(stability, "interpolate", "--ckpt", *paths, gan, gan, "--n", 6, "--out", tmp_path / "i.csv")
    rows = table(tmp_path / "i.csv")
    assert {row["loss"] for row in rows} == {"all t", "generator", "discriminator"}
    line = [row for row in rows if row["loss"] == "all t"]
    assert [float(row["alpha"]) for row in line] == pytest.approx(np.linspace(0, 1, 21))
    for row, path in ((line[0], paths[0]), (line[-1], paths[1])):
        _, losses = stability.landscape(path, flags())
        module, loss = losses["all t"]
        assert float(row["value"]) == pytest.approx(loss(module).item(), rel=1e-5)


def test_summary_takes_the_ends_over_all_probes():
    first = np.array([-2.0, 5.0]), np.array([0.5, 0.5]), np.array([0.1, 0.2])
    second = np.array([-3.0, 4.0]), np.array([0.5, 0.5]), np.array([0.3, 0.4])
    found = stability.summary([first, second])
    expected = dict(lambda_1=5, error_1=0.2, lambda_P=-3, error_P=0.3, mean=1, variance=12.5, ritz_variance=12.25)
    assert found == pytest.approx(expected)


def test_hessian_command(tmp_path):
    checkpoint(tmp_path / "a.pt")
    words = ["--n", 6, "--t", 50, "--lanczos", 4, "--probes", 2, "--out", tmp_path / "h.csv"]
    call(stability, "hessian", "--ckpt", tmp_path / "a.pt", *words)
    _, losses = stability.landscape(tmp_path / "a.pt", flags(t=[50]))
    curves = table(tmp_path / "h_density.csv")
    for row in table(tmp_path / "h.csv"):
        module, loss = losses.pop(row["loss"])
        expected = stability.summary(stability.spectrum(module, loss, 4, 2))
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-4)
        assert float(row["value"]) == pytest.approx(loss(module).item(), rel=1e-5)
        assert sum(point["loss"] == row["loss"] for point in curves) > 100
    assert not losses


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
    call(stability, "consistency", "--ckpt", *paths, "--count", 2, "--out", tmp_path / "c.csv")
    call(stability, "interpolate", "--ckpt", *paths, "--n", 2, "--out", tmp_path / "i.csv")
    call(stability, "hessian", "--ckpt", *paths, "--n", 2, "--lanczos", 2, "--out", tmp_path / "h.csv")
    assert len(table(tmp_path / "h.csv")) == 2
