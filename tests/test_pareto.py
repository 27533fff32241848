"""Gradients of the timesteps, the Pareto problem's solvers against a referee, UGD in training, and the figures."""
import argparse
import csv
import re
import sys

import numpy as np
import pytest
import torch
from conftest import finish, fork, relative

import pareto
import train
from data import built_in
from diffusion import TARGETS, Diffusion, loss_weight
from model_vit import ViT
from sample import load_checkpoint, read
from test_train import distance

TINY = ("--batch-size", 8, "--sample-steps", 1, "--log-every", 5, "--size", 8)


def network(T=40):
    """A small network whose head is not near 0, as after training."""
    torch.manual_seed(0)
    model = ViT(8, 4, 3, 8, dim=16, depth=2, heads=2, T=T)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model, built_in(8)


def explicit(model, diffusion, data, K, n, seed):
    """The gradients (K,P) of the mean squared error of the network's x0, one sample and one bin after another."""
    rows = []
    for k in range(K):
        model.zero_grad()
        for x0, t, noise, y in pareto.draw_bin(data, diffusion.T, K, k, n, seed):
            for i in range(len(t)):
                one = slice(i, i + 1)
                x_t = diffusion.q_sample(x0[one], t[one], noise[one])
                x0_hat = diffusion.to_x0(model(x_t, t[one], y[one]), x_t, t[one])
                ((x0_hat - x0[one]).square().mean() / n).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------ gradients

@pytest.mark.parametrize("target", TARGETS)
def test_gram_is_that_of_explicit_gradients_whole_and_in_chunks(target):
    model, data = network()
    diffusion = Diffusion("cosine", 40, target)
    g = explicit(model, diffusion, data, 5, 3, seed=7)
    expected, size = g @ g.T, g.norm(dim=1)
    off = lambda G: ((torch.from_numpy(G) - expected).abs() / size / size[:, None]).max()
    assert off(pareto.gram(model, diffusion, data, 5, 3, seed=7)) < 1e-5
    assert off(pareto.gram(model, diffusion, data, 5, 3, seed=7, budget=5 * 4 * 1000)) < 1e-5    # inside of tensors
    assert off(pareto.gram(model, diffusion, data, 5, 3, seed=8)) > 1e-3
    assert all(p.grad is not None for p in model.parameters())                # of explicit(): gram() leaves .grad alone


def test_samples_of_a_bin_are_its_own_and_come_from_the_seed():
    data = built_in(8)
    draw = lambda *words: [torch.cat(part) for part in zip(*pareto.draw_bin(data, *words))]
    x0, t, noise, y = draw(100, 7, 3, 200, 0)
    low, high = pareto.edges(100, 7)[3:5]
    assert t.unique().tolist() == list(range(low, high)) and x0.shape == noise.shape == (200, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip((x0, t, noise, y), draw(100, 7, 3, 200, 0)))
    assert not torch.equal(noise, draw(100, 7, 3, 200, 1)[2]) and not torch.equal(noise, draw(100, 7, 4, 200, 0)[2])
    assert pareto.edges(100, 7)[0] == 0 and pareto.edges(100, 7)[-1] == 100
    assert [draw(10, 10, k, 2, 0)[1].tolist() for k in range(10)] == [[k, k] for k in range(10)]


def test_projection_errs_by_one_over_the_root_of_its_size():
    model, data = network()
    diffusion, K = Diffusion("cosine", 40), 8
    G = pareto.gram(model, diffusion, data, K, 4)
    size = np.sqrt(np.outer(G.diagonal(), G.diagonal()))
    upper = np.triu_indices(K)
    for m in (100, 400, 1600):
        found = ((pareto.gram(model, diffusion, data, K, 4, project=m) - G) / size)[upper]
        error = np.sqrt(np.mean(found ** 2))
        print(f"projection to {m}: error {error:.4f}, x sqrt(m) {error * np.sqrt(m):.2f}")
        assert 0.3 < error * np.sqrt(m) < 1.7                                # sqrt(2) at most, on average
    again = pareto.gram(model, diffusion, data, K, 4, project=100)
    assert np.array_equal(again, pareto.gram(model, diffusion, data, K, 4, project=100))


# -------------------------------------------------------------------------------------------------- solvers

def random_gram(kind, T, rank, seed=0):
    """Of T gradients in `rank` dimensions: around 0, with a common part, or with lengths over four decades too."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((T, rank)) + (kind != "around 0")
    g *= 10 ** rng.uniform(-2, 2, (T, 1)) if kind == "uneven" else 1
    return g @ g.T


def check_solvers(G, lam):
    """The referee meets the conditions of Karush, Kuhn and Tucker; the others reach it within 0.1 %."""
    A = G + lam * np.eye(len(G))
    w, tiny = pareto.exact(G, lam), 1e-9 * A.diagonal().min()
    best, slope = w @ A @ w, A @ w
    assert abs(best - pareto.objective(G, w, lam)) <= 1e-9 * best + tiny
    assert w.min() >= 0 and abs(w.sum() - 1) < 1e-12
    assert slope.min() >= best * (1 - 1e-7) - tiny                           # no weight may gain
    assert np.abs(slope[w > 1e-9] - best).max() <= 1e-5 * best + tiny        # those that are there agree
    for solver in (pareto.ugd, pareto.frank_wolfe):
        v = solver(G, lam)
        assert v.min() >= 0 and abs(v.sum() - 1) < 1e-9
        assert pareto.objective(G, v, lam) <= 1.001 * best + tiny, solver.__name__
        assert pareto.objective(G, v, lam) >= best * (1 - 1e-6) - tiny, solver.__name__
    return w


@pytest.mark.parametrize("kind", ["around 0", "common part", "uneven"])
@pytest.mark.parametrize("T, rank", [(2, 5), (10, 4), (100, 27), (100, 300), (300, 77),
                                     *(pytest.param(1000, rank, marks=pytest.mark.slow) for rank in (250, 1000))])
def test_solvers_reach_the_referee(kind, T, rank):
    G = random_gram(kind, T, rank)
    for lam, scale in ((0, 1), (0.01, 1e-8)) if T == 1000 else ((0, 1), (0.01, 1), (0.01, 1e-8), (10, 1)):
        w = check_solvers(scale * G, lam * scale * G.trace() / T)
        if lam == 0:                                                         # appendix A
            u2 = pareto.objective(G, w)
            assert (G @ w).min() >= u2 * (1 - 1e-6) - 1e-9 * G.diagonal().min()
            assert pareto.common_descent(G, w) == ("descent" if u2 > 1e-9 * G.diagonal().min() else "stationary")


def test_solvers_reach_the_referee_on_gradients_of_a_network():
    model, data = network()
    for K, n in ((8, 2), (40, 2)):
        G = pareto.gram(model, Diffusion("cosine", 40), data, K, n)
        for lam in (0, 0.01):
            check_solvers(G, lam * G.trace() / K)


@pytest.mark.parametrize("decades, others", [(2, [pareto.ugd, pareto.frank_wolfe]), (3, [pareto.frank_wolfe]), (5, []), (7, [])])
def test_the_referee_is_exact_for_lengths_over_many_decades(decades, others):
    rng = np.random.default_rng(decades)
    g = rng.standard_normal((50, 77)) * 10 ** rng.uniform(-decades, decades, (50, 1))
    G = g @ g.T
    w = pareto.exact(G)
    best, slope = w @ G @ w, G @ w
    rounding = 1e-14 * np.abs(G) @ w
    assert w.min() >= 0 and abs(w.sum() - 1) < 1e-12 and (slope >= best * (1 - 1e-6) - rounding).all()
    for solver in others:
        assert 1 - 1e-6 < pareto.objective(G, solver(G)) / best < 1.001, solver.__name__


def test_two_orthogonal_gradients():
    G = np.diag([4.0, 1.0])
    for solver in (pareto.exact, pareto.ugd, pareto.frank_wolfe):
        assert np.allclose(solver(G), [0.2, 0.8], atol=1e-2 if solver is pareto.ugd else 1e-6)   # as 1 / |g|^2
        assert np.allclose(solver(G, 1.0), [2 / 7, 5 / 7], atol=1e-2)
    assert pareto.common_descent(G, np.array([0.2, 0.8])) == "descent"
    assert pareto.objective(G, np.array([0.2, 0.8])) == pytest.approx(0.8)
    assert pareto.objective(G, np.array([0.5, 0.5]), lam=2) == pytest.approx(2.25)


def test_theorem_1_by_hand():
    opposite = np.array([[1.0, -3.0], [-3.0, 9.0]])                          # g and -3 g
    for solver in (pareto.exact, pareto.ugd, pareto.frank_wolfe):
        w = solver(opposite)
        assert np.allclose(w, [0.75, 0.25], atol=1e-4) and pareto.common_descent(opposite, w) == "stationary"
    g = np.array([[1.0, 0.0], [-0.5, 0.1]])
    half = np.array([0.5, 0.5])
    assert pareto.common_descent(g @ g.T, half) == "conflict"                # -u raises the second loss
    assert pareto.common_descent(g @ g.T, pareto.exact(g @ g.T)) == "descent"
    assert pareto.common_descent(np.diag([0.0, 1.0]), np.array([1.0, 0.0])) == "stationary"
    assert pareto.common_descent(np.diag([0.0, 1.0]), half) == "descent"     # and the first loss stays: eq. 8


def test_a_step_along_the_common_direction_lowers_the_loss_of_every_bin():
    model, data = network()
    model, diffusion, K, n = model.double(), Diffusion("cosine", 40), 8, 4
    G = pareto.gram(model, diffusion, data, K, n)
    w = pareto.exact(G)
    assert pareto.common_descent(G, w) == "descent"
    before = pareto.bin_losses(model, diffusion, data, K, n, 0)
    g = explicit(model, diffusion, DoubleData(data), K, n, 0)
    u = (torch.from_numpy(w) @ g).split([p.numel() for p in model.parameters()])
    with torch.no_grad():
        for p, step in zip(model.parameters(), u):
            p -= 1e-4 * step.view_as(p)
    change = pareto.bin_losses(model, diffusion, data, K, n, 0) - before
    assert (change < 0).all()
    assert np.allclose(change, -1e-4 * (G @ w), rtol=0.05)                   # eq. 7


class DoubleData:
    """Data whose images are doubles, for a network of doubles."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def batch(self, *words):
        x0, y = self.data.batch(*words)
        return x0.double(), y


def test_weights_of_the_table():
    snr = Diffusion("cosine", 100).snr
    for name, gamma in pareto.TABLE:
        w = loss_weight(snr, name, "x0", gamma).numpy()
        assert np.allclose(pareto.weights_of(name, snr, 100, gamma), w / w.sum(), rtol=1e-12)
        bins = np.array([w[:33].sum(), w[33:66].sum(), w[66:].sum()])
        assert np.allclose(pareto.weights_of(name, snr, 3, gamma), bins / bins.sum(), rtol=1e-12)


# ---------------------------------------------------------------------------------------------- UGD in training

def test_ugd_table_is_the_solution_at_every_timestep():
    model, data = network(12)
    diffusion = Diffusion("cosine", 12)
    G = pareto.gram(model, diffusion, data, 12, 2, seed="0 5")
    expected = 12 * pareto.ugd(G, 0.01 * np.median(G.diagonal()))
    assert np.allclose(pareto.ugd_table(model, diffusion, data, 50, 2, 0.01, "0 5"), expected)
    assert not np.allclose(pareto.ugd_table(model, diffusion, data, 50, 2, 1.0, "0 5"), expected)
    coarse = pareto.ugd_table(model, diffusion, data, 4, 2, 0.01, 0)
    assert coarse.shape == (12,) and coarse.min() >= 0 and abs(coarse.mean() - 1) < 1e-12
    assert coarse[0] == coarse[1] and coarse[10] == coarse[11]               # outside of the first and last centre
    assert torch.allclose(coarse[1:5].diff(), coarse[2] - coarse[1])         # linear in between: 1, 4, 7, 10
    G = pareto.gram(model, diffusion, data, 5, 2)                            # bins of 2, 2, 3, 2, 3: 1 / width
    a, b, c = pareto.ugd(G, 0.01 * np.median(G.diagonal()))[:3] / [2, 2, 3]
    uneven = pareto.ugd_table(model, diffusion, data, 5, 2, 0.01, 0)         # centres .5, 2.5, 5
    assert uneven[2] / uneven[5] == pytest.approx((0.25 * a + 0.75 * b) / c)


def test_ugd_run_stopped_and_resumed_is_the_same_to_the_bit(script, tmp_path):
    words = (*TINY, "--weighting", "ugd", "--ugd-every", 6, "--ugd-bins", 10, "--ugd-samples", 8, "--T", 4, "--decay", 0, "--target", "eps")
    text = script("train.py", *words, "--steps", 16, "--out", "whole")
    assert [line.split(":")[0] for line in text.splitlines() if "UGD weights solved" in line] == ["step 0", "step 6", "step 12"]
    script("train.py", *words, "--steps", 9, "--out", "parts")               # the table of step 6 comes from the file
    script("train.py", "--out", "parts", "--resume", "--steps", 16)
    whole, parts = (read(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizer", "weight"):
        assert distance(whole[part], parts[part]) == 0, part
    factor = Diffusion("cosine", 4, "eps").factor
    assert abs((whole["weight"] * factor).mean() - 1) < 1e-9 and whole["weight"].shape == (4,)
    assert (whole["weight"] * factor).std() > 0.1
    assert [whole["config"][key] for key in train.UGD] == [6, 10, 8, 0.01]
    for key, value in train.UGD.items():
        flag = f"--{key.replace('_', '-')}"
        assert f"{flag}: needs" in script("train.py", *TINY, flag, value, "--out", "other", code=2)
    assert "--ugd-every" in script("train.py", "--ugd-every", 7, "--out", "parts", "--resume", code=2)
    del parts["weight"]
    torch.save(parts, tmp_path / "parts/ckpt.pt")
    assert "disagree" in script("train.py", "--out", "parts", "--resume", "--steps", 20, code=2)


def test_settings_of_ugd_reach_its_solution(script, tmp_path):
    words = (*TINY, "--weighting", "ugd", "--T", 8, "--steps", 1, "--ugd-samples", 4, "--ugd-bins", 8)
    seen = [script("train.py", *words, "--out", f"run{i}", *other) and read(tmp_path / f"run{i}/ckpt.pt")["weight"] for i, other in
            enumerate(((), ("--ugd-samples", 5), ("--ugd-bins", 2), ("--ugd-lambda", 5)))]
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
    assert len(seen[2].unique()) < len(seen[0].unique()) == 8                # constant outside of two centres
    text = script("train.py", *words, "--dry-run", "--ugd-every", 3, "--ugd-bins", 50, "--out", "none", whole=True)
    solving = float(re.search(r"UGD: about ([\d.]+) s a solution, one in 3 steps", text)[1])
    step, update = (float(x) / 1e3 for x in re.search(r"([\d,]+) ms a step \(([\d,]+) of it", text).groups())
    assert solving > 0 and step >= (solving - 0.05) / 3                      # printed to 0.1 s


@pytest.mark.slow
def test_ugd_run_on_two_processes(script, tmp_path):
    words = (*TINY, "--weighting", "ugd", "--ugd-every", 2, "--T", 8, "--steps", 5, "--dtype", "float64", "--lr", 1e-3)
    script("train.py", *words, "--out", "one")
    script("train.py", *words, "--out", "two", processes=2)
    one, two = (read(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    assert distance(one["model"], two["model"]) < 1e-8 and relative(two["weight"], one["weight"]) < 1e-6


# ------------------------------------------------------------------------------------------------- command line

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run of ten steps, trained once."""
    folder = tmp_path_factory.mktemp("runs")
    words = (*TINY, "--steps", 10, "--T", 100, "--out", folder / "run")
    assert finish([fork(folder / "run.txt", folder, "train.py", *words)]) == 0
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command("figure4", ...) runs pareto.py in this process, in an empty folder -> what it printed."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")

    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pareto.py", *map(str, words)])
        pareto.main()
        return capsys.readouterr().out
    return call


def table(path):
    return list(csv.DictReader(path.open()))


def test_figures_of_a_checkpoint(command, runs, tmp_path):
    small, ckpt = ("--K", 5, "--n", 3), ("--ckpt", runs / "run", "--ckpt", runs / "run/ckpt.pt")
    text = command("figure4", *small, *ckpt)
    rows = table(tmp_path / "figure4.csv")
    assert len(rows) == 2 * 8 and (tmp_path / "figure4.png").stat().st_size > 5000
    assert all(float(row["over_optimum"]) >= 1 - 1e-6 for row in rows)
    assert all(float(row["over_optimum"]) < 1.001 for row in rows if row["weighting"] == "UGD")
    assert "min-SNR-5" in text and "Frank-Wolfe" in text
    command("figure4", *small, *ckpt[:2], "--project", 64, "--out", "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text() and table(tmp_path / "p.csv") != rows[:8]
    command("figure2", *small, *ckpt[:2], "--steps", 2)
    rows = table(tmp_path / "figure2.csv")
    assert len(rows) == 15 and {(row["low"], row["high"]) for row in rows} == {("10", "20"), ("20", "30"), ("30", "40")}
    assert any(row["before"] != row["after"] for row in rows)
    command("figure3", *small, *ckpt[:2], "--samples", 2, 4, "--repeats", 2)
    rows = table(tmp_path / "figure3.csv")
    assert len(rows) == 2 * 2 * 5 and len({row["weight"] for row in rows}) == 20
    assert abs(sum(float(row["weight"]) for row in rows) - 4) < 1e-4


def test_figures_hold_what_the_functions_give(command, runs, tmp_path):
    """Columns of the CSV files against the same by hand, under flags that are not the defaults."""
    command("figure4", "--K", 4, "--n", 3, "--seed", 7, "--lam", 0.2, "--ckpt", runs / "run")
    args = argparse.Namespace(target=None, data=None, K=4)
    model, diffusion, data = pareto.load(runs / "run", args)
    G = pareto.gram(model, diffusion, data, 4, 3, 7)
    lam = 0.2 * np.median(G.diagonal())
    best = pareto.objective(G, pareto.exact(G, lam), lam)
    for row, (name, gamma) in zip(table(tmp_path / "figure4.csv"), pareto.TABLE):
        w = pareto.weights_of(name, diffusion.snr, 4, gamma)
        found = [float(row[key]) for key in ("u2", "w2", "objective", "over_optimum")]
        value = w @ G @ w + lam * w @ w
        assert found == pytest.approx([w @ G @ w, w @ w, value, value / best], rel=1e-4)
    command("figure2", "--K", 4, "--n", 3, "--seed", 7, "--steps", 3, "--lr", 1e-3, "--ckpt", runs / "run")
    rows = table(tmp_path / "figure2.csv")
    tuned = pareto.finetune(model, diffusion, data, 20, 30, 3, 1e-3, 7)
    for m, key in ((model, "before"), (tuned, "after")):
        expected = pareto.bin_losses(m, diffusion, data, 4, 3, 7)
        assert [float(row[key]) for row in rows[4:8]] == pytest.approx(expected.tolist(), rel=1e-4)
    command("figure3", "--K", 4, "--samples", 2, "--repeats", 3, "--seed", 7, "--ckpt", runs / "run")
    weight = np.array([float(row["weight"]) for row in table(tmp_path / "figure3.csv")]).reshape(3, 4)
    for r in range(3):
        G = pareto.gram(model, diffusion, data, 4, 2, f"7 2 {r}")
        assert np.allclose(weight[r], pareto.ugd(G, 0.01 * np.median(G.diagonal())), atol=1e-4)


def test_checkpoints_that_are_not_finite_are_refused(runs, script, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    state = read(runs / "run/ckpt.pt")
    next(iter(state["ema"].values())).fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    for figure in ("figure2", "figure3", "figure4"):
        assert "not finite" in script("pareto.py", figure, "--ckpt", "nan.pt", "--K", 3, "--n", 2, "--steps", 1, code=2)


def test_finetuning_lowers_the_loss_of_its_own_range(monkeypatch):
    model, data = network()
    seen, loss = set(), pareto.x0_loss
    monkeypatch.setattr(pareto, "x0_loss", lambda *words: seen.update(words[2][1].tolist()) or loss(*words))
    diffusion = Diffusion("cosine", 40)
    tuned = pareto.finetune(model, diffusion, data, 8, 12, 30, 1e-3, 0)
    assert seen == {8, 9, 10, 11}
    before, after = (pareto.bin_losses(m, diffusion, data, 10, 64, 0) for m in (model, tuned))
    assert after[2] < 0.9 * before[2] and not np.allclose(before[3:], after[3:])


def test_curves_of_runs(command, runs, script, tmp_path):
    command("figure6", "--runs", runs / "run", runs / "run")                  # one folder is one run
    rows, log = table(tmp_path / "figure6.csv"), table(runs / "run/log.csv")
    assert len(rows) == 4 * 2 and {row["runs"] for row in rows} == {"1"}
    for i in (0, 2, 6, 8):
        row = next(row for row in rows if row["column"] == f"x0_mse_{i}" and row["step"] == "10")
        assert float(row["mean"]) == pytest.approx(float(log[1][f"x0_mse_{i}"]), rel=1e-5)
    assert "quality.csv" in script("pareto.py", "figure5", "--runs", runs / "run", code=2)
    for seed, values in enumerate(([3, 1], [5])):                            # the second run diverged
        folder = tmp_path / f"r{seed}"
        folder.mkdir()
        (folder / "config.json").write_bytes((runs / "run/config.json").read_bytes())
        (folder / "quality.csv").write_text("step,fd_pixels\n" + "".join(f"{10 * i},{x}\n" for i, x in enumerate(values)))
    (folder / "diverged.txt").write_text("")
    command("figure5", "--runs", "r0", "r1", "--out", "five.svg")
    assert [(row["step"], row["mean"], row["low"], row["high"], row["diverged"]) for row in table(tmp_path / "five.csv")] == \
        [("0", "4", "3", "5", "1"), ("10", "1", "1", "1", "1")]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"T": 100,', '"T": 50,'))
    command("figure5", "--runs", "r0", "r1", "--out", "apart.png")           # not two seeds of one thing
    assert [row["weighting"] for row in table(tmp_path / "apart.csv")] == ["min-SNR-5 T 100"] * 2 + ["min-SNR-5 T 50"]
    (folder / "config.json").write_text(config.replace('"min_snr"', '"const"'))
    (folder / "quality.csv").unlink()                                        # lost before its first mark
    command("figure5", "--runs", "r0", "r1", "--out", "lost.svg")
    assert "const (1 of 1 diverged)" in (tmp_path / "lost.svg").read_text() and len(table(tmp_path / "lost.csv")) == 2
    (tmp_path / "r0/log.csv").write_bytes((runs / "run/log.csv").read_bytes())
    for name in ("log", "quality"):                                          # figures do not write over a run's log
        assert "write over" in script("pareto.py", "figure5", "--runs", "r0", "--out", f"r0/{name}.png", code=2)
    assert "min-SNR-5 (1 of 2 diverged)" in (tmp_path / "five.svg").read_text().replace("&#45;", "-")


def test_weights_command(command, tmp_path):
    command("weights", "--T", 20, "--out", "w.png")
    rows = table(tmp_path / "w.csv")
    snr = Diffusion("cosine", 20).snr
    assert len(rows) == 20 and np.allclose([float(row["min-SNR-5"]) for row in rows], snr.clamp(max=5), rtol=1e-5)
    assert np.allclose([float(row["max-SNR-1"]) for row in rows], snr.clamp(min=1), rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_the_miniature_is_resumed_and_its_divergence_is_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words, folder = " ".join(map(str, (*TINY, "--T", 100, "--decay", 0, "--cfg", 1))), tmp_path / "run"
    pareto.bring_up(folder, words, [2, 4], 16)
    quality = table(folder / "quality.csv")
    assert [row["step"] for row in quality] == ["2", "4"] and read(folder / "ckpt.pt")["step"] == 4
    before = (folder / "ckpt.pt").stat().st_mtime_ns
    model, config = load_checkpoint(folder)                                  # the x0 error is that of the EMA weights
    losses = pareto.bin_losses(model, Diffusion("cosine", 100), built_in(8), 10, 16, "quality")
    assert float(quality[1]["x0_mse"]) == pytest.approx(losses.mean(), rel=1e-4)
    (folder / "quality.csv").write_text("step,fd_pixels,x0_mse\n" + ",".join(quality[0].values()) + "\n")   # killed
    pareto.bring_up(folder, words, [2, 4], 16)
    assert table(folder / "quality.csv") == quality and (folder / "ckpt.pt").stat().st_mtime_ns == before
    log = (folder / "log.csv").read_text()
    assert not (folder / "diverged.txt").exists()
    (folder / "log.csv").write_text(log + "4,9,99\n")                        # an error that has grown
    pareto.bring_up(folder, words, [2, 4], 16)
    assert "99 in the last" in (folder / "diverged.txt").read_text()
    (folder / "diverged.txt").unlink()
    (folder / "log.csv").write_text(log)
    state = read(folder / "ckpt.pt")
    state["model"]["linear_projection.bias"][0] = float("inf")
    torch.save(state, folder / "ckpt.pt")
    pareto.bring_up(folder, words, [2, 4, 6], 16)
    assert "diverged" in capsys.readouterr().out and "not finite" in (folder / "diverged.txt").read_text()
    monkeypatch.setattr(pareto.subprocess, "run", None)
    pareto.bring_up(folder, words, [2, 4, 6], 16)                            # and is left alone
    assert table(folder / "quality.csv") == quality


def test_a_folder_belongs_to_one_miniature(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    pareto.claim(tmp_path / "m", steps=3)
    pareto.claim(tmp_path / "m", steps=4)                                    # nothing was trained yet
    (tmp_path / "m/run").mkdir()
    (tmp_path / "m/run/ckpt.pt").touch()
    pareto.claim(tmp_path / "m", steps=4)
    with pytest.raises(pareto.BadInput, match="other flags"):
        pareto.claim(tmp_path / "m", steps=5)


def test_a_line_without_points_is_drawn_empty(command, tmp_path):
    figure, axes = pareto.canvas()
    values = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, np.nan]])
    pareto.band(axes[0, 0], [0, 10, 20], values, 0, "holes")
    pareto.band(axes[0, 0], [0, 10, 20], values * np.nan, 1, "none")
    x, y = axes[0, 0].lines[0].get_data()
    assert x.tolist() == [0, 20] and y.tolist() == [1.5, 3.0] and len(axes[0, 0].lines[1].get_data()[0]) == 0
    pareto.save(figure, tmp_path / "f.png", "x", [])


@pytest.mark.slow
def test_miniature(command, script, tmp_path):
    words = ("miniature", "--steps", 4, "--size", 8, "--seeds", 1, "--marks", 2, "--images", 16, "--K", 4, "--n", 2,
             "--targets", "eps", "--samples", 2, 4, "--repeats", 2, "--out", "mini")
    text = command(*words)
    out = tmp_path / "mini"
    assert "run 4 / 4" in text and len(list(out.glob("*/quality.csv"))) == 4
    names = ["weights", "figure2", "figure3", "figure4", "figure5", "figure6"]
    assert all((out / f"{name}.{kind}").exists() for name in names for kind in ("png", "csv"))
    assert len(table(out / "figure5.csv")) == 4 * 2
    assert "run 4 / 4" in command(*words)                                  # nothing is left to train
    assert "other flags" in script("pareto.py", *words, "--steps", 6, code=2)


def test_refusals(script, runs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    run_ = runs / "run"
    for words, why in (((), "command"), (("figure7",), "figure7"), (("figure4",), "--ckpt"), (("figure5",), "--runs"),
                       (("figure4", "--ckpt", "none"), "no such file"), (("figure4", "--ckpt", run_, "--K", 101), "--K"),
                       (("figure4", "--ckpt", run_, "--n", 0), "--n"), (("figure4", "--ckpt", run_, "--lam", "nan"), "--lam"),
                       (("figure4", "--ckpt", run_, "--out", "x.jpg"), "--out"), (("figure6", "--runs", "none"), "none"),
                       (("figure3", "--ckpt", run_, "--repeats", 1), "--repeats"), (("weights", "--T", 0), "--T"),
                       (("figure3", "--ckpt", run_, "--ckpt", run_), "2 --ckpt"), (("figure3", "--ckpt", run_, "--K", 1), "--K 1"),
                       (("figure4", "--ckpt", run_, "--K", 3, "--n", 2, "--project", 1, "--lam", 0, "--seed", 4), "optimum is 0"),
                       (("figure4", "--ckpt", run_, "--project", -1), "--project"), (("figure4", "--ckpt", run_, "--data", "none"), "none"),
                       (("figure4", "--ckpt", run_, "--budget", 0), "--budget")):
        assert why in script("pareto.py", *words, code=2), words
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert "broken" in script("pareto.py", "figure6", "--runs", broken, code=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in script("pareto.py", "weights", code=2)
