"""How stable is diffusion training, beside a GAN's? The curriculum-timesteps paper's measurements.

    python stability.py miniature                              # trains 5 diffusion models, 3 GANs; draws all
    python stability.py consistency --ckpt out/a --ckpt out/b  # the same noise through several models
    python stability.py interpolate --ckpt A.pt --ckpt B.pt    # the loss on the line between two checkpoints
    python stability.py hessian --ckpt out/a                   # eigenvalues of the loss's Hessian
    python stability.py gan --out out/gan                      # the DCGAN to compare with; again: goes on
    python stability.py densities                              # 18 runs: how soon with which density of t

Wang et al., "Analyzing Stability in Diffusion Model Training", 2024; equation numbers are that paper's. Where
it is silent: images are drawn from the EMA weights; losses are those of training, with all labels and under
uniform t, around the weights that the optimizer holds; of a GAN's two networks one moves at a time, and the
kinks of its ReLUs have no part in the Hessian.
"""
import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model_unet
from data import Packed, built_in, generator, tile
from diffusion import TARGETS, Diffusion
from files import BadInput, Parser, progress, read, replace, run
from pareto import (FOUR, band, bring_up, canvas, check, claim, draw_bin, load, look, plot_runs, read_runs,
                    save, short_run, timed, train_to)
from sample import draw, find_vae, load_checkpoint, start, to_uint8

BATCH = 64                               # samples at a time: a GAN's step, a part of the samples of a loss
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------- consistency (eq. 1, table 1) and interpolation (eq. 2, figure 3)

def psnr(a, b):
    """10 log10(255^2 / MSE), dB, of images (...,C,H,W): uint8, or floats in [-1, 1], made bytes first. Equal
    images get what one byte off by 1 would, the largest finite value, so that means stay finite.
    """
    a, b = (x if x.dtype == torch.uint8 else to_uint8(x) for x in (a, b))
    error = (a.double() - b.double()).square().flatten(-3).sum(-1).clamp(min=1)
    return 10 * torch.log10(255 ** 2 * math.prod(a.shape[-3:]) / error)


def consistency(images):
    """C(q) = 1/M sum_i 1/(N-1) sum_{j>=2} PSNR(q_i1, q_ij), dB (eq. 1), of images (N models,M,C,H,W)."""
    return float(psnr(images[:1], images[1:]).mean())


def interpolate(model_a, model_b, alpha):
    """A copy of model_b with theta = alpha theta_a + (1 - alpha) theta_b (eq. 2)."""
    mixed = copy.deepcopy(model_b)
    with torch.no_grad():
        for p, a, b in zip(mixed.parameters(), model_a.parameters(), model_b.parameters()):
            p.copy_(alpha * a + (1 - alpha) * b)
    return mixed


def roughness(curve):
    """Total variation / (highest - lowest) of a curve (N,): 1 if it only rises or falls, more with each turn.
    Blind to the loss's scale, so that two losses compare; the paper shows jitter and gives no number.
    """
    extent = np.ptp(curve)
    return float(np.abs(np.diff(curve)).sum() / extent) if extent else 1.0


# ------------------------------------------------------------------------------ Hessian spectrum (figure 4)

@torch.no_grad()
def mean_loss(module, loss, parts):
    """Mean over the samples of all parts, where loss(module, part) is the mean over one's."""
    n = sum(len(part[0]) for part in parts)
    return sum(len(part[0]) / n * float(loss(module, part)) for part in parts)


def hvp(module, loss, parts, v):
    """H v (P,), H the Hessian of mean_loss by the module's parameters: grad <grad, v> (Pearlmutter 1994)."""
    params, n, total = list(module.parameters()), sum(len(part[0]) for part in parts), torch.zeros_like(v)

    def gradient(value, **how):
        grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True, **how)
        return torch.cat([grad.flatten() for grad in grads])

    with sdpa_kernel(SDPBackend.MATH):                                       # the fused have one derivative
        for part in parts:
            total += len(part[0]) / n * gradient(gradient(loss(module, part), create_graph=True) @ v)
    return total


def lanczos(product, v, k):
    """Ritz values, weights, residuals, each (<= k,) float64, of a symmetric H given as product(v) = H v: k
    steps from v, each vector made orthogonal to all before it, twice, in k P numbers of memory. An eigenvalue
    of H is within residual_i of value_i; sum_i weight_i f(value_i) = <v, f(H) v> / <v, v>, for polynomials
    of degree < 2 k exactly (Golub & Welsch 1969).
    """
    Q, w, alpha, beta = v.new_empty(min(k, len(v)), len(v)), v, [], []
    for j in range(len(Q)):
        Q[j] = w / w.norm()
        Hq = w = product(Q[j])
        alpha.append(float(Hq.double() @ Q[j].double()))
        for _ in range(2):
            w = w - (Q[:j + 1] @ w) @ Q[:j + 1]
        beta.append(float(w.norm()))
        if beta[-1] <= 10 * torch.finfo(v.dtype).eps * float(Hq.norm()):     # nothing new in it
            break
    values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    return values, vectors[0] ** 2, beta[-1] * np.abs(vectors[-1])


def spectrum(module, loss, parts, k, probes, seed=0):
    """lanczos() of the Hessian of mean_loss from so many vectors of random signs, which the seed draws."""
    weight, P = next(module.parameters()), sum(p.numel() for p in module.parameters())
    signs = (torch.randint(2, (P,), generator=generator("probe", seed, r)) * 2 - 1 for r in range(probes))
    return [lanczos(lambda v: hvp(module, loss, parts, v), v.to(weight), k) for v in signs]


def moments(found):
    """Mean trace(H) / P and variance of the eigenvalues, from <v, H v> and |H v|^2 of a spectrum's probes
    (Hutchinson 1990), whose quadratures of x and x^2 they are.
    """
    first, second = (np.mean([w @ x ** power for x, w, _ in found]) for power in (1, 2))
    return float(first), float(second - first ** 2)


def density(found, x, width):
    """(N,) at x (N,): density of the eigenvalues by stochastic Lanczos quadrature (Ghorbani et al. 2019), the
    mean over the probes of sum_i weight_i N(x; value_i, width^2).
    """
    bells = [np.exp(-((x[:, None] - values) / width) ** 2 / 2) @ weights for values, weights, _ in found]
    return np.mean(bells, 0) / (width * math.sqrt(2 * math.pi))


# -------------------------------------------------------------------- DCGAN (Radford, Metz & Chintala 2015)

class DCGAN(nn.Module):
    """.generator: z (B,100,1,1) -> images (B,3,S,S) in [-1, 1]; .discriminator: images -> logits (B,1,1,1).
    S = 4 * 2^n is reached by n strided layers, 64, 128, ... wide from the image on; BadInput for another S.
    """

    def __init__(self, size):
        super().__init__()
        n = size.bit_length() - 3
        if n < 1 or size != 4 * 2 ** n:
            raise BadInput(f"size: found {size}, a DCGAN's is 8, 16, 32, ...")
        wide = [64 * 2 ** i for i in range(n)]
        down = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]                # (B,64,S/2,S/2)
        up = [nn.ConvTranspose2d(100, wide[-1], 4, bias=False)]              # (B,_,4,4)
        for a, b in zip(wide, wide[1:]):
            down += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        for a, b in zip(wide[:0:-1], wide[-2::-1]):
            up += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
        up += [nn.BatchNorm2d(64), nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh()]
        self.generator = nn.Sequential(*up)
        self.discriminator = nn.Sequential(*down, nn.Conv2d(wide[-1], 1, 4))
        for name, p in self.named_parameters():                              # norms: N(1, .02), or N(0, .02)
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, p.ndim == 1, 0.02)


def generator_loss(D, fake):             # -log D(G(z)), which does not saturate (Goodfellow et al. 2014)
    return F.softplus(-D(fake)).mean()


def discriminator_loss(D, real, fake):   # -log D(x) - log(1 - D(G(z))), each batch with its own statistics
    return F.softplus(-D(real)).mean() + F.softplus(D(fake)).mean()


def gan_data(dir, size):
    """The packed folder, or the built-in images where it is None. Raises BadInput for another shape."""
    data = Packed(dir) if dir else built_in(size)
    if (data.channels, data.size) != (3, size):
        raise BadInput(f"{dir}: found channels, side {data.channels, data.size}, expected {3, size} (--size)")
    return data


def gan_batch(data, purpose, seed, k, n=BATCH):
    """Images (n,3,S,S) and z (n,100,1,1); they depend on (purpose, seed, k, n) alone."""
    g = generator(purpose, seed, k)
    x = data.batch(torch.randint(len(data), (n,), generator=g).numpy(), g)[0]
    return x.to(DEVICE), torch.randn(n, 100, 1, 1, generator=g).to(DEVICE)


def gan(args):
    """Train a DCGAN in --out, or go on with what was begun there: ckpt.pt, and early.pt of a tenth."""
    out, steps, data = Path(args.out), args.steps or 1800, gan_data(args.data, args.size)
    config = dict(model="dcgan", data=args.data, size=args.size, seed=args.seed, steps=steps)
    torch.manual_seed(args.seed)
    state = read(out / "ckpt.pt") if (out / "ckpt.pt").exists() else dict(config=config, step=0)
    if state.get("config") != config:
        old = state["config"] if isinstance(state.get("config"), dict) else {}
        raise BadInput(f"--out {out}: holds another run, " + ", ".join(
            f"{key} {old.get(key)} for {value}" for key, value in config.items() if old.get(key) != value))
    first, since, every = state.get("step"), time.monotonic(), max(1, steps // 10)
    model = open_model(out)[0] if first else DCGAN(args.size).to(DEVICE)
    adam = [torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999))
            for network in (model.train().discriminator, model.generator)]
    try:
        for optimizer, saved in zip(adam, state["optimizer"] if first != 0 else [], strict=first != 0):
            optimizer.load_state_dict(saved)
        if not 0 <= first <= steps:
            raise ValueError(f"step {first}")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{out / 'ckpt.pt'}: damaged ({' '.join(str(error).split())[:200]})") from None
    out.mkdir(parents=True, exist_ok=True)
    for step in range(first, steps):
        x, z = gan_batch(data, "gan", args.seed, step)
        fake = model.generator(z)
        losses = (discriminator_loss, (x, fake.detach())), (generator_loss, (fake,))
        for optimizer, (loss, images) in zip(adam, losses):
            optimizer.zero_grad()
            loss(model.discriminator, *images).backward()
            optimizer.step()
        if (done := step + 1) % every == 0 or done == steps:
            state = dict(model=model.state_dict(), optimizer=[optimizer.state_dict() for optimizer in adam],
                         step=done, config=config)
            for name in ["early.pt"] * (done == every) + ["ckpt.pt"]:
                replace(out / name, lambda f: torch.save(state, f))
            progress(f"{out.name}: steps", done, steps, since, first)


# --------------------------------------------------------------------------- checkpoints: images and losses

def open_model(path, target=None, raw=False):
    """-> (DCGAN or diffusion model on the device, config) of a checkpoint; EMA weights unless raw."""
    state = read(path)
    config = state.get("config")
    if isinstance(config, dict) and config.get("model") == "dcgan":
        try:
            model = model_unet.load(lambda: DCGAN(config["size"]), state["model"], "a DCGAN")
        except Exception as error:                                           # whatever damage raises
            raise BadInput(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from None
    else:
        model, config = load_checkpoint(path, raw, target)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise BadInput(f"{path}: its weights are not finite; expected a run that has not diverged")
    return model.to(DEVICE).eval(), {**config, "weight": state.get("weight")}


@torch.no_grad()
def pictures(path, args):
    """uint8 (count,3,S,S), without guidance: image k begins with the same noise wherever that has the same
    shape, and has the same label wherever the classes are as many.
    """
    (model, config), ks = open_model(path, args.target), range(args.count)
    if isinstance(model, DCGAN):
        z = [start(args.seed, k, [0], dict(num_classes=0, in_channels=100, img_size=1))[1] for k in ks]
        return to_uint8(model.generator(torch.stack(z).to(DEVICE))).cpu()
    how = dict(seed=args.seed, vae=find_vae(config, DEVICE, args.vae), steps=args.heun)
    return torch.cat([draw(model, config, ks[i:i + BATCH], **how) for i in range(0, len(ks), BATCH)])


def landscape(path, args):
    """-> (what was trained, {name: (network that moves, loss, parts)}), each loss on n fixed samples. Of a
    diffusion model it is the weighted loss of its training, at some t and over all. A DCGAN's batch norms
    take the statistics of a part, as in training: the running averages are those of weights it has left.
    """
    model, config = open_model(path, args.target, raw=True)
    if isinstance(model, DCGAN):
        G, D = model.train().generator, model.discriminator
        data = gan_data(args.data or config["data"], config["size"])
        for module in model.modules():
            module.momentum = 0.0                                            # the running averages stay
        sizes = [min(BATCH, args.n - i) for i in range(0, args.n, BATCH)]
        parts = [gan_batch(data, "landscape", args.seed, i, n) for i, n in enumerate(sizes)]
        with torch.no_grad():
            pairs = [(x, G(z)) for x, z in parts]
        return "DCGAN", {"generator": (G, lambda G, part: generator_loss(D, G(part[1])), parts),
                         "discriminator": (D, lambda D, part: discriminator_loss(D, *part), pairs)}
    _, diffusion, data = load(path, args)                                    # checks what belongs together
    T, what = diffusion.T, [config.get("weighting", "min_snr"), config.get("gamma", 5.0)]
    try:
        diffusion.weight = config["weight"] if what[0] == "ugd" else \
            Diffusion(config["schedule"], T, config["target"], *what).weight
        if diffusion.weight.shape != (T,) or not diffusion.weight.isfinite().all():
            raise ValueError("weights of the loss")
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: damaged ({error})") from None
    if args.t and max(args.t) >= T:
        raise BadInput(f"--t: found {args.t}, {path} has t = 0 .. {T - 1}")
    bins = {f"t = {t}": (T, t) for t in args.t or sorted({T // 10, T // 2, 9 * T // 10})} | {"all t": (1, 0)}
    loss, losses = lambda model, part: diffusion.loss(model, *part)[0].mean(), {}
    for name, (K, k) in bins.items():
        parts = draw_bin(data, T, K, k, args.n, args.seed)
        losses[name] = model, loss, [[x.to(DEVICE) for x in part] for part in parts]
    return [config["target"], *what, config["schedule"], T], losses


# ------------------------------------------------------- panels of the figures: a group of checkpoints each

def draw_consistency(ax, title, paths, args):
    """A row of images for each model, their PSNR to the first model's, eq. 1 above. -> rows of the CSV."""
    images = [pictures(path, args) for path in paths]
    for path, x in zip(paths, images):
        if x.shape != images[0].shape:
            raise BadInput(f"{path}: draws {tuple(x.shape[1:])}, {paths[0]} {tuple(images[0].shape[1:])}")
    q = torch.stack(images)                                                  # (N,M,3,S,S)
    values, S, shown = psnr(q[:1], q), q.shape[-1], min(args.count, 12)
    other = consistency(torch.cat([q[:1], q[1:].roll(1, 1)]))                # what all images share
    text = f"{title}: consistency {consistency(q):.2f} dB; with other images {other:.2f} dB"
    print(text, flush=True)
    ax.imshow(tile(q[:, :shown].flatten(0, 1).numpy(), shown))
    ax.set(title=text, xticks=[], yticks=[(j + 0.5) * S for j in range(len(paths))])
    ax.set_yticklabels([Path(path).parent.name or path for path in paths])
    ax.grid(False)
    pairs = [(j, i) for j in range(1, len(paths)) for i in range(args.count)]
    for j, i in pairs:
        if i < shown:
            ax.text((i + 0.05) * S, (j + 0.93) * S, f"{values[j, i]:.0f}", size=6, color="white",
                    bbox=dict(facecolor="black", pad=0.5, linewidth=0))
    return [(title, paths[j], i, float(values[j, i])) for j, i in pairs]


def draw_interpolate(ax, title, paths, args):
    """Each loss from checkpoint B (alpha = 0) to A (alpha = 1) of each pair A, B. The samples, and of a GAN
    the network that does not move, are B's. -> rows of the CSV.
    """
    curves, rows = {}, []
    for path_a, path_b in zip(paths[::2], paths[1::2]):
        (what_a, A), (what_b, B) = landscape(path_a, args), landscape(path_b, args)
        shapes = [[p.shape for module, *_ in X.values() for p in module.parameters()] for X in (A, B)]
        if what_a != what_b or shapes[0] != shapes[1]:
            raise BadInput(f"{path_a}, {path_b}: found {what_a} and {what_b}, or networks of other shapes; "
                           "expected two checkpoints of one kind")
        for name, (b, loss, parts) in B.items():
            alphas = np.linspace(0, 1, args.points)
            curve = [mean_loss(interpolate(A[name][0], b, alpha), loss, parts) for alpha in alphas]
            curves.setdefault(name, []).append(curve)
            rows += [(title, path_a, path_b, name, *map(float, point)) for point in zip(alphas, curve)]
            print(f"{path_a} {name:14s} roughness {roughness(curve):.3f}", flush=True)
    for i, (name, found) in enumerate(curves.items()):
        band(ax, alphas, np.array(found), i, name)
    ax.set(xlabel="alpha: 0 = B (late), 1 = A (early)", ylabel="loss", title=title, yscale="log")
    ax.legend()
    return rows


def draw_hessian(ax, title, paths, args):
    """Density of the eigenvalues of each loss, the mean over the checkpoints. -> rows of the CSV, whose last
    number is the plain variance of the Ritz values: the paper's sigma^2 = 37.9 beside lambda_1 = 13.3 is too
    large for that of all the eigenvalues, most of which are near 0.
    """
    pooled, rows = {}, []
    for path in paths:
        for name, (module, loss, parts) in landscape(path, args)[1].items():
            if not math.isfinite(value := mean_loss(module, loss, parts)):
                raise BadInput(f"{path}: its loss is {value}; expected a finite one")
            memory = args.lanczos * sum(p.numel() for p in module.parameters()) / 2 ** 28
            if memory > args.budget:
                raise BadInput(f"--budget {args.budget:g}: {args.lanczos} vectors of the parameters of "
                               f"{path} take {memory:.2f} GiB; give fewer --lanczos")
            found = spectrum(module, loss, parts, args.lanczos, args.probes, args.seed)
            pooled.setdefault(name, []).extend(found)
            high, low = (pick((f[0][i], f[2][i]) for f in found) for pick, i in ((max, -1), (min, 0)))
            numbers = *high, *low, *moments(found), np.mean([values.var() for values, *_ in found])
            rows.append((title, path, name, value, *map(float, numbers)))
            print(f"{path} {name:14s}" + "".join(f"{x:11.3g}" for x in rows[-1][3:]), flush=True)
    for i, (name, found) in enumerate(pooled.items()):
        low, high = (end([end(values) for values, *_ in found]) for end in (np.min, np.max))
        width = 0.01 * (high - low) or 1e-9
        x = np.linspace(low - 4 * width, high + 4 * width, 2001)
        y = density(found, x, width)
        ax.plot(x, np.where(y > 1e-8 * y.max(), y, np.nan), label=name, **look(i))       # less than one of P
    ax.set(xlabel="eigenvalue", ylabel="density", title=title, yscale="log")
    ax.set_xscale("symlog")
    ax.legend()
    return rows


FIGURES = {  # one panel of it, fewest checkpoints, columns of the CSV
    "consistency": (draw_consistency, 2, "group,ckpt,image,psnr_to_first"),
    "interpolate": (draw_interpolate, 2, "group,a,b,loss,alpha,value"),
    "hessian":     (draw_hessian,     1, "group,ckpt,loss,value,lambda_1,error_1,lambda_P,error_P,mean,"
                                         "variance,ritz_variance"),
}


def draw_figure(command, groups, out, args):
    """One panel for each of the groups {title: checkpoints}, and all their numbers."""
    panel, _, header = FIGURES[command]
    tall = command == "consistency"
    figure, axes = canvas(len(groups), 1) if tall else canvas(1, len(groups))
    if tall:
        figure.set_size_inches(8.4, sum(0.4 + 0.7 * len(paths) for paths in groups.values()))
    print(header, flush=True)
    rows = [row for ax, group in zip(axes.flat, groups.items()) for row in panel(ax, *group, args)]
    save(figure, out, header, rows)


# ------------------------------------------------------------------------------------------- the miniature

def miniature(args):
    """Train diffusion models and DCGANs without labels, 64 images a step, and draw the three figures."""
    out, steps = Path(args.out), args.steps or 1000
    DCGAN(args.size)                                                         # refusals first, training then
    if args.t and max(args.t) >= 1000:
        raise BadInput(f"--t: found {args.t}, expected below 1000")
    claim(out, kind="stability", steps=steps, size=args.size, seeds=args.seeds)
    runs = {f"seed{seed}": ("vit-tiny", "x0", seed) for seed in range(args.seeds)}
    runs |= {"unet": ("unet-tiny", "x0", 0), "eps": ("vit-tiny", "eps", 0)}
    runs |= {f"gan{seed}": (None, None, seed) for seed in range(args.seeds)}
    for folder, (model, target, seed) in timed({out / name: run for name, run in runs.items()}):
        if not model:
            gan(argparse.Namespace(data=None, size=args.size, out=folder, seed=seed, steps=3 * steps))
            continue
        flags = short_run(steps, model=model, target=target, classes=0, seed=seed, size=args.size)
        for mark in (max(1, steps // 10), steps):
            if why := train_to(folder, flags, mark):
                raise BadInput(f"{folder}: {why}")
            if read(folder / "ckpt.pt")["step"] == max(1, steps // 10):
                replace(folder / "early.pt", lambda f: f.write((folder / "ckpt.pt").read_bytes()))
    both = {"diffusion": [*runs][:args.seeds], "DCGAN": [*runs][-args.seeds:]}
    same = {**both, "diffusion, other network, target": ["seed0", "unet", "eps"]}
    for command, groups, files in (("consistency", same, ["ckpt.pt"]), ("hessian", both, ["ckpt.pt"]),
                                   ("interpolate", both, ["early.pt", "ckpt.pt"])):
        found = {title: [str(out / name / file) for name in names for file in files]
                 for title, names in groups.items()}
        draw_figure(command, found, out / f"{command}.png", args)


# --------------------------------------------------------- densities of t (eq. 7, figure 5, tables 2 and 3)

def reached(curve, level):
    """Step at which a falling curve {step: value} is down at a level, log-linear between; inf: never."""
    steps = sorted(curve)
    for a, b in zip(steps, steps[1:]):
        if curve[b] <= level < curve[a]:
            return a + (b - a) * math.log(curve[a] / level) / math.log(curve[a] / curve[b])
    return steps[0] if steps and curve[steps[0]] <= level else math.inf


def densities(args):
    """Train uniform, clts and laplace t under const and min-SNR-5: the steps until the x0 error and FD-pixels
    are where uniform t under min-SNR-5 ends, on the mean of its seeds; measured three times a run.
    """
    out, steps, columns = Path(args.out), args.steps or 600, ["x0_mse", "fd_pixels"]
    marks = sorted({max(1, steps * i // 3) for i in (1, 2, 3)})
    claim(out, kind="densities", steps=steps, size=args.size, count=args.count)
    curriculum = f"clts:0.3:{max(1, steps // 10)}"                           # the paper's share of its run
    runs = {out / f"{timesteps.split(':')[0]}_{weighting}_seed{seed}":
            short_run(steps, timesteps=timesteps, weighting=weighting, gamma=gamma, seed=seed, size=args.size)
            for seed in range(args.seeds) for timesteps in ("uniform", curriculum, "laplace")
            for weighting, gamma in (FOUR[0], FOUR[3])}
    for folder, flags in timed(runs):
        bring_up(folder, flags, marks, args.count)
    args.runs, args.out = [*runs], out / "densities.png"
    plot_runs(args, "quality.csv", columns, [", x0 error over all t", ", FD-pixels"], "")
    found = read_runs(args.runs, "quality.csv", columns)
    ends = [curve[steps] for curve, _ in found["x0", "min-SNR-5 timesteps uniform"] if steps in curve]
    if not ends:
        raise BadInput(f"--out {out}: uniform t under min-SNR-5 diverged; expected a run to compare with")
    levels = np.mean(ends, 0)
    print(f"steps to an x0 error of {levels[0]:.4f} and FD-pixels of {levels[1]:.3f}, one for each seed")
    for (_, name), curves in found.items():
        times = [[reached({step: row[j] for step, row in curve.items()}, levels[j]) for curve, _ in curves]
                 for j in (0, 1)]
        print(f"{name:34s}" + "   ".join("".join(f"{x:6.0f}" for x in row) for row in times), flush=True)


# ------------------------------------------------------------------------------------------- command line

FOLDERS = {"gan": (gan, "out/gan"), "miniature": (miniature, "out/stability"),
           "densities": (densities, "out/densities")}
RANGES = dict(seed=(0, 2 ** 62), count=(2, 1e5), heun=(1, 1e4), n=(1, 1e6), points=(2, 1e4), lanczos=(2, 1e4),
              probes=(1, 1e4), budget=(1e-9, 1e6), steps=(1, 1e9), size=(8, 1024), seeds=(1, 1e3))


def parse():
    parser = Parser(__doc__)
    parser.set_defaults(K=1)                                                 # for pareto.load
    add = parser.add_argument
    add("command", choices=[*FIGURES, *FOLDERS])
    add("--out", help=".png or .svg, numbers beside it (default: COMMAND.png); gan, miniature, densities: a\n"
                      "folder (default: out/gan, out/stability, out/densities)")
    add("--seed", type=int, default=0, help="of noise, samples and probes; gan: of the run")
    add("--ckpt", action="append", default=[], help="checkpoint or run folder; again for more")
    add("--data", help="packed folder (default: the checkpoint's own data; gan: the built-in images)")
    add("--target", choices=TARGETS, help="what released weights predict")
    add("--count", type=int, help="consistency: images a model (default: 32); densities: samples measured\n"
                                  "(default: 256)")
    add("--heun", type=int, default=18, help="consistency: Heun steps of the images (default: 18)")
    add("--vae", help="consistency: autoencoder of latents (default: the one that the data name)")
    # losses: interpolate, hessian
    add("--n", type=int, default=64, help="samples of each loss (default: 64)")
    add("--t", type=int, nargs="+", help="timesteps besides all together (default: T/10, T/2, 9T/10)")
    add("--points", type=int, default=21, help="alphas (default: 21)")
    add("--lanczos", type=int, default=30, help="steps, one vector of all parameters each (default: 30)")
    add("--probes", type=int, default=2, help="random vectors to start from (default: 2)")
    add("--budget", type=float, default=8.0, help="GiB that the vectors may take (default: 8)")
    # training: gan, miniature, densities
    add("--steps", type=int, help="gan (default: 1800), densities (600), miniature: of a diffusion run,\n"
                                  "of a GAN 3 times as many (1000)")
    add("--size", type=int, default=16, help="image side (default: 16)")
    add("--seeds", type=int, default=3, help="miniature: runs of each kind (default: 3)")
    return parser.parse_args()


def main():
    args = parse()
    check(args, RANGES)
    command, found, pairs = args.command, len(args.ckpt), args.command == "interpolate"
    least = FIGURES[command][1] if command in FIGURES else 0
    if found < least or found and not least or pairs and found % 2:
        expected = f"{least} or more{', in pairs' if pairs else ''}" if least else "none"
        raise BadInput(f"{command}: found {found} --ckpt, expected {expected}")
    if command == "miniature" and args.seeds < 2:
        raise BadInput("--seeds 1: found nothing to compare, expected at least 2")
    if args.t and min(args.t) < 0 or command in ("miniature", "densities") and args.data:
        raise BadInput(f"--t {args.t}, --data {args.data}: expected t >= 0, and no data for {command}")
    args.count = args.count or (256 if command == "densities" else 32)
    if command in FOLDERS:
        work, folder = FOLDERS[command]
        args.out = args.out or folder
        return work(args)
    args.out = args.out or f"{command}.png"
    if Path(args.out).suffix not in (".png", ".svg"):
        raise BadInput(f"--out {args.out}: expected a .png or .svg")
    groups = {path: [path] for path in args.ckpt} if command == "hessian" else {"checkpoints": args.ckpt}
    draw_figure(command, groups, args.out, args)


if __name__ == "__main__":
    run(main)
