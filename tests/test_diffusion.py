"""Schedule, weights, loss and sampler against golden values, closed forms and exact denoisers."""
import copy
import math

import pytest
import torch
from conftest import relative
from scipy import stats
from torch.nn import functional as F

from diffusion import (SOLVERS, TARGETS, WEIGHTINGS, Diffusion, alphas_cumprod, loss_weight, sampler,
                       sampling_timesteps, trajectory)
from model_vit import from_official


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


B, C, H, W = 5, 2, 4, 3                                # no two are equal: a wrong broadcast shows
X0, NOISE, GUESS, Z = normal(4, B, C, H, W, seed=0)
TIMES = torch.tensor([0, 17, 400, 801, 999])           # another t for every sample
LABELS = torch.tensor([0, 1, 2, 1, 0])
NULL = torch.full((B,), 3)                             # the label of "no class" beside three classes
MEANS = normal(3, C, H, W, seed=1)


def alpha_sigma(d, t):
    """alpha_t and sigma_t, each (B,1,1,1)."""
    squared = d.alphas_cumprod[t].view(-1, 1, 1, 1)
    return squared.sqrt(), (1 - squared).sqrt()


def as_target(d, x0, x_t, t):
    """What a network of d's target says when it means x0."""
    alpha, sigma = alpha_sigma(d, t)
    eps = (x_t - alpha * x0) / sigma
    v = alpha * eps - sigma * x0
    return {"x0": x0, "eps": eps, "v": v}[d.target]


class Mixture:
    """The exact denoiser E[x0 | x_t] of equally likely Gaussians N(mean, spread^2), a network of d's target.

    Label k stands for the k-th Gaussian alone. The null label, or no label, stands for the whole mixture.
    """

    def __init__(self, d, means=MEANS, spread=0.3):
        self.d = d
        self.means = means                                                   # (K,C,H,W)
        self.spread = spread
        self.num_classes = len(means)

    def parts(self, x_t, t):
        """E[x0 | x_t, k] (B,K,C,H,W) and log p(k | x_t) up to a constant (B,K)."""
        alpha, sigma = alpha_sigma(self.d, t)
        alpha, sigma = alpha[:, None], sigma[:, None]
        variance = alpha ** 2 * self.spread ** 2 + sigma ** 2
        offset = x_t[:, None] - alpha * self.means
        x0 = self.means + alpha * self.spread ** 2 / variance * offset
        return x0, -(offset ** 2 / (2 * variance)).flatten(2).sum(2)

    def classifier(self, x_t, t):
        return self.parts(x_t, t)[1]

    def __call__(self, x_t, t, y=None):
        x0, logits = self.parts(x_t, t)
        share = logits.softmax(1)
        if y is not None:
            known = F.one_hot(y, self.num_classes + 1)[:, :-1].double()
            share = torch.where(y[:, None] < self.num_classes, known, share)
        x0 = torch.einsum("bk,bkchw->bchw", share, x0)
        return as_target(self.d, x0, x_t, t)


def smooth(x_t, t, y=None):
    """Some x0 network that depends on all that it is given."""
    return torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


# ----------------------------------------------------------------------------------------------- schedule

@pytest.mark.parametrize("name, T", [("cosine", 1000), ("linear", 1000), ("cosine", 4000)])
def test_schedule_golden(golden, name, T):
    expected = golden("schedule")[0][f"alphas_cumprod/{name}_{T}"]
    found = alphas_cumprod(name, T)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_cosine_schedule_is_a_squared_cosine_up_to_its_last_step(T):
    s = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    found = alphas_cumprod("cosine", T)
    assert torch.allclose(found[:-1], (f / f[0])[1:-1], rtol=1e-9, atol=0)
    assert found[-1] / found[-2] == pytest.approx(1 - 0.999)


@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_linear_schedule_is_the_product_of_its_betas(T):
    expected = [1.0]
    for t in range(T):
        beta = (1e-4 + (0.02 - 1e-4) * t / (T - 1)) * 1000 / T
        expected.append(expected[-1] * (1 - beta))
    assert alphas_cumprod("linear", T).tolist() == pytest.approx(expected[1:], rel=1e-9)


@pytest.mark.parametrize("T", [50, 1000, 4000])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedule_falls_within_0_and_1(name, T):
    found = alphas_cumprod(name, T)
    assert found.shape == (T,)
    assert (found.diff() < 0).all() and 0 < found[-1] and found[0] < 1


@pytest.mark.parametrize("name, T", [("sine", 1000), ("linear", 20)])
def test_unknown_schedules_and_too_few_steps_are_refused(name, T):
    with pytest.raises(ValueError):
        alphas_cumprod(name, T)


# ------------------------------------------------------------------------------------------- loss weights

FORMULAS = {
    "const":        lambda snr: 1.0,
    "snr":          lambda snr: snr,
    "max_snr":      lambda snr: max(snr, 4.0),
    "min_snr":      lambda snr: min(snr, 4.0),
    "soft_min_snr": lambda snr: 4 * snr / (snr + 4),
    "p2":           lambda snr: snr / (1 + snr),
    "sqrt_snr":     lambda snr: math.sqrt(snr),
    "snr_plus_1":   lambda snr: snr + 1,
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target, factor", [("x0", lambda snr: 1), ("eps", lambda snr: snr),
                                            ("v", lambda snr: snr + 1)])
def test_weight_is_its_formula_divided_by_the_target_s_factor(weighting, target, factor):
    snr = [1e-9, 0.3, 1.0, 4.0, 7.0, 1e4]
    expected = [FORMULAS[weighting](value) / factor(value) for value in snr]
    found = loss_weight(torch.tensor(snr, dtype=torch.float64), weighting, target, gamma=4.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("target, mean", [("x0", 2.00396), ("eps", 0.82402), ("v", 0.32611)])
def test_mean_weight_of_min_snr_5(target, mean):
    assert Diffusion(target=target).weight.mean() == pytest.approx(mean, abs=5e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_tensor_of_weights_equals_the_name_with_the_same_weights(target, weighting):
    named = Diffusion(target=target, weighting=weighting)
    tensor = WEIGHTINGS[weighting](named.snr, 5.0)
    assert torch.equal(Diffusion(target=target, weighting=tensor).weight, named.weight)


LIMITS = {                 # of the weight where the SNR goes to 0, by target: x0, eps, v
    "const":        (1, None, 1),
    "snr":          (0, 1, 0),
    "max_snr":      (5, None, 5),
    "min_snr":      (0, 1, 0),
    "soft_min_snr": (0, 1, 0),
    "p2":           (0, 1, 0),
    "sqrt_snr":     (0, None, 0),
    "snr_plus_1":   (1, None, 1),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_weight_at_snr_0_is_the_limit_or_refused(weighting, target):
    snr = torch.tensor([2.0, 1e-8, 0.0], dtype=torch.float64)
    limit = LIMITS[weighting][TARGETS.index(target)]
    if limit is None:
        with pytest.raises(ValueError, match="no finite limit"):
            loss_weight(snr, weighting, target)
    else:
        assert loss_weight(snr, weighting, target)[-1] == pytest.approx(limit, abs=1e-200)


@pytest.mark.parametrize("target", ["x0", "v"])
def test_a_schedule_that_ends_at_snr_0_has_finite_weights_and_samples(target):
    root = alphas_cumprod().sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2     # Lin et al. 2024
    d = Diffusion(rescaled, target=target)
    sample = sampler(lambda x_t, t, y: 0.1 * x_t, d, Z, steps=7)
    assert d.snr[-1] == 0
    assert d.weight.isfinite().all() and sample.isfinite().all()


@pytest.mark.parametrize("how", [
    dict(weighting="min_snr_5"), dict(weighting=torch.full((1000,), math.nan)), dict(target="noise"),
    dict(gamma=0.0), dict(gamma=-1.0), dict(gamma=math.inf), dict(gamma=math.nan)])
def test_unknown_weights_are_refused(how):
    with pytest.raises(ValueError):
        Diffusion(**how)


# ------------------------------------------------------------------------------- forward process and loss

GOLDEN_WEIGHTS = {
    "const":      ("const", 5.0),
    "snr":        ("snr", 5.0),
    "snr_plus_1": ("snr_plus_1", 5.0),
    "max_snr_1":  ("max_snr", 1.0),
    "min_snr_1":  ("min_snr", 1.0),
    "min_snr_5":  ("min_snr", 5.0),
    "min_snr_20": ("min_snr", 20.0),
}


@pytest.mark.parametrize("key", [
    "x0/const", "x0/snr", "x0/max_snr_1", "x0/min_snr_1", "x0/min_snr_5", "x0/min_snr_20",
    "eps/snr", "eps/min_snr_5", "eps/max_snr_1", "v/min_snr_5", "v/snr_plus_1"])
def test_loss_golden(golden, key):
    values, _ = golden("losses")
    target, name = key.split("/")
    weighting, gamma = GOLDEN_WEIGHTS[name]
    d = Diffusion(target=target, weighting=weighting, gamma=gamma)
    loss, mse = d.loss(lambda x_t, t, y: values["model_output"], values["x0"], values["t"], values["noise"])
    assert loss.dtype == mse.dtype == torch.float32
    assert torch.allclose(loss.double(), values[f"loss/{key}"], rtol=1e-5, atol=0)
    assert torch.allclose(mse.double(), values[f"mse/{target}"], rtol=1e-5, atol=0)


def test_noisy_images_golden(golden):
    values, _ = golden("losses")
    x_t = Diffusion().q_sample(values["x0"], values["t"], values["noise"])
    assert relative(x_t, values["x_t"]) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
def test_an_output_stands_for_one_x0_and_one_eps(target):
    d = Diffusion(target=target)
    x_t = d.q_sample(X0, TIMES, NOISE)
    output = as_target(d, X0, x_t, TIMES)
    assert relative(d.to_x0(output, x_t, TIMES), X0) < 1e-9
    assert relative(d.to_eps(output, x_t, TIMES), NOISE) < 1e-9


def loss_of_guess(target, weighting="min_snr"):
    """Loss and mse of a network that means GUESS, whatever its target."""
    d = Diffusion(target=target, weighting=weighting, gamma=3.0)
    return d.loss(lambda x_t, t, y: as_target(d, GUESS, x_t, t), X0, TIMES, NOISE)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target", ["eps", "v"])
def test_one_guess_has_one_loss_in_every_target(target, weighting):
    loss, _ = loss_of_guess(target, weighting)
    expected, _ = loss_of_guess("x0", weighting)
    assert loss.dtype == torch.float64
    assert torch.allclose(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_mse_divided_by_the_factor_is_the_error_of_x0(target):
    _, mse = loss_of_guess(target)
    error = (X0 - GUESS).square().mean((1, 2, 3))
    assert torch.allclose(mse / Diffusion(target=target).factor[TIMES], error, rtol=1e-9, atol=0)


def test_the_loss_hands_labels_to_the_network():
    by_label = Diffusion().loss(lambda x_t, t, y: MEANS[y], X0, TIMES, NOISE, LABELS)
    assert torch.equal(by_label[0], Diffusion().loss(lambda x_t, t, y: MEANS[LABELS], X0, TIMES, NOISE)[0])


def test_the_loss_ignores_autocast():
    x0, noise, guess = X0.float(), NOISE.float(), GUESS.float()
    d = Diffusion(target="v")
    expected, _ = d.loss(lambda x_t, t, y: guess.bfloat16().float(), x0, TIMES, noise)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = d.loss(lambda x_t, t, y: guess.bfloat16(), x0, TIMES, noise)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_tables_move_together():
    d = Diffusion().to("meta")
    tables = (d.alphas_cumprod, d.snr, d.weight, d.factor)
    assert all(table.is_meta for table in tables)


# ------------------------------------------------------------------------------------------- density of t

def test_uniform_density():
    assert Diffusion(T=30).density(step=5).tolist() == pytest.approx([1 / 30] * 30, rel=1e-15)


@pytest.mark.parametrize("T, mu, target, step, gamma", [
    (1000, 0.3, 300_000, 0, 0.0), (1000, 0.3, 300_000, 150_000, 0.5), (4000, 0.3, 50_000, 50_000, 1.0),
    (100, 0.8, 7, 3, 3 / 7), (100, 0.8, 7, 70, 1.0)])
def test_curriculum_is_equations_6_and_7(T, mu, target, step, gamma):
    expected = (1 - gamma) / T + gamma * stats.norm(mu * T, T).pdf(range(T))
    found = Diffusion(T=T, timesteps=f"clts:{mu}:{target}").density(step)
    assert found.tolist() == pytest.approx(list(expected / expected.sum()), rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("timesteps, exact", [
    ("laplace", stats.laplace(0, 0.5)), ("laplace:-1.5:0.75", stats.laplace(-1.5, 0.75)),
    ("logit_normal", stats.norm(0, 2)), ("logit_normal:0.5:0.7", stats.norm(-1, 1.4)),
    ("cosine_scaled", stats.hypsecant(0, 1)), ("cosine_scaled:0.8", stats.hypsecant(0, 2.5))])
def test_density_of_log_snr_has_its_distribution_function(timesteps, exact, schedule):
    d = Diffusion(schedule, T=4000, timesteps=timesteps)
    lam = d.snr.log().numpy()                                                # falls with t
    middle = (lam[:-1] + lam[1:]) / 2
    inside = exact.cdf(lam[0]) - exact.cdf(lam[-1])                          # the schedule's ends are finite
    expected = (exact.cdf(lam[0]) - exact.cdf(middle)) / inside
    found = d.density().cumsum(0).numpy()
    assert abs(found[:-1] - expected).max() < 2e-3 and found[-1] == pytest.approx(1, abs=1e-12)


def test_cosine_scaled_by_1_is_the_cosine_schedule():
    q = Diffusion(timesteps="cosine_scaled:1").density() * 1000
    assert (q[50:950] - 1).abs().max() < 0.02


@pytest.mark.parametrize("short, long", [
    ("clts", "clts:0.3:50000"), ("laplace", "laplace:0:0.5"), ("laplace:0", "laplace:0:0.5"),
    ("logit_normal", "logit_normal:0:1"), ("cosine_scaled", "cosine_scaled:2")])
def test_default_parameters_of_densities(short, long):
    assert torch.equal(Diffusion(timesteps=short).density(9), Diffusion(timesteps=long).density(9))


@pytest.mark.parametrize("timesteps", [
    "", "lognormal", "uniform:1", "laplace:a", "laplace:0:0.5:", "laplace:0:1:2", "laplace:0:0", "laplace:0:-1",
    "laplace:inf", "laplace:100000", "logit_normal:0:1:3", "cosine_scaled:nan", "clts:0.3:0", "clts:0.3:-5",
    "clts:0.3:nan", "clts:nan", "clts:1.1", "clts:-0.1"])
def test_what_is_no_density_is_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps"):
        Diffusion(timesteps=timesteps)


DRAWN = ["uniform", "clts:0.3:1000", "laplace", "logit_normal:1:0.5"]


@pytest.mark.parametrize("timesteps", DRAWN)
def test_every_share_of_the_density_gives_a_batch_one_t(timesteps):
    d = Diffusion(T=200, timesteps=timesteps)
    t, _ = d.draw(64, torch.Generator().manual_seed(0), step=500)
    ends = torch.arange(65) / 64
    quantiles = torch.searchsorted(d.density(500).cumsum(0), ends.double()).clamp(max=199)
    found = t.sort().values
    assert (quantiles[:-1] <= found).all() and (found <= quantiles[1:]).all()


@pytest.mark.parametrize("timesteps", DRAWN)
def test_the_first_t_of_batches_has_the_density(timesteps):
    """So the order within a batch is random: else the first t came from the same share every time."""
    d, batches = Diffusion(T=100, timesteps=timesteps), 2000
    g = torch.Generator().manual_seed(1)
    first = torch.stack([d.draw(8, g, step=500)[0][0] for _ in range(batches)])
    expected = batches * d.density(500)
    found = first.bincount(minlength=100)
    often = expected > 5
    chi2 = ((found - expected) ** 2 / expected)[often].sum()
    low, high = stats.chi2(often.sum()).ppf([1e-4, 1 - 1e-4])
    assert low < chi2 < high


@pytest.mark.parametrize("timesteps", DRAWN)
def test_draws_come_with_their_importance_ratio(timesteps):
    d = Diffusion(T=200, timesteps=timesteps)
    t, ratio = d.draw(B, torch.Generator().manual_seed(2), step=500)
    assert t.dtype == torch.long and t.shape == (B,)
    assert torch.allclose(ratio, 1 / (200 * d.density(500)[t]), rtol=1e-12)


def drawn_losses(timesteps):
    """Loss / (q T) of single draws for a network that predicts 0 where x0 is 1, so that its loss is w_t."""
    d, g = Diffusion(timesteps=timesteps), torch.Generator().manual_seed(3)
    draws = [d.draw(1, g, step=5) for _ in range(2000)]
    t = torch.cat([t for t, _ in draws])
    ratio = torch.cat([ratio for _, ratio in draws])
    x0 = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    loss, _ = d.loss(lambda x_t, t, y: torch.zeros_like(x_t), x0, t, torch.zeros_like(x0))
    return loss * ratio


@pytest.mark.parametrize("timesteps", ["uniform", "clts:0.3:10", "laplace:1:2", "logit_normal"])
def test_importance_sampling_keeps_the_mean_of_the_loss(timesteps):
    losses = drawn_losses(timesteps)
    standard_error = losses.std() / math.sqrt(len(losses))
    assert abs(losses.mean() - Diffusion().weight.mean()) < 4 * standard_error


def test_importance_sampling_where_the_weight_is_lowers_the_variance():
    assert drawn_losses("laplace:1:2").var() < 0.9 * drawn_losses("uniform").var()


# ----------------------------------------------------------------------------------- sampler: the solvers

GUIDED = {
    "cfg1_n5":         dict(steps=5),
    "cfg1.5_n5":       dict(steps=5, cfg=1.5),
    "cfg1.5_n30":      dict(steps=30, cfg=1.5),
    "interval2.1_n10": dict(steps=10, cfg=2.1, interval=(0, 800)),
}


@pytest.mark.parametrize("key", GUIDED)
@pytest.mark.parametrize("target", ["x0", "eps"])
def test_sampler_golden(golden, target, key):
    values, weights = golden("sampler")
    model = from_official(weights, heads=4)
    found = sampler(model, Diffusion(target=target), values["z"], values["y"], **GUIDED[key])
    assert relative(found, values[f"out/{target}/{key}"]) < 1e-5
    assert relative(found, values[f"out_official_float32_table/{target}/{key}"]) < 1e-3


def test_noise_levels_golden(golden):
    official = golden("sampler")[0]["sigma_table"].double()[:1000].flip(0)
    assert torch.allclose(Diffusion().snr.rsqrt(), official, rtol=1e-3)


def edm_levels(high, low, steps):
    """Equation 5 of Karras et al. 2022 with rho = 7."""
    first, last = high ** (1 / 7), low ** (1 / 7)
    return [(first + i / (steps - 1) * (last - first)) ** 7 for i in range(steps)]


@pytest.mark.parametrize("T, steps", [(50, 7), (1000, 30), (50, 200)])
def test_timesteps_have_the_nearest_levels_to_edm_s_without_repeats(T, steps):
    d = Diffusion(T=T)
    levels = d.snr.rsqrt().tolist()
    expected = []
    for level in edm_levels(80, levels[0], steps):
        nearest = min(range(T), key=lambda t: abs(levels[t] - level))
        if nearest not in expected:
            expected.append(nearest)
    assert sampling_timesteps(d, steps).tolist() == expected


def exact_levels(steps):
    """A Diffusion that has EDM's levels from 80 to 0.002 and no others, so that none is rounded."""
    levels = torch.tensor(edm_levels(80, 0.002, steps), dtype=torch.float64)
    return Diffusion(1 / (1 + levels.flip(0) ** 2))


def test_levels_end_at_80_and_at_0_002():
    wider = Diffusion(1 / (1 + torch.logspace(-5, 5, 2001, dtype=torch.float64) ** 2))
    ends = wider.snr.rsqrt()[sampling_timesteps(wider, 9)[[0, -1]]]
    assert ends.tolist() == pytest.approx([80, 0.002], rel=0.01)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_of_convergence(solver, order):
    mean, spread = MEANS[:1], 0.6

    def error(steps):
        d = exact_levels(steps)
        flow = (80 * Z - mean) / math.sqrt(spread ** 2 + 80 ** 2)            # exact: constant along a path
        x0 = mean + flow * spread ** 2 / math.sqrt(spread ** 2 + 0.002 ** 2)
        return relative(sampler(Mixture(d, mean, spread), d, Z, steps=steps, solver=solver), x0)
    errors = [error(steps) for steps in (40, 80, 160)]
    slopes = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert order - 0.25 < min(slopes) and max(slopes) < order + 0.6


def test_euler_is_ddim():
    d = Diffusion()
    times = sampling_timesteps(d, 6)
    alphas, sigmas = alpha_sigma(d, times)
    x_t = sigmas[0] * Z
    for i in range(6):
        x0 = smooth(x_t, times[i])
        eps = (x_t - alphas[i] * x0) / sigmas[i]
        if i < 5:
            x_t = alphas[i + 1] * x0 + sigmas[i + 1] * eps
    assert relative(sampler(smooth, d, Z, steps=6, solver="euler"), x0) < 1e-10


def test_dpm_solver_extrapolates_x0_by_half_a_step():
    """Lu et al. 2022: (1 + 1/2r) x0 - 1/2r x0_before, with steps that are unequal in log sigma."""
    d = Diffusion()
    times = sampling_timesteps(d, 4)
    levels = d.snr.rsqrt()[times].tolist()
    x = Z * levels[0]                                                        # x_t / alpha_t
    for i in range(4):
        x0 = smooth(x / math.sqrt(1 + levels[i] ** 2), times[i])
        if i == 3:
            break
        step = math.log(levels[i] / levels[i + 1])
        ahead = x0
        if i > 0:
            r = math.log(levels[i - 1] / levels[i]) / step
            ahead = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x = levels[i + 1] / levels[i] * x - math.expm1(-step) * ahead
        before = x0
    assert relative(sampler(smooth, d, Z, steps=4, solver="dpm++2m"), x0) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("target", ["eps", "v"])
def test_targets_give_the_same_samples(target, spread, solver):
    def sample(target):
        d = Diffusion(target=target)
        return sampler(Mixture(d, spread=spread), d, Z, steps=20, solver=solver)
    assert relative(sample(target), sample("x0")) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_a_finite_set_are_its_images(solver):
    d = Diffusion()
    sample = sampler(Mixture(d, spread=0.0), d, Z, steps=20, solver=solver)
    distance = (sample[:, None] - MEANS).abs().flatten(2).amax(2)
    assert distance.amin(1).max() < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 18, 1000])
def test_a_constant_comes_back_exactly(steps, solver):
    sample = sampler(lambda x_t, t, y: X0.float(), Diffusion(), Z.float(), steps=steps, solver=solver)
    assert torch.equal(sample, X0.float().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_run_in_the_noise_s_dtype_and_the_state_in_float64(dtype):
    seen = set()

    def network(x_t, t, y):
        seen.add(x_t.dtype)
        return torch.tanh(x_t)

    def classifier(x_t, t):
        return network(x_t, t, None).flatten(1)
    sample = sampler(network, Diffusion(), Z.to(dtype), LABELS, classifier=classifier)
    assert seen == {dtype} and sample.dtype == torch.float64


def test_a_float32_network_has_the_samples_of_a_float64_one():
    z = Z.float()
    assert relative(sampler(smooth, Diffusion(), z), sampler(smooth, Diffusion(), z.double())) < 1e-6


@pytest.mark.parametrize("how", [dict(solver="ddim"), dict(steps=0), dict(cfg=2.0), dict(classifier=smooth)])
def test_the_sampler_refuses(how):
    with pytest.raises(ValueError):
        sampler(smooth, Diffusion(), Z, **how)


# --------------------------------------------------------------------------- sampler: trajectory and clipping

@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_has_one_estimate_a_step_and_ends_with_the_sample(solver):
    times, estimates = zip(*trajectory(smooth, Diffusion(), Z, steps=12, solver=solver))
    assert list(times) == sampling_timesteps(Diffusion(), 12).tolist()
    assert torch.equal(estimates[-1], sampler(smooth, Diffusion(), Z, steps=12, solver=solver))


def test_a_trajectory_starts_with_the_estimate_from_noise():
    d = Diffusion(target="eps")
    t, estimate = next(trajectory(Mixture(d), d, Z))
    _, sigma = alpha_sigma(d, t)
    x_t = sigma * Z
    times = torch.full((B,), t)
    assert relative(estimate, d.to_x0(Mixture(d)(x_t, times), x_t, times)) < 1e-12


def test_a_trajectory_has_no_gradients_and_leaves_its_caller_s_alone():
    weight = torch.ones((), requires_grad=True)
    for _, estimate in trajectory(lambda x_t, t, y: weight * torch.tanh(x_t), Diffusion(), Z, steps=3):
        assert not estimate.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("solver", SOLVERS)
def test_clip_is_a_network_whose_guided_estimates_are_clamped(solver):
    d = Diffusion()
    network = Mixture(d)

    def clamped(x_t, t, y):
        guided = 3 * network(x_t, t, y) - 2 * network(x_t, t, NULL)
        return guided.clamp(-1, 1)
    clipped = sampler(network, d, Z, LABELS, cfg=3.0, solver=solver, clip=True)
    assert relative(clipped, sampler(clamped, d, Z, LABELS, solver=solver)) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_clip_keeps_every_estimate_within_its_range(solver):
    d = Diffusion()
    how = dict(cfg=3.0, classifier=Mixture(d).classifier, solver=solver)
    estimates = [x0 for _, x0 in trajectory(Mixture(d), d, Z, LABELS, clip=True, **how)]
    assert torch.stack(estimates).abs().max() == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_clip_changes_nothing_where_estimates_lie_inside(solver):
    def inside(x_t, t, y):
        return torch.tanh(x_t)
    assert torch.equal(sampler(inside, Diffusion(), Z, solver=solver, clip=True),
                       sampler(inside, Diffusion(), Z, solver=solver))


class Moved(Diffusion):
    """Every move is one to another device: it puts new tensors in the places of the old."""

    def to(self, device):
        for name in ("alphas_cumprod", "snr", "weight", "factor"):
            setattr(self, name, getattr(self, name).clone())
        return self


def test_the_sampler_leaves_its_arguments_alone():
    d, z = Moved(), Z.clone()
    places, values = dict(vars(d)), copy.deepcopy(vars(d))
    sampler(Mixture(d), d, z, LABELS, steps=3, cfg=2.0)
    assert vars(d).keys() == places.keys()
    assert all(value is places[name] for name, value in vars(d).items())
    assert torch.equal(d.snr, values["snr"]) and torch.equal(z, Z)


# ------------------------------------------------------------------------------------------ sampler: guidance

@pytest.mark.parametrize("target", TARGETS)
def test_guidance_goes_from_the_unconditional_through_the_conditional(target):
    d = Diffusion(target=target)
    network = Mixture(d)

    def guided(x_t, t, y):
        return 1.5 * network(x_t, t, y) - 0.5 * network(x_t, t, NULL)
    found = sampler(network, d, Z, LABELS, steps=8, cfg=1.5)
    assert relative(found, sampler(guided, d, Z, LABELS, steps=8)) < 1e-9


class Recorder:
    """A network that notes the number of its rows, its t, and whether it was given the null label."""
    num_classes = 3

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, y):
        self.calls.append((len(x_t), t[0].item(), bool((y == 3).any())))
        return 0.5 * x_t + y.view(-1, 1, 1, 1)


@pytest.mark.parametrize("how, rows", [
    (dict(cfg=2.1), 118), (dict(cfg=2.1, interval=(0, 800)), 89), (dict(cfg=1.0), 59),
    (dict(cfg=2.1, solver="euler"), 60), (dict(cfg=1.0, solver="dpm++2m"), 30)])
def test_the_unconditional_half_runs_only_where_it_is_needed(how, rows):
    network = Recorder()
    sampler(network, Diffusion(), Z, LABELS, steps=30, **how)
    assert sum(count for count, _, _ in network.calls) == rows * B


@pytest.mark.parametrize("inwards, guided", [(0, 4), (1, 2)])
def test_the_ends_of_an_interval_are_inside_it(inwards, guided):
    times = sampling_timesteps(Diffusion(), 10).tolist()
    interval = (times[6] + inwards, times[3] - inwards)
    network = Recorder()
    sampler(network, Diffusion(), Z, LABELS, steps=10, cfg=3.0, interval=interval, solver="euler")
    found = [t for _, t, null in network.calls if null]
    assert len(found) == guided and interval[0] <= min(found) and max(found) <= interval[1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_exact_classifier_turns_a_mixture_into_its_component(solver, target):
    d = Diffusion(target=target)
    network = Mixture(d)

    def unconditional(x_t, t, y):
        return network(x_t, t)
    guided = sampler(unconditional, d, Z, LABELS, classifier=network.classifier, solver=solver)
    assert relative(guided, sampler(network, d, Z, LABELS, solver=solver)) < 1e-9


@pytest.mark.parametrize("interval", [None, (0, 500)])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_an_exact_classifier_adds_its_scale_to_cfg(scale, interval):
    d = Diffusion()
    network = Mixture(d)
    both = sampler(network, d, Z, LABELS, cfg=2.0, interval=interval, classifier=network.classifier,
                   classifier_scale=scale)
    assert relative(both, sampler(network, d, Z, LABELS, cfg=2.0 + scale, interval=interval)) < 1e-9
