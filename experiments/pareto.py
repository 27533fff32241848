"""Why timesteps conflict, and which weights serve them all: sections 3.2 to 3.4 of the Min-SNR paper.

    python -m experiments.pareto objective --ckpt out/shapes --out objective.csv    # how far from optimal: figure 4
    python -m experiments.pareto finetune --ckpt out/shapes --out finetune.csv      # one tenth alone: figure 2
    python -m experiments.pareto measure --ckpt out/shapes                    # how good each snapshot of a run is
    python -m experiments.pareto needs --runs out/min_snr/*/ --out needs.csv  # which weighting gets there sooner
    python -m experiments.pareto ugd --ckpt out/shapes --out w.csv            # weights, for train.py --weighting

`python -m experiments.figures` draws the CSV files. Figure 3 shows several files of `ugd`, each with another --n or
--seed. To train with UGD's weights, take turns: `train.py --out out/ugd --decay 0 --steps 500`, then `ugd`, then
`train.py --resume --out out/ugd --steps 1000 --weighting w.csv`, and so on.

Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023; equation numbers are that
paper's. The timesteps 0 .. T-1 are cut into K bins of neighbours; for K = T each timestep is a bin. g_k is the
gradient, by all the network's parameters, of the mean unweighted x0 loss in bin k. The Pareto problem asks for
weights w_k >= 0 of sum 1 that make sum_k w_k g_k the shortest. It needs only the gradients' inner products, the Gram
matrix G (K,K), G_jk = <g_j, g_k>. UGD, unconstrained gradient descent, is the paper's way to solve it.
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
from train import FREE

TABLE = [  # the weightings of section 3.4 and their gamma, which const and snr do not use
    ("const", 1),
    ("snr", 1),
    ("max_snr", 1),
    ("min_snr", 1),
    ("min_snr", 5),
    ("min_snr", 10),
    ("min_snr", 20),
]
MAY_DIFFER = {"weighting", "gamma", "seed", *FREE}                           # settings of runs that `needs` compares


# ------------------------------------------------------------- gradients of the timesteps (section 3.2)

def edges(T, K):
    """The K + 1 borders of the bins: bin k is t = edges[k] .. edges[k + 1] - 1."""
    if not 1 <= K <= T:
        raise BadInput(f"found {K} bins of t, expected 1 to {T}, the number of timesteps")
    return [k * T // K for k in range(K + 1)]


def draw_bin(data, T, K, k, n, seed):
    """n samples of bin k, in parts of up to 64. Each part is x0 (B,C,S,S), t (B,), noise like x0, y (B,). seed is a
    number or a text. For one data set the samples depend on (seed, T, K, k, n) alone.
    """
    g = generator("pareto", seed, k)
    low, high = edges(T, K)[k:k + 2]
    indices = torch.randint(len(data), (n,), generator=g)
    x0, y = data.batch(indices, g)
    t = torch.randint(low, high, (n,), generator=g)
    noise = torch.randn(x0.shape, generator=g)
    return zip(*[values.split(64) for values in (x0, t, noise, y)])


def x0_loss(model, diffusion, part):
    """Sum over the part's samples of L^t, the unweighted squared error of x0, whatever the network predicts."""
    device = next(model.parameters()).device
    x0, t, noise, y = [values.to(device) for values in part]
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

    All K gradients at once may not fit into the memory. So the parameters are cut into parts whose K gradients take
    about `budget` bytes, and G is the sum of the parts' Gram matrices; each part costs K backward passes over all n
    samples. Samples are few: on average their noise adds the variance of one sample's gradient / n to G_kk. The
    other entries come from independent samples and are right on average. Raises BadInput where a gradient is not
    finite.
    """
    params = sorted(model.parameters(), key=torch.numel)
    needed_bytes = 8 * K * sum(p.numel() for p in params)                    # as float64
    count = min(1 + needed_bytes // budget, len(params))
    device = params[0].device
    G = torch.zeros(K, K, dtype=torch.float64, device=device)
    since = time.monotonic()
    for i in range(count):
        part = params[i::count]                  # by size, every count-th: the parts are about equally large
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
# In this section t counts the bins, as in the paper, where each timestep is one: g_t and w_t are the g_k and w_k
# above.

def objective(G, w, lam=0.0):
    """|sum_t w_t g_t|^2 + lam |w|^2 (eq. 11) of weights w (K,), which are >= 0 and have the sum 1."""
    return float(w @ G @ w + lam * (w @ w))


def typical(G):
    """The median of |g_t|^2, the unit of --lam. A single bin with a huge gradient would dominate the mean."""
    return float(np.median(G.diagonal()))


def regularised(G, lam):
    """A = G + lam I, so that eq. 11 is w^T A w, as |w|^2 = w^T I w. Where the gradients cancel, rounding could make
    w^T A w negative; to keep it positive, 1e-12 of the least |g_t|^2 is added as well.
    """
    return G + (lam + 1e-12 * G.diagonal().min()) * np.eye(len(G))


def ugd(G, lam=0.0):
    """w (K,) of eq. 11 by unconstrained gradient descent on beta, w = softmax(beta) (eq. 12, 13).

    The descent is L-BFGS, on the logarithm of eq. 13, so that the scale of G does not matter. It starts at w_t
    proportional to 1 / sqrt(A_tt), where A_tt = |g_t|^2 + lam: halfway between equal weights and 1 / A_tt, the
    solution for orthogonal gradients. A w_t that is nearly 0 hardly moves, as the slope by beta_t is proportional to
    it. So the descent runs three times, and before each the weights that would lower the objective by growing get
    1 % of their start.
    """
    A = regularised(G, lam)

    def log_objective(beta):
        w = softmax(beta)
        Aw = A @ w
        f = w @ Aw
        return math.log(f), 2 * w * (Aw - f) / f                             # and its slope by beta

    how = dict(maxiter=2000, maxcor=30, ftol=1e-12, gtol=1e-10)
    inverse_length = 1 / np.sqrt(A.diagonal())
    w = start = inverse_length / inverse_length.sum()
    for _ in range(3):
        Aw = A @ w
        lift = np.where(Aw < w @ Aw, start, 0)
        beta = np.log(w + 1e-2 * lift + 1e-30)
        found = minimize(log_objective, beta, jac=True, method="L-BFGS-B", options=how)
        w = softmax(found.x)
    return w


def frank_wolfe(G, lam=0.0, tolerance=1e-3, steps=1_000_000):
    """w (K,) of eq. 11 by Frank-Wolfe with pairwise steps (Lacoste-Julien & Jaggi 2015): in each step weight moves
    from the worst timestep that has any to the best one, as much as lowers the objective f most.
    """
    A = regularised(G, lam)
    w = np.full(len(A), 1 / len(A))
    Aw = A @ w
    for _ in range(steps):
        f = w @ Aw
        best = Aw.argmin()
        gap = 2 * (f - Aw[best])                 # f is convex: it is at most this far above the optimum
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
    """w (K,) of eq. 11 but for rounding, which the other two are compared with, by non-negative least squares
    (Lawson & Hanson 1974).

    They minimise |R w|^2 + (sum w - 1)^2 over w >= 0, where R^T R = A, so |R w|^2 = w^T A w; divided by its sum, the
    solution is that of eq. 11. Lengths |g_t| may differ by many decades: the unknowns are w_t sqrt(A_tt), in
    which A has the diagonal 1.
    """
    A = regularised(G, lam)
    length = np.sqrt(A.diagonal())
    values, vectors = np.linalg.eigh(A / np.outer(length, length))
    R = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    rows = np.vstack([R, length.min() / length])                             # the last: sum w, up to a factor
    right = np.append(np.zeros(len(A)), 1.0)
    scaled, _ = nnls(rows, right, maxiter=30 * len(A))
    w = scaled / length
    return w / w.sum()


def common_descent(G, w, tolerance=1e-6):
    """What a small step along -u = -sum_t w_t g_t does (theorem 1).

    "descent": it raises the loss of no timestep, as every <g_t, u> >= 0 (eq. 8). "conflict": it raises that of some.
    "stationary": u = 0 but for rounding, so there is no step. For the w that solves eq. 10 it is never "conflict", as
    <g_t, u> >= |u|^2 for all t (appendix A).
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
    """(K,) the weights that a weighting gives to the x0 loss, summed in each bin; their sum is 1."""
    w = loss_weight(snr, weighting, "x0", gamma).cpu().numpy()
    return np.add.reduceat(w, edges(len(w), K)[:-1]) / w.sum()


def ugd_table(model, diffusion, data, K, n, lam, seed):
    """(T,) weights of the x0 loss with mean 1: UGD's in K bins, linear between the bins' centres. lam is in units
    of the median of |g_t|^2.
    """
    G = gram(model, diffusion, data, K, n, seed)
    borders = np.array(edges(diffusion.T, K))
    centres = (borders[:-1] + borders[1:] - 1) / 2
    per_timestep = ugd(G, lam * typical(G)) / np.diff(borders)
    w = np.interp(np.arange(diffusion.T), centres, per_timestep)
    return w / w.mean()


def load(path, data=None):
    """-> (model with its EMA weights on the device, diffusion, data) of a checkpoint or run folder.

    The diffusion has the run's schedule and target, but not its weighting: this file needs unweighted errors alone.
    `data` is a packed folder in place of the checkpoint's own. Raises BadInput where network and data do not fit.
    """
    model, config = load_checkpoint(path)
    if config["dataset"] == "shapes" and not data:
        images = built_in(model.img_size)
    else:
        images = Packed(data or config.get("data") or f"data/{config['dataset']}")
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
    """Eq. 11 for seven weightings, UGD and Frank-Wolfe, over the exact optimum, and what a small step with these
    weights does (figure 4).
    """
    model, diffusion, data = load(ckpt)
    G = gram(model, diffusion, data, K, n, seed)
    absolute_lam = lam * typical(G)
    best = objective(G, exact(G, absolute_lam), absolute_lam)
    solutions = dict(ugd=ugd(G, absolute_lam), frank_wolfe=frank_wolfe(G, absolute_lam))
    for name, gamma in TABLE:
        solutions[called(name, gamma)] = weights_of(name, gamma, diffusion.snr, K)
    rows = []
    for name, w in solutions.items():
        value = objective(G, w, absolute_lam)
        rows.append(dict(weighting=name, objective=value, over_optimum=value / best,
                         direction=common_descent(G, w)))
    write_csv(out, rows)


def fine_tuned(model, diffusion, data, tenth, steps, seed, lr=1e-4):
    """A copy of the model, trained on one tenth of the timesteps alone, 0 to 9, with 64 samples a step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr, (0.9, 0.99))
    for step in range(steps):
        [samples] = draw_bin(data, diffusion.T, 10, tenth, 64, f"{seed} {step}")         # 64 samples are one part
        optimizer.zero_grad()
        loss = x0_loss(model, diffusion, samples) / 64
        loss.backward()
        optimizer.step()
    return model


def finetune_command(ckpt, K, n, seed, steps, out):
    """Change of every bin's loss in per cent when one tenth of t is trained alone (figure 2). "tenth 1" is t from
    T/10 to 2T/10 - 1, the second of ten.
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
    """One line of quality.csv. n samples (Heun, 18 steps, no guidance, as many of each class) are compared with 2,048
    random images of the data. x0 errors are means over n images in each of ten bins of t; low is t < T/2.
    """
    labels = torch.arange(n) % max(model.num_classes, 1)
    batches = batches_of(range(n), 256 if diffusion.snr.is_cuda else 64)
    drawn = torch.cat([draw(model, config, ks, labels=labels.tolist(), steps=18) for ks in batches])
    order = torch.randperm(len(data), generator=generator("real", 0, 0))
    real = data.images[order[:2048].numpy()]
    distance = share = math.nan
    if model.num_classes:
        distance = fd_judge(data, drawn, real)
        share = recognised(data, drawn, labels)
    errors = bin_losses(model, diffusion, data, 10, n, "quality")
    return dict(step=config["step"], n=n, fd_pixels=fd_pixels(drawn, real), fd_judge=distance, recognised=share,
                x0_mse=errors.mean(), x0_mse_low=errors[:5].mean(), x0_mse_high=errors[5:].mean())


def measure_command(ckpt, n):
    """Add a line to a run's quality.csv for each snapshot and for ckpt.pt, of the EMA weights: FD-pixels, FD of the
    judge's features, the share of samples that the judge recognises, x0 errors. Steps that are there are left out.
    """
    folder = Path(ckpt)
    if folder.is_file():
        raise BadInput(f"--ckpt {ckpt}: is a file, expected the folder of a run")
    file = folder / "quality.csv"
    rows = {}                                                                # of each step that is measured
    for row in read_csv(file) if file.exists() else []:
        rows[entry(row, "step", int)] = row
        if entry(row, "n") != str(n):                                        # the distances depend on n
            raise BadInput(f"--n {n}: {file} has lines of {row['n']} samples; remove it, or keep to that number")
        entry(row, "x0_mse_high")                                            # the last column
    model, diffusion, data = load(ckpt)
    if data.latents:
        raise BadInput(f"--ckpt {ckpt}: draws latents, expected pixels")
    if not model.num_classes:
        say("the run has no classes: fd_judge and recognised are nan")
    for path in [*sorted(folder.glob("snapshot_*.pt")), folder / "ckpt.pt"]:
        model, config = load_checkpoint(path)
        step = config["step"]
        if step in rows:
            say(f"{path}: step {step} is measured already")
            continue
        rows[step] = quality(to_device(model, diffusion.snr.device), config, diffusion, data, n)
        write_csv(file, list(rows.values()))


def error_curves(folder):
    """{error: {step: its value}} of a run's quality.csv; not_recognised is 1 - recognised."""
    file = folder / "quality.csv"
    lines = read_csv(file) if file.exists() else []
    if not lines:
        say(f"warning: {folder} has no quality.csv: its weighting's mean is nan")
    curves = dict(fd_pixels={}, fd_judge={}, not_recognised={}, x0_mse={})
    for line in lines:
        step = entry(line, "step", int)
        line["not_recognised"] = 1 - entry(line, "recognised", float)
        for error, curve in curves.items():
            curve[step] = entry(line, error, float)
    return curves


def needed(curve, goal):
    """The step at which a curve {step: error} first gets down to the goal, as text: "<=STEP" if it is there at its
    first step, "-" if it never is. Between two steps the error is linear in the step's logarithm.
    """
    last = None
    for step, error in sorted(curve.items()):
        if error <= goal:
            if last is None:
                return f"<={step}"
            share = (curve[last] - goal) / (curve[last] - error)
            return f"{last * (step / last) ** share:.0f}"
        last = step
    return "-"


def needs_command(runs, out):
    """For each data set, target and error: the error of each weighting at the last step, as mean, lowest and highest
    of its seeds, and the step at which each seed gets down to the mean of the weighting that is then the best. A run
    that did not get to the last step makes its weighting's three numbers nan.
    """
    panels, firsts, rows = {}, {}, []
    for folder in dict.fromkeys(map(Path, runs)):                            # each once
        config = read_json(folder / "config.json")
        dataset, target = entry(config, "dataset"), entry(config, "target")
        first = firsts.setdefault((dataset, target), config)
        differing = {key for key in config if config[key] != first.get(key)} - MAY_DIFFER
        if differing:
            raise BadInput(f"--runs {folder}: {', '.join(sorted(differing))} differ from an earlier run's with "
                           f"{dataset} and {target}; expected runs of several weightings and seeds, else alike")
        weighting = called(config["weighting"], config["gamma"])
        for error, curve in error_curves(folder).items():
            panel = panels.setdefault((dataset, target, error), {})
            panel.setdefault(weighting, []).append(curve)
    for (dataset, target, error), panel in panels.items():
        end = max(max(curve, default=0) for seeds in panel.values() for curve in seeds)
        table = []
        for weighting, seeds in panel.items():
            last = np.array([curve.get(end, math.nan) for curve in seeds])
            early = sum(end not in curve for curve in seeds)
            if early and error == "x0_mse":                                  # once, not for each error
                say(f"warning: {dataset} {target} {weighting}: {early} of {len(seeds)} runs are not measured at step "
                    f"{end}, so the means are nan")
            table.append(dict(dataset=dataset, target=target, error=error, weighting=weighting, step=end,
                              mean=last.mean(), low=last.min(), high=last.max()))
        best = np.fmin.reduce([row["mean"] for row in table])                # nan only where all are
        for row in table:
            row["needs"] = " ".join(needed(curve, best) for curve in panel[row["weighting"]])
        rows += table
    write_csv(out, rows)


def ugd_command(ckpt, K, n, seed, lam, out):
    """A weight of the x0 loss for each t by UGD (eq. 12, 13), for train.py --weighting; figure 3 draws several."""
    model, diffusion, data = load(ckpt)
    table = ugd_table(model, diffusion, data, K, n, lam, seed)
    write_csv(out, [dict(t=t, weight=w) for t, w in enumerate(table)])


FLAGS = dict(
    ckpt=dict(required=True, help="run folder of train.py; a checkpoint too, but not for measure"),
    runs=dict(required=True, nargs="+", help="run folders that were measured"),
    K=dict(type=at_least(1), default=50, help="bins of t"),
    n=dict(type=at_least(2), default=256, help="samples in each bin; for measure, also of images"),
    seed=dict(type=at_least(0), default=0, help="of samples and noise"),
    lam=dict(type=positive, default=0.01, help="lambda of eq. 11, in units of the median of |g_t|^2"),
    steps=dict(type=at_least(1), default=200, help="optimizer steps"),
    out=dict(required=True, help="CSV file"),
)


def main():
    """A command's flags are the parameters of its function."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for call in (objective_command, finetune_command, measure_command, needs_command, ugd_command):
        command = commands.add_parser(call.__name__.removesuffix("_command"), doc=call.__doc__)
        command.set_defaults(call=call)
        for flag in inspect.signature(call).parameters:
            command.add_argument(f"--{flag}", **FLAGS[flag])
    flags = vars(parser.parse_args())
    call = flags.pop("call")
    call(**flags)


if __name__ == "__main__":
    run(main)
