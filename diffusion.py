"""Min-SNR diffusion in one file: schedule, prediction targets, loss weights, loss, sampler.

Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023. Equation numbers are
that paper's unless another is named.

Symbols: x0 is the clean image, eps is unit normal noise, and x_t = alpha_t x0 + sigma_t eps is the noisy image,
where alpha_t^2 + sigma_t^2 = 1. The timestep t is 0 .. T-1, in the paper 1 .. T. The signal-to-noise ratio is
SNR = alpha_t^2 / sigma_t^2; with the cosine schedule it falls from 2.4e4 to 2.4e-9. Tables over t are float64,
because 1 - alpha_t^2 is 4e-5 at t = 0, where float32 would leave it three digits.
"""
import copy
import math

import torch
from torch.nn import functional as F

TARGETS = ("x0", "eps", "v")
SOLVERS = ("heun", "euler", "dpm++2m")


# -------------------------------------------------------------------------------- schedule (section 3.1)

def alphas_cumprod(schedule="cosine", T=1000):
    """alpha_t^2 for t = 0 .. T-1, float64 (T,), strictly falling.

    It is the cumulative product of 1 - beta_t, and beta_t is the share of alpha^2 that step t takes away. The
    name is that of Ho et al., who write alpha_t for 1 - beta_t.
    "cosine": beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999) with f(s) = cos^2((s + .008) / 1.008 pi/2)
    (Nichol & Dhariwal 2021, eq. 17). "linear": betas from 1e-4 to 0.02, scaled by 1000 / T (Ho et al. 2020).
    Raises ValueError for another name, and for a T so small that a beta of the linear schedule reaches 1.
    """
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
    "p2":           lambda snr, gamma: snr / (1 + snr),                    # Choi et al. 2022: their k = gamma = 1
    "sqrt_snr":     lambda snr, gamma: snr.sqrt(),                         # "debiased", Yu et al. 2023
    "snr_plus_1":   lambda snr, gamma: snr + 1,                            # = the plain v loss
}


def target_factor(snr, target):
    """(|target - prediction| / |x0 - predicted x0|)^2, the same for every guess (appendix B). Same shape as snr.
    Raises ValueError for another target.
    """
    if target not in TARGETS:
        raise ValueError(f"target: found {target!r}, expected one of {', '.join(TARGETS)}")
    return {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[target]


def loss_weight(snr, weighting, target, gamma=5.0):
    """The factor that the mean squared error of the target gets in the loss: float64, same shape as snr.

    weighting: a name of WEIGHTINGS, or a table of weights of snr's shape. It is always a weight on the x0 loss, and
    is converted to the target here. So x0, eps and v trained under one name minimise the same objective (section
    4.2, appendix B). At SNR = 0 the weight is its limit: for min_snr 0 (x0, v) or 1 (eps), where the official
    code has 1 for all three. Raises ValueError for unknown names, for a gamma that is not positive and finite,
    and where a weight is not a finite number: under eps at SNR = 0 with const, max_snr, sqrt_snr, snr_plus_1 or a
    table that is not 0 there, and with several at an infinite SNR.
    """
    snr = torch.as_tensor(snr, dtype=torch.float64)
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma: found {gamma}, expected a positive finite number")
    if target == "eps":
        # The weight is w(SNR) / SNR, at SNR = 0 often 0 / 0. An SNR of 1e-300 gives its limit there, or more than
        # 1e100 if the limit is infinite, which is refused below.
        snr = snr.clamp(min=1e-300)
    if not isinstance(weighting, str):
        w = torch.as_tensor(weighting, dtype=snr.dtype, device=snr.device)
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
# Each function returns the density q(t) up to a factor, float64 (T,). t is 0 .. T-1 and lam is log SNR, both
# float64 (T,), and step is the step of training. The arguments after these are the density's parameters.

def uniform(t, lam, step):
    """The paper's: every t is equally likely."""
    return torch.ones_like(lam)


def curriculum(t, lam, step, mu=0.3, target_step=5e4):
    """"clts", curriculum learning of timesteps: from uniform to normal during training (Wang et al. 2024, eq. 6, 7).

    q = (1 - progress) U(t) + progress N(t; mu T, T^2), where progress = min(1, step / target_step). The paper writes
    mu for mu T, gamma for progress, and no min. Most of N lies outside 0 .. T: for mu = 0.3 only 0.376 of it is
    inside. As the mixture is normalised, not N alone, N's part of the draws is below progress until progress is 1.
    Even then q is not far from uniform: for mu = 0.3, q T is between 0.83 (t = T - 1) and 1.06 (t = mu T).
    """
    if not 0 <= mu <= 1:
        raise ValueError("the first number is a share of T, from 0 to 1")
    if not target_step > 0:
        raise ValueError("the second number is a step, above 0")
    progress = min(1, step / target_step)
    normal = (-(t / len(t) - mu) ** 2 / 2).exp() / math.sqrt(2 * math.pi)    # N(t) T, as U(t) T is 1
    return (1 - progress) + progress * normal


def spacing(lam):
    """|d lam| between neighbouring t: turns a density of lam into a density of t."""
    return torch.gradient(lam)[0].abs()


def laplace(t, lam, step, mu=0.0, b=0.5):
    """lam has a Laplace density with centre mu and width b (Hang & Gu 2024)."""
    if not b > 0:
        raise ValueError("the second number is a width, above 0")
    return (-(lam - mu).abs() / b).exp() * spacing(lam)


def logit_normal(t, lam, step, m=0.0, s=1.0):
    """log(sigma_t / alpha_t) = -lam / 2 is normal, with mean m and standard deviation s (Esser et al. 2024). It is
    the logit of their t, which is sigma_t / (alpha_t + sigma_t).
    """
    if not s > 0:
        raise ValueError("the second number is a width, above 0")
    return (-((lam / 2 + m) / s) ** 2 / 2).exp() * spacing(lam)


def cosine_scaled(t, lam, step, s=2.0):
    """lam has a density proportional to 1 / cosh(s lam / 2) (Hang & Gu 2024). At s = 1 it is that of the cosine
    schedule under uniform t.
    """
    return spacing(lam) / torch.cosh(s * lam / 2)


DENSITIES = {"uniform": uniform, "clts": curriculum, "laplace": laplace, "logit_normal": logit_normal,
             "cosine_scaled": cosine_scaled}


def timestep_density(timesteps, snr, step=0):
    """q(t) in a step of training, float64 (T,), sum 1.

    timesteps: a name of DENSITIES, then, after colons, that function's parameters in order: "clts:0.3:50000",
    "laplace:0:0.5". snr: float64 (T,). Raises ValueError for another name, for parameters that the function
    refuses, and where q is not a density.
    """
    name, *texts = timesteps.split(":")
    if name not in DENSITIES:
        raise ValueError(f"timesteps: found {timesteps!r}, expected one of {', '.join(DENSITIES)}")
    t = torch.arange(len(snr), dtype=torch.float64)
    lam = snr.clamp(min=1e-300).log()                                        # SNR may be 0
    try:
        parameters = [float(text) for text in texts]
        q = DENSITIES[name](t, lam, step, *parameters)
    except TypeError:
        raise ValueError(f"timesteps: found {timesteps!r}, more numbers than {name} has parameters") from None
    except ValueError as error:
        raise ValueError(f"timesteps: found {timesteps!r}, expected a density such as laplace:0:0.5 or "
                         f"clts:0.3:50000 ({error})") from None
    q = q / q.sum()
    if not q.min() >= 0:                                                     # nan, or below 0
        raise ValueError(f"timesteps: found {timesteps!r}, which gives no density over t")
    return q


# ------------------------------------------------------------------------------ forward process and loss

class Diffusion:
    """Schedule, target and weighting as tables over t, and what training computes with them.

    schedule: "cosine", "linear" or a (T,) tensor of alphas_cumprod. target: what the network predicts, "x0",
    "eps" or "v". weighting and gamma: see `loss_weight`. timesteps: see `timestep_density`. The tables are
    `.alphas_cumprod`, `.snr`, `.weight` (`loss_weight`) and `.factor` (`target_factor`), each float64 (T,).
    Images are (B,C,H,W), t is (B,) long. Raises ValueError for values that it does not know.
    """

    def __init__(self, schedule="cosine", T=1000, target="x0", weighting="min_snr", gamma=5.0,
                 timesteps="uniform"):
        alpha2 = alphas_cumprod(schedule, T) if isinstance(schedule, str) else schedule.double()
        self.alphas_cumprod = alpha2
        self.T = len(alpha2)
        self.target = target
        self.snr = alpha2 / (1 - alpha2)
        self.snr_on_cpu = self.snr               # for `draw`, whose threads must not wait for a GPU
        self.weight = loss_weight(self.snr, weighting, target, gamma)
        self.factor = target_factor(self.snr, target)
        self.timesteps = timesteps
        self.density()                           # raises its ValueError here, not in the first step

    def to(self, device):
        """Move the tables, so that no step waits for a copy. But mps, a Mac's GPU, has no float64. There the tables
        stay where they are, and the entries of a batch are moved in the images' dtype.
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

        The draws are stratified: q is cut into B equal shares and each gives one t, in random order. So every
        batch has its share of every range of t. In the official code the t of a batch are independent.
        A loss times 1 / (q T) has the same expectation as under uniform t (importance sampling), and so has its
        gradient. For independent t, the gradient's variance is lowest if q is proportional to the root mean square
        of the weighted gradient at t. Without this factor q acts as one more weight.
        """
        q = self.density(step)
        share = torch.randperm(B, generator=generator)
        place = torch.rand(B, generator=generator, dtype=torch.float64)      # within the share
        quantile = (share + place) / B
        t = torch.searchsorted(q.cumsum(0), quantile, right=True)            # inverse of the distribution function
        t = t.clamp(max=self.T - 1)              # rounding can leave the last sum below 1
        return t, 1 / (q[t] * self.T)

    def alpha_sigma(self, t, x):
        """alpha_t and sigma_t of each sample, (B,1,1,1) to multiply images, in x's dtype and on its device."""
        alpha2 = self.alphas_cumprod[t.to(self.alphas_cumprod.device)].view(-1, 1, 1, 1)
        sigma2 = 1 - alpha2
        return alpha2.sqrt().to(x), sigma2.sqrt().to(x)

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
        """-> (loss, mse) of each sample, both (B,), in the images' dtype (eq. 4, 5).

        mse is the squared error of the target, averaged over pixels; the paper takes the sum. loss is mse times the
        weight at t. mse / self.factor[t] is the squared error of x0 (figure 6). It can be compared across targets
        and weightings.
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
# The sampler works on x = x_t / alpha_t = x0 + sigma eps. From here on `sigma` is this noise level, EDM's, and not
# the paper's sigma_t: sigma = sigma_t / alpha_t = 1 / sqrt(SNR), and so alpha_t = 1 / sqrt(1 + sigma^2).

def sampling_timesteps(diffusion, steps, rho=7):
    """The t of each sampling step, long, falling, at most `steps` of them.

    The noise levels sigma fall from 80 to 0.002 with equal steps in sigma^(1 / rho) (EDM eq. 5). A schedule that
    ends before 80 or 0.002 gives its own end: the lowest level is 0.0064 with "cosine", 0.01 with "linear". Each
    level is rounded to the nearest of the T that training saw, and repeats are dropped.
    """
    levels = diffusion.snr.rsqrt()                                           # (T,) rising in t
    ramp = torch.linspace(0, 1, steps, dtype=levels.dtype, device=levels.device)
    high = levels.max().clamp(max=80) ** (1 / rho)
    low = levels.min().clamp(min=0.002) ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    nearest = (levels[:, None] - sigmas).abs().argmin(0)                     # (steps,)
    return torch.unique_consecutive(nearest)


def steps_run(diffusion, steps, solver="heun"):
    """-> how many of `steps` sampling steps are run, and how many evaluations of the network they take.

    `sampling_timesteps` drops repeats. Heun evaluates twice in every step but the last, the other solvers once.
    Under guidance an evaluation is still one call, with both halves in its batch. A classifier is not counted.
    """
    run = len(sampling_timesteps(diffusion, steps))
    if solver == "heun":
        return run, 2 * run - 1
    return run, run


def guided_x0(model, diffusion, x_t, t, y, cfg, dtype):
    """Classifier-free guidance: the x0 estimate (B,C,H,W) uncond + cfg (cond - uncond) at one t, a number.

    cond is the estimate with the labels y, uncond the one with the null label, model.num_classes. Both come from one
    call of the network, in dtype. At cfg 1 only cond is needed, and only that is run.
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
    """The gradient of log p(y | x_t) with respect to x_t, in x_t's shape."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        logits = classifier(x_t, torch.full((len(x_t),), t, device=x_t.device))
        log_p = -F.cross_entropy(logits, y, reduction="sum")
        return torch.autograd.grad(log_p, x_t)[0]


@torch.no_grad()
def trajectory(model, diffusion, z, y=None, steps=30, cfg=1.0, interval=None, solver="heun", classifier=None,
               classifier_scale=1.0, clip=False):
    """Sample from unit normal z (B,C,H,W) with labels y (B,) long: yields t and the x0 estimate (B,C,H,W) of every
    step. The last estimate is the sample. Estimates are float64, on mps float32; the network runs in z's dtype.

    steps: see `sampling_timesteps`. solver: "heun" (EDM algorithm 1 without churn), "euler" (= DDIM) or "dpm++2m"
    (Lu et al. 2022: second order, as Heun is, with one evaluation of the network a step). cfg: scale of guidance
    without a classifier, see `guided_x0`. interval = (t_lo, t_hi), inclusive: guide only there (Kynkaanniemi et al.
    2024). classifier: model(x_t, t) -> logits. It moves the x0 estimate by classifier_scale times sigma_t^2 /
    alpha_t (the paper's sigma_t) times the gradient of log p(y | x_t) (Dhariwal & Nichol 2021; appendix D.1). clip:
    clamp x0 estimates to [-1, 1]. Raises ValueError, at the first estimate, for arguments that make no sense.
    """
    if solver not in SOLVERS or steps < 1:
        raise ValueError(f"found solver {solver!r}, steps {steps}, expected one of {SOLVERS}, at least 1")
    if (cfg != 1 or classifier) and y is None:
        raise ValueError("cfg, classifier: guidance needs class labels y")
    diffusion = copy.copy(diffusion).to(z.device)        # the caller's tables stay where they are
    ts = sampling_timesteps(diffusion, steps)
    sigmas = diffusion.snr[ts].rsqrt().tolist()
    ts = ts.tolist()

    def denoise(x, sigma, t):
        inverse_alpha = math.sqrt(1 + sigma ** 2)
        x_t = x / inverse_alpha
        guided = interval is None or interval[0] <= t <= interval[1]
        x0 = guided_x0(model, diffusion, x_t, t, y, cfg if guided else 1, z.dtype)
        if classifier and guided:
            shift = classifier_scale * sigma ** 2 / inverse_alpha            # sigma_t^2 / alpha_t
            x0 = x0 + shift * log_p_gradient(classifier, x_t.to(z.dtype), t, y)
        return x0.clamp(-1, 1) if clip else x0

    x = (z.float() if z.is_mps else z.double()) * sigmas[0]                  # mps has no float64
    previous = None
    for i, (t, sigma) in enumerate(zip(ts, sigmas)):
        x0 = denoise(x, sigma, t)
        yield t, x0
        if i + 1 == len(ts):                                                 # the step to sigma = 0 ends at x0
            return
        next_sigma = sigmas[i + 1]
        slope = (x - x0) / sigma                                             # dx / dsigma, EDM eq. 1 and 3
        if solver == "heun":
            ahead = x + (next_sigma - sigma) * slope
            slope_ahead = (ahead - denoise(ahead, next_sigma, ts[i + 1])) / next_sigma
            slope = (slope + slope_ahead) / 2
        if solver == "dpm++2m" and previous is not None:
            # The slope now uses x0 + (x0 - previous) / (2 ratio): x0 extrapolated in log sigma to this step's middle.
            ratio = math.log(sigmas[i - 1] / sigma) / math.log(sigma / next_sigma)       # last step / this step
            slope = slope - (x0 - previous) / (2 * ratio * sigma)
        previous = x0
        x = x + (next_sigma - sigma) * slope


def sampler(*args, **how):
    """The sample (B,C,H,W), the last estimate of `trajectory`, which takes the same arguments."""
    for _, x0 in trajectory(*args, **how):
        pass
    return x0
