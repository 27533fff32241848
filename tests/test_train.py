"""The training loop: exact resume, one result on any number of processes, EMA, checkpoints, refusals."""
import copy
import csv
import json
import re
import signal
import time

import pytest
import torch
from conftest import free_port

from data import built_in
from diffusion import Diffusion
from sample import build_model, grid, load_checkpoint, read
from train import HEADER, ahead, draw_step, epoch_order, learning_rate, log_row

TINY = ("--batch-size", 8, "--sample-steps", 1, "--log-every", 5, "--size", 8)


def flat(state):
    """Nested checkpoint -> {name: tensor}."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {f"{key}.{name}": value for key, part in items for name, value in flat(part).items()}


def distance(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def test_stopped_by_sigkill_and_resumed_is_the_same_to_the_bit(script, start_fork, tmp_path):
    script("train.py", *TINY, "--steps", 20, "--out", "whole")
    process, _ = start_fork("train.py", *TINY, "--steps", 20, "--save-every", 7, "--out", "parts")
    while not (tmp_path / "parts/ckpt.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert read(tmp_path / "parts/ckpt.pt")["step"] in (7, 14)
    script("train.py", "--out", "parts", "--resume")                         # the run remembers its flags
    whole, parts = (read(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 20 and {**whole["config"], "save_every": 7} == parts["config"]
    for part in ("model", "ema", "optimizer", "tally"):
        assert distance(whole[part], parts[part]) == 0, part
    assert (tmp_path / "whole/log.csv").read_bytes() == (tmp_path / "parts/log.csv").read_bytes()
    rows = list(csv.DictReader((tmp_path / "whole/log.csv").open()))
    assert [row["step"] for row in rows] == ["5", "10", "15", "20"] and list(rows[0]) == HEADER.split(",")
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"ckpt.pt", "ckpt_previous.pt", "log.csv",
                                                              "config.json", "samples_000020.png"}
    assert (tmp_path / "whole/samples_000020.png").read_bytes() == (tmp_path / "parts/samples_000020.png").read_bytes()


def test_sigterm_saves_and_leaves(script, start_script, tmp_path):
    process = start_script("train.py", *TINY, "--steps", 100_000, "--out", "run")
    while not (tmp_path / "run/log.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "--resume" in text, text
    state = read(tmp_path / "run/ckpt.pt")
    assert state["step"] >= 5 and {p.name for p in (tmp_path / "run").iterdir()} == {"ckpt.pt", "log.csv", "config.json"}
    step = state["step"] + 1
    script("train.py", "--resume", "--out", "run", "--steps", step, "--log-every", 5, whole=True)
    assert read(tmp_path / "run/ckpt.pt")["step"] == step


@pytest.mark.slow
def test_processes_and_accumulation_do_not_change_the_run(script, tmp_path):
    """To 1e-9 in float64. In float32 the gradients agree to rounding, but where one is nearly 0 Adam turns its rounding
    into a whole step of size lr, so that single weights differ by up to lr a step.
    """
    words = (*TINY, "--steps", 5, "--dtype", "float64", "--flip", "--lr", 1e-3, "--warmup", 1)
    script("train.py", *words, "--out", "one")
    script("train.py", *words, "--out", "two", processes=2)
    script("train.py", *words, "--out", "accumulated", "--accum", 2)
    script("train.py", *words, "--out", "both", "--accum", 2, processes=2)
    one = read(tmp_path / "one/ckpt.pt")
    torch.manual_seed(0)
    start = build_model(one["config"]).double().state_dict()
    assert distance(one["model"], start) > 1e-3
    for name in ("two", "accumulated", "both"):
        other = read(tmp_path / name / "ckpt.pt")
        assert distance(one["model"], other["model"]) < 1e-9 and distance(one["ema"], other["ema"]) < 1e-9, name
        logs = [list(csv.reader((tmp_path / run / "log.csv").open()))[1:] for run in ("one", name)]
        assert all(abs(float(a) - float(b)) < 1e-7 for a, b in zip(sum(logs[0], []), sum(logs[1], [])) if a != "nan")


@pytest.mark.slow
def test_two_nodes_meet_and_do_not_change_the_run(script, start_script, tmp_path):
    words = (*TINY, "--steps", 3, "--dtype", "float64", "--lr", 1e-3)
    script("train.py", *words, "--out", "one", whole=True)
    port = free_port()
    nodes = [start_script("train.py", *words, "--out", "nodes", torchrun=("--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1",
                                                                          "--master-addr=127.0.0.1", f"--master-port={port}"))
             for i in range(2)]
    for node in nodes:
        text = node.communicate(timeout=120)[0]
        assert node.returncode == 0, text
    one, other = (read(tmp_path / name / "ckpt.pt") for name in ("one", "nodes"))
    assert distance(one["model"], other["model"]) < 1e-9 and distance(one["ema"], other["ema"]) < 1e-9


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_and_leaves(script, start_script, tmp_path):
    process = start_script("train.py", *TINY, "--steps", 100_000, "--out", "run", torchrun=("--standalone", "--nproc-per-node=2"))
    while not (tmp_path / "run/log.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert text.count("go on with --resume") == 1, text
    step = read(tmp_path / "run/ckpt.pt")["step"] + 1
    script("train.py", "--resume", "--out", "run", "--steps", step, processes=2, whole=True)
    assert read(tmp_path / "run/ckpt.pt")["step"] == step


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(script, tmp_path):
    words = (*TINY, "--dtype", "float64", "--lr", 1e-3, "--warmup", 1, "--decay", 0)
    script("train.py", *words, "--steps", 6, "--out", "one")
    script("train.py", *words, "--steps", 3, "--out", "moved", processes=2)
    script("train.py", *words, "--steps", 6, "--out", "moved", "--resume")
    one, moved = (read(tmp_path / name / "ckpt.pt") for name in ("one", "moved"))
    assert distance(one["model"], moved["model"]) < 1e-9 and distance(one["tally"], moved["tally"]) < 1e-6


def test_ema_is_the_average_by_hand(script, tmp_path):
    for step in range(1, 4):
        script("train.py", *TINY, "--steps", step, "--ema", 0.7, "--warmup", 1, "--decay", 0, "--out", "run", *(["--resume"] if step > 1 else []))
        state = read(tmp_path / "run/ckpt.pt")
        if step == 1:
            torch.manual_seed(0)
            expected = {key: value.clone() for key, value in build_model(state["config"]).state_dict().items()}
        expected = {key: 0.7 * value + 0.3 * state["model"][key] for key, value in expected.items()}
    assert distance(state["ema"], expected) < 1e-6 and distance(state["model"], state["ema"]) > 1e-4


@pytest.mark.slow
def test_plain_compiled_and_ddp_checkpoints_are_alike(script, tmp_path):
    words = (*TINY, "--steps", 2)
    script("train.py", *words, "--out", "plain")
    script("train.py", *words, "--out", "ddp", processes=2)
    script("train.py", *words, "--out", "compiled", "--compile")
    states = {name: read(tmp_path / name / "ckpt.pt") for name in ("plain", "ddp", "compiled")}
    for name, state in states.items():
        for key in (*state["model"], *state["ema"]):
            assert not key.startswith(("module.", "_orig_mod.")), (name, key)
        plain = build_model(state["config"])
        compiled = build_model(state["config"])
        compiled.compile()
        for model in (plain, compiled):
            model.load_state_dict(state["model"])
            model.load_state_dict(state["ema"])
        assert distance(state["model"], states["plain"]["model"]) < 5e-3
        script("train.py", *TINY, "--steps", 3, "--out", name, "--resume", *(["--compile"] if name == "ddp" else []),
               processes=2 if name == "plain" else 1)
        load_checkpoint(tmp_path / name)


def test_everything_random_is_drawn_for_the_global_batch():
    pool = built_in(16, 50, flip=True)
    config, d = dict(batch_size=12, seed=5, drop=0.3, importance=True), Diffusion(timesteps="laplace")
    whole = draw_step(pool, config, d, 7, slice(0, 12))
    parts = [draw_step(pool, config, d, 7, slice(i, i + 4)) for i in (0, 4, 8)]
    for full, *pieces in zip(whole, *parts):
        assert torch.equal(full, torch.cat(pieces))
    x0, t, noise, y, scale = whole
    assert torch.allclose(scale, 1 / (d.density() * 1000)[t])
    every = [draw_step(pool, config, Diffusion(T=4), step, slice(0, 12)) for step in range(20)]
    assert torch.cat([part[1] for part in every]).unique().tolist() == [0, 1, 2, 3]
    many = torch.cat([part[2] for part in every])
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01 and many.max() > 4
    assert x0.shape == noise.shape == (12, 3, 16, 16) and t.min() >= 0 and t.max() < 1000 and t.unique().numel() > 6
    for other in (draw_step(pool, config, d, 8, slice(0, 12)), draw_step(pool, {**config, "seed": 6}, d, 7, slice(0, 12))):
        assert not torch.equal(other[1], t) and not torch.equal(other[2], noise)


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_come_in_order_however_many_threads_prepare_them(threads):
    begun = []

    def make(step):
        begun.append(step)
        time.sleep(0.03 * (step % 3 == 0))                                   # the later ones are ready sooner
        return step
    found = []
    for step in ahead(make, 2, 9, threads):
        found.append(step)
        assert max(begun) <= step + threads                                  # memory: no more than these are held
    assert found == list(range(2, 9)) and sorted(begun) == found


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    pool = built_in(16, 50)
    pool.labels = torch.arange(50).numpy()                                   # labels as numbers of the images
    config = dict(batch_size=20, seed=0, drop=0.0, importance=False)
    seen = torch.cat([draw_step(pool, config, Diffusion(), step, slice(0, 20))[3] for step in range(5)])
    assert not torch.equal(epoch_order(50, 0, 0), epoch_order(50, 1, 0))
    assert sorted(seen[:50].tolist()) == sorted(seen[50:].tolist()) == list(range(50)) and not torch.equal(seen[:50], seen[50:])


def test_three_steps_by_hand(script, tmp_path):
    """Every number of the configuration reaches the step: weights and log of a run against the same by hand."""
    words = ("--batch-size", 8, "--steps", 3, "--sample-steps", 1, "--seed", 3, "--dtype", "float64", "--target", "v", "--gamma", 2,
             "--schedule", "linear", "--T", 100, "--warmup", 2, "--betas", 0.8, 0.95, "--weight-decay", 0.5, "--decay", 0.5,
             "--timesteps", "clts:0.1:2", "--importance")
    script("train.py", *words, "--out", "run")
    state = read(tmp_path / "run/ckpt.pt")
    config, pool = state["config"], built_in(16)
    torch.manual_seed(3)
    model = build_model(config).double()
    d = Diffusion("linear", 100, "v", "min_snr", 2.0, "clts:0.1:2")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0.5)
    rows = []
    for step in range(3):
        x0, t, noise, y, _ = draw_step(pool, config, d, step, slice(0, 8))
        loss, mse = d.loss(model, x0.double(), t, noise.double(), y)
        loss = loss / (100 * d.density(step)[t])
        optimizer.param_groups[0]["lr"] = (0.5, 1, 2 / 3)[step] * config["lr"]
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        rows.append(torch.stack([t.double(), loss, mse, mse * (1 - d.alphas_cumprod[t])], 1).detach())
    assert distance(model.state_dict(), state["model"]) < 1e-10 and state["tally"].abs().max() == 0
    t, loss, mse, x0_mse = torch.cat(rows).T
    row = next(csv.DictReader((tmp_path / "run/log.csv").open()))
    assert abs(float(row["loss"]) - loss.mean()) < 1e-7 and abs(float(row["mse"]) - mse.mean()) < 1e-7
    for i in range(10):
        inside = (t >= 10 * i) & (t < 10 * (i + 1))
        assert inside.sum() == 0 or abs(float(row[f"x0_mse_{i}"]) / x0_mse[inside].mean() - 1) < 1e-7


def test_bfloat16_is_another_run_and_the_grid_is_drawn_from_the_ema(script, tmp_path):
    words = (*TINY, "--steps", 3, "--warmup", 1)
    script("train.py", *words, "--out", "full")
    script("train.py", *words, "--out", "half", "--dtype", "bfloat16")
    full, half = (read(tmp_path / name / "ckpt.pt") for name in ("full", "half"))
    assert 1e-6 < distance(full["model"], half["model"]) < 0.1
    model, config = load_checkpoint(tmp_path / "full")
    grid(model, config, tmp_path / "again.png", steps=1, cfg=config["cfg"])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "full/samples_000003.png").read_bytes()


def test_labels_are_dropped_as_often_as_asked():
    pool, config = built_in(16, 50), dict(batch_size=100, seed=0, drop=0.15, importance=False)
    dropped = sum((draw_step(pool, config, Diffusion(), step, slice(0, 100))[3] == 8).sum().item() for step in range(40))
    assert 500 < dropped < 700                                               # 600 expected, sd 23


def test_densities_on_the_command_line(script, tmp_path):
    text = script("train.py", *TINY, "--steps", 3, "--timesteps", "clts:0.2", "--importance", "--out", "run")
    assert "clts:0.2:240 t" in text and "warning: --importance" not in text
    config = read(tmp_path / "run/ckpt.pt")["config"]
    assert config["timesteps"] == "clts:0.2:240" and config["importance"] is True and "curriculum" not in config
    for flag in ("clts:0.2:9", "laplace", "clts"):
        assert "--timesteps" in script("train.py", "--resume", "--out", "run", "--timesteps", flag, code=2)
    assert "--importance" in script("train.py", "--resume", "--out", "run", "--no-importance", code=2)
    for flag in ("clts:300:9", "lognormal", "laplace:0:0", "clts:x"):
        assert f"timesteps: found '{flag}" in script("train.py", *TINY, "--timesteps", flag, "--out", "none", code=2)
    for flag, why in (("uniform", "changes nothing"), ("laplace", "rarest t by")):
        assert why in script("train.py", *TINY, "--timesteps", flag, "--importance", "--dry-run", "--batch-size", 1)


def test_learning_rate():
    config = dict(lr=2.0, warmup=4, decay=0.5, steps=20)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4:11] == [2.0] * 7
    assert rates[11:] == pytest.approx([1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert learning_rate({**config, "decay": 0.0, "warmup": 0}, 19) == 2.0
    assert learning_rate({**config, "decay": 1.0, "warmup": 20}, 9) == 2.0 * 0.5 * 0.55


def test_log_row_averages_by_bin():
    tally = torch.zeros(10, 4, dtype=torch.float64)
    tally[0], tally[9] = torch.tensor([6.0, 4.0, 2.0, 2.0]), torch.tensor([3.0, 2.0, 4.0, 1.0])
    assert log_row(50, tally) == "50,3,2," + ",".join(["1"] + ["nan"] * 8 + ["4"])


@pytest.mark.slow
def test_unweighted_errors_do_not_depend_on_the_weighting(script, tmp_path):
    rows = []
    for i, weighting in enumerate(("min_snr", "const", "snr")):
        script("train.py", *TINY, "--steps", 1, "--weighting", weighting, "--out", f"run{i}")
        rows.append(next(csv.DictReader((tmp_path / f"run{i}/log.csv").open())))
    assert rows[0]["mse"] == rows[1]["mse"] == rows[2]["mse"] and len({row["loss"] for row in rows}) == 3


def test_steps_saves_and_dry_run(script, tmp_path):
    text = script("train.py", *TINY, "--dry-run", "--out", "none")
    assert all(word in text for word in ("images/s", "GiB", "hours", " days", "parameters", "GFLOP an image"))
    assert not (tmp_path / "none").exists()
    text = script("train.py", *TINY, "--steps", 7, "--save-every", 5, "--sample-every", 3, "--out", "run", whole=True)
    assert text.splitlines()[-1] == str(tmp_path / "run/samples_000007.png")
    assert {p.name for p in (tmp_path / "run").glob("samples*")} == {"samples_000003.png", "samples_000006.png", "samples_000007.png"}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config == read(tmp_path / "run/ckpt.pt")["config"] and config["steps"] == 7 and config["gamma"] == 5
    score, floor = map(float, re.search(r"FD-pixels (\S+) of 256 samples \(256 other .*: (\S+)\)", text).groups())
    assert 0.1 < floor < 0.6 < score                                         # 7 steps: noise, and far off
    text = script("train.py", "--out", "run", "--resume", whole=True)        # finished: only the grid again
    assert text.splitlines()[-1].endswith("samples_000007.png")


def test_refusals(script, tmp_path):
    script("train.py", *TINY, "--steps", 2, "--out", "run")
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    for words, named in (((), "--resume"), (("--resume", "--lr", 0.5), "--lr: found 0.5"), (("--resume", "--size", 32), "--size"),
                         (("--resume", "--batch-size", 9), "--batch-size"), (("--resume", "--dataset", "pets"), "--dataset")):
        assert named in script("train.py", *words, "--out", "run", code=2)
    for words, named in ((("--batch-size", 9, "--accum", 2), "must divide"), (("--drop", 0, "--cfg", 1.5), "--drop 0"),
                         (("--dataset", "pets"), "data/pets"), (("--size", 18), "--patch"), (("--gamma", -1), "--gamma"),
                         (("--resume",), "no such file"), (("--schedule", "linear", "--T", 5), "too few")):
        assert named in script("train.py", *words, "--steps", 2, "--out", "other", code=2)
    for flag, values in dict(steps=(0,), batch_size=(0, -1), lr=(0, "nan", "inf"), warmup=(-1,), decay=(-1, 2), drop=(1, -1),
                             betas=("1 .9", "nan .9"), ema=(1, -1), weight_decay=(-1, "nan"), gamma=(0, "inf"), T=(0, 10 ** 12),
                             patch=(0, -4), size=(-16, 10 ** 6), seed=(-1, 10 ** 30), cfg=("nan", -1), sample_steps=(0,),
                             accum=(0, -1), log_every=(0,), save_every=(-1,), sample_every=(-1,), model=("vit-x",),
                             nonsense=(1,), step=(3,)).items():
        flag = "--" + flag.replace("_", "-") if flag != "T" else "--T"
        for value in values:
            assert flag in script("train.py", flag, *str(value).split(), "--out", "other", code=2), (flag, value)
    assert "--data" in script("train.py", "--data", "x", "--out", "other", code=2)
    assert not (tmp_path / "other").exists() and (tmp_path / "run/ckpt.pt").read_bytes() == before
    assert "has done 2" in script("train.py", "--resume", "--steps", 1, "--out", "run", code=2)
    state = read(tmp_path / "run/ckpt.pt")
    moments = copy.deepcopy(state["optimizer"])
    moments["state"][0]["exp_avg"] = torch.zeros(3)
    for change in (dict(config=[]), dict(config={}), dict(config={**state["config"], "model": "vit-s"}), dict(step="2"), dict(step=-1),
                   dict(tally=torch.zeros(3)), dict(optimizer={}), dict(optimizer=moments), dict(model={})):
        torch.save({**state, **change}, tmp_path / "run/ckpt.pt")
        script("train.py", "--resume", "--out", "run", code=2)
    flipped = bytearray(before)
    flipped[len(before) // 2] ^= 4
    (tmp_path / "run/ckpt.pt").write_bytes(flipped)
    script("train.py", "--resume", "--out", "run", code=2)
    (tmp_path / "run/ckpt.pt").write_bytes(before)
    (tmp_path / "run/log.csv").write_text("\nnonsense\n")
    script("train.py", "--resume", "--out", "run")
    script("train.py", *TINY, "--steps", 3, "--dry-run")


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(script, tmp_path):
    script("train.py", *TINY, "--steps", 5, "--out", "run")
    state = read(tmp_path / "run/ckpt.pt")
    state["model"]["linear_projection.bias"][0] = float("inf")
    torch.save(state, tmp_path / "run/ckpt.pt")
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    assert "not finite" in script("train.py", *TINY, "--steps", 9, "--out", "run", "--resume", code=3)
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("network", [pytest.param("unet-tiny", marks=pytest.mark.slow), "vit-tiny"])
def test_grad_ckpt_changes_nothing(network, script, tmp_path):
    words = (*TINY, "--model", network, "--steps", 3)
    script("train.py", *words, "--out", "plain")
    script("train.py", *words, "--out", "ckpt", "--grad-ckpt")
    plain, ckpt = (read(tmp_path / name / "ckpt.pt") for name in ("plain", "ckpt"))
    assert distance(plain["model"], ckpt["model"]) < 1e-5
    if network == "unet-tiny":                                               # as any other network
        script("train.py", *words, "--out", "two", processes=2)
        assert distance(plain["model"], read(tmp_path / "two/ckpt.pt")["model"]) < 5e-3
        assert plain["config"]["weight_decay"] == 0 and "patch_size" not in plain["config"]["network"]
        script("sample.py", "--ckpt", "plain", "--n", 2, "--steps", 2)
        assert "--patch" in script("train.py", *TINY, "--model", network, "--patch", 2, "--out", "other", code=2)
        assert "multiple of 4" in script("train.py", *TINY, "--model", network, "--size", 18, "--out", "other", code=2)
