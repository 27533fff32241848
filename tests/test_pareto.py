"""Gradients of the timesteps, the Pareto problem's solvers against a referee, the commands and the figures."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import built_in
from diffusion import TARGETS, Diffusion, loss_weight
from experiments import figures, pareto
from files import BadInput
from model_vit import ViT
from sample import load_checkpoint

SHAPE = dict(img_size=8, patch_size=4, in_channels=3, num_classes=8, dim=16, depth=2, heads=2, T=40)


def network():
    """A small network whose head is not near 0, as after training."""
    torch.manual_seed(0)
    model = ViT(**SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model


def explicit_gradients(model, diffusion, data, K, n, seed):
    """The gradients (K,P) of the network's x0 error, one sample and one bin after another."""
    rows = []
    for k in range(K):
        model.zero_grad()
        for x0, t, noise, y in pareto.draw_bin(data, diffusion.T, K, k, n, seed):
            for i in range(len(t)):
                one = slice(i, i + 1)
                x_t = diffusion.q_sample(x0[one], t[one], noise[one])
                x0_hat = diffusion.to_x0(model(x_t, t[one], y[one]), x_t, t[one])
                error = (x0_hat - x0[one]).square().mean() / n
                error.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows).double().numpy()


# ------------------------------------------------------------------------------------------------ gradients

@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("budget", [2 ** 30, 40_000])
def test_gram_is_that_of_explicit_gradients(target, budget):
    model, data, diffusion = network(), built_in(8), Diffusion(T=40, target=target)
    g = explicit_gradients(model, diffusion, data, 5, 3, seed=7)
    length = np.linalg.norm(g, axis=1)
    G = pareto.gram(model, diffusion, data, 5, 3, seed=7, budget=budget)
    error = np.abs(G - g @ g.T) / np.outer(length, length)
    assert error.max() < 1e-5


def drawn(T, K, k, n, seed):
    parts = zip(*pareto.draw_bin(built_in(8), T, K, k, n, seed))
    return [torch.cat(part) for part in parts]


def test_samples_of_a_bin_cover_its_timesteps():
    x0, t, noise, y = drawn(100, 7, 3, 200, seed=0)
    assert t.unique().tolist() == list(range(42, 57))
    assert x0.shape == noise.shape == (200, 3, 8, 8)


def test_samples_of_a_bin_depend_on_seed_and_bin_alone():
    noise = drawn(100, 7, 3, 200, seed=0)[2]
    assert torch.equal(noise, drawn(100, 7, 3, 200, seed=0)[2])
    assert not torch.equal(noise, drawn(100, 7, 3, 200, seed=1)[2])
    assert not torch.equal(noise, drawn(100, 7, 4, 200, seed=0)[2])


def test_bins_are_at_most_the_timesteps():
    assert pareto.edges(10, 10) == list(range(11))
    with pytest.raises(BadInput, match="11 bins"):
        pareto.edges(10, 11)


# -------------------------------------------------------------------------------------------------- solvers

SOLVERS = pareto.exact, pareto.ugd, pareto.frank_wolfe


def random_gram(kind, T, rank):
    """Of T gradients: around 0, with a common part, or with a common part and lengths over four decades."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((T, rank))
    if kind != "around 0":
        g += 1
    if kind == "uneven":
        g *= 10 ** rng.uniform(-2, 2, (T, 1))
    return g @ g.T


def check_referee(G, lam=0.0):
    """The referee's weights meet the conditions of Karush, Kuhn and Tucker. -> the optimum, and what is 0."""
    A = G + lam * np.eye(len(G))
    w = pareto.exact(G, lam)
    slope = A @ w
    best = w @ slope
    zero = 1e-9 * A.diagonal().min()
    assert w.min() >= 0 and w.sum() == pytest.approx(1, abs=1e-12)
    assert slope.min() >= best * (1 - 1e-6) - zero - 1e-14 * (np.abs(A) @ w).max()   # no weight may gain
    return best, zero


@pytest.mark.parametrize("kind", ["around 0", "common part", "uneven"])
@pytest.mark.parametrize("T, rank", [
    (2, 5), (10, 4), (100, 27), (100, 300), (300, 77),
    pytest.param(1000, 250, marks=pytest.mark.slow), pytest.param(1000, 1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale, share", [(1, 0), (1, 0.01), (1e-8, 0.01), (1, 10)])
def test_solvers_reach_the_referee(kind, T, rank, scale, share):
    G = scale * random_gram(kind, T, rank)
    lam = share * G.trace() / T
    best, zero = check_referee(G, lam)
    for solver in (pareto.ugd, pareto.frank_wolfe):
        w = solver(G, lam)
        found = pareto.objective(G, w, lam)
        assert w.min() >= 0 and w.sum() == pytest.approx(1, abs=1e-9)
        assert best * (1 - 1e-6) - zero <= found <= best * 1.001 + zero, solver.__name__


@pytest.mark.parametrize("K", [8, 40])
def test_solvers_reach_the_referee_on_gradients_of_a_network(K):
    G = pareto.gram(network(), Diffusion(T=40), built_in(8), K, 2)
    best, zero = check_referee(G)
    for solver in (pareto.ugd, pareto.frank_wolfe):
        assert pareto.objective(G, solver(G)) <= best * 1.001 + zero, solver.__name__


@pytest.mark.parametrize("decades", [2, 3, 5, 7])
def test_lengths_over_many_decades(decades):
    rng = np.random.default_rng(decades)
    g = rng.standard_normal((50, 77)) * 10 ** rng.uniform(-decades, decades, (50, 1))
    best, _ = check_referee(g @ g.T)
    if decades <= 5:
        assert pareto.objective(g @ g.T, pareto.ugd(g @ g.T)) < 1.001 * best


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("G, lam, w", [
    ([[4, 0], [0, 1]], 0, [1 / 5, 4 / 5]),                                   # orthogonal: as 1 / |g|^2
    ([[4, 0], [0, 1]], 1, [2 / 7, 5 / 7]),
    ([[1, -3], [-3, 9]], 0, [3 / 4, 1 / 4]),                                 # g and -3 g cancel
    ([[1, 2], [2, 9]], 0, [1, 0])])                                          # the shorter one serves both
def test_two_gradients_by_hand(solver, G, lam, w):
    assert np.allclose(solver(np.array(G, float), lam), w, atol=1e-3)


def test_objective_by_hand():
    G = np.diag([4.0, 1.0])
    assert pareto.objective(G, np.array([0.5, 0.5]), lam=2) == pytest.approx(0.25 * 5 + 2 * 0.5)


@pytest.mark.parametrize("g, w, expected", [
    ([[1, 0], [-3, 0]], [0.75, 0.25], "stationary"),
    ([[1, 0], [-0.5, 0.1]], [0.5, 0.5], "conflict"),                         # -u raises the second loss
    ([[1, 0], [-0.5, 0.1]], None, "descent"),                                # the optimum's raises none
    ([[0, 0], [1, 0]], [0.5, 0.5], "descent")])                              # the first loss stays: eq. 8
def test_theorem_1_by_hand(g, w, expected):
    G = np.array(g, float) @ np.array(g, float).T
    w = pareto.exact(G) if w is None else np.array(w)
    assert pareto.common_descent(G, w) == expected


def test_a_step_along_the_common_direction_lowers_the_loss_of_every_bin():
    model, data, diffusion = network(), built_in(8), Diffusion(T=40)
    G = pareto.gram(model, diffusion, data, 8, 4)
    w = pareto.exact(G)
    before = pareto.bin_losses(model, diffusion, data, 8, 4, seed=0)
    u = torch.from_numpy(w @ explicit_gradients(model, diffusion, data, 8, 4, seed=0))
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()) - 1e-3 * u.float(), model.parameters())
    change = pareto.bin_losses(model, diffusion, data, 8, 4, seed=0) - before
    assert (change < 0).all()
    assert np.allclose(change, -1e-3 * (G @ w), rtol=0.1)                    # eq. 7


# ------------------------------------------------------------------------------------- weights, fine-tuning

@pytest.mark.parametrize("weighting, gamma", pareto.TABLE)
def test_weights_of_a_bin_are_added_up(weighting, gamma):
    snr = Diffusion(T=100).snr
    w = loss_weight(snr, weighting, "x0", gamma).numpy()
    expected = np.array([w[:33].sum(), w[33:66].sum(), w[66:].sum()]) / w.sum()
    assert np.allclose(pareto.weights_of(weighting, gamma, snr, 3), expected, rtol=1e-12)


def test_ugd_table_is_the_solution_at_every_timestep():
    model, data, diffusion = network(), built_in(8), Diffusion(T=12)
    G = pareto.gram(model, diffusion, data, 12, 2, seed=5)
    expected = 12 * pareto.ugd(G, 0.01 * np.median(G.diagonal()))
    assert np.allclose(pareto.ugd_table(model, diffusion, data, 12, 2, 0.01, seed=5), expected)


def test_ugd_table_is_linear_between_the_centres_of_bins():
    model, data, diffusion = network(), built_in(8), Diffusion(T=12)
    G = pareto.gram(model, diffusion, data, 5, 2)                            # bins of 2, 2, 3, 2, 3 timesteps
    a, b, c, *_ = pareto.ugd(G, 0.01 * np.median(G.diagonal())) / [2, 2, 3, 2, 3]
    w = pareto.ugd_table(model, diffusion, data, 5, 2, 0.01, seed=0)
    assert w.mean() == pytest.approx(1)
    assert w[[0, 2, 5]] / c == pytest.approx(w[5] / c / c * np.array([a, 0.25 * a + 0.75 * b, c]))


def test_fine_tuning_sees_its_tenth_and_lowers_its_loss(monkeypatch):
    model, data, diffusion = network(), built_in(8), Diffusion(T=40)
    seen, loss = set(), pareto.x0_loss
    before = pareto.bin_losses(model, diffusion, data, 10, 64, seed=0)

    def watched(model, diffusion, part):
        seen.update(part[1].tolist())
        return loss(model, diffusion, part)

    monkeypatch.setattr(pareto, "x0_loss", watched)
    tuned = pareto.fine_tuned(model, diffusion, data, 2, steps=30, seed=0, lr=1e-3)
    monkeypatch.undo()
    after = pareto.bin_losses(tuned, diffusion, data, 10, 64, seed=0)
    assert seen == {8, 9, 10, 11}
    assert after[2] < 0.9 * before[2]


# ------------------------------------------------------------------------------------------------- commands

@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(module, "spread", ...) runs a script's main in this process, in the test's folder, which holds a
    checkpoint in run/ -> what it printed.
    """
    model = network()
    config = dict(model="vit-tiny", network=SHAPE, dataset="shapes", schedule="cosine", T=40, target="eps")
    (tmp_path / "run").mkdir()
    state = dict(model=model.state_dict(), ema=model.state_dict(), step=7, config=config)
    torch.save(state, tmp_path / "run/ckpt.pt")
    monkeypatch.chdir(tmp_path)

    def call(module, *words):
        monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
        module.main()
        return capsys.readouterr().out
    return call


def column(path, name, kind=float):
    return [kind(row[name]) for row in figures.read_csv(path)]


def test_objective_command_compares_with_the_optimum(command):
    command(pareto, "objective", "--ckpt", "run", "--K", 4, "--n", 3, "--seed", 7, "--lam", 0.2)
    G = pareto.gram(*pareto.load("run"), 4, 3, seed=7)
    lam = 0.2 * np.median(G.diagonal())
    best = pareto.objective(G, pareto.exact(G, lam), lam)
    w = pareto.weights_of("min_snr", 5, Diffusion(T=40).snr, 4)
    over = dict(zip(column("objective.csv", "weighting", str), column("objective.csv", "over_optimum")))
    assert len(over) == 9 and min(over.values()) > 1 - 1e-6 and over["ugd"] < 1.001
    assert over["min_snr 5"] == pytest.approx((w @ G @ w + lam * w @ w) / best)


def test_finetune_command_gives_the_change_of_every_bin(command):
    command(pareto, "finetune", "--ckpt", "run", "--K", 4, "--n", 3, "--steps", 2)
    model, *where = pareto.load("run")
    tuned = pareto.fine_tuned(model, *where, 1, steps=2, seed=0)
    before, after = (pareto.bin_losses(m, *where, 4, 3, seed=0) for m in (model, tuned))
    percent = column("finetune.csv", "percent")
    assert len(percent) == 12 and percent[:4] == pytest.approx(100 * (after / before - 1))


def test_spread_command_repeats_with_other_samples(command):
    command(pareto, "spread", "--ckpt", "run", "--K", 4, "--samples", 2, 3)
    weight = np.reshape(column("spread.csv", "weight"), (2, 4, 40))
    expected = pareto.ugd_table(*pareto.load("run"), 4, 3, 0.01, "0 3 3")
    assert np.allclose(weight[1, 3], expected) and not np.allclose(weight[1, 0], expected)


def test_weights_command_lists_the_weightings(command):
    command(pareto, "weights", "--out", "w/table.csv")
    names = column("w/table.csv", "weighting", str)
    w = np.array(column("w/table.csv", "weight"))[np.array(names) == "min_snr 5"]
    assert np.allclose(w, Diffusion().snr.clamp(max=5))


def test_measure_command_appends_a_line(command, tmp_path):
    for _ in range(2):
        command(pareto, "measure", "--ckpt", "run", "--n", 16)
    model, diffusion, data = pareto.load("run")
    expected = pareto.bin_losses(model, diffusion, data, 10, 16, "quality").mean()
    assert column("run/quality.csv", "x0_mse") == pytest.approx([expected] * 2)
    assert column("run/quality.csv", "step") == [7, 7]
    assert 0 < column("run/quality.csv", "fd_pixels")[0] < 1e3


def test_checkpoints_that_are_not_finite_are_refused(command):
    state = torch.load("run/ckpt.pt")
    next(iter(state["ema"].values())).fill_(math.nan)
    torch.save(state, "run/ckpt.pt")
    with pytest.raises(BadInput, match="not finite"):
        command(pareto, "ugd", "--ckpt", "run", "--K", 3, "--n", 2)


def test_ugd_trains_by_way_of_a_file(script, command):
    words = ("--size", 8, "--batch-size", 8, "--T", 40, "--decay", 0, "--sample-steps", 1, "--out", "out")
    script("train.py", *words, "--steps", 2)
    command(pareto, "ugd", "--ckpt", "out", "--K", 5, "--n", 2, "--out", "out/w.csv")
    script("train.py", "--resume", "--out", "out", "--steps", 4, "--weighting", "out/w.csv")
    weight = torch.load("out/ckpt.pt")["weight"]
    assert weight.tolist() == pytest.approx(column("out/w.csv", "weight"))


# -------------------------------------------------------------------------------------------------- figures

@pytest.fixture
def drawn_lines(monkeypatch):
    """The list that the axes of every saved figure are appended to."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    axes, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (axes.extend(figure.axes), save(figure, path)))
    return axes


def test_a_curve_is_the_mean_and_its_band_the_range(command, drawn_lines, tmp_path):
    (tmp_path / "a.csv").write_text("t,kind,loss\n0,p,1\n0,p,3\n10,p,4\n0,q,5\n")
    command(figures, "curves", "a.csv", "--x", "t", "--y", "loss", "--by", "kind", "--out", "a.png")
    [ax] = drawn_lines
    p, q = ax.lines
    assert p.get_label() == "p" and p.get_xydata().tolist() == [[0, 2], [10, 4]]
    assert ax.collections[0].get_datalim(ax.transData).bounds == (0, 1, 10, 3)
    assert p.get_linestyle() != q.get_linestyle() and p.get_marker() != q.get_marker()


def test_bars_are_means_over_files(command, drawn_lines, tmp_path):
    (tmp_path / "a.csv").write_text("weighting,over\nugd,1\nsnr,2\n")
    (tmp_path / "b.csv").write_text("weighting,over\nugd,1\nsnr,4\n")
    command(figures, "bars", "a.csv", "b.csv", "--x", "weighting", "--y", "over", "--out", "a.svg")
    assert [bar.get_height() for bar in drawn_lines[0].patches] == [1, 3]


def write_run(folder, target, weighting, quality):
    folder.mkdir()
    config = dict(target=target, weighting=weighting, gamma=5.0)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.csv").write_text("step,x0_mse_2\n100,0.5\n")
    (folder / "quality.csv").write_text("step,fd_pixels\n" + quality)


def test_runs_are_told_apart_and_lost_ones_counted(command, drawn_lines, tmp_path):
    write_run(tmp_path / "a", "x0", "min_snr", "200,3\n400,1\n")
    write_run(tmp_path / "b", "x0", "min_snr", "200,5\n")
    write_run(tmp_path / "c", "x0", "const", "")
    write_run(tmp_path / "d", "eps", "snr", "400,2\n")
    command(figures, "runs", "a", "b", "c", "d", "--y", "fd_pixels", "x0_mse_2", "--logy", "--out", "r.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn_lines[0].lines}
    assert [ax.get_title() for ax in drawn_lines] == ["target x0"] * 2 + ["target eps"] * 2
    assert lines == {"min_snr 5 (1 of 2 to the end)": [[200, 4], [400, 1]], "const (0 of 1 to the end)": []}


@pytest.mark.parametrize("words, why", [
    (("curves", "a.csv", "--x", "t", "--y", "no", "--out", "a.png"), "column no: not found"),
    (("curves", "a.csv", "--x", "kind", "--y", "t", "--out", "a.png"), "found 'p', expected numbers"),
    (("bars", "a.csv", "--x", "kind", "--y", "t", "--out", "a.jpg"), ".png or .svg"),
    (("runs", "none", "--y", "loss", "--out", "a.png"), "none")])
def test_mistakes_in_figures_are_one_line(command, tmp_path, words, why):
    (tmp_path / "a.csv").write_text("t,kind\n0,p\n")
    with pytest.raises((BadInput, OSError), match=why):
        command(figures, *words)


def test_a_missing_matplotlib_is_asked_for(command, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("x,y\n0,1\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match="pip install matplotlib"):
        command(figures, "bars", "a.csv", "--x", "x", "--y", "y", "--out", "a.png")


PYTHON = """#!/bin/sh
# Stands in for python: notes its arguments; training makes a checkpoint, v runs diverge, measuring adds a line.
echo "$@" >> commands
case "$*" in *"--target v"*) exit 3;; esac
mkdir -p $3
case "$*" in train*) touch $3/ckpt.pt; echo "$@" | sed 's/.*--steps \\([0-9]*\\).*/\\1,/' > $3/done;; esac
case "$*" in *measure*) cat $5/done >> $5/quality.csv;; esac
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_min_snr_goes_on_after_a_kill_and_past_runs_that_diverge(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    path = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}")
    for _ in range(2):
        subprocess.run(["sh", ROOT / "experiments/min_snr.sh"], cwd=tmp_path, env=path, check=True)
    commands = (tmp_path / "commands").read_text().splitlines()
    trained = [line for line in commands if line.startswith("train.py") and "--target v" not in line]
    assert len(trained) == 4 * 2 * 3 * 3                                     # nothing is trained twice
    assert sum("--resume" in line for line in trained) == 4 * 2 * 3 * 2
