"""Figures of the CSV files that the other experiments write, and of train.py's run folders.

    python -m experiments.figures curves w4.csv w256.csv --x t --y weight --out figure3.png
    python -m experiments.figures bars objective.csv --x weighting --y over_optimum --logy --out figure4.png
    python -m experiments.figures runs out/min_snr/*/ --y fd_pixels --logy --out figure5.png

A curve is the mean of all the values at one x, such as those of several seeds; the band around it is their
range. `--by` names the columns that tell curves apart, `--panel` those that tell panels apart. `runs` draws
columns of log.csv and quality.csv against the step; there, --by and --panel name settings of config.json.
"""
import csv
import io
import math
from pathlib import Path
from statistics import fmean

from files import BadInput, Parser, read_json, replace, run

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

def canvas(panels, columns):
    """-> figure and a list of its axes, `columns` in a row. Raises BadInput where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("figures need a package: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "legend.fontsize": 7, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib.figure import Figure
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
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


def draw_curves(rows, args):
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
    figure, axes = canvas(len(panels), min(4, len(panels)))
    for ax, ((title, y), drawn) in zip(axes, panels.items()):
        for name, values in drawn.items():
            draw_curve(ax, values, name, LOOKS[names.index(name) % len(LOOKS)])
        ax.set(title=title, xlabel=args.x, ylabel=y)
        if args.logx:
            ax.set_xscale("log")
        if args.logy:
            ax.set_yscale("log" if ax.dataLim.y0 > 0 else "symlog")
        ax.legend()
    save(figure, args.out)


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
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    run(main)
