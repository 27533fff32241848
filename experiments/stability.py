"""How stable is diffusion training beside a GAN's? The measurements of the curriculum paper.

    python -m experiments.stability consistency --ckpt out/a out/b    # do models draw alike from one noise? table 1
    python -m experiments.stability interpolate --ckpt LATE EARLY     # the loss between two checkpoints: figure 3
    python -m experiments.stability hessian --ckpt out/a              # eigenvalues of the loss's Hessian: figure 4

Each command writes a CSV file, which `python -m experiments.figures` draws.

Wang et al., "Analyzing Stability in Diffusion Model Training", 2024; equation numbers are that paper's. A
checkpoint is a file of train.py or of dcgan.py, or its folder. The paper leaves some choices open; here they are
these. A diffusion model draws its images with the EMA weights. Its loss is that of its training, but with no label
dropped and t uniform, and at the raw weights. A GAN has two losses, and each is a function of its own network's
weights, while the other network is fixed. A ReLU's second derivative is taken as 0, so its kink does not show in the
Hessian.
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch.autograd.functional import vhp
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from data import generator
from diffusion import Diffusion
from experiments import dcgan
from experiments.dcgan import DEVICE, LATENT
from experiments.figures import write_csv
from experiments.pareto import draw_bin, load
from files import BadInput, Parser, at_least, read, run
from sample import draw, find_vae, load_checkpoint, save_sheet, to_device, to_uint8


# ------------------------------------------------------------------------------------------------ measures

def psnr(a, b):
    """How alike uint8 images (...,C,H,W) are: 10 log10(255^2 / MSE) in dB, (...,).

    For equal images it would be infinite. They get the largest finite value, that of images that differ by 1 in one
    byte, so that means stay finite.
    """
    difference = a.double() - b.double()
    error = difference.square().flatten(-3).sum(-1)
    peak = 255 ** 2 * math.prod(a.shape[-3:])
    return 10 * torch.log10(peak / error.clamp(min=1))


def roughness(curve):
    """All the ups and downs of a curve (N,) over highest - lowest: 1 if it only rises or falls, more with each turn.

    The paper shows pictures of jitter and gives no number. This one does not depend on the scale of the loss, so that
    two losses can be compared.
    """
    return np.abs(np.diff(curve)).sum() / np.ptp(curve)


def lanczos(product, v, k):
    """Estimates of eigenvalues, called Ritz values, their weights and residuals, each (<= k,) float64, of a symmetric
    H (P,P) that is given as product(v) = H v.

    It starts from v (P,). Each new vector is H times the last one, made orthogonal to all before it. This is done
    twice, as rounding undoes some of it. The k vectors take k P numbers of memory. In them H is a small tridiagonal
    matrix; the values are its eigenvalues. Some eigenvalue of H is within residual_i of value_i. The sum of
    weight_i f(value_i) is about <v, f(H) v> / <v, v>, and exactly that for polynomials f of degree < 2 k (Golub &
    Welsch 1969).
    """
    k = min(k, len(v))
    Q = v.new_empty(k, len(v))
    alpha, beta = [], []                         # the small matrix's diagonal and the numbers beside it
    w = v
    for j in range(k):
        Q[j] = w / w.norm()
        w = product(Q[j])
        alpha.append(float(w.double() @ Q[j].double()))
        rounding = 10 * torch.finfo(v.dtype).eps * float(w.norm())
        for _ in range(2):
            w = w - (Q[:j + 1] @ w) @ Q[:j + 1]
        beta.append(float(w.norm()))
        if beta[-1] <= rounding:                 # H Q[j] is a sum of the vectors before it
            break
    side = np.diag(beta[:-1], 1)
    values, vectors = np.linalg.eigh(np.diag(alpha) + side + side.T)
    residuals = beta[-1] * np.abs(vectors[-1])
    return values, vectors[0] ** 2, residuals


def spectrum(loss, theta, k, probes, seed):
    """lanczos() for the Hessian of loss(theta) at theta (P,), from each of `probes` vectors of random signs.

    -> values, weights, residuals of all probes, each (<= probes k,). The sum of all weights is 1.
    """
    def product(v):
        _, Hv = vhp(loss, theta, v)                                          # v H, which is H v as H is symmetric
        return Hv

    found = []
    for r in range(probes):
        g = generator("probe", seed, r)
        signs = 2 * torch.randint(2, theta.shape, generator=g) - 1
        with sdpa_kernel(SDPBackend.MATH):       # the faster kinds of attention have no second derivative
            found.append(lanczos(product, signs.to(theta), k))
    values, weights, residuals = np.hstack(found)
    return values, weights / probes, residuals


def summary(values, weights, residuals):
    """The largest and smallest Ritz value of a spectrum with their errors, and estimates of the mean and the variance
    of all P eigenvalues.

    The mean eigenvalue is the mean of <v, H v> / <v, v> over random signs v (Hutchinson 1990), which the weights give
    for f(x) = x, and that of H^2 likewise for f(x) = x^2. ritz_variance is the variance of the Ritz values alone. It
    may be what the paper calls sigma^2: 37.9 beside lambda_1 = 13.3 is too large for the variance of all
    eigenvalues, most of which are near 0.
    """
    top, bottom = values.argmax(), values.argmin()
    mean = weights @ values
    return dict(
        lambda_1=values[top],
        error_1=residuals[top],
        lambda_P=values[bottom],
        error_P=residuals[bottom],
        mean=mean,
        variance=weights @ values ** 2 - mean ** 2,
        ritz_variance=values.var(),
    )


def density(values, weights):
    """x and the density of the eigenvalues there, each (N,), by stochastic Lanczos quadrature (Ghorbani et al.
    2019): a sum of bells weight_i N(x; value_i, width^2), whose width is 1 % of the spectrum's.

    Points below 1e-8 of the highest density are left out.
    """
    low, high = values.min(), values.max()
    width = 0.01 * (high - low) + 1e-9                                       # above 0 also for one value
    x = np.linspace(low - 4 * width, high + 4 * width, 2001)
    distance = (x[:, None] - values) / width                                 # (2001, number of values)
    bells = np.exp(-distance ** 2 / 2) / (width * math.sqrt(2 * math.pi))
    y = bells @ weights
    shown = y > 1e-8 * y.max()
    return x[shown], y[shown]


# --------------------------------------------------------------------------- checkpoints: images and losses

def is_gan(path):
    return "gan" in read(path)


@torch.no_grad()
def pictures(path, args):
    """uint8 (args.count,3,S,S), drawn at once and without guidance; by a diffusion model in 18 Heun steps.

    Image k depends on the model, on args.seed and on k alone. It begins with the same noise in all networks
    of one kind, and has the same label in all networks with as many classes.
    """
    ks = range(args.count)
    if is_gan(path):
        model, _ = dcgan.load(path)
        noise = [torch.randn(LATENT, 1, 1, generator=generator("image", args.seed, k)) for k in ks]
        images = model.eval().generator(torch.stack(noise).to(DEVICE))
        return to_uint8(images).cpu()
    model, config = load_checkpoint(path)
    model = to_device(model, DEVICE)
    vae = find_vae(config, DEVICE, args.vae)
    return draw(model, config, ks, args.seed, vae=vae, steps=18)


def network(module, theta):
    """The module as a function of its inputs, with theta (P,) in place of its parameters."""
    weights, first = {}, 0
    for name, p in module.named_parameters():
        weights[name] = theta[first:first + p.numel()].view_as(p)
        first += p.numel()
    return lambda *inputs: functional_call(module, weights, inputs)


def landscape(path, args):
    """-> {name: (theta (P,), loss)}: the losses of a checkpoint as functions of all weights in one vector, and the
    vector that it holds. loss(theta) is the mean over args.n samples.

    Of a diffusion model it is the weighted loss of its training, at each timestep of args.t and over all of them.
    """
    if is_gan(path):
        return gan_landscape(path, args)
    _, _, data = load(path, args.data)                                       # for the data alone
    model, config = load_checkpoint(path, raw=True)                          # the raw weights, not the EMA
    model = to_device(model, DEVICE)
    weighting = config.get("weighting", "min_snr")                           # a name, or a table
    T, target = config["T"], config["target"]
    diffusion = Diffusion(config["schedule"], T, target, weighting, config.get("gamma", 5.0))
    if max(args.t, default=0) >= T:
        raise BadInput(f"--t: found {max(args.t)}, {path} has t = 0 .. {T - 1}")

    def mean_over_bin(K, k):
        parts = zip(*draw_bin(data, T, K, k, args.n, args.seed))
        samples = [torch.cat(part).to(DEVICE) for part in parts]             # x0, t, noise, y

        def mean(theta):
            loss, _ = diffusion.loss(network(model, theta), *samples)
            return loss.mean()
        return mean

    name = f"{type(model).__name__}-{model.img_size} {target}"
    theta = parameters_to_vector(model.parameters())
    losses = {f"{name} t = {t}": (theta, mean_over_bin(T, t)) for t in args.t}
    losses[f"{name} all t"] = theta, mean_over_bin(1, 0)
    return losses


def gan_landscape(path, args):
    """landscape() of a DCGAN. Its batch norms take the statistics of the samples, as in training."""
    model, state = dcgan.load(path)
    size = state["size"]
    data = dcgan.open_data(args.data or state["data"], [size])
    x, z = dcgan.batch(data, "landscape", args.seed, 0, args.n)
    G, D = model.generator, model.discriminator
    fake = G(z).detach()

    def of_G(theta):
        return dcgan.generator_loss(D, network(G, theta)(z))

    def of_D(theta):
        return dcgan.discriminator_loss(network(D, theta), x, fake)

    return {
        f"DCGAN-{size} generator": (parameters_to_vector(G.parameters()), of_G),
        f"DCGAN-{size} discriminator": (parameters_to_vector(D.parameters()), of_D),
    }


# ------------------------------------------------------------------------------------------------ commands

def consistency(args):
    """C = 1/M sum_i 1/(N-1) sum_{j>=2} PSNR(q_i1, q_ij) of M images of N models (eq. 1, table 1). q_ij is image i of
    model j, which every model draws from the same noise.

    The CSV file has the mean PSNR of each model to the first. A picture beside it, .png, has a row of each model's
    first 12 images.
    """
    images = [pictures(path, args) for path in args.ckpt]
    shapes = {x.shape for x in images}
    if len(images) < 2 or len(shapes) > 1:
        raise BadInput("--ckpt: expected two or more models that draw images of one shape")
    q = torch.stack(images)                                                  # (N,M,3,S,S)
    first, others = q[:1], q[1:]
    values = psnr(first, others)                                             # (N-1,M)
    unrelated = psnr(first, others.roll(1, 1)).mean()        # image i beside i - 1: what all images have in common
    print(f"consistency {values.mean():.2f} dB; with other images {unrelated:.2f} dB")
    means = zip(args.ckpt[1:], values.mean(1).tolist())
    write_csv(args.out, [dict(ckpt=path, psnr=mean) for path, mean in means])
    shown = q[:, :12]
    save_sheet(args.out.with_suffix(".png"), shown.flatten(0, 1), shown.shape[1])


@torch.no_grad()
def interpolate(args):
    """Each loss on the line theta = alpha theta_a + (1 - alpha) theta_b (eq. 2, figure 3).

    --ckpt takes pairs, b before a: for LATE EARLY, alpha = 0 is the late checkpoint and alpha = 1 the early one. The
    samples and the loss are b's, and so is the GAN's network that does not move.
    """
    if len(args.ckpt) % 2:
        raise BadInput(f"--ckpt: found {len(args.ckpt)} checkpoints, expected pairs")
    rows = []
    pairs = zip(args.ckpt[::2], args.ckpt[1::2])
    for path_b, path_a in pairs:
        B, A = landscape(path_b, args), landscape(path_a, args)
        for name, (theta_b, loss) in B.items():
            theta_a, _ = A.get(name, ([], None))
            if len(theta_a) != len(theta_b):
                raise BadInput(f"--ckpt: {path_b} has {name} of {len(theta_b):,} parameters, {path_a} has none; "
                               "expected pairs of one network")
            curve = []
            for alpha in np.linspace(0, 1, 21):
                theta = alpha * theta_a + (1 - alpha) * theta_b
                value = loss(theta).item()
                curve.append(value)
                rows.append(dict(b=path_b, a=path_a, loss=name, alpha=alpha, value=value))
            print(f"{path_b} {name}: roughness {roughness(curve):.3f}", flush=True)
    write_csv(args.out, rows)


def hessian(args):
    """Of each loss's Hessian: the largest and the smallest eigenvalue, and mean and variance of all eigenvalues
    (figure 4). A second CSV file, *_density.csv, has the density of the eigenvalues.
    """
    rows, curves = [], []
    for path in args.ckpt:
        for name, (theta, loss) in landscape(path, args).items():
            which = dict(ckpt=path, loss=name)
            values, weights, residuals = spectrum(loss, theta, args.lanczos, args.probes, args.seed)
            measured = summary(values, weights, residuals)
            rows.append(dict(which, value=loss(theta).item(), **measured))
            for x, y in zip(*density(values, weights)):
                curves.append(dict(which, eigenvalue=x, density=y))
            print(path, name, flush=True)
    write_csv(args.out, rows)
    write_csv(args.out.with_stem(f"{args.out.stem}_density"), curves)


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for call in (consistency, interpolate, hessian):
        command = commands.add_parser(call.__name__, doc=call.__doc__)
        command.set_defaults(call=call)
        add = command.add_argument
        add("--ckpt", nargs="+", required=True, help="checkpoints or run folders")
        add("--out", type=Path, default=f"{call.__name__}.csv", help="the CSV file")
        add("--seed", type=at_least(0), default=0, help="of noise, samples and probes")
        if call is consistency:
            add("--count", type=at_least(2), default=32, help="images of each model")
            add("--vae", help="autoencoder of latents in place of the one that the data name")
            continue
        add("--data", help="packed folder in place of the checkpoint's own data")
        add("--n", type=at_least(2), default=64, help="samples of each loss")
        add("--t", type=at_least(0), nargs="+", default=[], help="timesteps whose own losses are measured, too")
        if call is hessian:
            add("--lanczos", type=at_least(2), default=30, help="steps; each keeps a vector of all parameters")
            add("--probes", type=at_least(1), default=2, help="random vectors to start from")
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
