"""Min-SNR diffusion in one file: schedule, prediction targets, loss weights, loss, sampler.

Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023. Equation numbers are
that paper's unless another is named. Symbols: x0 is the clean image, x_t the noisy one, t = 0 .. T-1 (the
paper's 1 .. T), alpha_t^2 + sigma_t^2 = 1, alphas_cumprod = alpha_t^2, SNR = alpha_t^2 / sigma_t^2.
Tables are float64, because the SNR of the cosine schedule runs from 2.4e4 down to 2.4e-9.
"""
import copy
import math

import torch
from torch.nn import functional as F

TARGETS = ("x0", "eps", "v")
SOLVERS = ("heun", "euler", "dpm++2m")


# -------------------------------------------------------------------------------- schedule (section 3.1)

def alphas_cumprod(schedule="cosine", T=1000):
    """alpha_t^2 for t = 0 .. T-1, float64 (T,), strictly falling. The name is Ho et al.'s, whose alpha_t is
    1 - beta_t: the cumulative product of theirs is the square of this paper's.

    "cosine": beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999) with f(s) = cos^2((s + .008) / 1.008 pi/2)
    (Nichol & Dhariwal 2021, eq. 17). "linear": betas from 1e-4 to 0.02, scaled by 1000 / T (Ho et al. 2020).
    Raises ValueError for another name, and for a T so small that a beta of the linear schedule reaches 1.
    """
    assert T >= 1
    if schedule == "cosine":
        s = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    else:
        raise ValueError(f"schedule: found {schedule!r}, expected 'cosine' or 'linear'")
    if betas.max() >= 1:
        raise ValueError(f"T: found {T}, too few steps for the {schedule} schedule")
    return torch.cumprod(1 - betas, dim=0)


# ----------------------------------------------------------------------------- loss weights (section 3.4)

WEIGHTINGS = {  # name: w(SNR, gamma) on the x0 loss
    "const":        lambda snr, gamma: torch.ones_like(snr),               # section 3.4
    "snr":          lambda snr, gamma: snr,                                # = the plain eps loss, eq. 4
    "max_snr":      lambda snr, gamma: snr.clamp(min=gamma),               # gamma = 1: Salimans & Ho 2022
    "min_snr":      lambda snr, gamma: snr.clamp(max=gamma),               # the paper
    "soft_min_snr": lambda snr, gamma: gamma * snr / (snr + gamma),        # Crowson et al. 2024
    "p2":           lambda snr, gamma: snr / (1 + snr),                    # Choi et al. 2022 at k = gamma = 1
    "sqrt_snr":     lambda snr, gamma: snr.sqrt(),                         # "debiased", Yu et al. 2023
    "snr_plus_1":   lambda snr, gamma: snr + 1,                            # = the plain v loss
}


def target_factor(snr, target):
    """|target - prediction|^2 = factor |x0 - predicted x0|^2: 1 (x0), SNR (eps), SNR + 1 (v); appendix B."""
    if target not in TARGETS:
        raise ValueError(f"target: found {target!r}, expected one of {', '.join(TARGETS)}")
    return {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[target]


def loss_weight(snr, weighting, target, gamma=5.0):
    """Weight of the mean squared error in the target's own space, float64, same shape as snr.

    weighting: a name of WEIGHTINGS, or a table of weights like snr. It is always defined on the x0 loss and
    converted once, so that x0, eps and v trained under one name minimise the same objective (section 4.2,
    appendix B). At SNR = 0 the entry is the limit: for min_snr 0 (x0, v) and 1 (eps), where the official code
    writes 1 for all three. Raises ValueError for unknown names, gamma not in (0, inf), and a combination
    without a finite limit: eps at SNR = 0 with const, max_snr, sqrt_snr or snr_plus_1.
    """
    snr = torch.as_tensor(snr, dtype=torch.float64)
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma: found {gamma}, expected a positive finite number")
    if target == "eps":
        # This avoids 0 / 0: at 1e-300, w(SNR) / SNR equals its limit at SNR = 0, or exceeds 1e100 where there is
        # no finite limit, which is refused below.
        snr = snr.clamp(min=1e-300)
    if not isinstance(weighting, str):
        w = torch.as_tensor(weighting).to(snr)
        assert w.shape == snr.shape
    elif weighting in WEIGHTINGS:
        w = WEIGHTINGS[weighting](snr, gamma)
    else:
        raise ValueError(f"weighting: found {weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
    weight = w / target_factor(snr, target)
    if not (weight < 1e100).all():
        raise ValueError(f"weighting: the weights of target {target!r} are not finite at every SNR")
    return weight


# ----------------------------------------------------------------------------- density of t in training
# q(t) up to a factor, as a function of t, of lam = log SNR, of the step of training, and of parameters.

def uniform(t, lam, step):
    """The paper's: every t is equally likely."""
    return torch.ones_like(lam)


def curriculum(t, lam, step, mu=0.3, target_step=5e4):
    """Proportional to (1 - gamma) U(t) + gamma N(t; mu T, T^2) with gamma = min(1, step / target_step): eq. 6
    and 7 of the curriculum paper (Wang et al. 2024), whose mu is mu T here, and which has no min. This gamma is
    not min-SNR's. N reaches beyond 0 .. T (for mu = 0.3 its sum inside is 0.376) and is normalised only after the
    mixing, so its share of the draws is below gamma until gamma = 1. Then q T is between 0.83 (t = T - 1) and
    1.06 (t = mu T).
    """
    if not 0 <= mu <= 1:
        raise ValueError("mu")                                               # timestep_density says the rest
    gamma = min(1, step / target_step)
    normal = (-(t / len(t) - mu) ** 2 / 2).exp() / math.sqrt(2 * math.pi)    # N(t) T, so that U(t) T is 1
    return (1 - gamma) + gamma * normal


def spacing(lam):
    """|d lam| between neighbouring t: turns a density of lam into a density of t."""
    return torch.gradient(lam)[0].abs()


def laplace(t, lam, step, mu=0.0, b=0.5):
    """Hang & Gu 2024."""
    return (-(lam - mu).abs() / b).exp() * spacing(lam)


def logit_normal(t, lam, step, m=0.0, s=1.0):
    """Esser et al. 2024, whose t is sigma / (alpha + sigma)."""
    return (-((lam / 2 + m) / s) ** 2 / 2).exp() * spacing(lam)


def cosine_scaled(t, lam, step, s=2.0):
    """Hang & Gu 2024; for s = 1 the density of lam that the cosine schedule has under uniform t."""
    return spacing(lam) / torch.cosh(s * lam / 2)


DENSITIES = {"uniform": uniform, "clts": curriculum, "laplace": laplace, "logit_normal": logit_normal,
             "cosine_scaled": cosine_scaled}


def timestep_density(timesteps, snr, step=0):
    """q(t) in a step of training, float64 (T,), sum 1.

    timesteps: a name of DENSITIES, then, after colons, that function's parameters in order: "clts:0.3:50000",
    "laplace:0:0.5". The second, a width or a step, must be positive. Raises ValueError for another name and for
    parameters that give no density.
    """
    name, *values = timesteps.split(":")
    if name not in DENSITIES:
        raise ValueError(f"timesteps: found {timesteps!r}, expected one of {', '.join(DENSITIES)}")
    t = torch.arange(len(snr), dtype=torch.float64)
    lam = snr.double().clamp(min=1e-300).log()
    try:
        values = [float(value) for value in values]
        q = DENSITIES[name](t, lam, step, *values)
        q = q / q.sum()
        valid = q.min() >= 0 and min(values[1:], default=1) > 0              # nan is not >= 0
    except (TypeError, ValueError, ZeroDivisionError):                   # too many, no number, mu, 0
        valid = False
    if not valid:
        raise ValueError(f"timesteps: found {timesteps!r}, expected a density such as laplace:0:0.5, or "
                         "clts:0.3:50000, a share of T and a step")
    return q


# ------------------------------------------------------------------------------ forward process and loss

class Diffusion:
    """Schedule, target and weighting as float64 tables `.alphas_cumprod .snr .weight .factor`, each (T,).

    schedule: "cosine", "linear" or a (T,) tensor of alphas_cumprod. target: what the network predicts, "x0",
    "eps" or "v". weighting and gamma: see `loss_weight`. timesteps: see `timestep_density`.
    Images are (B,C,H,W), t is (B,) long. Raises ValueError for values that it does not know.
    """

    def __init__(self, schedule="cosine", T=1000, target="x0", weighting="min_snr", gamma=5.0,
                 timesteps="uniform"):
        table = alphas_cumprod(schedule, T) if isinstance(schedule, str) else schedule.double()
        self.alphas_cumprod = table
        self.T = len(table)
        self.target = target
        self.snr = table / (1 - table)                                       # SNR = alpha^2 / sigma^2
        self.snr_on_cpu = self.snr               # density reads it, in a thread that must not wait for a GPU
        self.weight = loss_weight(self.snr, weighting, target, gamma)
        self.factor = target_factor(self.snr, target)
        self.timesteps = timesteps
        self.density()                                                       # refuses what is no density

    def to(self, device):
        """Move the tables once, so that no step waits for a copy. A Mac's GPU, mps, has no float64: the tables stay
        where they are, and what is read from them there takes the images' dtype before it is moved.
        """
        if torch.device(device).type == "mps":
            return self
        for name in ("alphas_cumprod", "snr", "weight", "factor"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def density(self, step=0):
        """q(t) of a step of training, float64 (T,), on the CPU."""
        return timestep_density(self.timesteps, self.snr_on_cpu, step)

    def draw(self, B, generator, step=0):
        """t (B,) long with density q, and 1 / (q T) (B,) float64, on the CPU.

        The draws are stratified: each of B equal shares of q gives one t, so that every batch has its share of
        every range of t; their order is random. In the official code the t of a batch are independent.
        Multiplied by 1 / (q T), the loss has the same expectation as under uniform t (importance sampling), and
        less variance if q is large at those t where w |gradient| is large. Without the factor, q acts as one
        more weight.
        """
        q = self.density(step)
        share = torch.randperm(B, generator=generator)
        place = torch.rand(B, generator=generator, dtype=torch.float64)      # within the share
        t = torch.searchsorted(q.cumsum(0), (share + place) / B, right=True)
        t = t.clamp(max=self.T - 1)              # rounding can leave the last sum below 1
        return t, 1 / (q[t] * self.T)

    def alpha_sigma(self, t, x):
        """alpha_t and sigma_t of each sample, (B,1,1,1), so that they multiply images; in x's dtype."""
        a2 = self.alphas_cumprod[t.to(self.alphas_cumprod.device)].view(-1, 1, 1, 1)
        sigma2 = 1 - a2
        return a2.sqrt().to(x), sigma2.sqrt().to(x)

    def q_sample(self, x0, t, noise):
        """x_t = alpha_t x0 + sigma_t eps (eq. 2)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def to_x0(self, output, x_t, t):
        """The x0 that a network output stands for: eq. 2 solved for x0, with v = alpha eps - sigma x0."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.target == "x0":
            return output
        if self.target == "eps":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def to_eps(self, output, x_t, t):
        """The eps that a network output stands for."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.target == "eps":
            return output
        if self.target == "x0":
            return (x_t - alpha * output) / sigma
        return sigma * x_t + alpha * output

    def loss(self, model, x0, t, noise, y=None):
        """Per-sample (loss, mse), each (B,) float32 (float64 for float64 images): loss = w_t mse, and mse is the
        unweighted squared error in the target's own space (eq. 4, 5; a mean over pixels, where the paper sums).
        mse / factor[t] is the x0-space error of figure 6, comparable across targets and weightings.
        """
        alpha, sigma = self.alpha_sigma(t, x0)
        output = model(self.q_sample(x0, t, noise), t, y)
        v = alpha * noise - sigma * x0
        target = {"x0": x0, "eps": noise, "v": v}[self.target]
        error = output.to(x0.dtype) - target                                 # out of autocast's bf16
        mse = error.square().flatten(1).mean(1)
        weight = self.weight[t.to(self.weight.device)].to(mse)
        return weight * mse, mse


# ----------------------------------------------------- sampler (appendix C.3: EDM's, Karras et al. 2022)
# From here on `sigma` is EDM's noise level, sigma_t / alpha_t = 1 / sqrt(SNR), and not the paper's sigma_t. The
# sampler works on x = x_t / alpha_t = x0 + sigma eps, where alpha_t = 1 / sqrt(1 + sigma^2).

def sampling_timesteps(diffusion, steps, rho=7):
    """The t of each sampling step, long, falling, at most `steps` of them.

    EDM eq. 5 spaces the noise levels sigma = 1 / sqrt(SNR) from min(80, highest) to max(0.002, lowest). Each
    is rounded to the nearest of the T levels that training saw, and repeats are dropped.
    """
    levels = diffusion.snr.rsqrt()                                           # (T,) rising in t
    ramp = torch.linspace(0, 1, steps, dtype=levels.dtype, device=levels.device)
    high = levels.max().clamp(max=80) ** (1 / rho)
    low = levels.min().clamp(min=0.002) ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.unique_consecutive((levels[:, None] - sigmas).abs().argmin(0))


def steps_run(diffusion, steps, solver="heun"):
    """-> how many of `steps` sampling steps are run, and how many evaluations of the network they take.

    Repeats are dropped (`sampling_timesteps`). Heun evaluates twice in every step but the last, the other solvers
    once. Under guidance one evaluation is one call, with both halves in its batch. A classifier is not counted.
    """
    run = len(sampling_timesteps(diffusion, steps))
    if solver == "heun":
        return run, 2 * run - 1
    return run, run


def guided_x0(model, diffusion, x_t, t, y, cfg, dtype):
    """x0 estimate (B,C,H,W) at one t: uncond + cfg (cond - uncond), both halves in one call of the network. At
    cfg 1 the unconditional half is not run.
    """
    if cfg != 1:
        x_t = torch.cat([x_t, x_t])
        y = torch.cat([y, torch.full_like(y, model.num_classes)])
    times = torch.full((len(x_t),), t, device=x_t.device)
    output = model(x_t.to(dtype), times, y).to(x_t.dtype)
    x0 = diffusion.to_x0(output, x_t, times)
    if cfg == 1:
        return x0
    cond, uncond = x0.chunk(2)
    return uncond + cfg * (cond - uncond)


def log_p_gradient(classifier, x_t, t, y):
    """Gradient of log p(y | x_t) by x_t, like x_t."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        logits = classifier(x_t, torch.full((len(x_t),), t, device=x_t.device))
        log_p = -F.cross_entropy(logits, y, reduction="sum")
        return torch.autograd.grad(log_p, x_t)[0]


@torch.no_grad()
def trajectory(model, diffusion, z, y=None, steps=30, cfg=1.0, interval=None, solver="heun", classifier=None,
               classifier_scale=1.0, clip=False):
    """Sample from unit normal z (B,C,H,W), labels y (B,) long: yields (t, x0 estimate (B,C,H,W) float64) of
    every step, the last of which is the sample; on mps it is float32. The network runs in z's dtype. A generator
    checks its arguments when the first value is asked for.

    solver: "heun" (EDM algorithm 1 without churn, 2 steps - 1 evaluations), "euler" (= DDIM) or "dpm++2m"
    (Lu et al. 2022, one evaluation a step, second order).
    cfg: scale of classifier-free guidance on all channels, 1 is purely conditional; the null label is
    model.num_classes. interval = (t_lo, t_hi), inclusive: guide only there (Kynkaanniemi et al. 2024).
    classifier: model(x_t, t) -> logits. It moves the x0 estimate by classifier_scale sigma_t^2 / alpha_t (the
    paper's sigma_t) times the gradient of log p(y | x_t) (Dhariwal & Nichol 2021; appendix D.1), within the
    interval too. clip: clamp x0 estimates to [-1, 1].
    """
    if solver not in SOLVERS or steps < 1:
        raise ValueError(f"found solver {solver!r}, steps {steps}, expected one of {SOLVERS}, at least 1")
    if (cfg != 1 or classifier) and y is None:
        raise ValueError("cfg, classifier: guidance needs class labels y")
    diffusion = copy.copy(diffusion).to(z.device)        # the caller's tables stay where they are
    ts = sampling_timesteps(diffusion, steps)
    sigmas = diffusion.snr[ts].rsqrt().tolist()
    ts = ts.tolist()

    def denoise(x, sigma, t):                                                # x = x_t / alpha_t
        x_t = x / math.sqrt(1 + sigma ** 2)
        guided = interval is None or interval[0] <= t <= interval[1]
        x0 = guided_x0(model, diffusion, x_t, t, y, cfg if guided else 1, z.dtype)
        if classifier and guided:
            shift = classifier_scale * sigma ** 2 / math.sqrt(1 + sigma ** 2)            # sigma_t^2 / alpha_t
            x0 = x0 + shift * log_p_gradient(classifier, x_t.to(z.dtype), t, y)
        return x0.clamp(-1, 1) if clip else x0

    x = (z.float() if z.is_mps else z.double()) * sigmas[0]
    previous = None
    for i, (t, sigma) in enumerate(zip(ts, sigmas)):
        x0 = denoise(x, sigma, t)
        yield t, x0
        if i + 1 == len(ts):                                                 # a step to sigma = 0 lands on x0
            return
        next_sigma = sigmas[i + 1]
        slope = (x - x0) / sigma                                             # dx / dsigma, EDM eq. 1 and 3
        if solver == "heun":
            ahead = x + (next_sigma - sigma) * slope
            slope_ahead = (ahead - denoise(ahead, next_sigma, ts[i + 1])) / next_sigma
            slope = (slope + slope_ahead) / 2
        if solver == "dpm++2m" and previous is not None:                     # second order: x0, half a step ahead
            r = math.log(sigmas[i - 1] / sigma) / math.log(sigma / next_sigma)           # last step over this
            slope = slope - (x0 - previous) / (2 * r * sigma)
        previous = x0
        x = x + (next_sigma - sigma) * slope


def sampler(*args, **how):
    """Takes what `trajectory` takes and returns its last x0 estimate (B,C,H,W), the sample: float64, on mps float32."""
    for _, x0 in trajectory(*args, **how):
        pass
    return x0
