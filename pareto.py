"""Why timesteps conflict, and who serves them all: sections 3.2 to 3.4 of the Min-SNR paper, run and drawn.

    python pareto.py miniature                    # trains 12 combinations x 3 seeds and draws all the figures
    python pareto.py figure4 --ckpt out/shapes    # Pareto objective of the table's weightings and of UGD
    python pareto.py figure6 --runs out/a out/b   # x0 error of train.py's runs in the paper's ranges of t

Other figures: weights, figure2 and figure3 --ckpt, figure5 --runs. Hang et al., "Efficient Diffusion Training
via Min-SNR Weighting Strategy", ICCV 2023; equation numbers are that paper's. The range 0 .. T-1 is cut into
K bins (K = T: the timesteps themselves), g_k is the gradient of the unweighted x0 loss in bin k, and all that
the Pareto objective needs of them is the Gram matrix G (K,K), G_jk = <g_j, g_k>.
"""
import argparse
import copy
import csv
import functools
import json
import math
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import minimize, nnls
from scipy.special import softmax

from data import Packed, built_in, generator, shapes
from diffusion import TARGETS, WEIGHTINGS, Diffusion, loss_weight
from fid import fd_pixels
from files import BadInput, Parser, progress, read, read_json, replace, run
from sample import draw, load_checkpoint, to_device


# ------------------------------------------------------------- gradients of the timesteps (section 3.2)

def edges(T, K):
    """The K + 1 borders of the bins: bin k is t = edges[k] .. edges[k + 1] - 1."""
    return [k * T // K for k in range(K + 1)]


def draw_bin(data, T, K, k, n, seed):
    """x0, t, noise, y of n samples of bin k, 64 at a time; they depend on (seed, K, k, n) alone."""
    g, (low, high) = generator("pareto", seed, k), edges(T, K)[k:k + 2]
    indices = torch.randint(len(data), (n,), generator=g)
    x0, y = data.batch(indices.numpy(), g)
    t = torch.randint(low, high, (n,), generator=g)
    noise = torch.randn(x0.shape, generator=g)
    return zip(*(values.split(64) for values in (x0, t, noise, y)))


def x0_loss(model, diffusion, part):
    """Sum over the part's samples of L^t, the mean squared error of x0, whatever the network predicts."""
    weight = next(model.parameters())                                        # its device and dtype
    x0, t, noise, y = (values.to(weight.device) for values in part)
    mse = diffusion.loss(model, x0.to(weight.dtype), t, noise.to(weight.dtype), y)[1]
    return (mse / diffusion.factor.to(weight.device)[t]).sum()


def gram(model, diffusion, data, K, n=64, seed=0, budget=2 ** 30, project=0, quiet=True):
    """G (K,K) float64: the inner products of the gradients of L^t in K bins of t, n samples each (eq. 10).

    Exact: parameters come in chunks, whose K gradients fill at most `budget` bytes; every chunk costs K
    backward passes. project = m: one chunk, each gradient hashed to m numbers, a count sketch (Charikar et
    al. 2002) drawn from the seed; entry jk is then off by about |g_j| |g_k| / sqrt(m). Where processes train
    together, each takes its share of the bins. A mean of n samples is longer than the mean of all: on average
    G_kk is too large by a sample's variance / n, and entries off the diagonal, of other samples, are right.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    params = [p for p in model.parameters() if p.requires_grad]
    starts = np.cumsum([0, *(p.numel() for p in params)]).tolist()
    P, weight = starts[-1], params[0]
    width = P if project else max(1, budget // (K * weight.element_size()))
    if project:
        g = generator("sketch", seed, 0)
        bucket = torch.randint(project, (P,), generator=g, dtype=torch.int32).to(weight.device)
        sign = torch.randint(2, (P,), generator=g, dtype=torch.int8).mul_(2).sub_(1).to(weight.device)
    G = torch.zeros(K, K, dtype=torch.float64, device=weight.device)
    since, firsts = time.monotonic(), range(0, P, width)
    for i, first in enumerate(firsts):
        last = min(first + width, P)
        inside = [(p, a) for p, a in zip(params, starts) if a < last and a + p.numel() > first]
        rows = weight.new_zeros(K, project or last - first)
        for k in range(rank, K, world):
            for part in draw_bin(data, diffusion.T, K, k, n, seed):
                grads = torch.autograd.grad(x0_loss(model, diffusion, part) / n, [p for p, _ in inside])
                flat = torch.cat([grad.flatten() for grad in grads])         # from inside[0][1] on
                flat = flat[first - inside[0][1]:last - inside[0][1]]
                if project:
                    rows[k].index_add_(0, bucket, flat * sign)
                else:
                    rows[k] += flat
            if not quiet:
                progress("gradients", i * K + k + 1, len(firsts) * K, since)
        if world > 1:
            dist.all_reduce(rows)                                            # others are zeros: exact
        for columns in rows.split(8192, 1):                                  # (K,8192): few doubles at a time
            G += columns.double() @ columns.double().T
    return G.cpu().numpy()


# ------------------------------------------------------------------- Pareto optimality (section 3.3)

def objective(G, w, lam=0.0):
    """|sum_t w_t g_t|^2 + lam |w|^2 (eq. 11) of weights w (K,) on the simplex."""
    return float(w @ G @ w + lam * (w @ w))


def typical(G):
    """|g_t|^2 of a bin in the middle, which lambda is relative to: the mean may be one bin's alone."""
    return float(np.median(np.diagonal(G)))


def regularised(G, lam):
    """A = G + lam I, so that eq. 11 is w^T A w, and the |u|^2 below which a direction u counts as 0."""
    A = np.asarray(G, dtype=np.float64) + lam * np.eye(len(G))
    return A, 1e-11 * (A.diagonal().min() or A.diagonal().max() or 1.0)


def gap(Aw, f):
    """Upper bound of f - f*, the distance from the optimum, as a share of f: first-order, f being convex."""
    return 2 * (f - Aw.min()) / f


def ugd(G, lam=0.0, tolerance=1e-4, rounds=6):
    """w (K,) of eq. 11 by unconstrained gradient descent on beta, w = softmax(beta) (eq. 12, 13).

    The descent is L-BFGS on the logarithm of eq. 13, blind to the scale of G, from 1 / |g_t|^2, the solution
    for orthogonal gradients. Where w_t has come close to 0, so has its slope: the weights that would gain are
    lifted and the descent begins anew, until `gap` is below the tolerance, for so many rounds at most: where
    the squared lengths differ by ten decades and more, the objective may then be some 10 % above the optimum.
    """
    A, zero = regularised(G, lam)

    def log_objective(beta):
        w = softmax(beta)
        Aw = A @ w
        f = max(w @ Aw, 0) + zero
        return math.log(f), 2 * w * (Aw - f) / f

    beta, how = -np.log(A.diagonal() + zero), dict(maxiter=1000, ftol=1e-10, gtol=1e-9)
    start = softmax(beta)
    for _ in range(rounds):
        w = softmax(minimize(log_objective, beta, jac=True, method="L-BFGS-B", options=how).x)
        Aw = A @ w
        f = w @ Aw
        if f <= 10 * zero or gap(Aw, f) < tolerance:
            break
        gain = np.where(Aw < f, start, 0)
        beta = np.log(w + 1e-2 * gain / gain.sum() + 1e-30)
    return w


def frank_wolfe(G, lam=0.0, tolerance=1e-3, steps=1_000_000):
    """w (K,) of eq. 11 by Frank-Wolfe with pairwise steps (Lacoste-Julien & Jaggi 2015) and exact line
    search: weight moves from the worst timestep that has any to the best one.
    """
    A, zero = regularised(G, lam)
    w = np.full(len(A), 1 / len(A))
    Aw = A @ w
    for step in range(steps):
        f, best = w @ Aw, Aw.argmin()
        if f <= 10 * zero or gap(Aw, f) < tolerance:
            break
        worst = np.where(w > 0, Aw, -np.inf).argmax()
        bend = A[best, best] + A[worst, worst] - 2 * A[best, worst]          # of f along the step, / 2
        move = min((Aw[worst] - Aw[best]) / bend, w[worst]) if bend > 0 else w[worst]
        w[best], w[worst] = w[best] + move, w[worst] - move
        Aw += move * (A[:, best] - A[:, worst])
    return w


def exact(G, lam=0.0):
    """w (K,) of eq. 11, the referee: Lawson & Hanson's active sets for |R w|^2 + (sum w - 1)^2, w >= 0, with
    R^T R = A, whose solution is that of eq. 11 but for its sum. Solved for w_t |g_t|, as lengths differ by
    many decades.
    """
    A, zero = regularised(G, lam)
    length = np.sqrt(A.diagonal() + zero)
    values, vectors = np.linalg.eigh(A / np.outer(length, length))
    R = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    rows, right = np.vstack([R, length.min() / length]), np.append(np.zeros(len(A)), 1.0)
    w = nnls(rows, right, maxiter=30 * len(A))[0] / length
    return w / w.sum()


def common_descent(G, w, tolerance=1e-6):
    """What -u = -sum_t w_t g_t does (theorem 1): "descent", every <g_t, u> >= 0: a small step along it raises
    the loss of no timestep (eq. 8); "stationary", u = 0 but for rounding; "conflict", it raises that of some.

    For w that solves eq. 10 it is never the last: <g_t, u> >= |u|^2 for all t (appendix A).
    """
    inner = G @ w                                                            # <g_t, u>
    if w @ inner <= tolerance * (w ** 2 @ G.diagonal()):                     # it cancels
        return "stationary"
    return "descent" if inner.min() >= -tolerance * (w @ inner) else "conflict"


def weights_of(weighting, snr, K, gamma=5.0):
    """(K,) of section 3.4: a weighting of the table, on the x0 loss, added up in each bin, with sum 1."""
    w = loss_weight(snr, weighting, "x0", gamma).cpu().numpy()
    return np.add.reduceat(w, edges(len(w), K)[:-1]) / w.sum()


def ugd_table(model, diffusion, data, K, n, lam, seed):
    """(T,) weights of the x0 loss with mean 1: UGD's in K bins, linear between their centres. Under eps they
    are divided by SNR, as every weighting of the table is, and like `const` large at its end.
    """
    K = min(K, diffusion.T)
    G = gram(model, diffusion, data, K, n, seed)
    borders = np.array(edges(diffusion.T, K))
    centres = (borders[:-1] + borders[1:] - 1) / 2
    w = np.interp(np.arange(diffusion.T), centres, ugd(G, lam * typical(G)) / np.diff(borders))
    return torch.from_numpy(w / w.mean())


# ------------------------------------------------------------------------------------- figures: one style

LOOKS = [  # colour, line, marker, hatch: told apart in grey too
    ("#000000", "-", "o", ""), ("#d55e00", "--", "s", "///"), ("#0072b2", "-.", "^", "..."),
    ("#009e73", ":", "D", "xxx"), ("#cc79a7", (0, (5, 1)), "v", "---"), ("#777777", (0, (8, 3)), "*", "ooo"),
    ("#e69f00", (0, (3, 1, 1, 1)), "P", "+++"), ("#56b4e9", (0, (1, 1)), "X", "\\\\\\"),
]
NAMES = {"const": "const", "snr": "SNR", "max_snr": "max-SNR-{:g}", "min_snr": "min-SNR-{:g}", "ugd": "UGD",
         "soft_min_snr": "soft-min-SNR-{:g}"}
FOUR = [("const", 1), ("snr", 1), ("max_snr", 1), ("min_snr", 5)]            # of figures 5 and 6
TABLE = [*FOUR[:3], ("min_snr", 1), FOUR[3], ("min_snr", 10), ("min_snr", 20)]


def called(weighting, gamma):
    """The paper's name of a weighting."""
    return NAMES.get(weighting, weighting).format(gamma)


def look(i):
    """Line style number i."""
    colour, line, marker, _ = LOOKS[i % len(LOOKS)]
    return dict(color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.4, markevery=0.1)


def canvas(rows=1, columns=1):
    """-> figure and its axes (rows,columns). Raises BadInput where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise BadInput("figures need a package: pip install matplotlib") from None
    style = {"font.size": 9, "legend.fontsize": 7, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "0"}
    matplotlib.rcParams.update(style)
    pyplot.close("all")                                                      # what a refusal left open
    size = (4.2 * columns, 3.2 * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save(figure, out, header, rows):
    """Write the figure, .png or .svg, and its numbers beside it as .csv."""
    out, kind = Path(out), Path(out).suffix[1:]
    numbers = out.with_suffix(".csv")
    if numbers.exists() and numbers.read_text(errors="replace").partition("\n")[0] != header:
        raise BadInput(f"--out {out}: would write over {numbers}, which is another file; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    date = {"Date": None} if kind == "svg" else {}                           # the same bytes every time
    replace(out, lambda f: figure.savefig(f, format=kind, dpi=150, metadata=date))
    sys.modules["matplotlib.pyplot"].close(figure)
    show = lambda x: f"{x:.6g}" if isinstance(x, float) else str(x)
    text = "\n".join([header, *(",".join(map(show, row)) for row in rows), ""])
    replace(numbers, lambda f: f.write(text.encode()))
    print(f"{out.resolve()}   numbers: {numbers.name}", flush=True)


def spread(values):
    """Mean, lowest and highest of values (R,N), each (N,), without the nan; nan where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0)


def band(ax, x, values, i, name):
    """Mean of values (R,N) over x as line i, with the range of the R around it, where not all are nan."""
    seen = ~np.isnan(values).all(0)
    x, (mean, low, high) = np.array(x)[seen], spread(values[:, seen])
    ax.plot(x, mean, label=name, **look(i))
    ax.fill_between(x, low, high, color=LOOKS[i % len(LOOKS)][0], alpha=0.15, linewidth=0)


def weights(args):
    """Every weighting of the table on the x0 loss, over t and over log SNR (section 3.4)."""
    figure, axes = canvas(1, 2)
    snr = Diffusion(args.schedule, args.T).snr
    gammas = {name: 1 if name == "max_snr" else 5 for name in WEIGHTINGS}
    table = {called(name, gamma): loss_weight(snr, name, "x0", gamma) for name, gamma in gammas.items()}
    for ax, x, title in ((axes[0, 0], np.arange(args.T), "t"), (axes[0, 1], snr.log(), "log SNR")):
        for i, (name, w) in enumerate(table.items()):
            ax.plot(x, w, label=name, **look(i))
        ax.set(xlabel=title, ylabel="weight of the x0 loss", yscale="log", ylim=(1e-5, 1e5))
    axes[0, 0].legend()
    rows = ([t, float(snr[t]), *(float(w[t]) for w in table.values())] for t in range(args.T))
    save(figure, args.out, ",".join(["t", "snr", *table]), rows)


def load(path, args):
    """-> (model with its EMA weights, on the device, diffusion, data) of a checkpoint. Raises BadInput where
    they do not fit.
    """
    model, config = load_checkpoint(path, target=args.target)
    own_shapes = config["dataset"] == "shapes" and not args.data
    if not (own_shapes or args.data or isinstance(config.get("data"), str)):
        raise BadInput(f"{path}: does not name its data; give --data DIR")
    data = built_in(model.img_size) if own_shapes else Packed(args.data or config["data"])
    data.flip = config.get("flip", False)
    found, expected = (data.channels, data.size), (model.in_channels, model.img_size)
    if found != expected or model.num_classes and len(data.classes) != model.num_classes:
        raise BadInput(f"{path}: its network has channels and side {expected}, {model.num_classes} classes, "
                       f"the data {found}, {len(data.classes)} classes")
    diffusion = Diffusion(config["schedule"], config["T"], config["target"])
    if not 1 <= args.K <= diffusion.T:
        raise BadInput(f"--K: found {args.K}, expected 1 to {diffusion.T}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return to_device(model, device), diffusion.to(device), data


def measured(args, loaded, n, seed):
    """The Gram matrix of a loaded checkpoint under the command's flags, and lam of eq. 11."""
    G = gram(*loaded, args.K, n, seed, int(args.budget * 2 ** 30), args.project, quiet=False)
    if not np.isfinite(G).all():
        raise BadInput("the checkpoint's gradients are not finite; expected a run that has not diverged")
    return G, args.lam * typical(G)


@torch.no_grad()
def bin_losses(model, diffusion, data, K, n, seed):
    """(K,) mean of L^t in each bin."""
    return np.array([sum(float(x0_loss(model, diffusion, part)) for part in
                         draw_bin(data, diffusion.T, K, k, n, seed)) / n for k in range(K)])


def finetune(model, diffusion, data, low, high, steps, lr, seed):
    """A copy of the model, trained for a while on t = low .. high - 1 alone, 64 samples a step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.99), weight_decay=0)
    for step in range(steps):
        g = generator("finetune", f"{seed} {low}", step)
        x0, y = data.batch(torch.randint(len(data), (64,), generator=g).numpy(), g)
        t = torch.randint(low, high, (64,), generator=g)
        optimizer.zero_grad()
        (x0_loss(model, diffusion, (x0, t, torch.randn(x0.shape, generator=g), y)) / 64).backward()
        optimizer.step()
    return model


def figure2(args):
    """Change of every bin's loss when [100, 200), [200, 300) or [300, 400) is trained alone (figure 2)."""
    figure, axes = canvas()
    rows, changes, since = [], {}, time.monotonic()
    for i, path in enumerate(args.ckpt):
        model, diffusion, data = load(path, args)
        if diffusion.T < 10:
            raise BadInput(f"{path}: {diffusion.T} timesteps are too few for figure 2, expected at least 10")
        before = bin_losses(model, diffusion, data, args.K, args.n, args.seed)
        for j in (1, 2, 3):
            low, high = edges(diffusion.T, 10)[j:j + 2]
            tuned = finetune(model, diffusion, data, low, high, args.steps or 200, args.lr or 1e-4, args.seed)
            after = bin_losses(tuned, diffusion, data, args.K, args.n, args.seed)
            if not np.isfinite([before, after]).all():
                raise BadInput(f"{path}: its losses are not finite, before or after --lr {args.lr or 1e-4:g}")
            changes.setdefault((low, high), []).append(100 * (after / before - 1))
            rows += [(path, low, high, t, float(x), float(y)) for t, x, y in
                     zip(edges(diffusion.T, args.K), before, after)]
            progress("fine-tuned", 3 * i + j, 3 * len(args.ckpt), since)
    t = np.array(edges(diffusion.T, args.K)[:-1]) + diffusion.T / args.K / 2
    for i, ((low, high), change) in enumerate(changes.items()):
        band(axes[0, 0], t, np.array(change), i, f"trained on [{low}, {high})")
        axes[0, 0].axvspan(low, high, ymax=0.03 + 0.02 * i, color=LOOKS[i][0], alpha=0.5)
    axes[0, 0].axhline(0, color="black", linewidth=0.8)
    axes[0, 0].set(xlabel="t", ylabel="change of the x0 loss, %", yscale="symlog")
    axes[0, 0].legend()
    save(figure, args.out, "ckpt,low,high,t,before,after", rows)


def figure3(args):
    """UGD's weights in repeats with other samples, their spread against the number of samples (figure 3)."""
    figure, axes = canvas(1, len(args.samples) + 1)
    loaded, rows, spreads = load(args.ckpt[0], args), [], []
    t = edges(loaded[1].T, args.K)[:-1]
    for ax, n in zip(axes[0], args.samples):
        grams = [measured(args, loaded, n, f"{args.seed} {n} {r}") for r in range(args.repeats)]
        w = np.array([ugd(G, lam) for G, lam in grams])                      # (repeats,K)
        spreads.append(w.std(0, ddof=1).mean() * args.K)                     # the mean weight is 1 / K
        for r, row in enumerate(w):
            ax.plot(t, args.K * row, **look(r))
            rows += [(n, r, a, float(x)) for a, x in zip(t, row)]
        ax.set(xlabel="t", ylabel="weight x K", title=f"{n} samples", ylim=(0, None))
        print(f"{n} samples: spread of a weight {spreads[-1]:.2f} of the mean weight", flush=True)
    axes[0, -1].plot(args.samples, spreads, **look(0))
    axes[0, -1].set(xlabel="samples", ylabel="spread / mean weight", xscale="log", yscale="log")
    save(figure, args.out, "samples,repeat,t,weight", rows)


def figure4(args):
    """Objective of eq. 11 for every weighting and for UGD, over the exact optimum (figure 4)."""
    figure, axes = canvas()
    rows, over, excess = [], {}, dict.fromkeys(("UGD", "Frank-Wolfe"), -math.inf)
    for path in args.ckpt:
        loaded = load(path, args)
        G, lam = measured(args, loaded, args.n, args.seed)
        best = objective(G, exact(G, lam), lam)
        if best <= 0:
            raise BadInput(f"{path}: the optimum is 0 at --lam {args.lam:g}, --project {args.project}; "
                           "expected gradients that do not cancel")
        found = {called(*row): weights_of(row[0], loaded[1].snr, args.K, row[1]) for row in TABLE}
        solved = {"UGD": ugd(G, lam), "Frank-Wolfe": frank_wolfe(G, lam)}
        excess = {key: max(excess[key], objective(G, w, lam) / best - 1) for key, w in solved.items()}
        for name, w in {**found, "UGD": solved["UGD"]}.items():
            value = objective(G, w, lam)
            over.setdefault(name, []).append(value / best)
            state = common_descent(G, w)
            rows.append((path, name, objective(G, w), float(w @ w), value, value / best, state))
    print(f"lam {args.lam:g} x median |g|^2, {args.K} bins, {args.n} samples, {len(args.ckpt)} checkpoints")
    print(f"{'weighting':12s} objective / optimum   -u: descent for all t?")
    for name, values in over.items():
        states = [row[-1] for row in rows if row[1] == name]
        spread = f"+- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        print(f"{name:12s} {np.mean(values):9.3f} {spread:12s} {', '.join(states)}")
    print("above the exact optimum: " + ", ".join(f"{key} {value:.1e}" for key, value in excess.items()))
    for i, (name, values) in enumerate(over.items()):
        error = [[np.mean(values) - min(values)], [max(values) - np.mean(values)]]
        axes[0, 0].bar(name, np.mean(values), yerr=error, capsize=3, color="white", edgecolor=LOOKS[i][0],
                       hatch=LOOKS[i][3])
    axes[0, 0].set(ylabel="objective / optimum (eq. 11)", yscale="log")
    axes[0, 0].tick_params(axis="x", rotation=40)
    save(figure, args.out, "ckpt,weighting,u2,w2,objective,over_optimum,direction", rows)


# ------------------------------------------------------------------------ curves of train.py's run folders

APART = """dataset size model patch schedule T timesteps importance batch_size lr warmup decay betas ema
           weight_decay drop ugd_every ugd_bins ugd_samples ugd_lambda""".split()


def read_runs(dirs, file, columns):
    """{(target, name): [(curve, diverged) of each run]}, curve a dict: step -> values of the columns; name:
    the weighting, and what else of APART tells the runs apart.
    """
    found, dirs = {}, dict.fromkeys(Path(dir).resolve() for dir in dirs)     # one folder is one run
    configs = {dir: read_json(dir / "config.json") for dir in dirs}
    differ = [key for key in APART if len({str(c[key]) for c in configs.values() if key in c}) > 1]
    for dir, config in configs.items():
        try:
            name = called(config["weighting"], config["gamma"])
            others = [f"{word} {config[word]}" for word in differ if word in config]
            key = config["target"], " ".join([name, *others])
            lines = (dir / file).read_text().splitlines() if (dir / file).exists() else []
            rows = csv.DictReader(lines)
            curve = {int(row["step"]): [float(row[name]) for name in columns] for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{dir}: config.json or {file} is damaged or another's ({error!r})") from None
        found.setdefault(key, []).append((curve, (dir / "diverged.txt").exists()))
    if not any(curve for runs in found.values() for curve, _ in runs):
        raise BadInput(f"--runs: no {file} in {', '.join(map(str, dirs))}")
    return found


def plot_runs(args, file, columns, titles, ylabel):
    """One row of panels for each target, one panel for each column, one line for each weighting."""
    found, rows = read_runs(args.runs, file, columns), []
    targets = [target for target in TARGETS if any(key[0] == target for key in found)]
    names = [called(*row) for row in FOUR]
    names += sorted({name for _, name in found} - set(names))
    figure, axes = canvas(len(targets), len(columns))
    for (target, name), runs in found.items():
        steps = sorted({step for curve, _ in runs for step in curve})
        empty = [math.nan] * len(columns)                                    # a diverged run's later steps
        values = np.array([[curve.get(step, empty) for step in steps] for curve, _ in runs])
        lost = sum(diverged for _, diverged in runs)
        text = f"{name} ({lost} of {len(runs)} diverged)" if lost else name
        for j, column in enumerate(columns):
            ax = axes[targets.index(target), j]
            if not steps:                                                    # lost before anything was logged
                ax.plot([], [], label=text, **look(names.index(name)))
                continue
            band(ax, steps, values[:, :, j], names.index(name), text)
            rows += [(target, name, column, step, *map(float, line), len(runs), lost)
                     for step, *line in zip(steps, *spread(values[:, :, j]))]
            if (values[:, :, j] > 0).any():
                ax.set(yscale="log")
    for i, target in enumerate(targets):
        for j, title in enumerate(titles):
            axes[i, j].set(xlabel="step", ylabel=ylabel, title=f"{target} prediction{title}")
        axes[i, 0].legend()
    save(figure, args.out, "target,weighting,column,step,mean,low,high,runs,diverged", rows)


def figure5(args):
    """FD-pixels against steps, from quality.csv of each run (figure 5, whose measure is FID)."""
    plot_runs(args, "quality.csv", ["fd_pixels"], [""], "FD-pixels")


def figure6(args):
    """x0 error in the paper's four ranges of t against steps, from log.csv of each run (figure 6): means over
    the t that were drawn, so that runs with other densities of t are compared within a range only roughly.
    """
    bins = (0, 2, 6, 8)
    titles = [f", t in [{i}T/10, {i + 1}T/10)" for i in bins]
    plot_runs(args, "log.csv", [f"x0_mse_{i}" for i in bins], titles, "mean squared error of x0")


# ------------------------------------------------------------------------------------------- the miniature

@functools.cache
def real(size):
    return shapes(range(2048), size)[0]


def measure(ckpt, n):
    """FD-pixels to 2,048 of the data's images of n samples of the EMA weights, Heun 18 steps, no guidance;
    and their x0 error over all t, n samples in each of 10 bins.
    """
    model, config = load_checkpoint(ckpt)
    drawn = torch.cat([draw(model, config, range(k, min(k + 64, n)), steps=18) for k in range(0, n, 64)])
    diffusion = Diffusion(config["schedule"], config["T"], config["target"])
    x0_mse = bin_losses(model, diffusion, built_in(config["size"]), 10, n, "quality").mean()
    return fd_pixels(drawn, real(config["size"])), x0_mse


def claim(out, **settings):
    """Take a folder for a miniature, or go on with it there. Raises BadInput where it holds another."""
    canvas()                                                                 # no matplotlib: said at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)                # takes the run in progress along
    file, out = Path(out) / "miniature.json", Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*/ckpt.pt")) and file.exists() and read_json(file) != settings:
        raise BadInput(f"--out {out}: holds a miniature of other flags, {read_json(file)}")
    replace(file, lambda f: f.write(json.dumps(settings).encode()))


def short_run(steps, **other):
    """The flags of train.py for a run of a miniature: constant learning rate, no guidance."""
    often = f"--log-every {max(1, steps // 20)} --save-every {max(1, steps // 4)}"
    words = {"lr": 2e-3, "decay": 0, "cfg": 1, "sample-steps": 1, **other}
    return " ".join(f"--{key} {value}" for key, value in words.items()) + " " + often


def timed(runs):
    """The items of a dict folder: its run; says after each how long the others will take."""
    since = time.monotonic()
    for i, (folder, what) in enumerate(runs.items(), 1):
        yield folder, what
        each = (time.monotonic() - since) / i
        print(f"run {i} / {len(runs)}: {folder.name}   {each:.0f} s a run   "
              f"{each * (len(runs) - i) / 60:.1f} min left", flush=True)


def train_to(folder, flags, steps):
    """Train a run to a step, from wherever it was left. -> "", or why it cannot go on: it has diverged."""
    done = read(folder / "ckpt.pt")["step"] if (folder / "ckpt.pt").exists() else 0
    if done >= steps:
        return ""
    words = [Path(__file__).with_name("train.py"), *flags.split(), "--steps", steps, "--out", folder]
    words = [sys.executable, *map(str, words), *["--resume"] * (done > 0)]
    ended = subprocess.run(words, capture_output=True, text=True)
    last = " ".join((ended.stdout + ended.stderr).splitlines()[-1:])
    if ended.returncode not in (0, 3):
        raise BadInput(f"{folder}: train.py ended with code {ended.returncode}: {last}")
    return last if ended.returncode else ""


def bring_up(folder, flags, marks, n):
    """Train one run to its last mark and measure it at each into quality.csv, from wherever it was left. One
    that is no longer finite gets a diverged.txt and is left alone; so does, at its end, one whose error is
    twice that of its first log line.
    """
    quality, lost = folder / "quality.csv", folder / "diverged.txt"
    lines = quality.read_text().splitlines() if quality.exists() else ["step,fd_pixels,x0_mse"]
    why = ""
    for mark in marks[len(lines) - 1:]:
        if lost.exists() or (why := train_to(folder, flags, mark)):
            break
        try:
            values = measure(folder / "ckpt.pt", n)
        except (ValueError, np.linalg.LinAlgError) as error:                 # samples that are not finite
            why = f"its samples at step {mark} cannot be measured ({error})"
            break
        lines.append(f"{mark}," + ",".join(f"{value:.6g}" for value in values))
        replace(quality, lambda f: f.write("\n".join([*lines, ""]).encode()))
    else:
        errors = [float(row["mse"]) for row in csv.DictReader((folder / "log.csv").read_text().splitlines())]
        if errors and errors[-1] > 2 * errors[0]:
            why = f"mean squared error {errors[0]:.3g} in the first log line, {errors[-1]:.3g} in the last"
    if why:
        print(f"{folder.name}: diverged; {why}", flush=True)
        replace(lost, lambda f: f.write(f"{why}\n".encode()))


def miniature(args):
    """Train const, SNR, max-SNR-1 and min-SNR-5 under x0, eps and v, and draw every figure from the runs."""
    out, steps, lr, size = Path(args.out), args.steps or 600, args.lr or 2e-3, dict(size=args.size)
    marks = sorted({max(1, steps * i // args.marks) for i in range(1, args.marks + 1)})
    claim(out, steps=steps, marks=marks, lr=lr, images=args.images, **size)
    runs = {out / f"{target}_{weighting}_{gamma}_seed{seed}":
            short_run(steps, target=target, weighting=weighting, gamma=gamma, seed=seed, lr=lr, **size)
            for seed in range(args.seeds) for target in args.targets for weighting, gamma in FOUR}
    for folder, flags in timed(runs):
        bring_up(folder, flags, marks, args.images)
    base = [str(out / f"{args.targets[0]}_min_snr_5_seed{seed}") for seed in range(args.seeds)]
    for command in (weights, figure2, figure3, figure4, figure5, figure6):
        flags = dict(runs=[*runs], ckpt=base, steps=min(steps, 200), lr=None)
        command(argparse.Namespace(**{**vars(args), **flags, "out": out / f"{command.__name__}.png"}))


# ------------------------------------------------------------------------------------------- command line

COMMANDS = {command.__name__: command for command in
            (weights, figure2, figure3, figure4, figure5, figure6, miniature)}


RANGES = dict(K=(1, 1e6), n=(1, 1e6), steps=(1, 1e9), seeds=(1, 1e3), size=(1, 1e4), marks=(1, 1e4),
              T=(1, 1e6), lam=(0, 1e9), budget=(1e-9, 1e6), lr=(1e-12, 1e3), project=(0, 2 ** 30),
              images=(2, 1e6))


def check(args, ranges):
    """Raise BadInput for a number that is outside of its range."""
    for flag, (low, high) in ranges.items():
        if (value := getattr(args, flag)) is not None and not low <= value <= high:
            raise BadInput(f"--{flag}: found {value}, expected {low:g} to {high:g}")


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--out", help=".png or .svg, numbers beside it (default: COMMAND.png); miniature: a folder\n"
                      "(default: out/miniature)")
    add("--seed", type=int, default=0, help="of samples, noise and projection")
    # gradients: figures 2, 3, 4
    add("--ckpt", action="append", default=[], help="checkpoint or run folder; again for more seeds")
    add("--data", help="packed folder (default: the checkpoint's own data)")
    add("--target", choices=TARGETS, help="what released weights predict")
    add("--K", type=int, default=50, help="bins of t (default: 50)")
    add("--n", type=int, default=256, help="figures 2, 4: samples a bin (default: 256)")
    add("--lam", type=float, default=0.01, help="lambda of eq. 11 / median |g|^2 (default: 0.01)")
    add("--project", type=int, default=0, help="hash each gradient to so many numbers (default: exact)")
    add("--budget", type=float, default=1.0, help="GiB for K gradients of a chunk of parameters (default: 1)")
    add("--samples", type=int, nargs="+", default=[4, 16, 64, 256], help="figure3: samples a bin")
    add("--repeats", type=int, default=4, help="figure3: draws of each (default: 4)")
    # schedule: weights
    add("--schedule", choices=("cosine", "linear"), default="cosine")
    add("--T", type=int, default=1000, help="timesteps (default: 1000)")
    # training: figures 2, 5, 6
    add("--runs", nargs="+", default=[], metavar="DIR", help="figures 5, 6: run folders of train.py")
    add("--steps", type=int, help="miniature: of a run (default: 600); figure2: fine-tuning (default: 200)")
    add("--lr", type=float, help="miniature: constant (default: 2e-3); figure2 (default: 1e-4)")
    add("--seeds", type=int, default=3, help="miniature: runs of each combination (default: 3)")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="miniature (default: all three)")
    add("--size", type=int, default=16, help="miniature: image side (default: 16)")
    add("--marks", type=int, default=3, help="miniature: measurements of a run (default: 3)")
    add("--images", type=int, default=256, help="miniature: samples a measurement (default: 256)")
    return parser.parse_args()


def main():
    args = parse()
    check(args, RANGES)
    if args.repeats < 2 or min(args.samples) < 1:
        raise BadInput(f"--repeats {args.repeats}, --samples {args.samples}: expected at least 2 and 1")
    if args.command == "figure3" and (len(args.ckpt) > 1 or args.K < 2):
        raise BadInput(f"figure3: found {len(args.ckpt)} --ckpt, --K {args.K}, expected 1 and at least 2")
    if args.command == "miniature" and (args.ckpt or args.runs or args.data or args.target or args.K > 1000):
        raise BadInput("miniature: no --ckpt, --runs, --data, --target (but --targets), no K above 1000")
    needs = {"figure2": "ckpt", "figure3": "ckpt", "figure4": "ckpt", "figure5": "runs", "figure6": "runs"}
    if args.command in needs and not getattr(args, needs[args.command]):
        raise BadInput(f"{args.command}: needs --{needs[args.command]}")
    args.out = args.out or ("out/miniature" if args.command == "miniature" else f"{args.command}.png")
    if args.command != "miniature" and Path(args.out).suffix not in (".png", ".svg"):
        raise BadInput(f"--out {args.out}: expected a .png or .svg")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run(main)
