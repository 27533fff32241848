"""Why timesteps conflict, and which weights serve them all: sections 3.2 to 3.4 of the Min-SNR paper.

    python -m experiments.pareto objective --ckpt out/shapes --out objective.csv    # figure 4
    python -m experiments.pareto finetune --ckpt out/shapes --out finetune.csv      # figure 2
    python -m experiments.pareto measure --ckpt out/shapes      # the run's snapshots, into its quality.csv
    python -m experiments.pareto needs --runs out/min_snr/*/ --out needs.csv      # which is the sooner
    python -m experiments.pareto ugd --ckpt out/shapes --out w.csv                  # figure 3, train.py --weighting

`python -m experiments.figures` draws the CSV files. Figure 3 is `ugd` repeated, with several --n and --seed. UGD
as a training weighting takes turns with training: `train.py --out out/ugd --decay 0 --steps 500`, then `ugd`,
then `train.py --resume --out out/ugd --steps 1000 --weighting w.csv`, and so on.

Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023; equation numbers are
that paper's. The range 0 .. T-1 is cut into K bins; K = T gives the timesteps themselves. g_k is the gradient
of the unweighted x0 loss in bin k. The Pareto objective needs only their inner products, the Gram matrix
G (K,K), G_jk = <g_j, g_k>.
"""
import copy
import inspect
import math
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from scipy.special import softmax

from data import Packed, built_in, generator
from diffusion import Diffusion, loss_weight
from experiments.figures import called, entry, read_csv, write_csv
from experiments.judge import fd_judge, recognised
from fid import fd_pixels
from files import BadInput, Parser, at_least, positive, processes, progress, read_json, run, say
from sample import batches_of, draw, load_checkpoint, to_device

TABLE = [  # the weightings of section 3.4 and their gamma, which const and snr do not use
    ("const", 1),
    ("snr", 1),
    ("max_snr", 1),
    ("min_snr", 1),
    ("min_snr", 5),
    ("min_snr", 10),
    ("min_snr", 20),
]


# ------------------------------------------------------------- gradients of the timesteps (section 3.2)

def edges(T, K):
    """The K + 1 borders of the bins: bin k is t = edges[k] .. edges[k + 1] - 1."""
    if not 1 <= K <= T:
        raise BadInput(f"found {K} bins of t, expected 1 to {T}, the number of timesteps")
    return [k * T // K for k in range(K + 1)]


def draw_bin(data, T, K, k, n, seed):
    """n samples of bin k in parts of up to 64: x0 (B,C,S,S), t (B,), noise like x0, y (B,). They depend on
    (seed, K, k, n) alone.
    """
    g = generator("pareto", seed, k)
    low, high = edges(T, K)[k:k + 2]
    indices = torch.randint(len(data), (n,), generator=g)
    x0, y = data.batch(indices.numpy(), g)
    t = torch.randint(low, high, (n,), generator=g)
    noise = torch.randn(x0.shape, generator=g)
    return zip(x0.split(64), t.split(64), noise.split(64), y.split(64))


def x0_loss(model, diffusion, part):
    """Sum over the part's samples of L^t, the mean squared error of x0, whatever the network predicts."""
    weight = next(model.parameters())                                        # its device and dtype
    x0, t, noise, y = part
    x0, noise = x0.to(weight), noise.to(weight)
    t, y = t.to(weight.device), y.to(weight.device)
    _, mse = diffusion.loss(model, x0, t, noise, y)
    return (mse / diffusion.factor[t]).sum()


@torch.no_grad()
def bin_losses(model, diffusion, data, K, n, seed):
    """(K,) mean of L^t over n samples of each bin."""
    losses = np.zeros(K)
    for k in range(K):
        for part in draw_bin(data, diffusion.T, K, k, n, seed):
            losses[k] += float(x0_loss(model, diffusion, part)) / n
    return losses


def gram(model, diffusion, data, K, n=64, seed=0, budget=2 ** 30):
    """G (K,K) float64: the inner products of the gradients of L^t in K bins of t, n samples each (eq. 10).

    Exact for any budget: the parameters come in parts whose K gradients take about `budget` bytes, and each
    part costs K backward passes. g_k is estimated from n samples, whose noise adds the gradient's variance / n to
    G_kk on average. Entries off the diagonal come from independent samples and are unbiased. Raises BadInput where a gradient is not finite.
    """
    params = sorted(model.parameters(), key=torch.numel)
    size = 8 * K * sum(p.numel() for p in params)                            # bytes, as float64
    count = min(1 + size // budget, len(params))
    device, since = params[0].device, time.monotonic()
    G = torch.zeros(K, K, dtype=torch.float64, device=device)
    for i in range(count):
        part = params[i::count]                                              # about as large as the others
        rows = torch.zeros(K, sum(p.numel() for p in part), dtype=torch.float64, device=device)
        for k in range(K):
            for samples in draw_bin(data, diffusion.T, K, k, n, seed):
                loss = x0_loss(model, diffusion, samples) / n
                gradients = torch.autograd.grad(loss, part)
                rows[k] += torch.cat([gradient.flatten() for gradient in gradients])
            progress("gradients", i * K + k + 1, count * K, since)
        G += rows @ rows.T
    if not G.isfinite().all():
        raise BadInput("the checkpoint's gradients are not finite; expected a run that has not diverged")
    return G.cpu().numpy()


# ------------------------------------------------------------------- Pareto optimality (section 3.3)

def objective(G, w, lam=0.0):
    """|sum_t w_t g_t|^2 + lam |w|^2 (eq. 11) of weights w (K,) on the simplex."""
    return float(w @ G @ w + lam * (w @ w))


def typical(G):
    """The median of |g_t|^2, the unit of lambda. A single bin with a huge gradient can dominate the mean."""
    return float(np.median(np.diagonal(G)))


def regularised(G, lam):
    """A = G + lam I, so that eq. 11 is w^T A w. The diagonal is also raised by 1e-12 of its least value, so
    that w^T A w stays positive where the gradients cancel but for rounding.
    """
    return G + (lam + 1e-12 * G.diagonal().min()) * np.eye(len(G))


def ugd(G, lam=0.0):
    """w (K,) of eq. 11 by unconstrained gradient descent on beta, w = softmax(beta) (eq. 12, 13).

    The descent is L-BFGS on the logarithm of eq. 13, which does not depend on the scale of G. It starts at
    w_t ~ 1 / |g_t|, between equal weights and 1 / |g_t|^2, the solution for orthogonal gradients. Where w_t
    is nearly 0, so is the slope of beta_t: weights that would gain are lifted, and the descent begins anew.
    """
    A = regularised(G, lam)

    def log_objective(beta):
        w = softmax(beta)
        Aw = A @ w
        f = w @ Aw
        return math.log(f), 2 * w * (Aw - f) / f

    how = dict(maxiter=2000, maxcor=30, ftol=1e-12, gtol=1e-10)
    length = np.sqrt(A.diagonal())
    w = start = 1 / length / (1 / length).sum()
    for _ in range(3):
        Aw = A @ w
        lifted = np.where(Aw < w @ Aw, start, 0)
        beta = np.log(w + 1e-2 * lifted + 1e-30)
        found = minimize(log_objective, beta, jac=True, method="L-BFGS-B", options=how)
        w = softmax(found.x)
    return w


def frank_wolfe(G, lam=0.0, tolerance=1e-3, steps=1_000_000):
    """w (K,) of eq. 11 by Frank-Wolfe with pairwise steps (Lacoste-Julien & Jaggi 2015) and exact line
    search: weight moves from the worst timestep that has any to the best one.
    """
    A = regularised(G, lam)
    w = np.full(len(A), 1 / len(A))
    Aw = A @ w
    for _ in range(steps):
        f = w @ Aw
        best = Aw.argmin()
        gap = 2 * (f - Aw[best])                                             # >= f - f*, as f is convex
        if gap < tolerance * f or f < 1e-10 * A.diagonal().min():
            break
        worst = np.where(w > 0, Aw, -np.inf).argmax()
        curvature = A[best, best] + A[worst, worst] - 2 * A[best, worst]
        move = min(w[worst], (Aw[worst] - Aw[best]) / curvature)
        w[best] += move
        w[worst] -= move
        Aw += move * (A[:, best] - A[:, worst])
    return w


def exact(G, lam=0.0):
    """w (K,) of eq. 11, the referee, by the active sets of Lawson & Hanson's non-negative least squares.

    They minimise |R w|^2 + (sum w - 1)^2 over w >= 0 with R^T R = A; divided by its sum, the solution is that
    of eq. 11. The unknowns are w_t |g_t|, as the lengths may differ by many decades.
    """
    A = regularised(G, lam)
    length = np.sqrt(A.diagonal())
    values, vectors = np.linalg.eigh(A / np.outer(length, length))
    R = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    rows = np.vstack([R, length.min() / length])
    right = np.append(np.zeros(len(A)), 1.0)
    scaled, _ = nnls(rows, right, maxiter=30 * len(A))
    w = scaled / length
    return w / w.sum()


def common_descent(G, w, tolerance=1e-6):
    """What the direction -u = -sum_t w_t g_t does (theorem 1).

    "descent": every <g_t, u> >= 0, so a small step raises the loss of no timestep (eq. 8). "stationary":
    u = 0 but for rounding. "conflict": a step raises the loss of some timestep. For w that solves eq. 10 it
    is never "conflict", as <g_t, u> >= |u|^2 for all t (appendix A).
    """
    inner = G @ w                                                            # <g_t, u>
    u2 = w @ inner
    if u2 <= tolerance * (w ** 2 @ G.diagonal()):
        return "stationary"
    if inner.min() < -tolerance * u2:
        return "conflict"
    return "descent"


# ----------------------------------------------------------------- weights over t (section 3.4), checkpoints

def weights_of(weighting, gamma, snr, K):
    """(K,) of section 3.4: a weighting of the table, on the x0 loss, added up in each bin, with sum 1."""
    w = loss_weight(snr, weighting, "x0", gamma).cpu().numpy()
    return np.add.reduceat(w, edges(len(w), K)[:-1]) / w.sum()


def ugd_table(model, diffusion, data, K, n, lam, seed):
    """(T,) weights of the x0 loss with mean 1: UGD's in K bins, linear between their centres. lam is relative
    to the median of |g_t|^2.
    """
    G = gram(model, diffusion, data, K, n, seed)
    borders = np.array(edges(diffusion.T, K))
    centres = (borders[:-1] + borders[1:] - 1) / 2
    per_timestep = ugd(G, lam * typical(G)) / np.diff(borders)
    w = np.interp(np.arange(diffusion.T), centres, per_timestep)
    return w / w.mean()


def load(path, data=None):
    """-> (model with its EMA weights on the device, diffusion, data) of a checkpoint or run folder.

    `data` is a packed folder in place of the checkpoint's own. Raises BadInput where network and data do not fit.
    """
    model, config = load_checkpoint(path)
    if config.get("dataset") == "shapes" and not data:
        images = built_in(model.img_size)
    else:
        images = Packed(data or config.get("data") or f"data/{config.get('dataset')}")
    images.flip = config.get("flip", False)
    found = images.channels, images.size, len(images.classes)
    expected = model.in_channels, model.img_size, model.num_classes or len(images.classes)
    if found != expected:
        raise BadInput(f"{path}: its network has channels, side and classes {expected}, the data {found}")
    _, _, device = processes()
    diffusion = Diffusion(config["schedule"], config["T"], config["target"])
    return to_device(model, device), diffusion.to(device), images


# ------------------------------------------------------------------------------------------------- commands

def objective_command(ckpt, K, n, seed, lam, out):
    """Eq. 11 for every weighting of the table, UGD and Frank-Wolfe, over the exact optimum (figure 4)."""
    model, diffusion, data = load(ckpt)
    G = gram(model, diffusion, data, K, n, seed)
    lam *= typical(G)
    best = objective(G, exact(G, lam), lam)
    solutions = dict(ugd=ugd(G, lam), frank_wolfe=frank_wolfe(G, lam))
    for name, gamma in TABLE:
        solutions[called(name, gamma)] = weights_of(name, gamma, diffusion.snr, K)
    rows = []
    for name, w in solutions.items():
        value = objective(G, w, lam)
        row = dict(weighting=name, objective=value, over_optimum=value / best)
        rows.append(dict(row, direction=common_descent(G, w)))
    write_csv(out, rows)


def fine_tuned(model, diffusion, data, tenth, steps, seed, lr=1e-4):
    """A copy of the model, trained for a while on one tenth of the timesteps alone, 64 samples a step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.99), weight_decay=0)
    for step in range(steps):
        [samples] = draw_bin(data, diffusion.T, 10, tenth, 64, f"{seed} {step}")
        optimizer.zero_grad()
        loss = x0_loss(model, diffusion, samples) / 64
        loss.backward()
        optimizer.step()
    return model


def finetune_command(ckpt, K, n, seed, steps, out):
    """Change of every bin's loss when one tenth of t is trained alone (figure 2). "tenth 1" is t from T/10 to
    2T/10 - 1, the second of ten.
    """
    model, diffusion, data = load(ckpt)
    before = bin_losses(model, diffusion, data, K, n, seed)
    rows = []
    for tenth in (1, 2, 3):
        tuned = fine_tuned(model, diffusion, data, tenth, steps, seed)
        after = bin_losses(tuned, diffusion, data, K, n, seed)
        percent = 100 * (after / before - 1)
        for t, change in zip(edges(diffusion.T, K), percent):
            rows.append(dict(trained_on=f"tenth {tenth}", t=t, percent=change))
    write_csv(out, rows)


def quality(model, config, diffusion, data, n):
    """One line of quality.csv. n samples (Heun, 18 steps, no guidance, as many of each class) are compared
    with 2,048 random images of the data. x0 errors are means over n images in each of ten bins of t; low is
    t < T/2.
    """
    batches = batches_of(range(n), 256 if diffusion.snr.is_cuda else 64)
    drawn = torch.cat([draw(model, config, ks, steps=18) for ks in batches])
    order = torch.randperm(len(data), generator=generator("real", 0, 0))
    real = data.images[order[:2048].numpy()]
    errors = bin_losses(model, diffusion, data, 10, n, "quality")
    row = dict(step=config["step"], n=n, fd_pixels=fd_pixels(drawn, real), fd_judge=math.nan,
               recognised=math.nan, x0_mse=errors.mean(), x0_mse_low=errors[:5].mean(),
               x0_mse_high=errors[5:].mean())
    if model.num_classes:
        labels = torch.arange(n) % model.num_classes
        row.update(fd_judge=fd_judge(data, drawn, real), recognised=recognised(data, drawn, labels))
    return row


def measure_command(ckpt, n):
    """Add a line to a run's quality.csv for each snapshot and for ckpt.pt, of the EMA weights: FD-pixels, FD
    of the judge's features, the share of samples that the judge recognises, x0 errors. Steps that are there
    are left out.
    """
    folder = Path(ckpt)
    if folder.is_file():
        raise BadInput(f"--ckpt {ckpt}: is a file, expected the folder of a run")
    file = folder / "quality.csv"
    rows = read_csv(file) if file.exists() else []
    for row in rows:
        entry(row, "step", int)
        if row.get("n", str(n)) not in (str(n), "nan"):                      # the distances depend on n
            raise BadInput(f"--n {n}: {file} has lines of {row['n']} samples; remove it, or keep to that number")
    model, diffusion, data = load(ckpt)
    if data.latents:
        raise BadInput(f"--ckpt {ckpt}: draws latents, expected pixels")
    if not model.num_classes:
        say("the run has no classes: fd_judge and recognised are nan")
    for path in [*sorted(folder.glob("snapshot_*.pt")), folder / "ckpt.pt"]:
        model, config = load_checkpoint(path)
        if config["step"] in [int(row["step"]) for row in rows]:
            say(f"{path}: step {config['step']} is measured already")
            continue
        row = quality(to_device(model, diffusion.snr.device), config, diffusion, data, n)
        columns = dict.fromkeys(row, math.nan)
        rows = [columns | before for before in rows]                         # older files lack columns
        write_csv(file, [*rows, row])
        rows.append(row)


def needed(curve, goal):
    """The step at which a curve {step: error} first gets down to the goal, as text, "-" if never. Between two
    steps the error is linear in the step's logarithm.
    """
    last = None
    for step, error in curve.items():
        if error <= goal:
            if last is None:
                return f"<={step}"
            share = (curve[last] - goal) / (curve[last] - error)
            return f"{last * (step / last) ** share:.0f}"
        last = step
    return "-"


def needs_command(runs, out):
    """Errors of each weighting at the last step, and the steps at which its seeds get down to the mean of the
    weighting that is then the best, for each data set and target. A run that did not get to the last step
    makes its weighting's mean nan.
    """
    panels, rows = {}, []
    for folder in dict.fromkeys(map(Path, runs)):                            # each once
        config, file = read_json(folder / "config.json"), folder / "quality.csv"
        lines = read_csv(file) if file.exists() else []
        if not lines:
            say(f"warning: {folder} has no quality.csv: its weighting's mean is nan")
        for line in lines:
            line["not_recognised"] = 1 - entry(line, "recognised", float)
        for column in ("fd_pixels", "fd_judge", "not_recognised", "x0_mse"):
            panel = panels.setdefault((config["dataset"], config["target"], column), {})
            seeds = panel.setdefault(called(config["weighting"], config["gamma"]), [])
            curve = {int(line["step"]): entry(line, column, float) for line in lines}
            seeds.append(dict(sorted(curve.items())))
    for (dataset, target, column), panel in panels.items():
        end = max(max(curve, default=0) for seeds in panel.values() for curve in seeds)
        last = {name: [curve.get(end, math.nan) for curve in panel[name]] for name in panel}
        means = {name: np.mean(values) for name, values in last.items()}
        best = np.fmin.reduce(list(means.values()))                          # nan only where all are
        for name, seeds in panel.items():
            steps = " ".join(needed(curve, best) for curve in seeds)
            row = dict(dataset=dataset, target=target, error=column, weighting=name, step=end)
            rows.append(dict(row, mean=means[name], low=min(last[name]), high=max(last[name]), needs=steps))
    write_csv(out, rows)


def ugd_command(ckpt, K, n, seed, lam, out):
    """T weights of the x0 loss by UGD (eq. 12, 13), for train.py --weighting FILE; figure 3 draws several."""
    model, diffusion, data = load(ckpt)
    table = ugd_table(model, diffusion, data, K, n, lam, seed)
    write_csv(out, [dict(t=t, weight=w) for t, w in enumerate(table)])


FLAGS = dict(
    ckpt=dict(required=True, help="run folder of train.py; for all but measure, a checkpoint too"),
    runs=dict(required=True, nargs="+", help="run folders that were measured"),
    K=dict(type=at_least(1), default=50, help="bins of t"),
    n=dict(type=at_least(2), default=256, help="samples a bin; measure: images, too"),
    seed=dict(type=at_least(0), default=0, help="of samples and noise"),
    lam=dict(type=positive, default=0.01, help="lambda of eq. 11, over the median of |g_t|^2"),
    steps=dict(type=at_least(1), default=200, help="optimizer steps"),
    out=dict(required=True, help="CSV file"),
)
COMMANDS = dict(
    objective=objective_command,
    finetune=finetune_command,
    measure=measure_command,
    needs=needs_command,
    ugd=ugd_command,
)


def main():
    """A command's flags are the parameters of its function."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, call in COMMANDS.items():
        command = commands.add_parser(name, doc=call.__doc__)
        command.set_defaults(call=call)
        for flag in inspect.signature(call).parameters:
            command.add_argument(f"--{flag}", **FLAGS[flag])
    flags = vars(parser.parse_args())
    call = flags.pop("call")
    call(**flags)


if __name__ == "__main__":
    run(main)
