"""Min-SNR diffusion in one file: schedule, prediction targets, loss weights, loss, sampler.

Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023; equation numbers are
that paper's unless said otherwise. Symbols: x0 clean image, x_t noisy image, t = 0 .. T-1 (the paper's
1 .. T), alpha_t and sigma_t with alpha^2 + sigma^2 = 1, alphas_cumprod = alpha^2, SNR = alpha^2 / sigma^2.
Tables are float64: on the cosine schedule the SNR runs from 2.4e4 down to 2.4e-9.
"""
import math

import torch
from torch.nn import functional as F

TARGETS = ("x0", "eps", "v")
SOLVERS = ("heun", "euler", "dpm++2m")


# -------------------------------------------------------------------------------- schedule (section 3.1)

def alphas_cumprod(schedule="cosine", T=1000):
    """alpha_t^2 for t = 0 .. T-1 as float64 (T,), strictly falling.

    "cosine": beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999) with f(s) = cos^2((s + .008) / 1.008 pi/2)
    (Nichol & Dhariwal 2021, eq. 17). "linear": betas from 1e-4 to 0.02, scaled by 1000 / T (Ho et al. 2020).
    Raises ValueError for another name and for a T so small that a beta of the linear schedule reaches 1.
    """
    if T < 1:
        raise ValueError(f"T: found {T}, expected at least 1")
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


# -------------------------------------------------------------------- loss weights (section 3.4, eq. 11)

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

    Every weighting is defined on the x0 loss and converted once, so that x0, eps and v trained under one
    name minimise the same objective (section 4.2, appendix B). At SNR = 0 (zero terminal SNR) the entry is
    the limit: for min_snr 0 (x0, v) and 1 (eps), where the official code writes 1 for all three.
    Raises ValueError for unknown names, gamma not in (0, inf), an SNR that is not finite and >= 0, and a
    combination without a finite limit at an SNR of 0 in the table: eps with const, max_snr, sqrt_snr or
    snr_plus_1.
    """
    snr = torch.as_tensor(snr, dtype=torch.float64)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: found {weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma: found {gamma}, expected a positive number")
    if not (torch.isfinite(snr) & (snr >= 0)).all():
        raise ValueError("snr: expected finite values >= 0")
    if target == "eps":
        snr = snr.clamp(min=1e-300)              # w(SNR) / SNR at 1e-300 is its limit at 0, or > 1e100
    weight = WEIGHTINGS[weighting](snr, gamma) / target_factor(snr, target)
    if (weight > 1e100).any():
        raise ValueError(f"weighting {weighting!r} has no finite limit at SNR = 0 for target {target!r}")
    return weight


# ----------------------------------------------------------------------------- density of t in training

DENSITIES = {  # name: q(t) up to a factor; its parameters and their defaults follow the step
    "uniform":       lambda t, lam, step: torch.ones_like(lam),                                 # the paper
    "clts":          lambda t, lam, step, mu=.3, target=5e4: curriculum(t, step, mu, target),
    "laplace":       lambda t, lam, step, mu=0., b=.5: (-(lam - mu).abs() / b).exp() * spacing(lam),
    "logit_normal":  lambda t, lam, step, m=0., s=1.: (-((lam / 2 + m) / s) ** 2 / 2).exp() * spacing(lam),
    "cosine_scaled": lambda t, lam, step, s=2.: spacing(lam) / torch.cosh(s * lam / 2),
}   # The last three are densities of lam = log SNR. laplace, cosine_scaled: Hang & Gu 2024, the latter the
#     cosine schedule itself for s = 1; logit_normal: Esser et al. 2024, whose t is sigma / (alpha + sigma).


def curriculum(t, step, mu, target):
    """(1 - gamma) U(t) + gamma N(t; mu T, T^2), gamma = min(1, step / target): eq. 6 and 7 of the curriculum
    paper, Wang et al. 2024, whose mu is in timesteps. N is cut at the ends: for mu = 0.3 its sum is 0.376,
    and at the end of the curriculum q T is between 0.83 (t = T - 1) and 1.06 (t = mu T).
    """
    if not 0 <= mu <= 1:
        raise ValueError
    T, gamma = len(t), min(1, step / target)
    normal = (-((t - mu * T) / T) ** 2 / 2).exp() / (T * math.sqrt(2 * math.pi))
    return (1 - gamma) / T + gamma * normal


def spacing(lam):
    """|d lam| between neighbouring t: turns a density of lam into one of t."""
    return torch.gradient(lam)[0].abs()


def timestep_density(timesteps, snr, step=0):
    """q(t), float64 (T,), sum 1, in a step of training. timesteps: a name of DENSITIES, or with parameters
    "clts:0.3:50000", "laplace:0:0.5". Raises ValueError for another name or parameters without a density.
    """
    name, *values = str(timesteps).split(":")
    if name not in DENSITIES:
        raise ValueError(f"timesteps: found {timesteps!r}, expected one of {', '.join(DENSITIES)}")
    try:
        values = [float(value) for value in values]                          # a place, then a width > 0
        if not all(map(math.isfinite, values)) or min(values[name != "cosine_scaled":], default=1) <= 0:
            raise ValueError
        t, lam = torch.arange(len(snr), dtype=torch.float64), snr.double().clamp(min=1e-300).log()
        q = DENSITIES[name](t, lam, step, *values)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError):     # too many, not a number, T = 1
        raise ValueError(f"timesteps: found {timesteps!r}, expected like laplace:0:0.5, or clts:0.3:50000, a "
                         "share of T and a step") from None
    if not (q.isfinite().all() and q.min() >= 0 and q.sum() > 0):
        raise ValueError(f"timesteps: found {timesteps!r}, which is no density")
    return q / q.sum()


# ------------------------------------------------------------------------------ forward process and loss

class Diffusion:
    """Schedule, target and weighting as float64 tables `.alphas_cumprod .snr .weight .factor`, each (T,).

    schedule: "cosine", "linear" or a (T,) tensor of alphas_cumprod; target: what the network predicts, "x0",
    "eps" or "v"; weighting and gamma: see `loss_weight`; timesteps: see `timestep_density`.
    Images are (B,C,H,W), t is (B,) long. Raises ValueError for values that it does not know.
    """

    def __init__(self, schedule="cosine", T=1000, target="x0", weighting="min_snr", gamma=5.0,
                 timesteps="uniform"):
        table = alphas_cumprod(schedule, T) if isinstance(schedule, str) else schedule.double()
        self.alphas_cumprod, self.T, self.target = table, len(table), target
        self.snr = table / (1 - table)                                       # SNR = alpha^2 / sigma^2
        self.weight = loss_weight(self.snr, weighting, target, gamma)
        self.factor = target_factor(self.snr, target)
        self.timesteps, self.cpu_snr = timesteps, self.snr.cpu()             # t is drawn where the data are
        self.density()                                                       # refuses what is no density

    def to(self, device):
        """Move the tables once, so that no step waits for a copy."""
        for name in ("alphas_cumprod", "snr", "weight", "factor"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def density(self, step=0):
        """q(t) of a step of training, float64 (T,), on the CPU."""
        return timestep_density(self.timesteps, self.cpu_snr, step)

    def draw(self, B, generator, step=0):
        """t (B,) long with density q, and 1 / (q T) (B,) float64, on the CPU. Stratified: t[i] is where the
        cumulative sum of q passes a uniform number in [i / B, (i + 1) / B), so that each batch has its share
        of every range of t; in the official code the t of a batch are independent.

        Times 1 / (q T), the loss is that of uniform t in expectation (importance sampling): to be wanted
        where q is larger where w |gradient| is, whose variance it lowers; t too rare to be drawn drop out of
        the objective. Without it q is part of the objective: q T w are the weights under uniform t.
        """
        q = self.density(step)
        u = (torch.arange(B) + torch.rand(B, generator=generator, dtype=torch.float64)) / B
        t = torch.searchsorted(q.cumsum(0), u, right=True).clamp(max=self.T - 1)
        return t, 1 / (q[t] * self.T)

    def alpha_sigma(self, t, x):
        """alpha_t and sigma_t, each (B,1,1,1) in x's dtype: one a sample, never broadcast over width."""
        a2 = self.alphas_cumprod.to(t.device)[t].view(-1, *[1] * (x.ndim - 1))
        return a2.sqrt().to(x.dtype), (1 - a2).sqrt().to(x.dtype)

    def q_sample(self, x0, t, noise):
        """x_t = alpha_t x0 + sigma_t eps (eq. 2)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def to_x0(self, output, x_t, t):
        """The x0 that a network output stands for: eq. 2 solved for x0, with v = alpha eps - sigma x0."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.target == "x0":
            return output
        return (x_t - sigma * output) / alpha if self.target == "eps" else alpha * x_t - sigma * output

    def to_eps(self, output, x_t, t):
        """The eps that a network output stands for."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.target == "eps":
            return output
        return (x_t - alpha * output) / sigma if self.target == "x0" else sigma * x_t + alpha * output

    def loss(self, model, x0, t, noise, y=None):
        """Per-sample (loss, mse), each (B,) float32 (float64 for float64 images): w_t * mse, and mse, the
        unweighted mean squared error in the target's own space (eq. 4, 5). mse / factor[t] is the x0-space
        error of figure 6, comparable across targets and weightings.
        """
        alpha, sigma = self.alpha_sigma(t, x0)
        output = model(self.q_sample(x0, t, noise), t, y)
        target = {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0}[self.target]
        mse = (output.to(x0.dtype) - target).square().flatten(1).mean(1)     # (B,), out of autocast's bf16
        return self.weight.to(t.device)[t].to(mse.dtype) * mse, mse


# ----------------------------------------------------- sampler (appendix C.3: EDM's, Karras et al. 2022)

def noise_levels(diffusion, steps, rho=7):
    """The t of each step, (<= steps,) long, falling: EDM eq. 5 from min(80, max) to max(0.002, min) in
    sigma = 1 / sqrt(SNR), each level rounded to the nearest of the T that training saw, repeats dropped.
    """
    levels = diffusion.snr.rsqrt()                                           # (T,) rising in t
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device=levels.device)
    high, low = levels.max().clamp(max=80) ** (1 / rho), levels.min().clamp(min=0.002) ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.unique_consecutive((levels[:, None] - sigmas).abs().argmin(0))


def log_p_gradient(classifier, x_t, t, y):
    """Gradient of log p(y | x_t) by x_t, like x_t."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        logits = classifier(x_t, torch.full((len(x_t),), t, device=x_t.device))
        return torch.autograd.grad(-F.cross_entropy(logits, y, reduction="sum"), x_t)[0]


@torch.no_grad()
def sampler(model, diffusion, z, y=None, steps=30, cfg=1.0, interval=None, solver="heun", classifier=None,
            classifier_scale=1.0):
    """Unit normal z (B,C,H,W) -> x0 estimate (B,C,H,W) float64; the network runs in z's dtype.

    solver: "heun" (EDM algorithm 1 without churn, 2 steps - 1 evaluations), "euler" (= DDIM) or "dpm++2m"
    (Lu et al. 2022, one evaluation a step, second order).
    cfg: classifier-free guidance, uncond + cfg (cond - uncond) on all channels, 1 is purely conditional; the
    null label is model.num_classes. interval=(t_lo, t_hi), inclusive: guide only there (Kynkaanniemi et al.
    2024); outside, as everywhere at cfg 1, the unconditional half is not run.
    classifier: model(x_t, t) -> logits; the x0 estimate is moved by classifier_scale sigma^2 / alpha times
    the gradient of log p(y | x_t) (Dhariwal & Nichol 2021; appendix D.1), within the interval too.
    """
    if solver not in SOLVERS or steps < 1:
        raise ValueError(f"found solver {solver!r}, steps {steps}, expected one of {SOLVERS}, >= 1")
    if (cfg != 1 or classifier) and y is None:
        raise ValueError("cfg, classifier: guidance needs class labels y")
    diffusion.to(z.device)
    null = torch.full_like(y, model.num_classes) if cfg != 1 else None
    ts = noise_levels(diffusion, steps)
    sigmas, ts = diffusion.snr[ts].rsqrt().tolist(), ts.tolist()             # the only wait for the device
    t_lo, t_hi = interval or (0, diffusion.T - 1)

    def denoise(x, sigma, t):                                                # x = x_t / alpha_t
        x_t, inside = x / math.sqrt(1 + sigma ** 2), t_lo <= t <= t_hi
        x0 = estimate(x_t, t, cfg != 1 and inside)
        if classifier and inside:                                            # sigma_t^2 / alpha_t
            shift = classifier_scale * sigma ** 2 / math.sqrt(1 + sigma ** 2)
            x0 = x0 + shift * log_p_gradient(classifier, x_t.to(z.dtype), t, y).double()
        return x0

    def estimate(x_t, t, guided):
        times = torch.full((len(x_t) * (1 + guided),), t, device=x_t.device)
        if not guided:
            return diffusion.to_x0(model(x_t.to(z.dtype), times, y).double(), x_t, times)
        output = model(torch.cat([x_t, x_t]).to(z.dtype), times, torch.cat([y, null])).double()
        cond, uncond = diffusion.to_x0(output, torch.cat([x_t, x_t]), times).chunk(2)
        return uncond + cfg * (cond - uncond)

    x, before = z.double() * sigmas[0], None
    for i, (sigma, t) in enumerate(zip(sigmas, ts)):
        x0 = denoise(x, sigma, t)
        if i + 1 == len(ts):
            return x0                                                        # a step to sigma = 0 lands on x0
        ratio = sigmas[i + 1] / sigma
        if solver == "heun":
            d = (x - x0) / sigma                                             # EDM eq. 3
            ahead = x + (sigmas[i + 1] - sigma) * d
            d_ahead = (ahead - denoise(ahead, sigmas[i + 1], ts[i + 1])) / sigmas[i + 1]
            x = x + (sigmas[i + 1] - sigma) * (d + d_ahead) / 2
            continue
        if solver == "dpm++2m" and before is not None:                       # extrapolate x0 in log sigma
            r = math.log(sigmas[i - 1] / sigma) / math.log(1 / ratio)
            before, x0 = x0, x0 + (x0 - before) / (2 * r)
        else:
            before = x0
        x = ratio * x + (1 - ratio) * x0
