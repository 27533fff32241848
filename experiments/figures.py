"""Figures of the CSV files that the other experiments write, and of train.py's run folders.

    python -m experiments.figures curves w4.csv w256.csv --x t --y weight --out figure3.png
    python -m experiments.figures bars objective.csv --x weighting --y over_optimum --logy --out figure4.png
    python -m experiments.figures runs out/min_snr/*/ --y fd_pixels --logy --out figure5.png
    python -m experiments.figures teach --out assets/teach           # from formulas alone, for a lecture

A curve is the mean of all the values at one x, such as those of several seeds; the band around it is their
range. `--by` names the columns that tell curves apart, `--panel` those that tell panels apart. `runs` draws
columns of log.csv and quality.csv against the step; there, --by and --panel name settings of config.json.
"""
import csv
import io
import math
from argparse import Namespace
from pathlib import Path
from statistics import fmean

import torch

from data import generator, shapes
from diffusion import DENSITIES, TARGETS, WEIGHTINGS, Diffusion, loss_weight, timestep_density
from files import BadInput, Parser, read_json, replace, run
from sample import save_sheet, to_uint8

LOOKS = [  # colour, line, marker, hatch: they are told apart in grey, too
    ("#000000", "-", "o", ""),
    ("#d55e00", "--", "s", "///"),
    ("#0072b2", "-.", "^", "..."),
    ("#009e73", ":", "D", "xxx"),
    ("#cc79a7", (0, (5, 1)), "v", "---"),
    ("#777777", (0, (8, 3)), "*", "ooo"),
    ("#e69f00", (0, (3, 1, 1, 1)), "P", "+++"),
    ("#56b4e9", (0, (1, 1)), "X", "\\\\\\"),
]

# Width and height of a panel in inches. Letters have 9 points: the smaller the panel, the larger they look.
PAPER = (4.2, 3.2)
SLIDE = (2.3, 2.1)

# ---------------------------------------------------------------------------------------------------- tables

def write_csv(path, rows):
    """Write rows, dicts of the same keys, under a header line."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: file.write(text.getvalue().encode()))
    if len(rows) <= 20:
        print(text.getvalue(), end="")
    print(f"{path}: {len(rows):,} rows of {', '.join(rows[0])}", flush=True)


def read_csv(path):
    """The rows of a CSV file as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def entry(row, name, kind=str):
    """A row's entry in a column. Raises BadInput where it is missing, or no number where kind is float."""
    if name not in row:
        raise BadInput(f"column {name}: not found, expected one of {', '.join(row)}")
    try:
        return kind(row[name])
    except (TypeError, ValueError):
        raise BadInput(f"column {name}: found {row[name]!r}, expected numbers") from None


def called(weighting, gamma):
    """The name of a weighting in tables and figures, with its gamma where it has one: "min_snr 5"."""
    if isinstance(weighting, list):
        return "table"
    if weighting in ("max_snr", "min_snr", "soft_min_snr"):
        return f"{weighting} {gamma:g}"
    return weighting


# --------------------------------------------------------------------------------------------------- drawing

def canvas(panels, columns, size=PAPER):
    """-> figure and a list of its axes, `columns` in a row. Raises BadInput where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("figures need a package: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "legend.fontsize": 7, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib.figure import Figure
    rows = math.ceil(panels / columns)
    width, height = size
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)[:panels]


def save(figure, path):
    """Write the figure in the format that the file's name ends with, .png or .svg."""
    kind = Path(path).suffix[1:]
    if kind not in ("png", "svg"):
        raise BadInput(f"--out {path}: expected a .png or .svg")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: figure.savefig(file, format=kind, dpi=150))
    print(path, flush=True)


def draw_curve(ax, values, name, look):
    """Draw one curve; values is {x: the values there}. Those that are not finite are left out, and the legend
    says how many are left at the end.
    """
    colour, line, marker, _ = look
    ends = values[max(values)]
    there = sum(map(math.isfinite, ends))
    if there < len(ends):
        name += f" ({there} of {len(ends)} to the end)"
    finite = {x: list(filter(math.isfinite, values[x])) for x in sorted(values)}
    x = [x for x in finite if finite[x]]
    ys = [finite[place] for place in x]
    style = dict(color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.4)
    ax.plot(x, list(map(fmean, ys)), markevery=0.1, label=name, **style)
    low, high = list(map(min, ys)), list(map(max, ys))
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_curves(rows, args, size=PAPER):
    """Draw columns args.y of the rows: a panel for each y and its args.panel, a curve for each args.by."""
    panels, names = {}, []
    for row in rows:
        name = " ".join(entry(row, column) for column in args.by)
        title = ", ".join(f"{column} {entry(row, column)}" for column in args.panel)
        names.append(name)
        for y in args.y:
            drawn = panels.setdefault((title, y), {})
            values = drawn.setdefault(name, {}).setdefault(entry(row, args.x, float), [])
            values.append(entry(row, y, float))
    if not panels:
        raise BadInput("found no rows to draw")
    names = list(dict.fromkeys(names))                                       # each once, in order
    figure, axes = canvas(len(panels), min(4, len(panels)), size)
    for ax, ((title, y), drawn) in zip(axes, panels.items()):
        for name, values in drawn.items():
            draw_curve(ax, values, name, LOOKS[names.index(name) % len(LOOKS)])
        ax.set(title=title, xlabel=args.x, ylabel=y)
        if args.logx:
            ax.set_xscale("log")
        if args.logy and math.isfinite(ax.dataLim.y0):                       # inf: there is no finite value
            ax.set_yscale("log" if ax.dataLim.y0 > 0 else "symlog")
        if size == PAPER:
            ax.legend()
    if size == SLIDE:                            # one legend, which hides no curve and has a place of its own
        figure.set_figwidth(figure.get_figwidth() + 1.5)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, args.out)


# ------------------------------------------------------------------------ of lectures, by the formulas alone
# Rows of a table. The first column tells curves apart, the second is x, and each of the others is a panel.

def schedules():
    """alpha, sigma and log SNR of both schedules."""
    for name in ("cosine", "linear"):
        d = Diffusion(name)
        for t, (a2, snr) in enumerate(zip(d.alphas_cumprod, d.snr)):
            drawn = {"alpha": a2.sqrt(), "sigma": (1 - a2).sqrt(), "log SNR": snr.log()}
            yield {"schedule": name, "t": t, **drawn}


def weightings():
    """Every weighting at gamma 5, as it weights the x0, the eps and the v loss."""
    for name in WEIGHTINGS:
        for log_snr in torch.linspace(-10, 10, 101, dtype=torch.float64):
            row = {"weighting": called(name, 5), "log SNR": log_snr}
            for target in TARGETS:
                row[f"weight on {target} loss"] = loss_weight(log_snr.exp(), name, target)
            yield row


def shares():
    """How much of all the weight on the x0 loss lies at 0 .. t, in per cent, with the cosine schedule."""
    snr = Diffusion().snr
    for name, gamma in [("const", 5), ("snr", 5), ("min_snr", 1), ("min_snr", 5), ("min_snr", 20)]:
        sums = loss_weight(snr, name, "x0", gamma).cumsum(0)
        for t, part in enumerate(sums / sums[-1]):
            yield {"weighting": called(name, gamma), "t": t, "% of all weight, up to t": 100 * part}


def densities():
    """q(t) T of every density, with the cosine schedule: 1 where t is drawn as often as by the uniform one.
    clts is at the end of its curriculum.
    """
    snr = Diffusion().snr
    for name in DENSITIES:
        for t, q in enumerate(timestep_density(name, snr, step=50_000)):
            yield {"density": name, "t": t, "q(t) T": q * len(snr)}


def noisy(t, index=6, size=60):
    """x_t of one shape at every t (N,) long, all with the same noise: uint8 (N,3,size,size)."""
    images, _ = shapes([index], size)
    x0 = torch.from_numpy(images) / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator("teach", 0, index))
    return to_uint8(Diffusion().q_sample(x0, t, noise))


# -------------------------------------------------------------------------------------------------- commands

def curves(args):
    """Columns of CSV files against another column."""
    rows = []
    for path in args.paths:
        rows += [{"file": Path(path).stem, **row} for row in read_csv(path)]
    draw_curves(rows, args)


def bars(args):
    """One bar for each value of a column: the mean of another column, and its range."""
    heights = {}
    for path in args.paths:
        for row in read_csv(path):
            values = heights.setdefault(entry(row, args.x), [])
            values.append(entry(row, args.y[0], float))
    figure, [ax] = canvas(1, 1)
    for i, (name, values) in enumerate(heights.items()):
        colour, _, _, hatch = LOOKS[i % len(LOOKS)]
        mean = fmean(values)
        whiskers = [[mean - min(values)], [max(values) - mean]]
        ax.bar(name, mean, yerr=whiskers, capsize=3, color="white", edgecolor=colour, hatch=hatch)
    ax.set(xlabel=args.x, ylabel=args.y[0])
    ax.tick_params(axis="x", rotation=40)
    if args.logy:
        ax.set_yscale("log")
    save(figure, args.out)


def runs(args):
    """Columns of the logs of train.py's runs against the step (figures 5 and 6)."""
    configs, tables, columns = {}, {}, set()
    for folder in map(Path, args.paths):
        configs[folder] = read_json(folder / "config.json")
        table = tables[folder] = {}                                          # step: what the logs say of it
        for file in (folder / "log.csv", folder / "quality.csv"):
            for line in read_csv(file) if file.exists() else []:
                table.setdefault(int(line["step"]), {}).update(line)
                columns.update(line)
    steps = sorted(set().union(*tables.values()))
    rows = []
    for folder, config in configs.items():
        config["weighting"] = called(config["weighting"], config["gamma"])
        for step in steps:                                                   # nan: the run did not get there
            line = tables[folder].get(step, {})
            rows.append({**config, **dict.fromkeys(columns, math.nan), **line, "step": step})
    draw_curves(rows, args)


def teach(args):
    """Figures for a lecture, from the formulas alone: with T = 1000."""
    for table in (schedules, weightings, shares, densities):
        rows = list(table())
        by, x, *y = rows[0]
        out = Path(args.out, f"{table.__name__}.png")
        logy = table is weightings
        draw_curves(rows, Namespace(by=[by], panel=[], x=x, y=y, logx=False, logy=logy, out=out), SLIDE)
    t = torch.linspace(0, 999, 10).long()
    titles = [f"t {at}\nlog SNR\n{snr.log():.1f}" for at, snr in zip(t, Diffusion().snr[t])]
    out = Path(args.out, "noise.png")
    save_sheet(out, noisy(t), len(t), titles, side=128)
    print(out)


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for call in (curves, bars, runs):
        command = commands.add_parser(call.__name__, doc=call.__doc__)
        command.set_defaults(call=call)
        add = command.add_argument
        add("paths", nargs="+", help="CSV files; runs: run folders")
        add("--x", default="step", help="column")
        add("--y", required=True, nargs=1 if call is bars else "+", help="column")
        if call is not bars:
            add("--by", nargs="+", default=["file"], help="columns that tell curves apart")
            add("--panel", nargs="+", default=[], help="columns that tell panels apart")
            add("--logx", action="store_true", help="logarithmic x")
        if call is runs:
            command.set_defaults(by=["weighting"], panel=["target"])
        add("--logy", action="store_true", help="logarithmic y")
        add("--out", required=True, help=".png or .svg")
    command = commands.add_parser("teach", doc=teach.__doc__)
    command.set_defaults(call=teach)
    command.add_argument("--out", required=True, help="folder of the figures")
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
