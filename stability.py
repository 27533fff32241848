"""How stable is diffusion training, beside a GAN's? The curriculum-timesteps paper's measurements.

    python stability.py miniature                              # trains 5 diffusion models and 3 GANs, draws all
    python stability.py consistency --ckpt out/a --ckpt out/b  # the same noise through several models
    python stability.py interpolate --ckpt A.pt --ckpt B.pt    # the loss on the line between two checkpoints
    python stability.py hessian --ckpt out/a                   # eigenvalues of the loss's Hessian
    python stability.py gan --out out/gan                      # the DCGAN to compare with; again: goes on

Wang et al., "Analyzing Stability in Diffusion Model Training", 2024; equation numbers are that paper's. Images
are drawn from the EMA weights; losses are those of training, around the weights themselves, where the optimizer
stands: the paper says neither. Of a GAN's two networks one moves at a time.
"""
import argparse
import copy
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import BadInput, Packed, Parser, built_in, generator, progress, read, read_json, replace, run, tile
from diffusion import TARGETS, Diffusion
from pareto import band, canvas, draw_bin, load, look, save
from sample import draw, find_vae, load_checkpoint, start, to_uint8

BATCH = 64                               # samples at a time: a step of the GAN, a part of a landscape's samples
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------- consistency (eq. 1, table 1) and interpolation (eq. 2, figure 3)

def psnr(a, b):
    """10 log10(255^2 / MSE), dB, of images (...,C,H,W): uint8, or floats in [-1, 1], which become bytes first.
    Equal images get what one byte off by 1 would, the largest finite value, so that means stay finite.
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
    """Total variation / (highest - lowest) of a curve (N,): 1 if it only rises or falls, more with every turn.
    Blind to the loss's scale, so that two losses compare; the paper shows jitter and gives no number.
    """
    extent = np.ptp(curve)
    return float(np.abs(np.diff(curve)).sum() / extent) if extent else 1.0


# -------------------------------------------------------------------------------- Hessian spectrum (figure 4)

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

    with sdpa_kernel(SDPBackend.MATH):                                       # fused kernels have one derivative
        for part in parts:
            total += len(part[0]) / n * gradient(gradient(loss(module, part), create_graph=True) @ v)
    return total


def lanczos(product, v, k):
    """Ritz values, weights, residuals, each (<= k,) float64, of a symmetric H given as product(v) = H v: k steps
    from v, each vector made orthogonal to all before it, twice, which takes k P numbers of memory. An eigenvalue
    of H lies within residual_i of value_i; <v, f(H) v> / <v, v> = sum_i weight_i f(value_i), a quadrature exact
    for polynomials of degree < 2 k (Golub & Welsch 1969).
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
    """lanczos() of the Hessian of mean_loss from each of so many vectors of random signs, drawn by the seed."""
    weight, P = next(module.parameters()), sum(p.numel() for p in module.parameters())
    signs = (torch.randint(2, (P,), generator=generator("probe", seed, r)) * 2 - 1 for r in range(probes))
    return [lanczos(lambda v: hvp(module, loss, parts, v), v.to(weight), k) for v in signs]


def moments(found):
    """Mean trace(H) / P and variance of the eigenvalues: Hutchinson's (1990) <v, H v> and |H v|^2, averaged over
    the probes of a spectrum, whose quadratures of x and x^2 they are.
    """
    first, second = (np.mean([w @ x ** power for x, w, _ in found]) for power in (1, 2))
    return float(first), float(second - first ** 2)


def density(found, x, width):
    """(N,) at x (N,): the eigenvalues' density by stochastic Lanczos quadrature (Ghorbani et al. 2019), mean over
    the probes of sum_i weight_i N(x; value_i, width^2).
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
        for name, p in self.named_parameters():                              # norms N(1, .02), the rest N(0, .02)
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


def load_gan(path, state):
    """The DCGAN of the state read from a checkpoint; None if it holds none, BadInput if a damaged one."""
    config = state.get("config")
    if not isinstance(config, dict) or config.get("model") != "dcgan":
        return None
    try:
        model = DCGAN(config["size"])
        model.load_state_dict(state["model"])
    except Exception as error:                                               # whatever damage makes them raise
        raise BadInput(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from None
    return finite(path, model).to(DEVICE)


def gan(args):
    """Train a DCGAN in --out, or go on with the one begun there: ckpt.pt, and early.pt of a tenth of the way."""
    out, steps, data = Path(args.out), args.steps or 1800, gan_data(args.data, args.size)
    config = dict(model="dcgan", data=args.data, size=args.size, seed=args.seed, steps=steps)
    torch.manual_seed(args.seed)
    state = read(out / "ckpt.pt") if (out / "ckpt.pt").exists() else dict(config=config, step=0)
    if state.get("config") != config:
        raise BadInput(f"--out {out}: holds a run of {state.get('config')}, expected {config}")
    model = (load_gan(out, state) if state["step"] else DCGAN(args.size).to(DEVICE)).train()
    networks = model.discriminator, model.generator
    adam = [torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999)) for network in networks]
    for optimizer, saved in zip(adam, state.get("optimizer", [])):
        optimizer.load_state_dict(saved)
    out.mkdir(parents=True, exist_ok=True)
    first, since, every = state["step"], time.time(), max(1, steps // 10)
    for step in range(first, steps):
        x, z = gan_batch(data, "gan", args.seed, step)
        fake = model.generator(z)
        for optimizer, loss, images in zip(adam, (discriminator_loss, generator_loss),
                                           ((x, fake.detach()), (fake,))):
            optimizer.zero_grad()
            loss(model.discriminator, *images).backward()
            optimizer.step()
        if (done := step + 1) % every == 0 or done == steps:
            state = dict(model=finite(f"{out}, step {done}", model).state_dict(), step=done, config=config,
                         optimizer=[optimizer.state_dict() for optimizer in adam])
            for name in ["early.pt"] * (done == every) + ["ckpt.pt"]:
                replace(out / name, lambda f: torch.save(state, f))
            progress(f"{out.name}: steps", done, steps, since, first)


# ---------------------------------------------------------------------------- checkpoints: images and losses

def finite(path, model):
    """The model. Raises BadInput where a weight is not finite."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise BadInput(f"{path}: its weights are not finite; expected a run that has not diverged")
    return model


@torch.no_grad()
def pictures(path, args):
    """uint8 (count,3,S,S): image k of every checkpoint begins with the same noise, if its shape is the same."""
    ks = range(args.count)
    if model := load_gan(path, read(path)):                                  # running averages: k alone matters
        z = [start(args.seed, k, [0], dict(num_classes=0, in_channels=100, img_size=1))[1] for k in ks]
        return to_uint8(model.eval().generator(torch.stack(z).to(DEVICE))).cpu()
    model, config = load_checkpoint(path, target=args.target)
    how = dict(seed=args.seed, vae=find_vae(config, DEVICE), steps=args.sample_steps or config["sample_steps"])
    model = finite(path, model).to(DEVICE)
    return torch.cat([draw(model, config, ks[i:i + BATCH], **how) for i in range(0, len(ks), BATCH)])


def landscape(path, args):
    """-> (what it was trained on, {name: (network that moves, loss, parts)}), each loss on n fixed samples. Of a
    diffusion model it is the weighted loss of its training, over all t and at some. A DCGAN's batch norms take the
    statistics of a part, as in training: running averages would be those of other weights than the moved ones.
    """
    state = read(path)
    if model := load_gan(path, state):
        G, D = model.train().generator, model.discriminator
        for module in model.modules():
            module.momentum = 0.0                                            # the running averages stay
        data = gan_data(args.data or state["config"].get("data"), state["config"]["size"])
        parts = [gan_batch(data, "landscape", args.seed, i, min(BATCH, args.n - i))
                 for i in range(0, args.n, BATCH)]
        with torch.no_grad():
            pairs = [(x, G(z)) for x, z in parts]
        return "DCGAN", {"generator": (G, lambda G, part: generator_loss(D, G(part[1])), parts),
                         "discriminator": (D, lambda D, part: discriminator_loss(D, *part), pairs)}
    _, diffusion, data = load(path, args)                                    # checks what belongs together
    model, config = load_checkpoint(path, raw=True, target=args.target)
    T, what = diffusion.T, [config.get("weighting", "min_snr"), config.get("gamma", 5.0)]
    diffusion.weight = state["weight"].to(DEVICE) if what[0] == "ugd" else \
        Diffusion(config["schedule"], T, config["target"], *what).to(DEVICE).weight
    if args.t and max(args.t) >= T:
        raise BadInput(f"--t: found {args.t}, {path} has t = 0 .. {T - 1}")
    bins = {f"t = {t}": (T, t) for t in args.t or sorted({T // 10, T // 2, 9 * T // 10})} | {"all t": (1, 0)}
    parts = {name: [[x.to(DEVICE) for x in part] for part in draw_bin(data, T, *which, args.n, args.seed)]
             for name, which in bins.items()}
    model, loss = finite(path, model).to(DEVICE), lambda model, part: diffusion.loss(model, *part)[0].mean()
    return [config["target"], *what, config["schedule"], T], {name: (model, loss, parts[name]) for name in bins}


# ------------------------------------------------------------ figures of args.groups, {title: checkpoints}

def draw_consistency(args):
    """One panel a group: a row of images a model, each with its PSNR to the first model's; eq. 1 above."""
    figure, axes = canvas(len(args.groups), 1)
    figure.set_size_inches(8.4, sum(0.5 + 0.7 * len(paths) for paths in args.groups.values()))
    rows, shown = [], min(args.count, 12)
    for ax, (title, paths) in zip(axes[:, 0], args.groups.items()):
        images = [pictures(path, args) for path in paths]
        for path, x in zip(paths, images):
            if x.shape != images[0].shape:
                raise BadInput(f"{path}: draws {tuple(x.shape[1:])}, {paths[0]} {tuple(images[0].shape[1:])}")
        q = torch.stack(images)                                              # (N,M,3,S,S)
        values, chance, S = psnr(q[:1], q), consistency(torch.cat([q[:1], q[1:].roll(1, 1)])), q.shape[-1]
        text = f"{title}: consistency {consistency(q):.2f} dB; from other noise {chance:.2f} dB"
        print(text, flush=True)
        names = [Path(path).parent.name if Path(path).is_file() else Path(path).name for path in paths]
        ax.imshow(tile(q[:, :shown].flatten(0, 1).numpy(), shown))
        ax.set(title=text, xticks=[], yticks=[(j + 0.5) * S for j in range(len(paths))], yticklabels=names)
        ax.grid(False)
        for j, path in enumerate(paths[1:], 1):
            rows += [(title, path, i, float(value)) for i, value in enumerate(values[j])]
            for i in range(shown):
                ax.text((i + 0.05) * S, (j + 0.93) * S, f"{values[j, i]:.0f}", fontsize=6, color="white",
                        bbox=dict(facecolor="black", pad=0.5, linewidth=0))
    save(figure, args.out, "group,ckpt,image,psnr_to_first", rows)


def draw_interpolate(args):
    """One panel a group: each loss from checkpoint B (alpha = 0) to A (alpha = 1), over the group's pairs A, B.
    The samples, and of a GAN the network that does not move, are B's.
    """
    figure, axes = canvas(1, len(args.groups))
    rows, alphas = [], np.linspace(0, 1, args.points)
    print(f"{'':12s}{'loss':14s}roughness   of B: loss   of A: loss, checkpoint", flush=True)
    for ax, (title, paths) in zip(axes[0], args.groups.items()):
        curves = {}
        for path_a, path_b in zip(paths[::2], paths[1::2]):
            (what_a, A), (what_b, B) = landscape(path_a, args), landscape(path_b, args)
            shapes = [[p.shape for module, *_ in X.values() for p in module.parameters()] for X in (A, B)]
            if what_a != what_b or shapes[0] != shapes[1]:
                raise BadInput(f"{path_a}, {path_b}: found {what_a} and {what_b}, or networks of other shapes; "
                               "expected two checkpoints of one kind")
            for name, (b, loss, parts) in B.items():
                curve = [mean_loss(interpolate(A[name][0], b, alpha), loss, parts) for alpha in alphas]
                curves.setdefault(name, []).append(curve)
                rows += [(title, path_a, path_b, name, *map(float, point)) for point in zip(alphas, curve)]
                print(f"{title:12s}{name:14s}{roughness(curve):9.3f} {curve[0]:12.4g} {curve[-1]:12.4g}, {path_a}")
        for i, (name, found) in enumerate(curves.items()):
            band(ax, alphas, np.array(found), i, name)
        ax.set(xlabel="alpha: 0 = B (late), 1 = A (early)", ylabel="loss", title=title, yscale="log")
        ax.legend()
    save(figure, args.out, "group,a,b,loss,alpha,value", rows)


def draw_hessian(args):
    """One panel a group: density of the eigenvalues of each loss, mean over its checkpoints; and a table. The
    last column is the variance of the Ritz values, unweighted: the paper's sigma^2 = 37.9 beside lambda_1 =
    13.3 is too large for that of all the eigenvalues, most of which are near 0.
    """
    figure, axes = canvas(1, len(args.groups))
    rows, header = [], "loss value lambda_1 error_1 lambda_P error_P mean variance ritz_variance".split()
    print(f"{'':12s}{header[0]:13s}" + "".join(f"{word:>11s}" for word in header[1:-1]), header[-1], flush=True)
    for ax, (title, paths) in zip(axes[0], args.groups.items()):
        pooled = {}
        for path in paths:
            for name, (module, loss, parts) in landscape(path, args)[1].items():
                memory = args.lanczos * sum(p.numel() for p in module.parameters()) / 2 ** 28
                if memory > args.budget:
                    raise BadInput(f"--budget {args.budget:g}: found {memory:.2f} GiB for {args.lanczos} vectors "
                                   f"as long as {path} has parameters; give fewer --lanczos")
                found = spectrum(module, loss, parts, args.lanczos, args.probes, args.seed)
                pooled.setdefault(name, []).extend(found)
                high, low = (pick((f[0][i], f[2][i]) for f in found) for pick, i in ((max, -1), (min, 0)))
                numbers = [mean_loss(module, loss, parts), *high, *low, *moments(found),
                           np.mean([values.var() for values, *_ in found])]
                rows.append((title, path, name, *map(float, numbers)))
                print(f"{title:12s}{name:13s}" + "".join(f"{x:11.3g}" for x in numbers) + f" {path}", flush=True)
        for i, (name, found) in enumerate(pooled.items()):
            low, high = (end([end(values) for values, *_ in found]) for end in (np.min, np.max))
            width = 0.01 * (high - low) or 1e-9
            x = np.linspace(low - 4 * width, high + 4 * width, 2001)
            ax.plot(x, density(found, x, width), label=name, **look(i))
        ax.set(xlabel="eigenvalue", ylabel="density", title=title, yscale="log")
        ax.legend()
    save(figure, args.out, ",".join(["group,ckpt", *header]), rows)


# ------------------------------------------------------------------------------------------- the miniature

def bring_up(folder, words, marks):
    """Train a diffusion run to its marks, keep that of the first as early.pt, from wherever it was left."""
    ckpt = folder / "ckpt.pt"
    for mark in marks:
        done = read(ckpt)["step"] if ckpt.exists() else 0
        if done < mark:
            flags = [*words, "--steps", mark, "--out", folder, *(["--resume"] if done else [])]
            script = [sys.executable, Path(__file__).with_name("train.py"), *flags]
            ended = subprocess.run(list(map(str, script)), capture_output=True, text=True)
            if ended.returncode:
                last = " ".join((ended.stdout + ended.stderr).splitlines()[-1:])
                raise BadInput(f"{folder}: train.py ended with code {ended.returncode}: {last}")
        if max(done, mark) == marks[0]:
            replace(folder / "early.pt", lambda f: f.write(ckpt.read_bytes()))


def miniature(args):
    """Train diffusion models and DCGANs without labels, 64 images a step, and draw the three figures of them."""
    canvas()                                                                 # no matplotlib: said at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)                # takes the run in progress along
    out, steps, file = Path(args.out), args.steps or 600, Path(args.out) / "miniature.json"
    settings = dict(kind="stability", steps=steps, size=args.size, seeds=args.seeds)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*/ckpt.pt")) and file.exists() and read_json(file) != settings:
        raise BadInput(f"--out {out}: holds a miniature of other flags, {read_json(file)}")
    replace(file, lambda f: f.write(json.dumps(settings).encode()))
    runs = {f"seed{seed}": ("vit-tiny", "x0", seed) for seed in range(args.seeds)}
    runs |= {"unet": ("unet-tiny", "x0", 0), "eps": ("vit-tiny", "eps", 0)}
    runs |= {f"gan{seed}": (None, None, seed) for seed in range(args.seeds)}
    since = time.time()
    for i, (name, (model, target, seed)) in enumerate(runs.items(), 1):
        words = dict(model=model, target=target, seed=seed, size=args.size, classes=0, decay=0, lr=2e-3)
        words |= {"sample-steps": 1, "log-every": max(1, steps // 20), "save-every": max(1, steps // 4)}
        if model:
            flags = [part for key, value in words.items() for part in (f"--{key}", value)]
            bring_up(out / name, flags, [max(1, steps // 10), steps])
        else:
            gan(argparse.Namespace(data=None, size=args.size, out=out / name, seed=seed, steps=3 * steps))
        left = (time.time() - since) / i * (len(runs) - i) / 60
        print(f"run {i} / {len(runs)}: {name}   {left:.1f} min of training left", flush=True)
    at = lambda names, *files: [str(out / name / file) for name in names for file in files]
    both = {"diffusion": [*runs][:args.seeds], "DCGAN": [*runs][-args.seeds:]}
    same = {"diffusion, seeds": both["diffusion"], "diffusion, network and target": ["seed0", "unet", "eps"],
            "DCGAN, seeds": both["DCGAN"]}
    for command, groups, files in ((draw_consistency, same, ["ckpt.pt"]), (draw_hessian, both, ["ckpt.pt"]),
                                   (draw_interpolate, both, ["early.pt", "ckpt.pt"])):
        groups = {title: at(names, *files) for title, names in groups.items()}
        flags = dict(groups=groups, out=out / f"{command.__name__[5:]}.png", sample_steps=18)
        command(argparse.Namespace(**{**vars(args), **flags}))


# ------------------------------------------------------------------------------------------- command line

COMMANDS = {  # function, default --out, how many --ckpt
    "consistency": (draw_consistency, "consistency.png", "2 or more"),
    "interpolate": (draw_interpolate, "interpolate.png", "pairs of"),
    "hessian":     (draw_hessian,     "hessian.png",     "1 or more"),
    "gan":         (gan,              "out/gan",         "no"),
    "miniature":   (miniature,        "out/stability",   "no"),
}
RANGES = dict(seed=(0, 2 ** 62), count=(1, 1e5), n=(1, 1e6), points=(2, 1e4), lanczos=(2, 1e4),
              probes=(1, 1e4), budget=(1e-9, 1e6), steps=(1, 1e9), size=(8, 1024), seeds=(2, 1e3))


def parse():
    parser = Parser(__doc__)
    parser.set_defaults(K=1, sample_steps=None)                              # for pareto.load, miniature
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--out", help=".png or .svg, numbers beside it; gan, miniature: a folder (default: COMMAND.png,\n"
                      "out/gan, out/stability)")
    add("--seed", type=int, default=0, help="of noise, samples and probes; gan: of the run")
    add("--ckpt", action="append", default=[], help="checkpoint or run folder; again for more")
    add("--data", help="packed folder (default: the checkpoint's own data; gan: the built-in images)")
    add("--target", choices=TARGETS, help="what released weights predict")
    # images: consistency
    add("--count", type=int, default=32, help="images a model (default: 32)")
    # losses: interpolate, hessian
    add("--n", type=int, default=64, help="samples of each loss (default: 64)")
    add("--t", type=int, nargs="+", help="timesteps besides all together (default: T/10, T/2, 9T/10)")
    add("--points", type=int, default=21, help="alphas (default: 21)")
    add("--lanczos", type=int, default=30, help="steps, one vector of all parameters each (default: 30)")
    add("--probes", type=int, default=2, help="random vectors to start from (default: 2)")
    add("--budget", type=float, default=8.0, help="GiB that the vectors may take (default: 8)")
    # training: gan, miniature
    add("--steps", type=int, help="gan (default: 1800); miniature: of a diffusion run, the GANs take three\n"
                                  "times as many (default: 600)")
    add("--size", type=int, default=16, help="image side (default: 16)")
    add("--seeds", type=int, default=3, help="miniature: runs of each kind (default: 3)")
    return parser.parse_args()


def main():
    args = parse()
    for flag, (low, high) in RANGES.items():
        if (value := getattr(args, flag)) is not None and not low <= value <= high:
            raise BadInput(f"--{flag.replace('_', '-')}: found {value}, expected {low:g} to {high:g}")
    function, out, needs = COMMANDS[args.command]
    found, args.out = len(args.ckpt), args.out or out
    if not {"no": found == 0, "1": found > 0, "2": found > 1, "pairs": found and found % 2 == 0}[needs.split()[0]]:
        raise BadInput(f"{args.command}: found {found} --ckpt, expected {needs} --ckpt")
    if args.t and min(args.t) < 0 or args.command == "miniature" and args.data:
        raise BadInput(f"--t {args.t}, --data {args.data}: expected t >= 0, and no data for the miniature")
    if needs != "no" and Path(args.out).suffix not in (".png", ".svg"):
        raise BadInput(f"--out {args.out}: expected a .png or .svg")
    args.groups = {path: [path] for path in args.ckpt} if function is draw_hessian else {"": args.ckpt}
    function(args)


if __name__ == "__main__":
    run(main)
