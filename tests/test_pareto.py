"""Gradients of the timesteps, the solvers of the Pareto problem, the commands, the figures."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data import Images, Packed, built_in, generator
from diffusion import TARGETS, Diffusion, loss_weight
from experiments import crops, figures, judge, pareto
from files import BadInput
from model_vit import ViT

SHAPE = dict(
    img_size=8,
    patch_size=4,
    in_channels=3,
    num_classes=8,
    T=40,
    dim=16,
    depth=2,
    heads=2,
)


def network():
    """A small network whose head is not near 0, as after training."""
    torch.manual_seed(0)
    model = ViT(**SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model


@pytest.fixture
def loaded():
    return network(), Diffusion(T=40), built_in(8)


def explicit_gradients(model, diffusion, data, K, n, seed):
    """The gradients (K,P) of the network's x0 error, one sample and one bin after another."""
    rows = []
    for k in range(K):
        model.zero_grad()
        for part in pareto.draw_bin(data, diffusion.T, K, k, n, seed):
            for x0, t, noise, y in zip(*(values.split(1) for values in part)):
                x_t = diffusion.q_sample(x0, t, noise)
                x0_hat = diffusion.to_x0(model(x_t, t, y), x_t, t)
                error = (x0_hat - x0).square().mean() / n
                error.backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        rows.append(torch.cat(gradients))
    return torch.stack(rows).double().numpy()


# ------------------------------------------------------------------------------------------------ gradients

@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("budget", [2 ** 30, 40_000])                        # bytes: one part, or nine
def test_gram_is_that_of_explicit_gradients(loaded, target, budget):
    model, _, data = loaded
    diffusion = Diffusion(T=40, target=target)
    g = explicit_gradients(model, diffusion, data, 5, 3, seed=7)
    length = np.linalg.norm(g, axis=1)
    G = pareto.gram(model, diffusion, data, 5, 3, seed=7, budget=budget)
    error = np.abs(G - g @ g.T) / np.outer(length, length)
    assert error.max() < 1e-5


def drawn(T, K, k, n, seed):
    parts = zip(*pareto.draw_bin(built_in(8), T, K, k, n, seed))
    return [torch.cat(part) for part in parts]


def test_samples_of_a_bin_cover_its_timesteps():
    t = drawn(100, 7, 3, 200, seed=0)[1]
    assert t.unique().tolist() == list(range(42, 57))


def test_samples_depend_on_bin_and_seed_alone():
    noise = drawn(100, 7, 3, 200, seed=0)[2]
    others = [drawn(100, 7, k, 200, seed)[2] for k, seed in [(3, 0), (3, 1), (4, 0)]]
    assert [torch.equal(noise, other) for other in others] == [True, False, False]


def test_bins_are_at_most_the_timesteps():
    with pytest.raises(BadInput, match="11 bins"):
        pareto.edges(10, 11)


# -------------------------------------------------------------------------------------------------- solvers

def random_gram(kind, T, rank):
    """Of T gradients: around 0, with a common part, or with a common part and uneven lengths."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((T, rank))
    if kind != "around 0":
        g += 1
    if kind == "uneven":
        g *= 10 ** rng.uniform(-2, 2, (T, 1))
    return g @ g.T


def check_referee(G, lam=0.0):
    """Karush, Kuhn and Tucker's conditions hold. -> the optimum, and what counts as 0."""
    A = G + lam * np.eye(len(G))
    w = pareto.exact(G, lam)
    slope = A @ w
    best = w @ slope
    zero = 1e-9 * A.diagonal().min()
    rounding = 1e-14 * (np.abs(A) @ w).max()
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1, abs=1e-12)
    assert slope.min() >= best * (1 - 1e-6) - zero - rounding                # no weight may gain
    return best, zero


@pytest.mark.parametrize("kind", ["around 0", "common part", "uneven"])
@pytest.mark.parametrize("T, rank", [
    (2, 5),
    (10, 4),
    (60, 17),
    (60, 200),
    pytest.param(1000, 250, marks=pytest.mark.slow),
    pytest.param(1000, 1000, marks=pytest.mark.slow),
])
@pytest.mark.parametrize("scale, share", [(1, 0), (1, 0.01), (1e-8, 0.01), (1, 10)])
def test_solvers_reach_the_referee(kind, T, rank, scale, share):
    G = scale * random_gram(kind, T, rank)
    lam = share * G.trace() / T
    best, zero = check_referee(G, lam)
    for solver in (pareto.ugd, pareto.frank_wolfe):
        w = solver(G, lam)
        value = pareto.objective(G, w, lam)
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1, abs=1e-9)
        assert best * (1 - 1e-6) - zero <= value <= best * 1.001 + zero, solver


@pytest.mark.parametrize("solver", [pareto.exact, pareto.ugd, pareto.frank_wolfe])
@pytest.mark.parametrize("g1, g2, lam, first, optimum", [
    ([2, 0], [0, 1], 0, 1 / 5, 4 / 5),                                       # orthogonal: as 1 / |g|^2
    ([2, 0], [0, 1], 1, 2 / 7, 10 / 7),
    ([1, 0], [-3, 0], 0, 3 / 4, 0),                                          # opposite: they cancel
    ([1, 0], [2, 2], 0, 1, 1),                                               # the shorter one serves both
])
def test_two_gradients_by_hand(solver, g1, g2, lam, first, optimum):
    G = np.array([g1, g2]) @ np.array([g1, g2]).T
    w = solver(G, lam)
    assert np.allclose(w, [first, 1 - first], atol=1e-3)
    assert pareto.objective(G, w, lam) == pytest.approx(optimum, abs=1e-5)


@pytest.mark.parametrize("g1, g2, first, expected", [
    ([1, 0], [-3, 0], 0.75, "stationary"),
    ([1, 0], [-0.5, 0.1], 0.5, "conflict"),                                  # -u raises the second loss
    ([1, 0], [-0.5, 0.1], 0.3363, "descent"),                                 # the optimum's raises none
    ([0, 0], [1, 0], 0.5, "descent"),                                        # the first loss stays: eq. 8
])
def test_theorem_1_by_hand(g1, g2, first, expected):
    g = np.array([g1, g2], float)
    w = np.array([first, 1 - first])
    assert pareto.common_descent(g @ g.T, w) == expected


def test_a_step_along_the_common_direction_lowers_the_loss_of_every_bin(loaded):
    model, *where = loaded
    where += [8, 4, 0]
    G = pareto.gram(model, *where)
    w = pareto.exact(G)
    u = w @ explicit_gradients(model, *where)
    before = pareto.bin_losses(model, *where)
    theta = parameters_to_vector(model.parameters())
    theta = theta - 1e-3 * torch.from_numpy(u).float()
    vector_to_parameters(theta, model.parameters())
    change = pareto.bin_losses(model, *where) - before
    assert pareto.common_descent(G, w) == "descent"
    assert (change < 0).all()
    assert np.allclose(change, -1e-3 * (G @ w), rtol=0.1)                    # eq. 7


# ------------------------------------------------------------------------------------- weights, fine-tuning

@pytest.mark.parametrize("weighting, gamma", pareto.TABLE)
def test_weights_of_a_bin_are_added_up(weighting, gamma):
    snr = Diffusion(T=100).snr
    w = loss_weight(snr, weighting, "x0", gamma)
    bins = np.array([part.sum() for part in w.split([33, 33, 34])])
    found = pareto.weights_of(weighting, gamma, snr, 3)
    assert np.allclose(found, bins / bins.sum(), rtol=1e-12)


def test_ugd_table_is_linear_between_the_centres_of_bins(loaded):
    G = pareto.gram(*loaded, 3, 2)                                           # bins of 13, 13, 14 timesteps
    a, b, c = pareto.ugd(G, 0.01 * np.median(G.diagonal())) / [13, 13, 14]
    w = pareto.ugd_table(*loaded, 3, 2, 0.01, seed=0)                        # centres 6, 19, 32.5
    expected = np.array([a, a, (12 * a + b) / 13, b, c])
    assert w.mean() == pytest.approx(1)
    assert w[[0, 6, 7, 19, 39]] / w[19] == pytest.approx(expected / b)


def test_fine_tuning_serves_its_own_tenth(loaded):
    model, *where = loaded
    losses = {}
    for tenth in (1, 8):
        tuned = pareto.fine_tuned(model, *where, tenth, steps=5, seed=0, lr=3e-3)
        losses[tenth] = pareto.bin_losses(tuned, *where, 10, 16, seed=0)
    assert losses[1][1] < losses[8][1]
    assert losses[8][8] < losses[1][8]


# ------------------------------------------------------------------------------------------------- commands

@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(module, "ugd", ...) runs a script's main in a folder with a checkpoint in run/."""
    weights = network().state_dict()
    config = dict(
        model="vit-tiny",
        network=SHAPE,
        dataset="shapes",
        schedule="cosine",
        T=40,
        target="eps",
    )
    (tmp_path / "run").mkdir()
    state = dict(
        model=weights,
        ema=weights,
        step=7,
        config=config,
    )
    torch.save(state, tmp_path / "run/ckpt.pt")
    monkeypatch.chdir(tmp_path)

    def call(module, *words):
        monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
        module.main()
    return call


def column(path, name, kind=float):
    return [kind(row[name]) for row in figures.read_csv(path)]


def test_objective_command_compares_with_the_optimum(command):
    flags = ("--K", 4, "--n", 3, "--seed", 7, "--lam", 0.2)
    command(pareto, "objective", "--ckpt", "run", "--out", "o.csv", *flags)
    G = pareto.gram(*pareto.load("run"), 4, 3, seed=7)
    A = G + 0.2 * np.median(G.diagonal()) * np.eye(4)
    best = pareto.exact(A)
    w = pareto.weights_of("min_snr", 5, Diffusion(T=40).snr, 4)
    over = dict(zip(column("o.csv", "weighting", str), column("o.csv", "over_optimum")))
    assert over["min_snr 5"] == pytest.approx((w @ A @ w) / (best @ A @ best))
    assert over["ugd"] < 1.001


def test_finetune_command_gives_the_change_of_every_bin(command):
    flags = ("--K", 4, "--n", 3, "--steps", 2)
    command(pareto, "finetune", "--ckpt", "run", "--out", "f.csv", *flags)
    model, *where = pareto.load("run")
    tuned = pareto.fine_tuned(model, *where, 3, steps=2, seed=0)
    before = pareto.bin_losses(model, *where, 4, 3, seed=0)
    after = pareto.bin_losses(tuned, *where, 4, 3, seed=0)
    assert column("f.csv", "percent")[8:] == pytest.approx(100 * (after / before - 1))


@pytest.fixture
def measure(command, monkeypatch):
    monkeypatch.setattr(judge, "IMAGES", 60)
    return lambda: command(pareto, "measure", "--ckpt", "run", "--n", 16)


def test_measure_command_measures_each_snapshot_once(measure):
    state = torch.load("run/ckpt.pt")
    for step in (3, 5):
        torch.save({**state, "step": step}, f"run/snapshot_{step:06d}.pt")
        measure()
    assert column("run/quality.csv", "step") == [3, 7, 5]


def test_measure_command_gives_distances_and_errors(measure):
    measure()
    [row] = figures.read_csv("run/quality.csv")
    low, high = pareto.bin_losses(*pareto.load("run"), 10, 16, "quality").reshape(2, 5).mean(1)
    found = [float(row[name]) for name in ("x0_mse", "x0_mse_low", "x0_mse_high")]
    assert found == pytest.approx([(low + high) / 2, low, high])
    assert 0 < float(row["fd_pixels"]) < 1e3
    assert 0 < float(row["fd_judge"]) < 1e3
    assert 0 <= float(row["recognised"]) < 1


def test_samples_of_every_class_are_judged_beside_random_images(measure, monkeypatch):
    seen = []
    monkeypatch.setattr(pareto, "recognised", lambda data, images, labels: seen.append(labels.tolist()))
    monkeypatch.setattr(pareto, "fd_judge", lambda data, images, real: seen.append(real))
    measure()
    real, labels = seen
    first = built_in(8).images[np.arange(len(real))]
    assert labels == [k % SHAPE["num_classes"] for k in range(16)]
    assert len(real) == 2048 and not np.array_equal(real, first)


@pytest.mark.parametrize("table, message", [
    ("step,n\n3,1024\n", "quality.csv has lines of 1024 samples"),
    ("step,n\nx,8\n", "column step: found 'x'"),
    ("step,fd_pixels\n3,2.5\n", "column n: not found"),
    ("step,n,fd_pixels\n3,16,2.5\n", "column x0_mse_high: not found"),
])
def test_measure_refuses_lines_that_do_not_compare(table, message, measure):
    Path("run/quality.csv").write_text(table)
    with pytest.raises(BadInput, match=message):
        measure()


def test_measure_wants_a_folder(command):
    with pytest.raises(BadInput, match="is a file, expected the folder of a run"):
        command(pareto, "measure", "--ckpt", "run/ckpt.pt")


def test_without_classes_nothing_is_recognised_and_that_is_said(measure, capsys):
    state = torch.load("run/ckpt.pt")
    state["config"]["network"] = shape = {**SHAPE, "num_classes": 0}
    torch.save({**state, "ema": ViT(**shape).state_dict()}, "run/ckpt.pt")
    measure()
    assert math.isnan(column("run/quality.csv", "recognised")[0])
    assert "no classes: fd_judge and recognised are nan" in capsys.readouterr().out


def two_greys(size=8):
    """Dark images of class 0 and bright ones of class 1, as a packed folder would have them."""
    labels = np.arange(120) % 2
    noise = np.random.RandomState(0).randint(0, 100, (120, 3, size, size))
    images = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
    return Images(images, labels, dict(classes=["dark", "bright"]))


def test_the_judge_recognises_labelled_images(capsys):
    data = two_greys()
    labels = torch.tensor(data.labels)
    assert judge.recognised(data, torch.tensor(data.images), labels) == 1
    assert judge.recognised(data, torch.tensor(data.images), 1 - labels) == 0
    said = capsys.readouterr().out
    assert said.count("100.0% of 20 real images") == 1                       # trained once
    assert "warning" not in said


def test_a_judge_that_knows_its_data_badly_warns(capsys):
    data = two_greys()
    data.labels = np.random.RandomState(1).randint(0, 2, len(data))
    judge.judge(data)
    assert "warning: the judge knows these data badly" in capsys.readouterr().out


def test_the_judge_is_the_same_every_time_and_leaves_the_random_state():
    torch.manual_seed(5)
    one = judge.judge(two_greys())
    drawn = torch.rand(3)
    two = judge.judge(two_greys())
    assert torch.equal(one[0].weight, two[0].weight)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_fd_judge_tells_the_features_of_images_apart():
    data = two_greys()
    judge.judge(data)[-1].weight.zero_()                                     # behind the features
    dark, bright = data.images[::2], data.images[1::2]
    same = judge.fd_judge(data, torch.tensor(dark), dark)
    assert same < 1e-3 < judge.fd_judge(data, torch.tensor(dark), bright)


def test_the_features_are_what_the_judges_last_layer_gets(monkeypatch):
    data, seen = two_greys(), []
    monkeypatch.setattr(judge, "frechet_distance", lambda *moments: seen.append(moments[0]))
    judge.fd_judge(data, torch.tensor(data.images), data.images)
    network = judge.judge(data)
    logits = network(torch.tensor(data.images) / 127.5 - 1).mean(0)
    assert torch.allclose(network[-1](seen[0].float()), logits, atol=1e-4)


def test_the_judge_of_the_shapes_sees_none_that_a_run_trains_on(monkeypatch):
    monkeypatch.setattr(judge, "IMAGES", 3)
    x, _ = judge.seen(built_in(8))
    expected, _ = built_in(8, 1_000_003).batch(range(1_000_000, 1_000_003))
    assert torch.equal(x, expected)


@pytest.fixture
def packed_crops(command, monkeypatch, tmp_path):
    """16 crops in data/crops. Stands in for the photographs: number k has columns of the greys 20 k to 20 k + 19."""
    folder = tmp_path / "skimage/data"
    folder.mkdir(parents=True)
    (tmp_path / "skimage/__init__.py").touch()
    columns = np.tile(np.arange(20, dtype=np.uint8).repeat(2), (30, 1))
    for k, name in enumerate(crops.PHOTOGRAPHS):
        Image.fromarray(columns + 20 * k).convert("RGB").save(folder / name)
    monkeypatch.syspath_prepend(tmp_path)
    command(crops, "--count", 16, "--size", 8)
    return Packed("data/crops")


def test_the_class_of_a_crop_is_its_photograph(packed_crops):
    greys = packed_crops.images.mean((1, 2, 3))
    assert packed_crops.images.shape == (16, 3, 8, 8)
    assert packed_crops.labels.tolist() == [*range(8), *range(8)]
    assert (greys // 20).tolist() == packed_crops.labels.tolist()


def test_the_seed_chooses_the_places(command, packed_crops):
    command(crops, "--count", 16, "--size", 8, "--seed", 1, "--out", "other")
    assert not np.array_equal(Packed("other").images, packed_crops.images)


def test_the_images_of_a_run_are_found_where_train_looks(packed_crops):
    state = torch.load("run/ckpt.pt")
    state["config"].update(dataset="crops", data=None)                       # data/DATASET, without --data
    torch.save(state, "run/ckpt.pt")
    _, _, data = pareto.load("run")
    assert data.classes == packed_crops.classes


def test_crops_come_from_all_over_a_photograph():
    photograph = np.arange(5 * 7).reshape(5, 7, 1)
    corners = {int(crops.crop(photograph, 4, generator("crop", 0, k))[0, 0, 0]) for k in range(99)}
    assert corners == {0, 1, 2, 3, 7, 8, 9, 10}                              # 2 rows, 4 columns


def test_missing_photographs_are_asked_for(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install scikit-image"):
        command(crops)


def test_ugd_trains_by_way_of_a_file(script, command):
    words = ("--size", 8, "--batch-size", 8, "--T", 40, "--decay", 0, "--sample-steps", 1)
    script("train.py", *words, "--out", "out", "--steps", 2)
    command(pareto, "ugd", "--ckpt", "out", "--K", 5, "--n", 2, "--out", "w.csv")
    script("train.py", "--resume", "--out", "out", "--steps", 4, "--weighting", "w.csv")
    weight = torch.load("out/ckpt.pt")["config"]["weighting"]
    assert weight == pytest.approx(column("w.csv", "weight"))


# -------------------------------------------------------------------------------------------------- figures

@pytest.fixture
def axes(monkeypatch):
    """The list that the axes of every saved figure are appended to."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    found, save = [], figures.save

    def watched(figure, path):
        found.extend(figure.axes)
        save(figure, path)

    monkeypatch.setattr(figures, "save", watched)
    return found


def test_a_curve_is_the_mean_and_its_band_the_range(command, axes, tmp_path):
    (tmp_path / "a.csv").write_text("t,kind,loss\n0,p,1\n0,p,3\n10,p,4\n0,q,5\n")
    command(figures, "curves", "a.csv", "--x", "t", "--y", "loss", "--by", "kind", "--out", "a.png")
    p, q = axes[0].lines
    band = axes[0].collections[0].get_datalim(axes[0].transData)
    assert p.get_xydata().tolist() == [[0, 2], [10, 4]]
    assert band.bounds == (0, 1, 10, 3)
    assert p.get_linestyle() != q.get_linestyle()                            # told apart in grey


def test_a_panel_without_a_finite_value_is_drawn_empty(command, tmp_path):
    (tmp_path / "a.csv").write_text("step,loss\n0,nan\n10,nan\n")
    command(figures, "curves", "a.csv", "--y", "loss", "--logy", "--out", "a.png")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("text, message", [
    ("weighting,over\n", "found no rows to draw"),
    ("weighting,over\n\udcff,1\n", "a.csv: cannot be read"),
])
def test_bars_without_rows_are_refused(command, tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(BadInput, match=message):
        command(figures, "bars", "a.csv", "--x", "weighting", "--y", "over", "--out", "a.png")


def test_bars_are_means_over_files(command, axes, tmp_path):
    (tmp_path / "a.csv").write_text("weighting,over\nugd,1\nsnr,2\n")
    (tmp_path / "b.csv").write_text("weighting,over\nugd,1\nsnr,4\n")
    words = ("--x", "weighting", "--y", "over", "--out", "a.svg")
    command(figures, "bars", "a.csv", "b.csv", *words)
    assert [bar.get_height() for bar in axes[0].patches] == [1, 3]


def write_run(folder, target, weighting, quality, **other):
    folder.mkdir()
    config = dict(dataset="shapes", target=target, weighting=weighting, gamma=5.0, **other)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.csv").write_text("step,x0_mse_2\n100,0.5\n")
    (folder / "quality.csv").write_text("step,fd_pixels\n" + quality)


def test_runs_are_told_apart_and_lost_ones_counted(command, axes, tmp_path):
    write_run(tmp_path / "a", "x0", "min_snr", "200,3\n400,1\n")
    write_run(tmp_path / "b", "x0", "min_snr", "200,5\n")
    write_run(tmp_path / "c", "x0", "const", "")
    write_run(tmp_path / "d", "eps", "snr", "400,2\n")
    command(figures, "runs", *"abcd", "--y", "fd_pixels", "x0_mse_2", "--logy", "--out", "r.png")
    first, lost = axes[0].lines
    assert [ax.get_title() for ax in axes[::2]] == ["target x0", "target eps"]
    assert first.get_label() == "min_snr 5 (1 of 2 to the end)"
    assert first.get_xydata().tolist() == [[200, 4], [400, 1]]
    assert lost.get_label() == "const (0 of 1 to the end)"


@pytest.mark.parametrize("command_, y, out, why", [
    ("curves", "no", "a.png", "column no: not found"),
    ("curves", "kind", "a.png", "found 'p', expected numbers"),
    ("bars", "t", "a.jpg", "a .png or .svg"),
])
def test_mistakes_in_figures_are_one_line(command, tmp_path, command_, y, out, why):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    (tmp_path / "a.csv").write_text("t,kind\n0,p\n")
    with pytest.raises(BadInput, match=why):
        command(figures, command_, "a.csv", "--x", "t", "--y", y, "--out", out)


def test_a_missing_matplotlib_is_asked_for(command, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("x,y\n0,1\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match="pip install matplotlib"):
        command(figures, "bars", "a.csv", "--x", "x", "--y", "y", "--out", "a.png")


def test_needs_is_the_step_of_the_best_weightings_end(command, tmp_path):
    fds = dict(a=(8, 4, 4), b=(6, 2, 2), c=(3, 3, 4))
    for name, weighting in dict(a="const", b="min_snr", c="min_snr").items():
        write_run(tmp_path / name, "x0", weighting, "")
        lines = [f"{step},{fd},nan,1,1" for step, fd in zip((100, 200, 400), fds[name])]
        table = "\n".join(["step,fd_pixels,fd_judge,recognised,x0_mse", *lines])
        (tmp_path / name / "quality.csv").write_text(table)
    command(pareto, "needs", "--runs", *"abc", "--out", "n.csv")
    assert column("n.csv", "mean")[:2] == [4, 3]
    assert column("n.csv", "high")[:2] == [4, 4]
    assert column("n.csv", "needs", str)[:4] == ["-", "168 <=100", "-", "- -"]       # 100 * 2 ** (3 / 4)


def test_a_run_given_twice_counts_once(command, tmp_path):
    write_run(tmp_path / "a", "x0", "const", "")
    (tmp_path / "a/quality.csv").write_text("step,fd_pixels,fd_judge,recognised,x0_mse\n100,3,nan,1,1")
    command(pareto, "needs", "--runs", "a", "a", "--out", "n.csv")
    assert column("n.csv", "needs", str)[0] == "<=100"


def test_needs_says_that_a_run_ends_early(command, tmp_path, capsys):
    for name, steps in ("a", (100,)), ("b", (100, 200)):
        write_run(tmp_path / name, "x0", "const", "")
        lines = [f"{step},3,4,1,2\n" for step in steps]
        (tmp_path / name / "quality.csv").write_text("step,fd_pixels,fd_judge,recognised,x0_mse\n" + "".join(lines))
    command(pareto, "needs", "--runs", "a", "b", "--out", "n.csv")
    assert "warning: shapes x0 const: 1 of 2 runs are not measured at step 200" in capsys.readouterr().out


def test_needs_names_a_run_that_was_not_measured(command, tmp_path, capsys):
    write_run(tmp_path / "a", "x0", "const", "")
    (tmp_path / "a/quality.csv").unlink()
    command(pareto, "needs", "--runs", "a", "--out", "n.csv")
    assert "warning: a has no quality.csv" in capsys.readouterr().out


def test_needs_takes_seeds_of_one_setting_alone(command, tmp_path):
    quality = "100,3\n"
    write_run(tmp_path / "a", "x0", "const", quality, size=16, seed=0, steps=100)
    write_run(tmp_path / "b", "x0", "min_snr", quality, size=8, seed=1, steps=200)
    for name in "ab":
        (tmp_path / name / "quality.csv").write_text("step,fd_pixels,fd_judge,recognised,x0_mse\n100,3,1,1,1")
    with pytest.raises(BadInput, match="--runs b: size differ from an earlier run's with shapes and x0"):
        command(pareto, "needs", "--runs", *"ab", "--out", "n.csv")


def test_a_run_that_ended_early_makes_its_weightings_numbers_nan(command, tmp_path):
    for name, steps in dict(a=(100,), b=(100, 200)).items():
        write_run(tmp_path / name, "x0", "const", "", seed=name)
        lines = [f"{step},3,nan,1,1" for step in steps]
        table = "\n".join(["step,fd_pixels,fd_judge,recognised,x0_mse", *lines])
        (tmp_path / name / "quality.csv").write_text(table)
    command(pareto, "needs", "--runs", *"ba", "--out", "n.csv")
    [first, *_] = figures.read_csv("n.csv")
    assert [first[name] for name in ("mean", "low", "high")] == ["nan"] * 3


PYTHON = """#!/bin/sh
# Stands in for python: training makes a checkpoint, but target v diverges, seed 9 is an error and seed 8 a mistake;
# measuring adds a line.
echo "$@" >> commands
case "$*" in *"--target v"*) exit 3;; *"--seed 9"*) exit 1;; esac
case "$*" in train*) mkdir -p $3; echo "$*," | sed 's/.*--steps //; s/ .*,/,/' > $3/ckpt.pt;; esac
case "$*" in *measure*) echo "$(cat $5/ckpt.pt)$7," >> $5/quality.csv;; esac
"""


@pytest.fixture
def min_snr(tmp_path):
    """min_snr(SEEDS="0 1") runs the script with the stand-in -> its exit code, the commands of training so far."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "commands").touch()
    path = f"{tmp_path}:{os.environ['PATH']}"

    def call(**sizes):
        words = ["sh", ROOT / "experiments/min_snr.sh"]
        code = subprocess.run(words, cwd=tmp_path, env=dict(sizes, PATH=path)).returncode
        commands = (tmp_path / "commands").read_text().splitlines()
        return code, [line for line in commands if line.startswith("train.py")]
    return call


shell = pytest.mark.skipif(os.name == "nt", reason="a shell script")


@shell
def test_min_snr_trains_nothing_twice_and_goes_past_runs_that_diverge(min_snr):
    min_snr()
    code, trained = min_snr()
    assert code == 0
    assert sum("--target v" not in line and "--resume" not in line for line in trained) == 4 * 2 * 3


@shell
def test_min_snr_goes_on_after_an_error_and_reports_it(min_snr, capfd):
    code, trained = min_snr(SEEDS="0 9 1", WEIGHTINGS="const", TARGETS="x0", JOBS="2")
    assert code != 0
    assert len(trained) == 3
    assert "out/min_snr/shapes_x0_const_9: exit code 1 of python train.py" in capfd.readouterr().err


@shell
@pytest.mark.parametrize("sizes, runs, line", [
    (dict(N="1"), 0, "min_snr.sh: N: found 1, expected a whole number, at least 2"),
    (dict(STEPS="1e4"), 0, "min_snr.sh: STEPS: found 1e4, expected a whole number, at least 1"),
    (dict(JOBS="0"), 0, "min_snr.sh: JOBS: found 0, expected a whole number, at least 1"),
])
def test_a_wrong_size_in_min_snr_is_one_line(min_snr, capfd, sizes, runs, line):
    code, trained = min_snr(**sizes)
    assert (code, len(trained), capfd.readouterr().err) == (2, runs, line + "\n")


@shell
def test_min_snr_resumes_what_a_kill_left(min_snr, tmp_path):
    folder = tmp_path / "out/min_snr/crops_x0_const_0"
    folder.mkdir(parents=True)
    (folder / "ckpt.pt").touch()
    _, trained = min_snr(DATA="crops", SEEDS="0 1", WEIGHTINGS="const", TARGETS="x0")
    assert ["--resume" in line for line in trained] == [True, False]
    assert "-m experiments.crops\n" in (tmp_path / "commands").read_text()


@shell
@pytest.mark.slow
def test_min_snr_in_small(tmp_path):
    sizes = dict(WEIGHTINGS="const min_snr", TARGETS="x0", SEEDS="0", STEPS="2", EVERY="1", JOBS="2", N="16",
                 OBJECTIVE="", FLAGS="--batch-size 32", OUT=str(tmp_path / "out"), PYTHON=sys.executable)
    words = ["sh", "experiments/min_snr.sh"]
    subprocess.run(words, cwd=ROOT, env=dict(os.environ, **sizes), check=True)
    for weighting in ("const", "min_snr"):
        assert column(tmp_path / f"out/shapes_x0_{weighting}_0/quality.csv", "step") == [1, 2]
    assert column(tmp_path / "out/needs.csv", "weighting", str) == ["const", "min_snr 5"] * 4
