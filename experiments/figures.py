"""Draws the CSV files that the other experiments write, and the logs of train.py's runs.

    python -m experiments.figures curves w4.csv w256.csv --x t --y weight --out figure3.png
    python -m experiments.figures bars objective.csv --x weighting --y over_optimum --logy --out figure4.png
    python -m experiments.figures runs out/min_snr/*/ --y fd_pixels --logy --out figure5.png
    python -m experiments.figures teach --out assets/teach           # from formulas alone, for a lecture

A point of a curve is the mean of all the values at its x, such as those of several seeds; the band is their range.
Rows with the same entries in the columns `--by` are one curve, and those with the same entries in the columns
`--panel` are in one panel. `runs` draws columns of log.csv and quality.csv against the step; there --by and --panel
name settings of config.json.
"""
import csv
import io
import math
from pathlib import Path
from statistics import fmean

import torch

from data import generator, shapes
from diffusion import DENSITIES, TARGETS, WEIGHTINGS, Diffusion, loss_weight, timestep_density
from files import BadInput, Parser, read_json, replace, run
from sample import save_sheet, to_uint8

LOOKS = [  # colour, line, marker, hatch of a bar: printed in grey they still differ
    ("#000000", "-", "o", ""),
    ("#d55e00", "--", "s", "///"),
    ("#0072b2", "-.", "^", "..."),
    ("#009e73", ":", "D", "xxx"),
    ("#cc79a7", (0, (5, 1)), "v", "---"),
    ("#777777", (0, (8, 3)), "*", "ooo"),
    ("#e69f00", (0, (3, 1, 1, 1)), "P", "+++"),
    ("#56b4e9", (0, (1, 1)), "X", "\\\\\\"),
]

# Width and height of a panel in inches. Letters always have 9 points: in a smaller panel they look larger.
PAPER = (4.2, 3.2)
SLIDE = (2.3, 2.1)

# ---------------------------------------------------------------------------------------------------- tables

def write_csv(path, rows):
    """Write rows, dicts of the same keys, under a header line. A table of at most 20 rows is printed, too."""
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
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except ValueError as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def entry(row, name, kind=str):
    """A row's entry in a column, as str, int or float. Raises BadInput where it is missing or no such number."""
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

def canvas(panels, size=PAPER):
    """-> figure and a list of its axes, at most 4 in a row. Raises BadInput where matplotlib is missing."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("figures need a package: pip install matplotlib") from None
    rcParams.update({"font.size": 9, "legend.fontsize": 7, "axes.grid": True, "grid.alpha": 0.3})
    columns = min(4, panels)
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
    """Draw one curve; values is {x: the values there}. Values that are not finite are dropped. If any are missing at
    the last x, the legend says how many are finite there.
    """
    end = max(values)
    finite = {}
    for x in sorted(values):
        ys = list(filter(math.isfinite, values[x]))
        if ys:
            finite[x] = ys
    remaining = len(finite.get(end, []))
    if remaining < len(values[end]):
        name += f" ({remaining} of {len(values[end])} to the end)"
    colour, line, marker, _ = look
    x, ys = list(finite), list(finite.values())
    style = dict(color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.4)
    ax.plot(x, list(map(fmean, ys)), markevery=0.1, label=name, **style)
    ax.fill_between(x, list(map(min, ys)), list(map(max, ys)), color=colour, alpha=0.15, linewidth=0)


def draw_curves(rows, x, y, by, out, panel=(), logx=False, logy=False, size=PAPER):
    """Draw columns of rows, which are dicts, against column x: a panel for each column in y and each value of the
    columns `panel`, in it a curve for each value of the columns `by`.
    """
    panels, looks = {}, {}
    for row in rows:
        name = " ".join(entry(row, column) for column in by)
        title = ", ".join(f"{column} {entry(row, column)}" for column in panel)
        looks.setdefault(name, LOOKS[len(looks) % len(LOOKS)])               # a curve looks the same in all panels
        for column in y:
            drawn = panels.setdefault((title, column), {})
            values = drawn.setdefault(name, {}).setdefault(entry(row, x, float), [])
            values.append(entry(row, column, float))
    if not panels:
        raise BadInput("found no rows to draw")
    figure, axes = canvas(len(panels), size)
    for ax, ((title, column), drawn) in zip(axes, panels.items()):
        for name, values in drawn.items():
            draw_curve(ax, values, name, looks[name])
        ax.set(title=title, xlabel=x, ylabel=column)
        if logx:
            ax.set_xscale("log")
        if logy and math.isfinite(ax.dataLim.y0):                            # inf: there is no finite value
            ax.set_yscale("log" if ax.dataLim.y0 > 0 else "symlog")
        if size == PAPER:
            ax.legend()
    if size == SLIDE:                            # one legend beside the panels, which hides no curve
        figure.set_figwidth(figure.get_figwidth() + 1.5)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, out)


# --------------------------------------------------------------------------- of lectures, from formulas alone
# Each function but `noisy` yields the rows of a table. Its first column tells curves apart, the second is x, and
# each of the others is a panel.

def schedules():
    """alpha, sigma and log SNR of both schedules."""
    for name in ("cosine", "linear"):
        d = Diffusion(name)
        for t, (a2, snr) in enumerate(zip(d.alphas_cumprod, d.snr)):
            drawn = {"alpha": a2.sqrt(), "sigma": (1 - a2).sqrt(), "log SNR": snr.log()}
            yield {"schedule": name, "t": t, **drawn}


def weightings():
    """Every weighting at gamma 5: its weights of the x0, the eps and the v loss."""
    for name in WEIGHTINGS:
        for log_snr in torch.linspace(-10, 10, 101, dtype=torch.float64):
            row = {"weighting": called(name, 5), "log SNR": log_snr}
            for target in TARGETS:
                row[f"weight on {target} loss"] = loss_weight(log_snr.exp(), name, target)
            yield row


def shares():
    """How many per cent of all the weight on the x0 loss lie at 0 .. t, with the cosine schedule."""
    snr = Diffusion().snr
    for name, gamma in [("const", 5), ("snr", 5), ("min_snr", 1), ("min_snr", 5), ("min_snr", 20)]:
        sums = loss_weight(snr, name, "x0", gamma).cumsum(0)
        for t, part in enumerate(sums / sums[-1]):
            yield {"weighting": called(name, gamma), "t": t, "% of all weight, up to t": 100 * part}


def densities():
    """q(t) T of every density, with the cosine schedule: 1 where it draws t as often as the uniform one does. clts is
    at the end of its curriculum.
    """
    snr = Diffusion().snr
    for name in DENSITIES:
        for t, q in enumerate(timestep_density(name, snr, step=50_000)):
            yield {"density": name, "t": t, "q(t) T": q * len(snr)}


def noisy(t):
    """x_t of one heart at every t (N,) long, all with the same noise: uint8 (N,3,60,60)."""
    images, _ = shapes([6], 60)
    x0 = torch.from_numpy(images) / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator("teach", 0, 6))
    return to_uint8(Diffusion().q_sample(x0, t, noise))


# -------------------------------------------------------------------------------------------------- commands

def curves(paths, **how):
    """Columns of CSV files against another column."""
    rows = []
    for path in paths:
        rows += [{"file": Path(path).stem, **row} for row in read_csv(path)]
    draw_curves(rows, **how)


def bars(paths, x, y, logy, out):
    """One bar for each entry of column x: the mean of column y in all the rows that have it, and their range."""
    [y] = y
    heights = {}
    for path in paths:
        for row in read_csv(path):
            values = heights.setdefault(entry(row, x), [])
            values.append(entry(row, y, float))
    if not heights:
        raise BadInput("found no rows to draw")
    figure, [ax] = canvas(1)
    for i, (name, values) in enumerate(heights.items()):
        colour, _, _, hatch = LOOKS[i % len(LOOKS)]
        mean = fmean(values)
        whiskers = [[mean - min(values)], [max(values) - mean]]
        ax.bar(name, mean, yerr=whiskers, capsize=3, color="white", edgecolor=colour, hatch=hatch)
    ax.set(xlabel=x, ylabel=y)
    ax.tick_params(axis="x", rotation=40)
    if logy:
        ax.set_yscale("log")
    save(figure, out)


def runs(paths, **how):
    """Columns of the logs of train.py's runs against the step (figures 5 and 6)."""
    found, steps, columns = [], set(), set()
    for folder in dict.fromkeys(map(Path, paths)):                           # each once
        config = read_json(folder / "config.json")
        entry(config, "weighting")                                           # else it is no run's
        config["weighting"] = called(config["weighting"], config["gamma"])
        table = {}                                                           # step: what the logs say of it
        for file in (folder / "log.csv", folder / "quality.csv"):
            for line in read_csv(file) if file.exists() else []:
                table.setdefault(entry(line, "step", int), {}).update(line)
                columns.update(line)
        steps.update(table)
        found.append((config, table))
    rows = []
    for config, table in found:
        blank = dict.fromkeys(columns, math.nan)                             # where the run did not get to
        for step in sorted(steps):
            rows.append({**config, **blank, **table.get(step, {}), "step": step})
    draw_curves(rows, **how)


def teach(out):
    """Figures for a lecture, from the formulas alone: with T = 1000."""
    for table in (schedules, weightings, shares, densities):
        rows = list(table())
        by, x, *y = rows[0]
        file = Path(out, f"{table.__name__}.png")
        draw_curves(rows, x, y, [by], file, logy=table is weightings, size=SLIDE)
    t = torch.linspace(0, 999, 10).long()
    titles = [f"t {at}\nlog SNR\n{snr.log():.1f}" for at, snr in zip(t, Diffusion().snr[t])]
    file = Path(out, "noise.png")
    save_sheet(file, noisy(t), len(t), titles, side=128)
    print(file)


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for call in (curves, bars, runs, teach):
        command = commands.add_parser(call.__name__, doc=call.__doc__)
        command.set_defaults(call=call)
        add = command.add_argument
        add("--out", required=True, help=".png or .svg; teach: folder")
        if call is teach:
            continue
        add("paths", nargs="+", help="CSV files; runs: run folders")
        add("--x", default="step", help="column")
        add("--y", required=True, nargs=1 if call is bars else "+", help="column")
        add("--logy", action="store_true", help="logarithmic y")
        if call is bars:
            continue
        add("--logx", action="store_true", help="logarithmic x")
        add("--by", nargs="+", default=["file"], help="columns that tell curves apart")
        add("--panel", nargs="+", default=[], help="columns that tell panels apart")
        if call is runs:
            command.set_defaults(by=["weighting"], panel=["target"])
    flags = vars(parser.parse_args())
    call = flags.pop("call")
    call(**flags)


if __name__ == "__main__":
    run(main)
