"""How stable is diffusion training beside a GAN's? The measurements of the curriculum paper.

    python -m experiments.stability consistency --ckpt out/a out/b    # one noise, several models: table 1
    python -m experiments.stability interpolate --ckpt LATE EARLY     # the loss between them: figure 3
    python -m experiments.stability hessian --ckpt out/a              # eigenvalues of the Hessian: figure 4

Each command writes a CSV file, which `python -m experiments.figures` draws.

Wang et al., "Analyzing Stability in Diffusion Model Training", 2024; equation numbers are that paper's. A
checkpoint is a file of train.py or of dcgan.py, or its folder. The paper leaves some choices open. Here
images are drawn from the EMA weights. Losses are those of training, with all labels and under uniform t,
around the weights that the optimizer holds. Of a GAN's two networks one moves at a time. The kinks of its
ReLUs have no part in the Hessian.
"""
import copy
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from data import generator, tile
from diffusion import Diffusion
from experiments import dcgan
from experiments.dcgan import DEVICE
from experiments.figures import write_csv
from experiments.pareto import draw_bin, load
from files import BadInput, Parser, at_least, read, replace, run
from sample import draw, find_vae, load_checkpoint, start, to_device, to_uint8


# ------------------------------------- consistency (eq. 1, table 1) and interpolation (eq. 2, figure 3)

def psnr(a, b):
    """10 log10(255^2 / MSE) in dB, (...,), of uint8 images (...,C,H,W).

    Equal images get the value of images that differ by 1 in one byte, the largest finite value, so that means
    stay finite.
    """
    difference = a.double() - b.double()
    error = difference.square().flatten(-3).sum(-1)
    peak = 255 ** 2 * math.prod(a.shape[-3:])
    return 10 * torch.log10(peak / error.clamp(min=1))


def consistency(images):
    """C(q) = 1/M sum_i 1/(N-1) sum_{j>=2} PSNR(q_i1, q_ij), dB (eq. 1), of uint8 images (N,M,C,H,W)."""
    return float(psnr(images[:1], images[1:]).mean())


@torch.no_grad()
def interpolate(model_a, model_b, alpha):
    """A copy of model_b with the parameters alpha theta_a + (1 - alpha) theta_b (eq. 2)."""
    mixed = copy.deepcopy(model_b)
    theta_a, theta_b = model_a.parameters(), model_b.parameters()
    for p, a, b in zip(mixed.parameters(), theta_a, theta_b):
        p.copy_(alpha * a + (1 - alpha) * b)
    return mixed


def roughness(curve):
    """Total variation / (highest - lowest) of a curve (N,): 1 if it only rises or falls, more with each turn.

    The paper shows jitter and gives no number. This one does not depend on the scale of the loss, so that two
    losses can be compared.
    """
    extent = np.ptp(curve)
    if extent == 0:
        return 1.0
    return float(np.abs(np.diff(curve)).sum() / extent)


# ------------------------------------------------------------------------------ Hessian spectrum (figure 4)

def hvp(module, loss, v):
    """H v (P,), where H is the Hessian of the scalar loss(module) by the module's P parameters.

    It is the gradient of <gradient, v> (Pearlmutter 1994).
    """
    params = list(module.parameters())

    def gradient(value, **how):
        grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True, **how)
        return torch.cat([grad.flatten() for grad in grads])

    with sdpa_kernel(SDPBackend.MATH):                               # the fused kernels cannot
        return gradient(gradient(loss(module), create_graph=True) @ v)


def lanczos(product, v, k):
    """Ritz values, weights, residuals, each (<= k,) float64, of a symmetric H given as product(v) = H v.

    k steps from v (P,), each vector made orthogonal to all before it, twice; they take k P numbers of memory.
    Some eigenvalue of H is within residual_i of value_i. The quadrature sum_i weight_i f(value_i) is
    <v, f(H) v> / <v, v>, exactly so for polynomials f of degree < 2 k (Golub & Welsch 1969).
    """
    k = min(k, len(v))
    Q = v.new_empty(k, len(v))
    alpha, beta = [], []                                                     # of the tridiagonal matrix
    w = v
    for j in range(k):
        Q[j] = w / w.norm()
        w = product(Q[j])
        alpha.append(float(w.double() @ Q[j].double()))
        rounding = 10 * torch.finfo(v.dtype).eps * float(w.norm())
        for _ in range(2):
            w = w - (Q[:j + 1] @ w) @ Q[:j + 1]
        beta.append(float(w.norm()))
        if beta[-1] <= rounding:                                             # nothing new in w
            break
    side = np.diag(beta[:-1], 1)
    values, vectors = np.linalg.eigh(np.diag(alpha) + side + side.T)
    residuals = beta[-1] * np.abs(vectors[-1])
    return values, vectors[0] ** 2, residuals


def spectrum(module, loss, k, probes, seed=0):
    """A list of k steps of lanczos() for the Hessian of loss(module), each from a vector of random signs."""
    theta = parameters_to_vector(module.parameters())                        # (P,)
    found = []
    for r in range(probes):
        g = generator("probe", seed, r)
        signs = 2 * torch.randint(2, theta.shape, generator=g) - 1
        ritz = lanczos(lambda v: hvp(module, loss, v), signs.to(theta), k)
        found.append(ritz)
    return found


def moments(found):
    """Mean and variance of the P eigenvalues as a spectrum's probes estimate them (Hutchinson 1990).

    trace(H) and trace(H^2) are means of <v, H v> and |H v|^2, which the quadratures of x and x^2 give.
    """
    first = np.mean([weights @ values for values, weights, _ in found])
    second = np.mean([weights @ values ** 2 for values, weights, _ in found])
    return float(first), float(second - first ** 2)


def density(found, x, width):
    """Density (N,) of the eigenvalues at x (N,) by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    The mean over the probes of sum_i weight_i N(x; value_i, width^2).
    """
    curves = []
    for values, weights, _ in found:
        distance = (x[:, None] - values) / width                             # (N,k)
        curves.append(np.exp(-distance ** 2 / 2) @ weights)
    return np.mean(curves, 0) / (width * math.sqrt(2 * math.pi))


# --------------------------------------------------------------------------- checkpoints: images and losses

def is_gan(path):
    return read(path).get("config", {}).get("model") == "dcgan"


@torch.no_grad()
def pictures(path, args):
    """uint8 (args.count,3,S,S), drawn at once and without guidance; by a diffusion model in 18 Heun steps.

    Image k begins with the same noise in all networks whose noise has one shape. It has the same label in all
    networks with as many classes.
    """
    ks = range(args.count)
    if is_gan(path):
        model, _ = dcgan.load(path)
        z = [start(args.seed, k, "balanced", model)[1] for k in ks]
        return to_uint8(model.generator(torch.stack(z).to(DEVICE))).cpu()
    model, config = load_checkpoint(path)
    model = to_device(model, DEVICE)
    vae = find_vae(config, DEVICE, args.vae)
    return draw(model, config, ks, args.seed, vae=vae, steps=18)


def landscape(path, args):
    """-> (kind of network, {name: (module, loss)}), where loss(module) is the mean over args.n samples.

    Of a diffusion model it is the weighted loss of its training, at the timesteps args.t and over all.
    """
    if is_gan(path):
        return gan_landscape(path, args)
    _, _, data = load(path, args.data)
    model, config = load_checkpoint(path, raw=True)
    model = to_device(model, DEVICE)
    weighting = read(path).get("weight", config.get("weighting", "min_snr"))
    T, target = config["T"], config["target"]
    diffusion = Diffusion(config["schedule"], T, target, weighting, config.get("gamma", 5.0))

    def mean_over_bin(K, k):
        parts = zip(*draw_bin(data, T, K, k, args.n, args.seed))
        samples = [torch.cat(part).to(DEVICE) for part in parts]             # x0, t, noise, y
        return lambda model: diffusion.loss(model, *samples)[0].mean()

    if max(args.t, default=0) >= T:
        raise BadInput(f"--t: found {max(args.t)}, {path} has t = 0 .. {T - 1}")
    losses = {f"t = {t}": (model, mean_over_bin(T, t)) for t in args.t}
    losses["all t"] = model, mean_over_bin(1, 0)
    return f"{type(model).__name__}-{model.img_size} {target}", losses


def gan_landscape(path, args):
    """landscape() of a DCGAN, whose norms take the statistics of the samples, as in training."""
    model, config = dcgan.load(path)
    G, D = model.train().generator, model.discriminator
    data = dcgan.open_data(args.data or config["data"], config["size"])
    x, z = dcgan.batch(data, "landscape", args.seed, 0, args.n)
    fake = G(z).detach()
    losses = {
        "generator": (G, lambda G: dcgan.generator_loss(D, G(z))),
        "discriminator": (D, lambda D: dcgan.discriminator_loss(D, x, fake)),
    }
    return f"DCGAN-{config['size']}", losses


# ------------------------------------------------------------------------------------------------ commands

def consistency_command(args):
    """PSNR to the first model's images, eq. 1; and a sheet, .png, with a row of images for each model."""
    images = [pictures(path, args) for path in args.ckpt]
    if len(images) < 2 or len({x.shape for x in images}) > 1:
        raise BadInput("--ckpt: expected two or more models that draw images of one shape")
    q = torch.stack(images)                                                  # (N,M,3,S,S)
    first, others = q[:1], q[1:]
    unrelated = psnr(first, others.roll(1, 1)).mean()                        # what all images have in common
    print(f"consistency {consistency(q):.2f} dB; with other images {unrelated:.2f} dB")
    rows = []
    for path, values in zip(args.ckpt[1:], psnr(first, others)):
        rows.append(dict(ckpt=path, psnr=values.mean().item()))
    write_csv(args.out, rows)

    shown = q[:, :12]
    sheet = tile(shown.flatten(0, 1).numpy(), shown.shape[1])
    replace(args.out.with_suffix(".png"), lambda file: sheet.save(file, "PNG"))


@torch.no_grad()
def interpolate_command(args):
    """Each loss on the line from a checkpoint B (alpha = 0) to an A (alpha = 1), which come in pairs B A.

    The samples, the loss and the network of a GAN that does not move are B's.
    """
    if len(args.ckpt) % 2:
        raise BadInput(f"--ckpt: found {len(args.ckpt)} checkpoints, expected pairs")
    rows = []
    for path_b, path_a in zip(args.ckpt[::2], args.ckpt[1::2]):
        kind, B = landscape(path_b, args)
        kind_a, A = landscape(path_a, args)
        if kind_a != kind:
            raise BadInput(f"--ckpt: found {kind} beside {kind_a}, expected pairs of one network")
        for name, (module, loss) in B.items():
            curve = []
            for alpha in np.linspace(0, 1, 21):
                mixed = interpolate(A[name][0], module, alpha)
                curve.append(loss(mixed).item())
                row = dict(kind=kind, b=path_b, a=path_a, loss=name)
                rows.append(row | dict(alpha=alpha, value=curve[-1]))
            print(f"{path_b} {name}: roughness {roughness(curve):.3f}", flush=True)
    write_csv(args.out, rows)


def hessian_command(args):
    """Ends and moments of each Hessian's eigenvalues; in a second CSV file, *_density.csv, their density."""
    rows, curves = [], []
    for path in args.ckpt:
        kind, losses = landscape(path, args)
        for name, (module, loss) in losses.items():
            which = dict(kind=kind, ckpt=path, loss=name)
            found = spectrum(module, loss, args.lanczos, args.probes, args.seed)
            numbers = dict(value=loss(module).item(), **summary(found))
            print(path, name, *(f"{key} {number:.3g}" for key, number in numbers.items()), flush=True)
            rows.append(which | numbers)
            curves += [dict(which, eigenvalue=x, density=y) for x, y in density_curve(found)]
    write_csv(args.out, rows)
    write_csv(args.out.with_stem(f"{args.out.stem}_density"), curves)


def summary(found):
    """The largest and smallest Ritz value of a spectrum with their errors, and its moments.

    ritz_variance is the plain variance of the Ritz values. The paper's sigma^2 = 37.9 beside lambda_1 = 13.3
    is too large for the variance of all eigenvalues, most of which are near 0.
    """
    highest = [(values[-1], residuals[-1]) for values, _, residuals in found]
    lowest = [(values[0], residuals[0]) for values, _, residuals in found]
    lambda_1, error_1 = max(highest)
    lambda_P, error_P = min(lowest)
    mean, variance = moments(found)
    ritz_variance = np.mean([values.var() for values, *_ in found])
    return dict(lambda_1=lambda_1, error_1=error_1, lambda_P=lambda_P, error_P=error_P, mean=mean,
                variance=variance, ritz_variance=ritz_variance)


def density_curve(found):
    """Points (eigenvalue, density), in bells 1 % of the spectrum wide, above 1e-8 of the highest density."""
    ends = np.array([values[[0, -1]] for values, *_ in found])
    low, high = ends.min(), ends.max()
    width = 0.01 * (high - low) + 1e-9
    x = np.linspace(low - 4 * width, high + 4 * width, 2001)
    y = density(found, x, width)
    return np.stack([x, y], 1)[y > 1e-8 * y.max()]


FLAGS = dict(
    ckpt=dict(nargs="+", required=True, help="checkpoints or run folders"),
    out=dict(type=Path, help="the CSV file"),
    seed=dict(type=at_least(0), default=0, help="of noise, samples and probes"),
    count=dict(type=at_least(2), default=32, help="images of each model"),
    vae=dict(help="autoencoder of latents in place of the one that the data name"),
    data=dict(help="packed folder in place of the checkpoint's own data"),
    n=dict(type=at_least(2), default=64, help="samples of each loss"),
    t=dict(type=at_least(0), nargs="+", default=[], help="timesteps besides all together"),
    lanczos=dict(type=at_least(2), default=30, help="steps, which keep a vector of all parameters each"),
    probes=dict(type=at_least(1), default=2, help="random vectors to start from"),
)
LOSSES = ["ckpt", "out", "seed", "data", "n", "t"]
COMMANDS = dict(
    consistency=(consistency_command, ["ckpt", "out", "seed", "count", "vae"]),
    interpolate=(interpolate_command, LOSSES),
    hessian=(hessian_command, [*LOSSES, "lanczos", "probes"]),
)


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (call, flags) in COMMANDS.items():
        command = commands.add_parser(name, doc=call.__doc__)
        for flag in flags:
            command.add_argument(f"--{flag}", **FLAGS[flag])
        command.set_defaults(call=call, out=Path(f"{name}.csv"))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
