"""train.py: exact resume, one result on any number of processes, what is logged, saved and refused."""
import contextlib
import functools
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, finish, fork, free_port, group
from mlp import MLP
from test_files import Full

import model_vit
import sample
import train
from data import built_in
from diffusion import TARGETS, WEIGHTINGS, Diffusion
from files import hash_file, read, run
from sample import MODELS, grid, load_checkpoint
from train import draw_step

TINY = "--batch-size 8 --size 8 --sample-steps 1 --warmup 1 --decay 0"
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)    # parts of checkpoints, to the bit


# ----------------------------------------------------------------------------------------- helpers

def launch(folder, command, code=0, main=train.main, **functions):
    """Run train.py in a folder, in this process, with some functions of train replaced. Checks the exit code
    and that a refusal is one line; returns what was printed. The network vit-tiny is a small one.
    """
    out, err = io.StringIO(), io.StringIO()
    found = 0
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *command.split()])
        patch.setitem(MODELS, "vit-tiny", SMALL)
        patch.setattr(train, "sanity", lambda *_: 0.0)
        for name, function in functions.items():
            patch.setattr(train, name, function)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run(main)
            except SystemExit as exit:
                found = exit.code
    for number, handler in handlers:
        signal.signal(number, handler)
    text = out.getvalue() + err.getvalue()
    assert found == code, text
    if code == 2:
        assert len(err.getvalue().splitlines()) == 1, text
    return text


def in_step(number, act):
    """A learning_rate() of train that calls act() first in the step of a number."""
    learning_rate = train.learning_rate

    def wrapped(config, step):
        if step == number:
            act()
        return learning_rate(config, step)
    return wrapped


def terminate():
    signal.raise_signal(signal.SIGTERM)


def kill():
    signal.raise_signal(signal.SIGKILL)


def noise_is(value, first, last):
    """A draw_step() of train that spoils one number of the noise, from one step to another."""
    def wrapped(data, config, diffusion, step, rows):
        parts = draw_step(data, config, diffusion, step, rows)
        if first <= step <= last:
            parts[2][0, 0, 0, 0] = float(value)
        return parts
    return wrapped


def log_of(folder):
    """log.csv without its columns of speed: lists of step, loss, mse and ten x0_mse, as text."""
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.split(",")[:13] for line in lines]


def step_of(folder):
    """The step of the checkpoint in folder/run."""
    return read(folder / "run")["step"]


# ----------------------------------------------------------------------------- stopped and gone on

TWENTY = f"{TINY} --steps 20 --log-every 3 --save-every 10 --sample-every 8"


def killed_in_step_13():
    train.learning_rate = in_step(13, kill)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with "whole", a run of 20 steps, and "parts", killed in step 13 and gone on from step 10."""
    folder = tmp_path_factory.mktemp("runs")
    launch(folder, f"{TWENTY} --out whole")
    words = f"train.py {TWENTY} --out parts".split()
    process = fork(folder / "text", folder, *words, change=killed_in_step_13)
    process.join()
    assert read(folder / "parts")["step"] == 10
    with open(folder / "parts/log.csv", "a") as file:
        file.write("1")                                                      # the line of a later step, cut short
    launch(folder, "--out parts --resume")                                   # the run remembers its flags
    return folder


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "tally"])
def test_killed_and_resumed_is_the_straight_run_to_the_bit(part, runs):
    same(read(runs / "whole")[part], read(runs / "parts")[part])


def test_the_log_goes_on_without_what_lies_beyond_the_checkpoint(runs):
    whole = log_of(runs / "whole")
    assert whole == log_of(runs / "parts")
    assert [row[0] for row in whole] == ["step", "3", "6", "9", "12", "15", "18", "20"]


def test_a_run_leaves_its_config_its_log_its_checkpoint_and_a_grid_as_often_as_asked_and_at_the_end(runs):
    grids = {f"samples_{step:06d}.png" for step in (8, 16, 20)}
    names = {path.name for path in (runs / "parts").iterdir()}
    assert names == {"ckpt.pt", "config.json", "log.csv"} | grids
    assert json.loads((runs / "parts/config.json").read_text()) == read(runs / "parts")["config"]


@pytest.mark.parametrize("raw", [False, True])
def test_the_grid_is_drawn_from_the_moving_average(raw, runs, tmp_path):
    model, config = load_checkpoint(runs / "whole", raw)
    grid(model, config, tmp_path / "grid.png", steps=1, cfg=1.5)
    found = (runs / "whole/samples_000020.png").read_bytes()
    assert (found == (tmp_path / "grid.png").read_bytes()) == (not raw)


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    text = launch(tmp_path, f"{TINY} --steps 4 --out run", code=143, learning_rate=in_step(1, terminate))
    assert "go on with --resume" in text
    assert step_of(tmp_path) == 2
    launch(tmp_path, "--resume --out run")
    assert step_of(tmp_path) == 4


# ------------------------------------------------------------------- one result on any number of processes

FIVE = f"{TINY} --steps 5 --dtype float64 --lr 1e-3 --log-every 2 --grad-clip 1.7"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of five steps, in float64, by one process."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder, f"{FIVE} --out run")
    return folder / "run"


def assert_same_run(a, b):
    """To 1e-9. In float32 they agree to rounding, but where a gradient is nearly 0, Adam turns its rounding
    into a whole step of size lr.
    """
    for part in ("model", "ema"):
        same(read(a)[part], read(b)[part], atol=1e-9)
    for row, other in zip(log_of(a)[1:], log_of(b)[1:], strict=True):
        found, expected = ([float(value) for value in line] for line in (row, other))
        assert found == pytest.approx(expected, rel=1e-7, nan_ok=True)


@pytest.mark.parametrize("how", ["--accum 2", "--grad-ckpt"])
def test_accumulation_and_grad_ckpt_do_not_change_a_run(how, one, tmp_path):
    launch(tmp_path, f"{FIVE} {how} --out run")
    assert_same_run(one, tmp_path / "run")


def stopped_in_step_2():
    if os.environ["RANK"] == "1":                                            # all stop where one is told to
        train.learning_rate = in_step(2, terminate)


def test_two_processes_with_accumulation_are_stopped_and_one_goes_on_to_the_same_run(one, script, tmp_path):
    words = f"train.py {FIVE} --accum 2 --out run".split()
    script(*words, processes=2, change=stopped_in_step_2, code=143)
    assert step_of(tmp_path) == 3
    launch(tmp_path, "--resume --out run")
    assert_same_run(one, tmp_path / "run")


def killed_in_step_4():
    if os.environ["RANK"] == "1":
        train.learning_rate = in_step(4, kill)


def test_one_of_two_processes_dies_and_the_other_ends_with_one_line(one, tmp_path):
    command = f"{FIVE} --save-every 4 --out run"
    launch(tmp_path, command, code=143, learning_rate=in_step(2, terminate))
    both = []
    for env in group(2):
        words = f"train.py {command} --resume".split()
        both.append(fork(tmp_path / env["RANK"], tmp_path, *words, env=env, change=killed_in_step_4))
    finish(both)
    text = (tmp_path / "0").read_text()
    assert both[0].exitcode == 1 and "Traceback" not in text
    assert "another process of this run has ended" in text.splitlines()[-1]
    launch(tmp_path, "--resume --out run")                                   # the last step, alone as the first three
    assert_same_run(one, tmp_path / "run")


@pytest.mark.slow
def test_two_nodes_do_not_change_a_run(start_script, script, tmp_path):
    words = f"train.py {FIVE} --steps 2".split()
    script(*words, "--out", "one", whole=True)
    start = f"--nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --master-port={free_port()}".split()
    nodes = [start_script(*words, "--out", "two", torchrun=(*start, f"--node-rank={i}")) for i in range(2)]
    for node in nodes:
        text, _ = node.communicate(timeout=120)
        assert node.returncode == 0, text
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---------------------------------------------------------------------------------------- steps by hand

HAND = """--steps 4 --batch-size 8 --size 8 --patch 2 --seed 3 --dtype float64 --target v --gamma 2
--schedule linear --T 100 --timesteps clts --curriculum 2 --importance --drop 0.4 --ema 0.7 --lr 2e-3
--warmup 2 --decay 0.5 --betas 0.8 0.95 --weight-decay 0.5 --grad-clip 0.11 --sample-steps 1 --log-every 2"""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Four steps of a run, each number of which is another than its default, and the same steps by hand, with
    stock AdamW. A number of step 1 is nan: that step has no part in either.
    """
    folder = tmp_path_factory.mktemp("hand")
    draw = noise_is("nan", 1, 1)
    text = launch(folder, f"{HAND} --out run", draw_step=draw)
    torch.manual_seed(3)
    network, arguments = SMALL
    model = network(img_size=8, patch_size=2, in_channels=3, num_classes=8, T=100, **arguments).double()
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    diffusion = Diffusion("linear", 100, "v", "min_snr", 2.0, "clts:0.3:2")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0.5)
    config = dict(batch_size=8, seed=3, drop=0.4, importance=False)
    rows = []
    for step, rate in enumerate((0.5, 1, 1, 0.5)):
        x0, t, noise, y, _ = draw(built_in(8), config, diffusion, step, slice(0, 8))
        loss, mse = diffusion.loss(model, x0.double(), t, noise.double(), y)
        loss = loss / (100 * diffusion.density(step)[t])
        x0_mse = mse * (1 - diffusion.alphas_cumprod[t])
        rows.append(torch.stack([t, loss, mse, x0_mse], 1).detach())
        if step == 1:
            continue
        optimizer.param_groups[0]["lr"] = rate * 2e-3
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.11)             # of three norms one is smaller
        optimizer.step()
        for name, value in model.state_dict().items():
            ema[name] = 0.7 * ema[name] + 0.3 * value
    return SimpleNamespace(state=read(folder / "run"), lines=log_of(folder / "run")[1:], text=text,
                           rows=rows, model=model.state_dict(), ema=ema,
                           moments=optimizer.state_dict()["state"])


def test_a_run_is_the_steps_by_hand(by_hand):
    same(by_hand.state["model"], by_hand.model, atol=1e-10)


def test_the_moving_average_is_that_of_the_steps_by_hand(by_hand):
    same(by_hand.state["ema"], by_hand.ema, atol=1e-9)


def test_a_step_that_is_not_finite_leaves_moments_and_step_counts_alone_and_is_said(by_hand):
    same(by_hand.state["optimizer"]["state"], by_hand.moments, atol=1e-10)
    assert "1 steps skipped" in by_hand.text


@pytest.mark.parametrize("number", [0, 1])
def test_a_line_of_the_log_is_the_mean_of_its_finite_steps(number, by_hand):
    rows = torch.cat(by_hand.rows[2 * number:2 * number + 2])
    t, loss, mse, x0_mse = rows[rows[:, 1].isfinite()].T
    bins = [x0_mse[t // 10 == i].mean().item() for i in range(10)]
    found = [float(value) for value in by_hand.lines[number]]
    expected = [2 * number + 2, loss.mean().item(), mse.mean().item(), *bins]
    assert found == pytest.approx(expected, rel=1e-7, nan_ok=True)


def test_a_logged_step_leaves_no_sums(by_hand):
    assert not by_hand.state["tally"].any()


def test_the_learning_rate_rises_in_the_warm_up_stays_and_falls_to_0_at_the_end():
    config = dict(lr=2.0, warmup=4, decay=0.5, steps=20)
    found = [train.learning_rate(config, step) for step in (0, 1, 3, 10, 11, 19)]
    assert found == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.8, 0.2])
    assert train.learning_rate({**config, "warmup": 0, "decay": 0.0}, 19) == 2.0


# ------------------------------------------------------------------------------------------ lost and diverged

ALONE = f"{TINY} --batch-size 1 --steps 9 --save-every 2 --out run"


@pytest.mark.parametrize("every, first", [(2, 4), (1, 4), (9, 2)])           # the last: most are nan, not all
def test_a_run_whose_losses_are_nan_ends_and_leaves_its_last_checkpoint(every, first, tmp_path):
    text = launch(tmp_path, f"{ALONE} --log-every {every}", code=3, draw_step=noise_is("nan", first, 9))
    assert "to 6 are not finite; the checkpoint from before" in text
    assert step_of(tmp_path) == 4


@pytest.mark.parametrize("every", ["--log-every 3 --save-every 4", "--log-every 1"])
def test_one_nan_ends_no_run_where_no_other_step_is_judged_with_it(every, tmp_path):
    launch(tmp_path, f"{ALONE} {every}", draw_step=noise_is("nan", 3, 3))
    assert step_of(tmp_path) == 9


@pytest.mark.parametrize("every, since, stop", [(2, 5, 9), (8, 1, 6)])       # the second: seen between two log lines
def test_a_diverged_run_says_so_at_once_and_at_its_end_and_saves_no_more(every, since, stop, tmp_path):
    command = f"{TINY} --target eps --steps 8 --log-every {every} --save-every 2 --keep-every 2 --out run"
    text = launch(tmp_path, command, code=3, draw_step=noise_is("1e6", 4, 4),
                  learning_rate=in_step(stop, terminate))
    first, last = re.findall(f".*diverged since step {since}:.*", text)
    assert first.startswith("warning: ")
    assert text.endswith(f"{last}\n") and f"the checkpoint from before: {tmp_path}/run/ckpt.pt" in last
    assert ("step 8 / 8" in text) == (stop > 8)                              # it goes on
    assert step_of(tmp_path) == 4
    assert not (tmp_path / "run/snapshot_000006.pt").exists()


def test_a_run_that_diverges_at_once_has_no_good_checkpoint(tmp_path):
    text = launch(tmp_path, f"{TINY} --lr 1 --steps 30 --log-every 10 --out run", code=3)
    assert "there is no checkpoint from before" in text


@pytest.mark.parametrize("target", TARGETS)
def test_a_healthy_run_does_not_diverge_in_a_single_step(target, tmp_path):
    """Not even where two images and a high rate reach four times the mean square of the data."""
    words = "--batch-size 2 --warmup 0 --lr 2e-2 --steps 20 --log-every 1"
    launch(tmp_path, f"{TINY} --target {target} {words} --out run")


def test_output_0_gets_the_mean_square_of_the_target():
    table = torch.tensor([0.9, 0.8, 0.1])                                    # the mean of alpha^2 is 0.6
    found = [train.mean_square(Diffusion(table, target=target), 0.7) for target in TARGETS]
    assert found == pytest.approx([0.7, 1, 0.6 + 0.4 * 0.7])


# ------------------------------------------------------------------------------------ snapshots and fine-tuning

STILL = f"{TINY} --steps 1 --lr 1e-30 --out new"                             # one step that changes no weight


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder with "run", a run with a snapshot of step 2, and released.pt, known as weights of vit-tiny."""
    launch(tmp_path, f"{TINY} --steps 3 --keep-every 2 --out run")
    network, arguments = SMALL
    torch.save(network(8, 4, 3, 8, T=4000, **arguments).state_dict(), tmp_path / "released.pt")
    monkeypatch.setitem(model_vit.SIZES, "vit-tiny", arguments)
    monkeypatch.setitem(model_vit.RELEASED, (32, 3), dict(target="x0"))
    return tmp_path


def test_a_snapshot_is_the_moving_average_alone_and_samples(kept):
    assert read(kept / "run/snapshot_000002.pt").keys() == {"ema", "step", "config"}
    launch(kept, "--ckpt run/snapshot_000002.pt --n 2 --steps 1 --out grid.png", main=sample.main)


@pytest.mark.parametrize("name", ["run", "run/ckpt.pt", "run/snapshot_000002.pt", "released.pt"])
def test_a_run_starts_from_the_weights_of(name, kept):
    launch(kept, f"{STILL} --init {name}")
    expected = load_checkpoint(kept / name)[0].state_dict()
    expected["time_embedding.weight"] = expected["time_embedding.weight"][:1000]
    for part in ("model", "ema"):
        same(read(kept / "new")[part], expected, atol=1e-20)


@pytest.mark.parametrize("words, named", [
    ("--target v --init run", "--target v: run was trained with x0"),
    ("--target v --init released.pt", "--target v: released.pt was trained with x0"),
    ("--T 500 --init run", "--T 500: run was trained with 1000"),
    ("--schedule linear --init run", "--schedule linear: run was trained with cosine"),
    ("--classes 0 --init run", "trained with 8 classes, the data have 0"),
    ("--patch 2 --init run", r"pos_embed.*\[1, 6, 32\].*\[1, 18, 32\]"),
    ("--init none", "none: no such file")])
def test_weights_that_do_not_fit_are_refused(words, named, kept):
    assert re.search(named, launch(kept, f"{STILL} {words}", code=2))


def test_a_tuned_run_of_two_processes_goes_on_without_the_file_and_from_no_other(script, tmp_path):
    given = tmp_path / "given/ckpt.pt"
    launch(tmp_path, f"{FIVE} --steps 1 --seed 1 --out given")
    command = f"{FIVE} --init given --out"
    launch(tmp_path, f"{command} one")
    script("train.py", *f"{command} two --steps 2".split(), processes=2)
    assert read(tmp_path / "two")["config"]["init_sha256"] == hash_file(given)
    given.unlink()
    assert "--init: found other.pt" in launch(tmp_path, "--out two --init other.pt --resume", code=2)
    launch(tmp_path, f"{command} two --resume")
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---------------------------------------------------------------------------------- what is drawn at random

DRAWN = dict(batch_size=12, seed=5, drop=0.3, importance=True)


def test_everything_random_is_drawn_for_the_global_batch():
    pool, diffusion = built_in(16, 50, flip=True), Diffusion(timesteps="laplace")
    whole = draw_step(pool, DRAWN, diffusion, 7, slice(0, 12))
    parts = [draw_step(pool, DRAWN, diffusion, 7, slice(i, i + 4)) for i in (0, 4, 8)]
    for full, *pieces in zip(whole, *parts):
        assert torch.equal(full, torch.cat(pieces))


@pytest.mark.parametrize("seed, step", [(5, 8), (6, 7)])
def test_another_step_and_another_seed_draw_other_numbers(seed, step):
    pool, diffusion = built_in(16, 50), Diffusion()
    one = draw_step(pool, DRAWN, diffusion, 7, slice(0, 12))
    other = draw_step(pool, {**DRAWN, "seed": seed}, diffusion, step, slice(0, 12))
    assert [torch.equal(one[i], other[i]) for i in range(3)] == [False] * 3  # x0, t, noise


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    pool = built_in(16, 50)
    pool.labels = torch.arange(50).numpy()                                   # labels as numbers of the images
    config = dict(batch_size=20, seed=0, drop=0.0, importance=False)
    labels = [draw_step(pool, config, Diffusion(), step, slice(0, 20))[3] for step in range(5)]
    first, second = torch.cat(labels).view(2, 50).tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_labels_are_dropped_as_often_as_asked():
    config = dict(batch_size=4000, seed=0, drop=0.15, importance=False)
    labels = draw_step(built_in(8), config, Diffusion(), 0, slice(0, 4000))[3]
    assert 500 < (labels == 8).sum() < 700                                   # 600 expected, deviation 23


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_come_in_order_however_many_threads_prepare_them(threads):
    begun, found = [], []

    def make(step):
        begun.append(step)
        time.sleep(0.03 * (step % 3 == 0))                                   # later ones are ready sooner
        return step
    for step in train.ahead(make, 2, 9, threads):
        found.append(step)
        assert max(begun) <= step + threads                                  # no more are held in memory
    assert found == list(range(2, 9))


# ------------------------------------------------------------------------------------- weights from a file

def write_weights(path, weights, header="weight"):
    path.write_text("\n".join([header, *map(str, weights)]))


@pytest.fixture
def weighted(tmp_path):
    """A folder with min.csv, which is min_snr, ones.csv, and a run "run" of one step with min.csv."""
    write_weights(tmp_path / "min.csv", WEIGHTINGS["min_snr"](Diffusion().snr, 5).tolist())
    write_weights(tmp_path / "ones.csv", [1] * 1000)
    launch(tmp_path, f"{TINY} --steps 1 --weighting min.csv --out run")
    return tmp_path


def test_a_file_is_the_weighting_of_the_same_numbers_to_the_bit_and_may_be_gone_on_resume(weighted):
    (weighted / "min.csv").unlink()
    launch(weighted, "--resume --steps 3 --out run")
    launch(weighted, f"{TINY} --steps 3 --weighting min_snr --out named")
    same(read(weighted / "named")["model"], read(weighted / "run")["model"])


def test_a_file_may_become_another_but_no_name(weighted):
    launch(weighted, "--resume --steps 3 --weighting ones.csv --out run")
    assert read(weighted / "run")["config"]["weighting"] == [1.0] * 1000
    assert "--weighting" in launch(weighted, "--resume --weighting min_snr --out run", code=2)


def test_a_name_may_become_a_file_but_no_other_name(weighted):
    launch(weighted, f"{TINY} --steps 1 --weighting const --out named")
    assert "--weighting" in launch(weighted, "--resume --weighting snr --out named", code=2)
    launch(weighted, "--resume --steps 2 --weighting ones.csv --out named")
    launch(weighted, f"{TINY} --steps 2 --weighting const --out straight")
    same(read(weighted / "named")["model"], read(weighted / "straight")["model"])


BAD_TABLES = [([1] * 999, "weight"), ([1] * 999 + [-1], "weight"), ([1] * 999 + ["nan"], "weight"),
              ([1] * 1000, "w"), ([0] * 1000, "weight"),
              ([f"1,{t}" for t in reversed(range(1000))], "weight,t")]


@pytest.mark.parametrize("weights, header", BAD_TABLES)
def test_a_file_that_is_no_table_of_weights_is_refused(weights, header, tmp_path):
    write_weights(tmp_path / "bad.csv", weights, header)
    assert "--weighting" in launch(tmp_path, f"{TINY} --weighting bad.csv --out run", code=2)


# ------------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("words", ["", "--classes 0", "--timesteps clts"])
def test_the_original_command_may_be_repeated_to_go_on(words, tmp_path):
    launch(tmp_path, f"{TINY} {words} --steps 1 --out run")
    launch(tmp_path, f"{TINY} {words} --steps 2 --out run --resume")
    assert step_of(tmp_path) == 2


def test_a_run_that_was_saved_before_these_flags_goes_on(runs):
    config = read(runs / "whole")["config"]
    saved = dict(config)
    for key in ("init", "grad_clip", "keep_every", "class_counts"):
        del saved[key]
    train.compare(config, saved, runs)


OTHER = ["--batch-size 4", "--size 16", "--classes 0", "--target v", "--gamma 2", "--timesteps clts",
         "--curriculum 9", "--importance", "--schedule linear", "--T 2000", "--lr 0.5", "--warmup 9",
         "--decay 0.5", "--betas 0.5 0.5", "--weight-decay 0.5", "--drop 0.5", "--ema 0.5", "--dtype float64",
         "--seed 1", "--flip", "--grad-clip 1", "--init none", "--model unet-tiny"]


@pytest.mark.parametrize("words", OTHER)
def test_another_flag_than_the_runs_is_refused(words, runs):
    flag = words.split()[0]
    text = launch(runs, f"--resume --out whole {words}", code=2)
    init_takes_it = flag not in ("--target", "--schedule", "--T", "--model")
    assert f"{flag}: found" in text
    assert (f"--init {runs / 'whole'}" in text) == init_takes_it


def test_a_resumed_run_takes_on_and_remembers_the_flags_that_may_change(runs):
    free = dict(steps=21, cfg=1.0, sample_steps=2, log_every=1, save_every=7, sample_every=7, keep_every=7)
    launch(runs, "--resume --out parts --steps 21 --cfg 1 --sample-steps 2 --log-every 1 --save-every 7 "
           "--sample-every 7 --keep-every 7")
    config = read(runs / "parts")["config"]
    assert {key: config[key] for key in free} == free


BAD = ["--steps 0", "--batch-size 0", "--batch-size 9 --accum 2", "--lr nan", "--warmup -1", "--decay 2",
       "--betas 1 .9", "--weight-decay -1", "--ema 1", "--drop 1", "--gamma inf", "--T 0", "--patch 0",
       "--patch 2 --model unet-tiny", "--size 1000000", "--seed -1", "--cfg -1", "--cfg 2 --drop 0",
       "--sample-steps 0", "--accum 0", "--log-every 0", "--save-every 0", "--sample-every -1", "--grad-clip 0",
       "--classes 7", "--curriculum 0", "--data x"]


@pytest.mark.parametrize("words", BAD)
def test_a_bad_value_is_one_line_that_names_the_flag(words, tmp_path):
    flag = words.split()[0]
    assert flag.strip("-") in launch(tmp_path, f"{TINY} {words} --out run", code=2)
    assert not list(tmp_path.iterdir())


BAD_RUNS = [(f"{TINY} --out whole", "holds a run already"),
            ("--resume --out whole --steps 19", "has done 20"),
            ("--resume --out none", "no such file"), ("--dataset pets --out none", "data/pets"),
            ("--timesteps clts:9:1 --out none", "timesteps: found"),
            ("--weighting min --out none", "weighting: found"),
            ("--size 18 --out none", "img_size: found 18"), ("--init= --out none", "no such file")]


@pytest.mark.parametrize("command, named", BAD_RUNS)
def test_a_run_that_cannot_be_is_one_line(command, named, runs):
    before = (runs / "whole/ckpt.pt").read_bytes()
    assert named in launch(runs, command, code=2)
    assert (runs / "whole/ckpt.pt").read_bytes() == before and not (runs / "none").exists()


def help_of(command):
    """{flag: what --help says about it}"""
    text = launch(Path(), f"{command} --help")
    return dict(re.findall(r"^  --([\w-]+)(.*?)(?=^  -|\Z)", text, re.M | re.S))


def test_help_shows_the_defaults_of_the_preset_that_the_command_names():
    found = help_of("--dataset imagenet64 --model unet-adm")
    expected = {"batch-size": "1024", "steps": "900000", "target": "eps", "betas": "[0.9, 0.999]"}
    for flag, default in expected.items():
        assert f"(default: {default})" in " ".join(found[flag].split())


@pytest.mark.parametrize("row", train.PRESETS)
def test_every_key_of_a_preset_is_a_flag(row):
    keys = {key.replace("_", "-") for key in train.preset(*row[:3])}
    assert keys <= help_of("").keys()


# ------------------------------------------------------------------------- folders, disks, damaged files

def test_two_runs_in_one_folder_end_with_one_line(script, tmp_path):
    def other():
        script("train.py", "--resume", "--steps", 3, "--out", "run")
    text = launch(tmp_path, f"{TINY} --steps 9 --save-every 2 --out run", code=2, learning_rate=in_step(3, other))
    assert "another run is writing there" in text
    assert step_of(tmp_path) == 3


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_loads(tmp_path, monkeypatch):
    launch(tmp_path, f"{TINY} --steps 1 --out run")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Full()))
    text = launch(tmp_path, "--resume --steps 2 --out run", code=2)
    assert "ckpt.pt" in text and "No space left" in text
    assert load_checkpoint(tmp_path / "run")[1]["step"] == 1


# ---------------------------------------------------------------------------------------- other runs

def test_bfloat16_is_another_run(one, tmp_path):
    launch(tmp_path, f"{FIVE} --dtype bfloat16 --out run")
    torch.set_float32_matmul_precision("highest")
    change = read(one)["model"]["pos_embed"] - read(tmp_path / "run")["model"]["pos_embed"]
    assert 1e-6 < change.abs().max() < 0.1


@pytest.mark.slow
def test_a_compiled_networks_checkpoint_is_a_plain_one(script, tmp_path):
    launch(tmp_path, f"{FIVE} --steps 1 --out plain")
    script("train.py", *f"{FIVE} --steps 1 --compile --out run".split())
    same(read(tmp_path / "plain")["model"], read(tmp_path / "run")["model"], atol=1e-7)


def test_a_third_network_trains_resumes_and_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "mlp", (MLP, dict(width=16)))
    launch(tmp_path, f"{TINY} --model mlp --steps 2 --out whole")
    launch(tmp_path, f"{TINY} --model mlp --steps 1 --out run")
    launch(tmp_path, "--resume --steps 2 --out run")
    same(read(tmp_path / "whole")["model"], read(tmp_path / "run")["model"])
    launch(tmp_path, "--ckpt run --n 2 --steps 2 --out grid.png", main=sample.main)
    assert (tmp_path / "grid.png").exists()
