"""Schedule, weights, loss and sampler against golden values, closed forms and exact denoisers."""
import math

import pytest
import torch
from conftest import relative
from scipy import stats

from diffusion import (SOLVERS, TARGETS, WEIGHTINGS, Diffusion, alphas_cumprod, loss_weight, sampler,
                       sampling_timesteps, steps_run, trajectory)
from model_vit import from_official

B, C, H, W = 5, 2, 4, 3                                # no two are equal: a wrong broadcast shows
TIMES = torch.tensor([0, 17, 400, 801, 999])           # another t for every sample
LABELS = torch.tensor([0, 1, 2, 1, 0])
NULL = torch.full((B,), 3)                             # the label of "no class" beside three classes
G = torch.Generator().manual_seed(0)
X0, NOISE, Z = torch.randn(3, B, C, H, W, generator=G, dtype=torch.float64)
MEANS = torch.randn(3, C, H, W, generator=G, dtype=torch.float64)
D = Diffusion()

each = pytest.mark.parametrize
each_target = each("target", TARGETS)
each_weighting = each("weighting", WEIGHTINGS)
each_solver = each("solver", SOLVERS)


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

    Label k stands for the k-th Gaussian alone, the null label for the whole mixture.
    """

    def __init__(self, d=D, means=MEANS, spread=0.3):
        self.d = d
        self.means = means[:, None]                                          # (K,1,C,H,W)
        self.spread = spread
        self.num_classes = len(means)

    def parts(self, x_t, t):
        """E[x0 | x_t, k] (K,B,C,H,W) and log p(k | x_t) up to a constant (K,B)."""
        alpha, sigma = alpha_sigma(self.d, t)
        variance = alpha ** 2 * self.spread ** 2 + sigma ** 2
        offset = x_t - alpha * self.means
        x0 = self.means + alpha * self.spread ** 2 / variance * offset
        return x0, -(offset ** 2 / (2 * variance)).flatten(2).sum(2)

    def classifier(self, x_t, t):
        return self.parts(x_t, t)[1].T

    def __call__(self, x_t, t, y):
        x0, logits = self.parts(x_t, t)
        known = torch.eye(self.num_classes + 1, dtype=torch.float64)[:-1, y]
        share = torch.where(y == self.num_classes, logits.softmax(0), known)
        x0 = torch.einsum("kb,kbchw->bchw", share, x0)
        return as_target(self.d, x0, x_t, t)


def smooth(x_t, t, y=None):
    """Some x0 network that depends on x_t and t and leaves [-1, 1]."""
    return torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


def sample(network, d=D, y=LABELS, **how):
    """One sample a label, from the noise Z."""
    return sampler(network, d, Z, y, **how)


# ----------------------------------------------------------------------------------------------- schedule

@each("name", ["cosine_1000", "linear_1000", "cosine_4000"])
def test_schedule_golden(golden, name):
    expected = golden("schedule")[0][f"alphas_cumprod/{name}"]
    schedule, T = name.split("_")
    found = alphas_cumprod(schedule, int(T))
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_cosine_schedule_is_a_squared_cosine_up_to_its_last_step():
    s = torch.arange(51, dtype=torch.float64) / 50
    f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    found = alphas_cumprod("cosine", 50)
    assert relative(found[:-1], f[1:-1] / f[0]) < 1e-12


def test_betas_of_the_linear_schedule_rise_linearly_and_faster_for_a_smaller_T():
    found = alphas_cumprod("linear", 50)
    betas = 1 - found[1:] / found[:-1]
    expected = torch.linspace(20 * 1e-4, 20 * 0.02, 50)
    assert relative(betas, expected[1:]) < 1e-6


# ------------------------------------------------------------------------------------------- loss weights

FORMULAS = {
    "const":        lambda snr: 1.0,
    "snr":          lambda snr: snr,
    "max_snr":      lambda snr: max(snr, 4.0),
    "min_snr":      lambda snr: min(snr, 4.0),
    "soft_min_snr": lambda snr: 4 * snr / (snr + 4),
    "p2":           lambda snr: snr / (1 + snr),
    "sqrt_snr":     math.sqrt,
    "snr_plus_1":   lambda snr: snr + 1
}


@each_weighting
def test_weight_of_the_x0_loss_is_its_formula(weighting):
    snr = [1e-9, 0.3, 1.0, 4.0, 7.0, 1e4]
    expected = [FORMULAS[weighting](value) for value in snr]
    found = loss_weight(snr, weighting, "x0", gamma=4.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


@each_weighting
@each_target
def test_a_tensor_of_weights_equals_the_name_with_the_same_weights(target, weighting):
    named = Diffusion(target=target, weighting=weighting)
    tensor = WEIGHTINGS[weighting](named.snr, 5.0)
    assert torch.equal(Diffusion(target=target, weighting=tensor).weight, named.weight)


@each_weighting
@each("target", ["x0", "v"])
def test_weight_at_snr_0(target, weighting):
    limit = {"const": 1, "max_snr": 5, "snr_plus_1": 1}.get(weighting, 0)
    assert loss_weight(0.0, weighting, target) == limit


@each("weighting", ["snr", "min_snr", "soft_min_snr", "p2"])
def test_weight_of_the_eps_loss_at_snr_0_is_its_limit(weighting):
    assert loss_weight(0.0, weighting, "eps") == pytest.approx(1)


@each("weighting", ["const", "max_snr", "sqrt_snr", "snr_plus_1"])
def test_weight_of_the_eps_loss_at_snr_0_is_refused_where_it_has_no_limit(weighting):
    with pytest.raises(ValueError, match="not finite at every SNR"):
        loss_weight(0.0, weighting, "eps")


def test_a_schedule_that_ends_at_snr_0_has_finite_samples():
    schedule = alphas_cumprod()
    schedule[-1] = 0
    d = Diffusion(schedule, target="v")
    assert sample(lambda x_t, t, y: 0.1 * x_t, d).isfinite().all()


@each("how", [
    dict(schedule="sine"),
    dict(schedule="linear", T=20),
    dict(target="noise"),
    dict(weighting="min_snr_5"),
    dict(weighting=torch.full((1000,), math.nan)),
    dict(gamma=0.0),
    dict(gamma=math.inf),
    dict(gamma=math.nan)
])
def test_unknown_names_and_impossible_values_are_refused(how):
    with pytest.raises(ValueError):
        Diffusion(**how)


# ------------------------------------------------------------------------------- forward process and loss

WITH_GAMMA = {
    "max_snr_1":  ("max_snr", 1.0),
    "min_snr_1":  ("min_snr", 1.0),
    "min_snr_5":  ("min_snr", 5.0),
    "min_snr_20": ("min_snr", 20.0)
}


@each("key", ["x0/const", "x0/snr", "x0/max_snr_1", "x0/min_snr_1", "x0/min_snr_5", "x0/min_snr_20",
              "eps/snr", "eps/min_snr_5", "eps/max_snr_1", "v/min_snr_5", "v/snr_plus_1"])
def test_loss_golden(golden, key):
    values, _ = golden("losses")
    target, name = key.split("/")
    weighting, gamma = WITH_GAMMA.get(name, (name, 5.0))
    d = Diffusion(target=target, weighting=weighting, gamma=gamma)
    output = values["model_output"]
    loss, _ = d.loss(lambda x_t, t, y: output, values["x0"], values["t"], values["noise"])
    assert torch.allclose(loss.double(), values[f"loss/{key}"], rtol=1e-5, atol=0)


def test_noisy_images_golden(golden):
    values, _ = golden("losses")
    x_t = D.q_sample(values["x0"], values["t"], values["noise"])
    assert relative(x_t, values["x_t"]) < 1e-6


@each_target
def test_an_output_stands_for_one_x0(target):
    d = Diffusion(target=target)
    x_t = d.q_sample(X0, TIMES, NOISE)
    output = as_target(d, X0, x_t, TIMES)
    assert relative(d.to_x0(output, x_t, TIMES), X0) < 1e-9


@each_weighting
@each_target
def test_a_guess_of_x0_has_one_loss_in_every_target(target, weighting):
    d = Diffusion(target=target, weighting=weighting, gamma=3.0)

    def network(x_t, t, y):
        return as_target(d, MEANS[y], x_t, t)
    error = (X0 - MEANS[LABELS]).square().mean((1, 2, 3))
    weight = WEIGHTINGS[weighting](d.snr[TIMES], 3.0)
    loss, mse = d.loss(network, X0, TIMES, NOISE, LABELS)
    assert torch.allclose(loss, weight * error, rtol=1e-9, atol=0)
    assert torch.allclose(mse / d.factor[TIMES], error, rtol=1e-9, atol=0)


@each("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_has_the_images_dtype_whatever_the_network_s_is(dtype):
    loss, mse = D.loss(lambda x_t, t, y: x_t.to(dtype), X0.float(), TIMES, NOISE.float())
    assert loss.dtype == mse.dtype == torch.float32


def test_tables_move_together():
    d = Diffusion().to("meta")
    tables = (d.alphas_cumprod, d.snr, d.weight, d.factor)
    assert all(table.is_meta for table in tables)


# ------------------------------------------------------------------------------------------- density of t

def test_uniform_density():
    assert Diffusion(T=30).density().tolist() == [1 / 30] * 30


@each("step, gamma", [(0, 0), (3, 3 / 7), (7, 1), (70, 1)])
def test_curriculum_is_equations_6_and_7(step, gamma):
    expected = (1 - gamma) / 100 + gamma * stats.norm(80, 100).pdf(range(100))
    found = Diffusion(T=100, timesteps="clts:0.8:7").density(step)
    assert relative(found, expected / expected.sum()) < 1e-12


@each("timesteps, exact", [
    ("laplace:-1.5:0.75", stats.laplace(-1.5, 0.75)),
    ("logit_normal:0.5:0.7", stats.norm(-1, 1.4)),
    ("cosine_scaled:1.5", stats.hypsecant(0, 4 / 3))
])
def test_log_snr_has_the_distribution_function(timesteps, exact):
    d = Diffusion(T=4000, timesteps=timesteps)
    lam = d.snr.log()                                                        # falls with t
    above = exact.sf((lam[:-1] + lam[1:]) / 2)
    assert relative(d.density().cumsum(0)[:-1], above) < 2e-3


def test_cosine_scaled_by_1_is_the_cosine_schedule():
    q = Diffusion(timesteps="cosine_scaled:1").density()
    assert (1000 * q[50:950] - 1).abs().max() < 0.02


@each("short, long", [
    ("clts", "clts:0.3:50000"),
    ("laplace", "laplace:0:0.5"),
    ("logit_normal", "logit_normal:0:1"),
    ("cosine_scaled", "cosine_scaled:2")
])
def test_default_parameters_of_densities(short, long):
    found = Diffusion(timesteps=short).density(9)
    assert torch.equal(found, Diffusion(timesteps=long).density(9))


@each("timesteps", [
    "", "lognormal", "uniform:1", "laplace:a", "laplace:0:0.5:", "laplace:0:1:2", "laplace:0:0",
    "laplace:0:-1", "laplace:inf", "laplace:100000", "logit_normal:0:1:3", "cosine_scaled:nan", "clts:0.3:0",
    "clts:0.3:-5", "clts:0.3:nan", "clts:nan", "clts:1.1", "clts:-0.1"])
def test_what_is_no_density_is_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps"):
        Diffusion(timesteps=timesteps)


each_density = each("timesteps", ["uniform", "clts:0.3:1000", "laplace:1:2", "logit_normal:0:2"])


@each_density
def test_each_of_equal_shares_of_the_density_gives_a_batch_one_t(timesteps):
    d = Diffusion(timesteps=timesteps)
    q = d.density(500)
    t, _ = d.draw(64, torch.Generator(), step=500)
    t = t.sort().values
    passed = q.cumsum(0)[t]
    share = torch.arange(64) / 64
    assert (passed > share).all()
    assert (passed - q[t] <= share + 1 / 64).all()


@each_density
def test_a_batch_is_in_random_order(timesteps):
    """The first t of many batches has the density q, not that of the first share."""
    d = Diffusion(T=200, timesteps=timesteps)
    g = torch.Generator()
    first = [d.draw(B, g, step=500)[0][0] for _ in range(2000)]
    found = torch.stack(first).bincount(minlength=200) / 2000
    distance = (found - d.density(500)).cumsum(0).abs().max()
    assert distance < 1.95 / math.sqrt(2000)        # Kolmogorov and Smirnov, p = 0.001


@each_density
def test_the_importance_ratio_keeps_the_mean_weight(timesteps):
    d = Diffusion(timesteps=timesteps)
    t, ratio = d.draw(20_000, torch.Generator(), step=500)
    mean = (d.weight[t] * ratio).mean()
    assert relative(ratio, 1 / (1000 * d.density(500)[t])) < 1e-12
    assert abs(mean / d.weight.mean() - 1) < 0.01


def test_draws_depend_on_the_generator_alone():
    t, _ = D.draw(64, torch.Generator())
    again, _ = D.draw(64, torch.Generator())
    assert torch.equal(t, again)


def test_the_highest_draw_is_the_last_t_though_the_density_adds_up_to_less_than_1(monkeypatch):
    highest = torch.tensor([1 - 2 ** -53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: highest)
    t, _ = Diffusion(T=10).draw(1, torch.Generator())
    assert t == 9


# ----------------------------------------------------------------------------------- sampler: the solvers

GUIDED = {
    "cfg1_n5":         dict(steps=5),
    "cfg1.5_n5":       dict(steps=5, cfg=1.5),
    "cfg1.5_n30":      dict(steps=30, cfg=1.5),
    "interval2.1_n10": dict(steps=10, cfg=2.1, interval=(0, 800))
}


@each("key", GUIDED)
@each("target", ["x0", "eps"])
def test_sampler_golden(golden, target, key):
    values, weights = golden("sampler")
    model = from_official(weights, heads=4)
    found = sampler(model, Diffusion(target=target), values["z"], values["y"], **GUIDED[key])
    assert relative(found, values[f"out/{target}/{key}"]) < 1e-5
    assert relative(found, values[f"out_official_float32_table/{target}/{key}"]) < 1e-3


def edm_levels(steps):
    """Equation 5 of Karras et al. 2022 from 80 to 0.002 with rho = 7, float64 (steps,), falling."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return torch.linspace(high, low, steps, dtype=torch.float64) ** 7


@each("steps", [1, 7, 200])
def test_timesteps_have_the_nearest_levels_to_edm_s_without_repeats(steps):
    levels = torch.logspace(-5, 5, 50, dtype=torch.float64)
    d = Diffusion(1 / (1 + levels ** 2))
    nearest = (edm_levels(steps)[:, None] - levels).abs().argmin(1)
    assert torch.equal(sampling_timesteps(d, steps), nearest.unique().flip(0))


@each("solver, order", [("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_of_convergence(solver, order):
    mean = MEANS[:1]
    path = (80 * Z - mean) / math.hypot(0.3, 80)                             # does not change with the level
    exact = mean + path * 0.3 ** 2 / math.hypot(0.3, 0.002)

    def error(steps):
        d = Diffusion(1 / (1 + edm_levels(steps).flip(0) ** 2))              # so that no level is rounded
        network = Mixture(d, mean, 0.3)
        return relative(sample(network, d, 0 * LABELS, steps=steps, solver=solver), exact)
    slope = math.log2(error(80) / error(160))
    assert order - 0.25 < slope < order + 0.5


@each("solver", ["euler", "dpm++2m"])
def test_euler_is_ddim_and_dpm_solver_is_ddim_with_x0_extrapolated_by_half_a_step(solver):
    times = sampling_timesteps(D, 6)[:, None]
    lam = D.snr[times].log()
    x_t = D.q_sample(0 * Z, times[0], Z)
    estimates = [smooth(x_t, times[0])]
    for i in range(5):
        x0 = estimates[i]
        if solver == "dpm++2m" and i > 0:
            slope = (x0 - estimates[i - 1]) / (lam[i] - lam[i - 1])
            x0 = x0 + slope * (lam[i + 1] - lam[i]) / 2
        eps = as_target(Diffusion(target="eps"), x0, x_t, times[i])
        x_t = D.q_sample(x0, times[i + 1], eps)
        estimates.append(smooth(x_t, times[i + 1]))
    found = [x0 for _, x0 in trajectory(smooth, D, Z, steps=6, solver=solver)]
    assert relative(torch.stack(found), torch.stack(estimates)) < 1e-10


@each_solver
@each_target
def test_samples_of_a_finite_set_are_its_images_and_the_same_for_every_target(target, solver):
    d = Diffusion(target=target)
    found = sample(Mixture(d, spread=0.0), d, NULL, solver=solver)
    distance = (found[:, None] - MEANS).abs().flatten(2).amax(2)
    assert distance.amin(1).max() < 0.05
    assert relative(found, sample(Mixture(spread=0.0), D, NULL, solver=solver)) < 1e-9


@each_solver
@each("steps", [1, 18])
def test_a_constant_comes_back_exactly(steps, solver):
    found = sample(lambda x_t, t, y: X0, steps=steps, solver=solver)
    assert torch.equal(found, X0)


def test_networks_run_in_the_noise_s_dtype_and_the_state_in_float64():
    def network(x_t, t, y=None):
        assert x_t.dtype == torch.float32
        return x_t

    def classifier(x_t, t):
        return network(x_t, t).flatten(1)
    found = sampler(network, D, Z.float(), LABELS, classifier=classifier)
    assert found.dtype == torch.float64


@each("how", [
    dict(solver="ddim"),
    dict(cfg=2.0),
    dict(classifier=smooth)
])
def test_the_sampler_refuses_what_it_does_not_know_and_guidance_without_labels(how):
    with pytest.raises(ValueError):
        sample(smooth, y=None, **how)


# ------------------------------------------------------------ sampler: trajectory, clipping, its arguments

@each_solver
def test_a_trajectory_has_one_estimate_a_step_and_ends_with_the_sample(solver):
    times, estimates = zip(*trajectory(smooth, D, Z, solver=solver))
    assert list(times) == sampling_timesteps(D, 30).tolist()
    assert torch.equal(estimates[-1], sample(smooth, solver=solver))


def test_a_trajectory_has_no_gradients_and_leaves_its_caller_s_alone():
    weight = torch.ones((), requires_grad=True)
    for _, estimate in trajectory(lambda x_t, t, y: weight * x_t, D, Z):
        assert not estimate.requires_grad
        assert torch.is_grad_enabled()


def test_clip_keeps_guided_estimates_within_their_range():
    network = Mixture()
    how = dict(cfg=3.0, classifier=network.classifier, clip=True)
    estimates = [x0 for _, x0 in trajectory(network, D, Z, LABELS, **how)]
    assert torch.stack(estimates).abs().max() == 1


@each_solver
def test_clip_changes_nothing_but_what_lies_outside(solver):
    def inside(x_t, t, y):
        return smooth(x_t, t).clamp(-1, 1)
    expected = sample(inside, solver=solver)
    assert torch.equal(sample(inside, solver=solver, clip=True), expected)
    assert torch.equal(sample(smooth, solver=solver, clip=True), expected)


class Moving(Diffusion):
    """Every move is like one to another device: a new tensor takes the place of the old."""

    def to(self, device):
        self.snr = self.snr.clone()
        return self


def test_the_sampler_leaves_its_arguments_alone():
    d, z = Moving(), Z.clone()
    before = dict(vars(d))
    sampler(Mixture(), d, z, LABELS, cfg=2.0)
    assert all(value is before[name] for name, value in vars(d).items())
    assert torch.equal(d.snr, D.snr) and torch.equal(z, Z)


# ------------------------------------------------------------------------------------------ sampler: guidance

@each_target
def test_guidance_goes_from_the_unconditional_through_the_conditional(target):
    d = Diffusion(target=target)
    network = Mixture(d)

    def guided(x_t, t, y):
        return 1.5 * network(x_t, t, y) - 0.5 * network(x_t, t, NULL)
    assert relative(sample(network, d, cfg=1.5), sample(guided, d)) < 1e-9


class Recorder(list):
    """A network that is the list of its calls: t and the number of rows."""
    num_classes = 3

    def __call__(self, x_t, t, y):
        self.append((t[0].item(), len(x_t)))
        return x_t


@each("how, rows", [
    (dict(cfg=2.1, interval=(0, 800)), 89),
    (dict(cfg=1.0), 59),
    (dict(cfg=2.1, solver="dpm++2m"), 60)
])
def test_the_unconditional_half_runs_only_where_it_is_needed(how, rows):
    network = Recorder()
    sample(network, **how)
    assert sum(count for _, count in network) == rows * B


@each("steps", [1, 18, 250])
@each("d", [D, Diffusion("linear", 4000), Diffusion(T=100)])
@each_solver
def test_steps_and_evaluations_are_those_that_are_run(d, steps, solver):
    network = Recorder()
    estimates = list(trajectory(network, d, Z, LABELS, steps=steps, cfg=2.0, solver=solver))
    assert steps_run(d, steps, solver) == (len(estimates), len(network))


def test_the_ends_of_an_interval_are_inside_it():
    network = Recorder()
    times = sampling_timesteps(D, 10).tolist()
    sample(network, steps=10, cfg=3.0, interval=(times[6], times[3]), solver="euler")
    assert [t for t, count in network if count == 2 * B] == times[3:7]


@each_target
@each_solver
def test_an_exact_classifier_turns_a_mixture_into_its_component(solver, target):
    d = Diffusion(target=target)
    network = Mixture(d)

    def unconditional(x_t, t, y):
        return network(x_t, t, NULL)
    guided = sample(unconditional, d, classifier=network.classifier, solver=solver)
    assert relative(guided, sample(network, d, solver=solver)) < 1e-9


@each("interval", [None, (0, 500)])
def test_an_exact_classifier_adds_its_scale_to_cfg(interval):
    network = Mixture()
    how = dict(classifier=network.classifier, classifier_scale=0.5)
    found = sample(network, cfg=2.0, interval=interval, **how)
    assert relative(found, sample(network, cfg=2.5, interval=interval)) < 1e-9
