"""Schedule, weights, loss and sampler against golden values, closed forms and exact denoisers."""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from conftest import relative

from diffusion import SOLVERS, TARGETS, WEIGHTINGS, Diffusion, alphas_cumprod, loss_weight, sampling_timesteps, sampler
from model_vit import from_official

B, C, H, W = 5, 2, 4, 3                                                      # no two equal: a wrong broadcast shows


def batch(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x0, noise, guess = (torch.randn(B, C, H, W, generator=g, dtype=dtype) for _ in range(3))
    return x0, noise, guess, torch.tensor([0, 17, 400, 801, 999])


# ------------------------------------------------------------------------------------------------- schedule

def test_schedules_golden(golden):
    for key, expected in golden("schedule")[0].items():
        name, T = key.split("/")[1].split("_")
        found = alphas_cumprod(name, int(T))
        assert found.dtype == torch.float64 and torch.allclose(found, expected, rtol=1e-12, atol=0), key


@pytest.mark.parametrize("T", [50, 1000, 4000])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedule_falls_and_does_not_depend_on_T(name, T):
    found = alphas_cumprod(name, T)
    assert found.shape == (T,) and (found.diff() < 0).all() and 0 < found[-1] and found[0] < 1
    s = torch.arange(1, T + 1, dtype=torch.float64) / T
    if name == "cosine":                                                     # closed form, up to the clipped last step
        f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert torch.allclose(found[:-1], f[:-1], rtol=1e-9)
    else:                                                                    # exp(-integral of beta)
        assert torch.allclose(found.log(), -(0.1 * s + 9.95 * s ** 2), rtol=0.5 if T == 50 else 0.05, atol=1e-3)


def test_schedule_refuses():
    for name, T in (("sine", 1000), ("linear", 20)):
        with pytest.raises(ValueError):
            alphas_cumprod(name, T)


# -------------------------------------------------------------------------------------------------- weights

def test_losses_golden(golden):
    values, _ = golden("losses")
    seen = 0
    for key in values:
        if not key.startswith("loss/"):
            continue
        _, target, name = key.split("/")
        name, gamma = (name.rsplit("_", 1)[0], float(name.rsplit("_", 1)[1])) if name[-1].isdigit() and "snr_" in name \
            and name != "snr_plus_1" else (name, 5.0)
        loss, mse = Diffusion(target=target, weighting=name, gamma=gamma).loss(
            lambda x, t, y: values["model_output"], values["x0"], values["t"], values["noise"])
        assert loss.dtype == mse.dtype == torch.float32
        assert torch.allclose(loss.double(), values[key], rtol=1e-5, atol=0), key
        assert torch.allclose(mse.double(), values[f"mse/{target}"], rtol=1e-5, atol=0), key
        seen += 1
    assert seen == 11
    x_t = Diffusion().q_sample(values["x0"], values["t"], values["noise"])
    assert relative(x_t, values["x_t"]) < 1e-6


def test_mean_weights_of_min_snr_5():
    means = [Diffusion(target=target).weight.mean().item() for target in TARGETS]
    assert means == pytest.approx([2.00396, 0.82402, 0.32611], abs=5e-6)     # x0, eps, v
    assert (Diffusion().snr > 5).sum() == 261


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_guess_has_one_loss_in_every_target(weighting):
    x0, noise, guess, t = batch()
    losses = {}
    for target in TARGETS:
        d = Diffusion(target=target, weighting=weighting, gamma=3.0)
        x_t = d.q_sample(x0, t, noise)
        alpha, sigma = d.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1), (1 - d.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        eps = (x_t - alpha * guess) / sigma
        output = {"x0": guess, "eps": eps, "v": alpha * eps - sigma * guess}[target]
        assert relative(d.to_x0(output, x_t, t)[:-1], guess[:-1]) < 1e-9     # alpha is 5e-5 at t = 999
        assert relative(d.to_eps(output, x_t, t), eps) < 1e-9
        losses[target], mse = d.loss(lambda x, t, y: output, x0, t, noise)
        assert losses[target].dtype == torch.float64
        assert torch.allclose(mse / d.factor[t], (x0 - guess).square().mean((1, 2, 3)), rtol=1e-9)
    assert torch.allclose(losses["x0"], losses["eps"], rtol=1e-9) and torch.allclose(losses["x0"], losses["v"], rtol=1e-9)


def test_weight_formulas():
    snr = torch.tensor([1e-9, 0.3, 1.0, 4.0, 7.0, 1e4], dtype=torch.float64)
    expected = {"const": snr ** 0, "snr": snr, "max_snr": torch.maximum(snr, torch.tensor(4.0)), "sqrt_snr": snr ** 0.5,
                "min_snr": torch.minimum(snr, torch.tensor(4.0)), "soft_min_snr": 4 * snr / (snr + 4),
                "p2": snr / (1 + snr), "snr_plus_1": snr + 1}
    assert set(expected) == set(WEIGHTINGS)
    for name, w in expected.items():
        for target, factor in (("x0", 1), ("eps", snr), ("v", snr + 1)):
            assert torch.allclose(loss_weight(snr, name, target, gamma=4.0), w / factor, rtol=1e-14), (name, target)
    assert torch.equal(loss_weight(snr, "p2", "x0"), loss_weight(snr, "soft_min_snr", "x0", gamma=1.0))


def test_zero_terminal_snr():
    snr = torch.tensor([2.0, 1e-8, 0.0], dtype=torch.float64)
    limits = {"const": (1, None, 1), "snr": (0, 1, 0), "max_snr": (5, None, 5), "min_snr": (0, 1, 0), "soft_min_snr": (0, 1, 0),
              "p2": (0, 1, 0), "sqrt_snr": (0, None, 0), "snr_plus_1": (1, None, 1)}
    for name in WEIGHTINGS:
        for target, limit in zip(TARGETS, limits[name]):
            if limit is None:
                with pytest.raises(ValueError, match="no finite limit"):
                    loss_weight(snr, name, target)
            else:
                assert loss_weight(snr, name, target)[-1] == pytest.approx(limit, abs=1e-200), (name, target)
    table = alphas_cumprod()
    root = table.sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2     # Lin et al. 2024: abar_T = 0
    for target in ("x0", "v"):
        d = Diffusion(rescaled, target=target)
        z = torch.randn(B, C, H, W)
        assert torch.isfinite(d.weight).all() and torch.isfinite(sampler(lambda x, t, y: 0.1 * x, d, z, steps=7)).all()


def test_bad_names_and_values_are_refused():
    snr = torch.ones(3)
    for arguments in ((snr, "min_snr_5", "x0"), (snr, "min_snr", "noise"), (snr, "min_snr", "x0", 0.0), (-snr, "snr", "x0"),
                      (snr, "soft_min_snr", "x0", math.inf), (snr / 0, "snr", "x0"), (snr * float("nan"), "snr", "x0")):
        with pytest.raises(ValueError):
            loss_weight(*arguments)
    for how in (dict(solver="ddim"), dict(steps=0), dict(cfg=2.0)):
        with pytest.raises(ValueError):
            sampler(lambda x, t, y: x, Diffusion(), torch.randn(B, C, H, W), **how)


# ------------------------------------------------------------------------------------------------ density of t

def clts(T, mu, gamma):
    """Eq. 6 and 7 of the curriculum paper, a number at a time, made to sum to 1."""
    normal = [math.exp(-(t - mu) ** 2 / (2 * T ** 2)) / (T * math.sqrt(2 * math.pi)) for t in range(T)]
    P = np.array([(1 - gamma) / T + gamma * n for n in normal])
    return P / P.sum()


def test_curriculum_at_its_beginning_middle_and_end():
    for T, target, mu in ((1000, 300_000, 0.3), (4000, 50_000, 0.3), (100, 7, 0.8)):
        d = Diffusion(T=T, timesteps=f"clts:{mu}:{target}")
        for step, gamma in ((0, 0), (target // 2, (target // 2) / target), (target, 1), (10 * target, 1)):
            assert np.allclose(d.density(step), clts(T, mu * T, gamma), rtol=1e-12)
    assert torch.equal(Diffusion(timesteps="clts").density(9), Diffusion(timesteps="clts:0.3:50000").density(9))
    assert torch.equal(Diffusion(T=30).density(5), torch.full((30,), 1 / 30, dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("timesteps, exact", [
    ("laplace", stats.laplace(0, 0.5)), ("laplace:-1.5:0.75", stats.laplace(-1.5, 0.75)),
    ("logit_normal", stats.norm(0, 2)), ("logit_normal:0.5:0.7", stats.norm(-1, 1.4)),
    ("cosine_scaled", stats.hypsecant(0, 1)), ("cosine_scaled:0.8", stats.hypsecant(0, 2.5))])
def test_densities_of_log_snr_have_their_distribution_function(timesteps, exact, schedule):
    d = Diffusion(schedule, T=4000, timesteps=timesteps)
    q, lam = d.density(), d.snr.log().numpy()                                # falling in t
    assert abs(q.sum() - 1) < 1e-12 and q.min() >= 0
    middle = (lam[:-1] + lam[1:]) / 2
    inside = exact.cdf(lam[0]) - exact.cdf(lam[-1])                          # the linear schedule has finite ends
    expected = (exact.cdf(lam[0]) - exact.cdf(middle)) / inside
    assert np.abs(q.cumsum(0)[:-1].numpy() - expected).max() < 2e-3


def test_cosine_scaled_by_1_is_the_cosine_schedule():
    q = Diffusion(T=1000, timesteps="cosine_scaled:1").density() * 1000
    assert (q[50:950] - 1).abs().max() < 0.02


@pytest.mark.parametrize("timesteps, steps", [pytest.param("clts:0.3:1000", (0, 500, 1000), marks=pytest.mark.slow), ("laplace", (0,)), ("uniform", (7,)), ("logit_normal:1:0.5", (0,))])
def test_draws_have_the_table_s_frequencies(timesteps, steps):
    d, N = Diffusion(T=200, timesteps=timesteps), 10 ** 6
    for step in steps:
        q = d.density(step)
        t, ratio = d.draw(N, torch.Generator().manual_seed(step), step)
        assert t.dtype == torch.long and t.shape == (N,) and torch.allclose(ratio, 1 / (200 * q[t]), rtol=1e-12)
        assert (torch.bincount(t, minlength=200) - N * q).abs().max() < 2    # one batch: every stratum once
        g = torch.Generator().manual_seed(step)
        t = torch.stack([d.draw(100, g, step)[0] for _ in range(N // 100)])  # (10000,100)
        often = (N * q > 50).numpy()
        chi2 = lambda t, size: (((torch.bincount(t, minlength=200) - size * q) ** 2 / (size * q)).numpy()[often]).sum()
        assert chi2(t.flatten(), N) < stats.chi2(often.sum() - 1).ppf(0.999)
        assert (t.diff(dim=1) < 0).any() and (t[1:] != t[:-1]).any(1).float().mean() > 0.9
        rows = torch.arange(len(t))                                          # one of each batch: independent draws
        one = chi2(t[rows, torch.randint(100, rows.shape, generator=g)], len(t))
        assert stats.chi2(often.sum()).ppf(1e-4) < one < stats.chi2(often.sum()).ppf(1 - 1e-4)


def test_importance_keeps_the_expectation_and_changes_the_variance():
    """The loss of a network that predicts 0, x0 being +-1 and never 0: w_t exactly, so that its mean is known."""
    d = {name: Diffusion(timesteps=name) for name in ("uniform", "clts:0.3:10", "laplace", "laplace:1:2", "logit_normal")}
    x0 = torch.ones(64, 3, 2, 2)
    found = {}
    for name, diffusion in d.items():
        g, values = torch.Generator().manual_seed(0), []
        for step in range(400):
            t, ratio = diffusion.draw(64, g, step)
            loss, _ = diffusion.loss(lambda x, t, y: torch.zeros_like(x), x0, t, torch.randn(x0.shape, generator=g))
            values.append((loss.double() * ratio).mean())
        found[name] = torch.stack(values)
    expected = d["uniform"].weight.mean()
    for name, values in found.items():
        q = d[name].density(399)                                             # far tails of "laplace" are never drawn
        seen = d["uniform"].weight[q * 400 * 64 > 1].sum() / 1000
        assert abs(values.mean() - (seen if name == "laplace" else expected)) < 5 * values.std() / 20 + 0.02 * expected, name
    w, q = d["laplace:1:2"].weight, d["laplace:1:2"].density()
    variance = lambda q: (w ** 2 / (1000 ** 2 * q)).sum() - w.mean() ** 2    # of one draw's w / (q T)
    assert variance(q) < variance(torch.full_like(q, 1e-3))


def test_unknown_densities_are_refused():
    for name in ("lognormal", "laplace:0:0", "laplace:a", "laplace:0:1:2", "clts:0.3:0", "clts:nan", "logit_normal:0:inf:3",
                 "cosine_scaled:nan", "laplace:inf", "uniform:1", "", "clts:0.3:-5", "laplace:0:-1", "logit_normal:0:inf",
                 "clts:0.3:nan", "laplace:100000", "laplace:0:0.5:"):
        with pytest.raises(ValueError, match="timesteps"):
            Diffusion(timesteps=name)
    with pytest.raises(ValueError, match="timesteps"):
        Diffusion(T=1, timesteps="laplace")
    assert torch.equal(Diffusion(timesteps="laplace:0").density(), Diffusion(timesteps="laplace:0:0.5").density())


def test_weights_ignore_autocast():
    x0, noise, guess, t = (part.float() if part.is_floating_point() else part for part in batch())
    plain = Diffusion(target="v").loss(lambda x, t, y: guess, x0, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        cast = Diffusion(target="v").loss(lambda x, t, y: guess, x0, t, noise)
    assert torch.equal(plain[0], cast[0]) and cast[0].dtype == torch.float32


# -------------------------------------------------------------------------------------------------- sampler

def golden_sampler(golden, prefix):
    values, weights = golden("sampler")
    model = from_official(weights, heads=4)
    for key in (key for key in values if key.startswith(prefix + "/")):
        _, target, (how, steps) = *key.split("/")[:2], key.split("/")[2].rsplit("_n", 1)
        scale, interval = float(how.lstrip("cfginterval")), (0, 800) if how.startswith("interval") else None
        yield sampler(model, Diffusion(target=target), values["z"], values["y"], int(steps), scale, interval), values[key]


def test_sampler_golden(golden):
    errors = [relative(*pair) for pair in golden_sampler(golden, "out")]
    assert len(errors) == 8 and max(errors) < 1e-5


def test_sampler_golden_official_float32_table(golden):
    errors = [relative(*pair) for pair in golden_sampler(golden, "out_official_float32_table")]
    assert len(errors) == 8 and max(errors) < 1e-3


def test_sampling_timesteps_golden(golden):
    table = golden("sampler")[0]["sigma_table"].double()[:1000].flip(0)      # sigma at t = 0 .. 999
    assert torch.allclose(Diffusion().snr.rsqrt(), table, rtol=1e-3)
    ts = sampling_timesteps(Diffusion(), 30)
    assert len(ts) == 30 and (ts.diff() < 0).all() and ts[-1] == 0
    assert Diffusion().snr.rsqrt()[ts[0]] == pytest.approx(80, rel=0.05)
    assert len(sampling_timesteps(Diffusion(), 3000)) <= 1000                      # repeats are dropped


def gaussian(d, mean=0.4, std=0.6):
    """The exact denoiser E[x0 | x_t] of N(mean, std^2), as a network for d's target."""
    def model(x_t, t, y=None):
        a, s = d.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1), (1 - d.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        x0 = mean + a * std ** 2 / (a ** 2 * std ** 2 + s ** 2) * (x_t - a * mean)
        return as_target(d, x0, x_t, a, s)
    return model


def as_target(d, x0, x_t, a, s):
    eps = (x_t - a * x0) / s
    return {"x0": x0, "eps": eps, "v": a * eps - s * x0}[d.target]


def points(d, data):
    """The exact denoiser of a finite set of images (N,C,H,W)."""
    def model(x_t, t, y=None):
        a, s = d.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1), (1 - d.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        distance = (x_t[:, None] - a[:, None] * data).square().flatten(2).sum(2)         # (B,N)
        x0 = torch.einsum("bn,nchw->bchw", (-distance / (2 * s.view(-1, 1) ** 2)).softmax(1), data)
        return as_target(d, x0, x_t, a, s)
    return model


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("exact", ["gaussian", "points"])
def test_targets_give_the_same_samples(exact, solver):
    g = torch.Generator().manual_seed(3)
    z, data = torch.randn(B, C, H, W, generator=g, dtype=torch.float64), torch.randn(4, C, H, W, generator=g, dtype=torch.float64)
    out = {}
    for target in TARGETS:
        d = Diffusion(target=target)
        out[target] = sampler(gaussian(d) if exact == "gaussian" else points(d, data), d, z, steps=20, solver=solver)
    assert relative(out["eps"], out["x0"]) < 1e-9 and relative(out["v"], out["x0"]) < 1e-9
    if exact == "points":                                                    # every sample is one of the images
        assert (out["x0"][:, None] - data).abs().flatten(2).amax(2).amin(1).max() < 0.05


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_of_convergence(solver, order):
    d = Diffusion(T=200_000)                                                 # levels so dense that rounding is no matter
    z = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, std = 0.4, 0.6
    levels = d.snr.rsqrt()[sampling_timesteps(d, 10)]
    first, last = levels[0], levels[-1]                                      # exact flow: (x - mean) / sqrt(std^2 + sigma^2)
    flow = (z * first - mean) / (std ** 2 + first ** 2).sqrt()
    x_last = mean + flow * (std ** 2 + last ** 2).sqrt()
    exact = mean + std ** 2 / (std ** 2 + last ** 2) * (x_last - mean)       # the last step returns the denoised image
    error = [relative(sampler(gaussian(d), d, z, steps=n, solver=solver), exact) for n in (40, 80, 160)]
    slopes = [math.log2(error[0] / error[1]), math.log2(error[1] / error[2])]
    assert all(order - 0.25 < slope < order + 0.6 for slope in slopes), (error, slopes)


def test_dpm_solver_2m_by_hand():
    """Unequal steps in log sigma: x0 is extrapolated by half a step, (1 + 1/2r) x0 - 1/2r x0_before (Lu et al. 2022)."""
    d, z = Diffusion(), torch.randn(B, C, H, W, dtype=torch.float64)
    ts = sampling_timesteps(d, 4).tolist()
    s = d.snr.rsqrt()[ts].tolist()
    net = lambda x, t, y=None: torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000)
    at = lambda x, i: net(x / math.sqrt(1 + s[i] ** 2), torch.full((B,), ts[i]))
    x, before = z * s[0], None
    for i in range(3):
        x0, h = at(x, i), math.log(s[i] / s[i + 1])
        r = math.log(s[i - 1] / s[i]) / h if i else None
        guess = x0 if before is None else (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x, before = s[i + 1] / s[i] * x - math.expm1(-h) * guess, x0
    assert relative(sampler(net, d, z, steps=4, solver="dpm++2m"), at(x, 3)) < 1e-10


def test_levels_are_the_nearest_in_sigma_and_end_at_0_002():
    d = Diffusion(T=50)
    sigma = d.snr.rsqrt()
    high, low = 80 ** (1 / 7), float(sigma[0]) ** (1 / 7)
    wanted = [(high + i / 6 * (low - high)) ** 7 for i in range(7)]
    nearest = [min(range(50), key=lambda t: abs(float(sigma[t]) - w)) for w in wanted]
    assert sampling_timesteps(d, 7).tolist() == list(dict.fromkeys(nearest))       # repeats dropped
    fine = Diffusion(1 / (1 + torch.logspace(-5, 2, 300, dtype=torch.float64) ** 2))
    assert fine.snr.rsqrt()[sampling_timesteps(fine, 9)[-1]] == pytest.approx(0.002, rel=0.03)


def test_state_stays_float64_and_without_gradients():
    y, z = torch.tensor([0, 1, 2, 1, 0]), torch.randn(B, C, H, W)
    weight = torch.nn.Parameter(torch.ones(()))

    class Model:
        num_classes = 3

        def __call__(self, x, t, y):
            return weight.to(x.dtype) * torch.tanh(x) * (1 + y.view(-1, 1, 1, 1))
    for how in (dict(), dict(cfg=1.5), dict(solver="dpm++2m")):
        single, double = (sampler(Model(), Diffusion(), part, y, steps=30, **how) for part in (z, z.double()))
        assert single.dtype == torch.float64 and not single.requires_grad and relative(single, double) < 1e-6


@pytest.mark.parametrize("solver", ["heun", "euler", "dpm++2m"])
def test_classifier_guidance_turns_a_mixture_into_its_component(solver):
    """An exact denoiser of a Gaussian mixture plus the gradient of its exact classifier is the exact denoiser of one
    component, so both give the same samples, whose mean is the component's.
    """
    d, y, spread = Diffusion(), torch.arange(400) % 3, 0.3
    means = torch.tensor([[1.0, -0.5, 0.2, 0.0], [-1.0, 0.4, 0.0, 0.7], [0.3, 0.1, -0.9, -0.4]], dtype=torch.float64).view(3, 1, 2, 2)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def parts(x, t):                                                         # all components, (B,3,1,2,2)
        alpha, sigma = d.alpha_sigma(t, x[:, None])
        v = alpha ** 2 * spread ** 2 + sigma ** 2
        off = x[:, None] - alpha * means
        logits = prior.log() - (off ** 2 / (2 * v)).flatten(2).sum(2)        # (B,3): log p(c | x_t) + constant
        return means + alpha * spread ** 2 / v * off, logits

    def mixture(x, t, y=None):
        x0, logits = parts(x, t)
        return (x0 * logits.softmax(1).view(-1, 3, 1, 1, 1)).sum(1)

    def component(x, t, y):
        return parts(x, t)[0][torch.arange(len(x)), y]
    z = torch.randn(400, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    how = dict(steps=30, solver=solver)
    guided = sampler(mixture, d, z, y, classifier=lambda x, t: parts(x, t)[1], **how)
    assert relative(guided, sampler(component, d, z, y, **how)) < 1e-9
    for c in range(3):
        assert (guided[y == c].mean(0) - means[c]).abs().max() < 0.08
    assert (sampler(mixture, d, z, y, **how) - guided).abs().max() > 0.5
    twice = sampler(mixture, d, z, y, classifier=lambda x, t: parts(x, t)[1], classifier_scale=2.0, **how)
    half = sampler(mixture, d, z, y, classifier=lambda x, t: parts(x, t)[1], interval=(0, 300), **how)
    assert (twice - guided).abs().max() > 0.05 and (half - guided).abs().max() > 0.05
    # both kinds of guidance add up: the classifier's shift, doubled, is also cfg 3 between mixture and component

    class Both:
        num_classes = 3

        def __call__(self, x, t, y):
            wild = mixture(x, t)
            known = component(x, t, y.clamp(max=2))
            return torch.where((y == 3).view(-1, 1, 1, 1), wild, known)
    for where in (None, (0, 500)):
        classifier = lambda x, t: parts(x, t)[1]
        added = sampler(Both(), d, z, y, cfg=2.0, classifier=classifier, interval=where, **how)
        alone = sampler(Both(), d, z, y, cfg=3.0, interval=where, **how)
        assert relative(added, alone) < 1e-9
    strong = sampler(mixture, d, z, y, classifier=classifier, classifier_scale=3.0, **how)
    assert relative(strong, sampler(Both(), d, z, y, cfg=3.0, **how)) < 1e-9
    with pytest.raises(ValueError):
        sampler(mixture, d, z, classifier=lambda x, t: parts(x, t)[1])


def test_tables_move_together():
    d = Diffusion().to("meta")
    assert all(getattr(d, name).is_meta for name in ("alphas_cumprod", "snr", "weight", "factor"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 1000])
def test_a_constant_comes_back_exactly(steps, solver):
    z, constant = torch.randn(B, C, H, W), torch.rand(B, C, H, W)
    out = sampler(lambda x, t, y: constant, Diffusion(), z, steps=steps, solver=solver)
    assert out.dtype == torch.float64 and torch.equal(out, constant.double())


class Counted:
    """A network that counts its rows and answers by class, the null label being 3."""
    num_classes = 3

    def __init__(self):
        self.rows, self.times = 0, []

    def __call__(self, x, t, y):
        self.rows += len(x)
        self.times.append((t[0].item(), y is not None and (y == 3).any().item()))
        return 0.5 * x + (y.view(-1, 1, 1, 1) if y is not None else 0)


def test_unconditional_rows_run_only_where_needed():
    y = torch.tensor([0, 1, 2, 1, 0])
    for how, rows in ((dict(cfg=2.1), 118), (dict(cfg=2.1, interval=(0, 800)), 89), (dict(cfg=1.0), 59),
                      (dict(cfg=2.1, solver="euler"), 60), (dict(cfg=1.0, solver="dpm++2m"), 30)):
        model = Counted()
        sampler(model, Diffusion(), torch.randn(B, C, H, W), y, steps=30, **how)
        assert model.rows == rows * B, how
        low, high = how.get("interval", (0, 999))
        assert all(null == (how["cfg"] != 1 and low <= t <= high) for t, null in model.times)


def test_interval_ends_are_inclusive():
    y = torch.tensor([0, 1, 2, 1, 0])
    ts = sampling_timesteps(Diffusion(), 10)
    for interval, guided in (((int(ts[6]), int(ts[3])), 4), ((int(ts[6]) + 1, int(ts[3]) - 1), 2)):
        model = Counted()
        sampler(model, Diffusion(), torch.randn(B, C, H, W), y, steps=10, cfg=3.0, interval=interval, solver="euler")
        assert sum(null for _, null in model.times) == guided


def test_guidance_formula_in_every_target():
    """Guiding the network's output, whatever its target, is uncond + cfg (cond - uncond) on x0, on every channel."""
    y, z = torch.tensor([0, 1, 2, 1, 0]), torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = {}
    for target in TARGETS:
        d = Diffusion(target=target)

        class Model:
            num_classes = 3

            def __call__(self, x, t, y):
                a, s = d.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1), (1 - d.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
                return as_target(d, torch.tanh(x + y.view(-1, 1, 1, 1) / 3), x, a, s)

        class Guided:
            def __call__(self, x, t, y):
                cond, uncond = Model()(x, t, y), Model()(x, t, torch.full_like(y, 3))
                return -0.5 * uncond + 1.5 * cond
        out[target] = sampler(Model(), d, z, y, steps=8, cfg=1.5)
        assert relative(out[target], sampler(Guided(), d, z, y, steps=8)) < 1e-10
        assert torch.equal(sampler(Model(), d, z, y, steps=8, cfg=1.0), sampler(Model(), d, z, y, steps=8))
    assert relative(out["eps"], out["x0"]) < 1e-9 and relative(out["v"], out["x0"]) < 1e-9
