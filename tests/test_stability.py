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

from data import built_in
from diffusion import Diffusion
from experiments import dcgan, stability
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
    expected = [10 * math.log10(255 ** 2 / 48), 20 * math.log10(5)]
    assert stability.psnr(a, b).tolist() == pytest.approx(expected)


def test_psnr_of_equal_images_is_that_of_one_byte_off_by_1():
    a = torch.full((3, 4, 4), 9, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0] = 10
    assert stability.psnr(a, a) == stability.psnr(a, b) == pytest.approx(10 * math.log10(255 ** 2 * 48))


def test_consistency_is_equation_1():
    N, M = 3, 5
    q = torch.randint(256, (N, M, 3, 4, 4), dtype=torch.uint8, generator=seeded(0))
    C = 0.0
    for i in range(M):
        for j in range(1, N):
            mse = np.mean((q[0, i].numpy().astype(float) - q[j, i].numpy()) ** 2)
            C += 10 * math.log10(255 ** 2 / mse) / (N - 1) / M
    assert stability.consistency(q) == pytest.approx(C)
    assert stability.consistency(q.flip(0)) != pytest.approx(C)              # the first model is the reference


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
    ([5, 3, 2, -1], 1), ([0, 1, 9], 1), ([0, 1, 0, 1, 0], 4), ([2, 0, 1], 1.5), ([14, 0, 7], 1.5), ([2, 2, 2], 1)])
def test_roughness_counts_the_turns(curve, expected):
    assert stability.roughness(curve) == expected


# -------------------------------------------------------------------------------------------- Hessian spectrum

def symmetric(values):
    """A symmetric matrix (P,P) of doubles with these eigenvalues, and a vector (P,) to start from."""
    P = len(values)
    Q, _ = torch.linalg.qr(torch.randn(P, P, generator=seeded(0), dtype=torch.float64))
    H = Q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ Q.T
    return H, torch.randn(P, generator=seeded(1), dtype=torch.float64)


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


def test_probes_of_a_spectrum_depend_on_seed_and_number(exact):
    model, loss, _ = exact
    first, second = stability.spectrum(model, loss, 2, 2)
    (again, *_), = stability.spectrum(model, loss, 2, 1)
    (other, *_), = stability.spectrum(model, loss, 2, 1, seed=1)
    assert np.array_equal(first[0], again)
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], other)


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
    low = min(values[0] for values, *_ in found)
    high = max(values[-1] for values, *_ in found)
    x, dx = np.linspace(low - 8 * width, high + 8 * width, 20_001, retstep=True)
    f = stability.density(found, x, width)
    mean, variance = stability.moments(found)
    assert f.min() >= 0
    assert f.sum() * dx == pytest.approx(1, abs=1e-9)
    assert (f * x).sum() * dx == pytest.approx(mean, rel=1e-6)
    assert (f * (x - mean) ** 2).sum() * dx == pytest.approx(variance + width ** 2, rel=1e-6)


def test_density_curve_covers_the_spectrum():
    found = [(np.array([-1.0, 3.0]), np.array([0.25, 0.75]), np.zeros(2))]
    x, y = stability.density_curve(found).T
    assert (y * (x[1] - x[0])).sum() == pytest.approx(1, abs=1e-3)
    assert x[y.argmax()] == pytest.approx(3, abs=0.01)
    assert y.min() > 1e-8 * y.max()


# ------------------------------------------------------------------------------------------------------- DCGAN

def call(module, *words):
    """Run a script of experiments/ in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()


def refusal(capsys, module, *words):
    """The one line with which a script of experiments/ refuses its flags."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        run(module.main)
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
    strided = [m for m in model.modules() if getattr(m, "stride", 0) == (2, 2)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(strided) == 2 * layers
    assert len(norms) == 2 * layers - 1                                      # not beside the image or the logit


def test_dcgan_has_the_first_weights_of_its_paper():
    torch.manual_seed(0)
    for name, p in dcgan.DCGAN(32).named_parameters():
        mean, std = (1, 0.02) if p.ndim == 1 else (0, 0.02)
        if name.endswith("bias"):
            mean, std = 0, 0
        assert p.mean().item() == pytest.approx(mean, abs=1e-2), name
        assert p.std(correction=0).item() == pytest.approx(std, abs=5e-3), name


def test_losses_of_a_gan_by_hand():
    logits = {"real": torch.tensor([2.0, -1.0]), "fake": torch.tensor([0.5, -3.0])}
    real, fake = (x.sigmoid() for x in logits.values())
    D_loss = -real.log().mean() - (1 - fake).log().mean()
    assert dcgan.discriminator_loss(logits.get, "real", "fake") == pytest.approx(D_loss.item())
    assert dcgan.generator_loss(logits.get, "fake") == pytest.approx(-fake.log().mean().item())


def test_two_steps_of_a_gan_by_hand(tmp_path):
    """Radford et al.: Adam 2e-4, (0.5, 0.999). The discriminator first, the generator against the new one."""
    call(dcgan, "--out", tmp_path, "--size", 8, "--steps", 2, "--seed", 3)
    torch.manual_seed(3)
    model = dcgan.DCGAN(8)
    G, D = model.generator, model.discriminator
    adam_D, adam_G = (torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in (D, G))
    for step in range(2):
        x, z = dcgan.batch(built_in(8), "gan", 3, step)
        fake = G(z)
        model.zero_grad()
        (-D(x).sigmoid().log().mean() - (1 - D(fake.detach()).sigmoid()).log().mean()).backward()
        adam_D.step()
        model.zero_grad()
        (-D(fake).sigmoid().log().mean()).backward()
        adam_G.step()
    found = read(tmp_path)["model"]
    for key, value in model.state_dict().items():
        assert torch.allclose(found[key], value, atol=1e-4), key


def test_a_gan_killed_and_started_again_is_the_same_to_the_bit(tmp_path, monkeypatch):
    words = ["--size", 8, "--steps", 5, "--seed", 1]
    call(dcgan, "--out", tmp_path / "whole", *words)
    monkeypatch.setattr(dcgan, "SAVE_EVERY", 2)
    batch = dcgan.batch

    def kill(data, purpose, seed, k):
        if k == 3:
            raise KeyboardInterrupt
        return batch(data, purpose, seed, k)

    monkeypatch.setattr(dcgan, "batch", kill)
    with pytest.raises(KeyboardInterrupt):
        call(dcgan, "--out", tmp_path / "parts", *words)
    assert read(tmp_path / "parts")["step"] == 2
    monkeypatch.setattr(dcgan, "batch", batch)
    call(dcgan, "--out", tmp_path / "parts", *words)
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
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
    assert kind == "DCGAN"
    assert list(losses) == list(expected)
    for name, (module, loss) in losses.items():
        assert torch.equal(loss(module), expected[name])
        assert torch.equal(flat(module), flat(getattr(model, name)))


def test_hessian_of_a_gan_does_not_depend_on_what_was_asked_before(gan):
    """The running averages of the batch norms move with each call and have no part in a loss."""
    _, losses = stability.landscape(gan, flags())
    for module, loss in losses.values():
        v = torch.randn(len(flat(module)), generator=seeded(0))
        assert torch.equal(stability.hvp(module, loss, v), stability.hvp(module, loss, v))


def test_pictures_of_a_gan_depend_on_their_number_and_the_seed(gan):
    three = stability.pictures(gan, flags(count=3))
    assert three.shape == (3, 3, 8, 8)
    assert torch.equal(stability.pictures(gan, flags(count=2)), three[:2])
    assert not torch.equal(stability.pictures(gan, flags(seed=1)), three)
