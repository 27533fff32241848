"""What goes wrong on the way: numbers that are not finite, damaged checkpoints, two runs in one folder, signals, full
disks, folders that vanish, processes that die, counters past 32 bits, long runs.
"""
import copy
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, group
from PIL import Image

import data
import files
from data import Packed, built_in, generator, shapes
from files import read
from diffusion import Diffusion
from train import HEADER, SKIPS, draw_step, epoch_order, update, zero_moments

TINY = ("--steps", 12, "--batch-size", 8, "--log-every", 2, "--save-every", 4, "--sample-steps", 1, "--size", 8)
LATENTS = ("--dataset", "bad", "--model", "vit-tiny", "--drop", 0, "--cfg", 1)


def small():
    """A network of 3,000 weights, and a final line that costs nothing; for forks."""
    import train
    train.SIZES["vit-tiny"] = dict(dim=16, depth=1, heads=1)
    train.sanity = lambda *a: (0, 0)


def until(what, process=None, seconds=60):
    since = time.monotonic()
    while not what():
        assert time.monotonic() - since < seconds and (process is None or process.is_alive())
        time.sleep(0.01)
    return time.monotonic() - since


def test_an_update_that_is_not_finite_changes_nothing():
    """Weights, both moments and their step counts; and after ten in a row nothing moves any more."""
    torch.manual_seed(0)
    model, ema = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3).requires_grad_(False)
    config = dict(lr=0.1, warmup=0, decay=0, ema=0.5, steps=100, betas=(0.9, 0.999), weight_decay=0.01)
    moments = zero_moments(model)
    skips = torch.zeros(3, dtype=torch.long)

    def step(number, value):
        before = [p.clone() for p in (*model.parameters(), *(x for m in moments.values() for x in m.values()))]
        loss = model(torch.ones(2, 5)).square().sum() * value
        loss.backward()
        update(model, ema, moments, config, number, skips)
        after = [*model.parameters(), *(x for m in moments.values() for x in m.values())]
        return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))

    assert not step(0, 1) and skips.tolist() == [0, 0, 0]
    assert step(1, float("nan")) and step(2, float("inf")) and skips.tolist() == [2, 2, 1]
    assert not step(3, 1) and skips.tolist() == [0, 2, 1]
    assert all(p.isfinite().all() for p in ema.parameters())
    assert all(step(number, float("inf")) for number in range(4, 4 + SKIPS)) and skips.tolist() == [10, 12, 1]
    assert step(20, 1)                                                       # for good


def pack_with_nan(folder, bad, count=2000):
    """Latents with a NaN in those numbered `bad`, unless they are looked at before a run begins."""
    bad = np.setdiff1d(bad, np.linspace(0, count - 1, 256).astype(int))
    folder.mkdir(parents=True)
    latents = np.random.default_rng(0).standard_normal((count, 8, 4, 4)).astype(np.float16) / 2 ** 0.5
    latents[bad, 0, 0, 0] = np.nan
    np.save(folder / "latents.npy", latents)
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    (folder / "meta.json").write_text(json.dumps(dict(dataset="bad", split="train", count=count, size=32, scale=1.0,
                                                      classes=["all"])))


def test_a_nan_in_the_data_costs_its_steps_alone(script, tmp_path):
    pack_with_nan(tmp_path / "data/bad", epoch_order(2000, 0, 0)[[*range(48, 56), *range(64, 80)]])   # steps 7, 9, 10
    text = script("train.py", *LATENTS, *TINY, "--size", 4, "--out", "run")
    warnings = [line for line in text.splitlines() if "not finite" in line]
    assert ["from step 7 on, " in warnings[0], "from step 9 on, " in warnings[1]] == [True, True] and len(warnings) == 2
    assert "in 1 steps" in warnings[0] and "in 2 steps" in warnings[1]
    state = read(tmp_path / "run/ckpt.pt")
    assert all(p.isfinite().all() for part in ("model", "ema") for p in state[part].values())
    assert all(m["step"] == 12 - 3 for m in state["optimizer"]["state"].values())
    rows = [line.split(",") for line in (tmp_path / "run/log.csv").read_text().splitlines()]
    assert rows[4][0] == "8" and "nan" not in rows[4][1:3]                   # the mean of step 8 and what is left of 7


def test_ten_such_steps_in_a_row_end_the_run(script, tmp_path):
    pack_with_nan(tmp_path / "data/bad", range(2000))
    text = script("train.py", *LATENTS, *TINY, "--size", 4, "--steps", 30, "--save-every", 3, "--log-every", 30, "--out", "run", code=3)
    assert "gradients of 10 steps in a row, from step 1 on, are not finite" in text
    assert read(tmp_path / "run/ckpt.pt")["step"] == 9                       # of finite weights: nothing was changed


def test_the_checkpoint_before_the_last_is_kept_and_offered(script, tmp_path):
    script("train.py", *TINY, "--out", "whole", change=small)
    script("train.py", *TINY, "--out", "run", change=small)
    last, before = tmp_path / "run/ckpt.pt", tmp_path / "run/ckpt_previous.pt"
    assert read(last)["step"] == 12 and read(before)["step"] == 8
    data = last.read_bytes()
    last.write_bytes(data[:len(data) // 2])
    text = script("train.py", "--out", "run", "--resume", code=2)
    assert "ckpt.pt" in text and "delete it to go on from ckpt_previous.pt, whole, of step 8" in text
    assert "holds a run already" in script("train.py", *TINY, "--out", "run", code=2)
    last.unlink()
    script("train.py", "--out", "run", "--resume", change=small)
    whole, found = read(tmp_path / "whole/ckpt.pt"), read(last)
    assert found["step"] == whole["step"] == 12
    for part in ("model", "ema"):
        assert all(torch.equal(value, found[part][name]) for name, value in whole[part].items())
    before.write_bytes(b"")
    last.write_bytes(b"")
    assert "delete it" not in script("train.py", "--out", "run", "--resume", code=2)


def test_one_folder_is_one_runs(script, start_fork, tmp_path):
    process, _ = start_fork("train.py", *TINY, "--steps", 100_000, "--out", "run", change=small)
    until((tmp_path / "run/ckpt.pt").exists, process)
    one_line(script("train.py", "--out", "run", "--resume", code=2, change=small), "another run is writing there")
    process.kill()
    process.join()
    step = read(tmp_path / "run/ckpt.pt")["step"] + 1
    script("train.py", "--out", "run", "--resume", "--steps", step, change=small)


# --------------------------------------------------------------------- signals, clocks, two runs in one folder

def slow():
    """A step takes half a second, an image to pack 10 ms."""
    import data
    import train
    small()
    update, square = train.update, data.square
    data.square = lambda *a: (time.sleep(0.01), square(*a))[1]
    train.update = lambda *a: (time.sleep(0.5), update(*a))


def jumping():
    """A wall clock that jumps by years, back and forth."""
    small()
    real, jumps = time.time, itertools.cycle((0, -1e8, 1e8, 3, -5e8))
    time.time = lambda: real() + next(jumps)


def pictures(folder, count, side=16):
    folder.mkdir()
    for i, image in enumerate(shapes(range(count), side)[0].transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(folder / f"{i:04d}.png")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(text, *words):
    """A script's error is one line at the end, and no traceback."""
    assert "Traceback" not in text and all(word in text.splitlines()[-1] for word in words), text


def test_the_same_command_gives_the_same_bytes_whatever_the_clock_says(script, tmp_path):
    for name, change in (("one", small), ("two", jumping)):
        script("train.py", *TINY, "--sample-every", 6, "--out", f"{name}/run", change=change)
        words = ("--ckpt", f"{name}/run", "--n", 5, "--steps", 2, "--out", f"{name}/drawn.npz")
        script("sample.py", *words, change=change)
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one == two and {"run/ckpt.pt", "run/log.csv", "run/samples_000006.png", "drawn.npz"} < one.keys()
    assert not [path.name for path in ROOT.glob("*.py") if re.search(r"time\.time\(|datetime", path.read_text())]


def test_sigterm_saves_the_step_it_came_in(start_fork, tmp_path):
    process, file = start_fork("train.py", *TINY, "--steps", 1000, "--log-every", 1, "--save-every", 1000,
                               "--out", "run", change=slow)
    until(lambda: "step 3 /" in file.read_text(), process)
    process.terminate()
    took = until(lambda: not process.is_alive())
    assert process.exitcode == 143 and took < 2.5, took                      # a step is 0.5 s
    assert read(tmp_path / "run/ckpt.pt")["step"] in (4, 5) and "go on with --resume" in file.read_text()


@pytest.mark.parametrize("name", ["train", "data", "sample"])
def test_sigterm_at_any_time(name, script, start_fork, tmp_path):
    """While it starts, reads, works: it ends at once, non-zero, and the next run goes on."""
    script("train.py", *TINY, "--steps", 1, "--out", "model", change=small)
    pictures(tmp_path / "src", 300)
    words, change = dict(train=(("train.py", *TINY, "--out", "all"), slow),
                         data=(("data.py", "--src", "src", "--size", 8, "--workers", 2, "--out", "all"), slow),
                         sample=(("sample.py", "--ckpt", "model", "--n", 1000, "--out", "all.npz"), small))[name]
    again = lambda: ("--resume",) if (tmp_path / "all/ckpt.pt").exists() else ()
    for seconds in (0, 0.1, 0.3, 0.6):
        process, file = start_fork(*words, *again(), change=change)
        time.sleep(seconds)
        process.terminate()
        assert until(lambda: not process.is_alive()) < 5
        assert process.exitcode in (-signal.SIGTERM, 143), file.read_text()
    script(*words, *again(), change=small)
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("name", ["data", "sample"])
def test_a_folder_that_another_run_writes_to_is_refused(name, script, tmp_path):
    pictures(tmp_path / "src", 3)
    script("train.py", *TINY, "--steps", 1, "--out", "model", change=small)
    (tmp_path / "out").mkdir()
    words = dict(data=("data.py", "--src", "src", "--size", 8, "--out", "out"),
                 sample=("sample.py", "--ckpt", "model", "--n", 3, "--steps", 2, "--out", "out"))[name]
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    one_line(script(*words, code=2, change=small), "--out", "another run is writing there")
    assert not any((tmp_path / "out").iterdir())
    os.close(other)
    script(*words, change=small)


def mortal():
    """The worker that comes to image 150 dies."""
    import data
    square = data.square
    data.square = lambda path, *a: os.kill(os.getpid(), signal.SIGKILL) if path.name == "0150.png" else square(path, *a)


def test_a_worker_that_dies_is_one_line_and_the_next_run_goes_on(script, tmp_path):
    pictures(tmp_path / "src", 200)
    words = ("data.py", "--src", "src", "--size", 8, "--workers", 2, "--out")
    text = script(*words, "one/pack", code=2, change=mortal)
    one_line(text.replace("\r", "\n"), "a worker process was killed", "run again")
    script(*words, "one/pack", change=small)
    script(*words, "two/pack", change=small)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ------------------------------------------------------------------------- disks that fill up, folders that go

def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_loads(script, tmp_path):
    script("train.py", *TINY, "--out", "run", change=small)
    before = contents(tmp_path / "run")
    more = ("train.py", "--out", "run", "--resume", "--steps", 14)
    for name in ("ckpt.pt", "log.csv", "config.json"):                       # the file that is renamed once it is whole
        os.symlink("/dev/full", tmp_path / f"run/{name}.0.part")
        one_line(script(*more, code=2, change=small), name, "No space left")
        found = contents(tmp_path / "run")
        assert found["ckpt.pt"] == before["ckpt.pt"] and not any(key.endswith(".part") for key in found)
    script(*more, change=small)
    assert read(tmp_path / "run/ckpt.pt")["step"] == 14
    (tmp_path / "drawn").mkdir()
    os.symlink("/dev/full", tmp_path / "drawn/000002.png.0.part")
    words = ("sample.py", "--ckpt", "run", "--n", 3, "--steps", 2, "--out")
    one_line(script(*words, "drawn", code=2, change=small), "000002.png", "No space left")
    os.symlink("/dev/full", tmp_path / "drawn.npz.0.part")
    one_line(script(*words, "drawn.npz", code=2, change=small), "drawn.npz", "No space left")
    script(*words, "drawn", change=small)
    script(*words, "drawn.npz", change=small)
    pictures(tmp_path / "src", 5)
    words = ("data.py", "--src", "src", "--size", 8, "--out", "pack")
    (tmp_path / "pack").mkdir()
    os.symlink("/dev/full", tmp_path / "pack/meta.json.0.part")
    one_line(script(*words, code=2, change=small), "meta.json", "No space left")
    script(*words, change=small)
    assert sorted(contents(tmp_path / "pack")) == ["images.npy", "labels.npy", "meta.json"]


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts a small file system in memory at tmp_path/disk, or mounts it anew with other options."""
    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path / "disk"], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount")
    (tmp_path / "disk").mkdir()
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("needs root on Linux, to mount a small disk")
    mount("size=1m")
    yield lambda options: mount("remount," + options)
    subprocess.run(["umount", "-l", str(tmp_path / "disk")])


def test_a_disk_that_fills_up_or_turns_read_only(disk, script, tmp_path):
    words = ("train.py", *TINY, "--out", "disk/run")                         # 370 kB a checkpoint: two fit, no third
    one_line(script(*words, code=2, change=small), "No space left")
    assert read(tmp_path / "disk/run/ckpt.pt")["step"] in (4, 8)
    for option, why in (("size=10m,ro", "Read-only"), ("size=10m,rw", "")):
        disk(option)
        text = script("train.py", "--out", "disk/run", "--resume", code=2 if why else 0, change=small)
        why and one_line(text, "disk/run", why)
    assert read(tmp_path / "disk/run/ckpt.pt")["step"] == 12
    pictures(tmp_path / "src", 50)
    words = ("data.py", "--src", "src", "--size", 256, "--out", "disk/pack")
    one_line(script(*words, code=2, change=small), "disk/pack", "No space left")
    disk("size=40m")
    script(*words, change=small)
    assert sorted(contents(tmp_path / "disk/pack")) == ["images.npy", "labels.npy", "meta.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_a_folder_without_the_right_to_write(script, tmp_path):
    script("train.py", *TINY, "--out", "run", change=small)
    before = contents(tmp_path / "run")
    (tmp_path / "run").chmod(0o555)
    more = ("train.py", "--out", "run", "--resume", "--steps", 14)
    one_line(script(*more, code=2, change=small), "run", "Permission denied")
    (tmp_path / "run").chmod(0o755)
    assert contents(tmp_path / "run") == before
    script(*more, change=small)


@pytest.mark.parametrize("name", ["train", "data", "sample"])
def test_a_folder_that_is_removed_ends_the_run_in_one_line(name, script, start_fork, tmp_path):
    script("train.py", *TINY, "--steps", 1, "--out", "model", change=small)
    pictures(tmp_path / "src", 1000 if name == "data" else 1)
    words = dict(train=("train.py", *TINY, "--steps", 10 ** 6, "--out", "out"),
                 data=("data.py", "--src", "src", "--size", 8, "--workers", 1, "--out", "out"),
                 sample=("sample.py", "--ckpt", "model", "--n", 10 ** 5, "--steps", 2, "--out", "out"))[name]
    begun = tmp_path / "out" / dict(train="ckpt.pt", data="packing.json", sample="000003.png")[name]
    process, file = start_fork(*words, change=slow if name == "data" else small)
    until(begun.exists, process)
    os.rename(tmp_path / "out", tmp_path / "gone")
    assert until(lambda: not process.is_alive()) < 30 and process.exitcode == 2, file.read_text()
    one_line(file.read_text().replace("\r", "\n"), "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ one process of several dies

def rank_of(pid, folder):
    """RANK of a process that runs in a folder, else None."""
    try:
        found = re.search(rb"(?:^|\0)RANK=(\d+)", open(f"/proc/{pid}/environ", "rb").read())
        return int(found[1]) if found and os.readlink(f"/proc/{pid}/cwd") == str(folder) else None
    except OSError:
        return None


TWO = (*TINY, "--dtype", "float64", "--lr", 1e-3, "--decay", 0, "--warmup", 1)


def goes_on(script, folder):
    """One process goes on from a run's last checkpoint, to what one process alone arrives at."""
    step = read(folder / "run/ckpt.pt")["step"] + 2
    script("train.py", "--out", "run", "--resume", "--steps", step, change=small)
    script("train.py", *TWO, "--steps", step, "--out", "one", change=small)
    one, other = (read(folder / name / "ckpt.pt") for name in ("one", "run"))
    for part in ("model", "ema"):
        assert all((value - other[part][key]).abs().max() < 1e-9 for key, value in one[part].items())


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_of_two_dies(dies, script, start_fork, tmp_path):
    """The other one, which nobody ends, does so by itself within a minute, with one line."""
    run = ("train.py", *TWO, "--steps", 10 ** 6, "--save-every", 3, "--out", "run")
    both = [start_fork(*run, env=rank, change=small) for rank in group(2)]
    (victim, _), (other, file) = both[dies], both[1 - dies]
    until((tmp_path / "run/ckpt.pt").exists, other)
    victim.kill()
    print(f"the other one ended {until(lambda: not other.is_alive()):.1f} s later")
    assert other.exitcode == 1
    one_line(file.read_text(), "another process of this run has ended", "--resume")
    goes_on(script, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_of_torchrun_dies(dies, script, start_script, tmp_path):
    start = f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport files, test_faults, train\n"
    (tmp_path / "train.py").write_text(start + "test_faults.small()\nfiles.run(train.main)\n")
    process = start_script(tmp_path / "train.py", *TWO, "--steps", 10 ** 6, "--save-every", 3, "--out", "run",
                           torchrun=("--standalone", "--nproc-per-node=2"))
    until(lambda: (tmp_path / "run/ckpt.pt").exists() or process.poll() is not None, seconds=120)
    family = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and rank_of(pid, tmp_path) == dies]
    os.kill(min(family), signal.SIGKILL)
    since = time.monotonic()
    text = process.communicate(timeout=60)[0]
    print(f"all ended {time.monotonic() - since:.1f} s later")
    assert process.returncode == 1, text
    goes_on(script, tmp_path)


# --------------------------------------------------------------------------------- overflow, counters, long runs

@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_checkpoint_with_an_infinite_number_is_left_alone(part, script, tmp_path):
    script("train.py", *TINY, "--steps", 4, "--out", "run", change=small)
    state = read(tmp_path / "run/ckpt.pt")
    wrong = state[part] if part != "optimizer" else state[part]["state"][0]
    wrong["exp_avg" if part == "optimizer" else "linear_projection.weight"].flatten()[0] = float("inf")
    torch.save(state, tmp_path / "run/ckpt.pt")
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    text = script("train.py", "--out", "run", "--resume", "--steps", 9, code=3, change=small)
    one_line(text, "not finite", "ckpt.pt")
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_overflow_are_named_and_never_saved(dtype, script, tmp_path):
    assert "--lr: found 1e+30" in script("train.py", "--lr", 1e30, "--out", "run", code=2)
    words = ("--lr", 1e3, "--weight-decay", 1e3, "--warmup", 1, "--decay", 0, "--dtype", dtype)      # -1e6 a step
    text = script("train.py", *TINY, *words, "--steps", 40, "--save-every", 1, "--out", "run", code=3, change=small)
    assert re.search(r"(gradients of 10 steps in a row, from step|weights at step) \d+,? (on, )?are not finite", text)
    state = read(tmp_path / "run/ckpt.pt")
    assert 1 <= state["step"] < 20
    assert all(p.isfinite().all() for part in ("model", "ema") for p in state[part].values())


@pytest.mark.parametrize("passed", [2 ** 31, 2 ** 33])
def test_counters_past_two_billion_samples(passed, script, tmp_path):
    script("train.py", *TINY, "--steps", 2, "--out", "run", change=small)
    state, first = read(tmp_path / "run/ckpt.pt"), passed // 8 + 5
    torch.save({**state, "step": first}, tmp_path / "run/ckpt.pt")
    text = script("train.py", "--out", "run", "--resume", "--steps", first + 2, "--log-every", 1, change=small)
    assert read(tmp_path / "run/ckpt.pt")["step"] == first + 2
    assert text.splitlines()[-1].endswith(f"samples_{first + 2}.png")
    lines = (tmp_path / "run/log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "2", str(first + 1), str(first + 2)]
    assert all(0 < float(line.split(",")[1]) < 9 for line in lines[1:])
    config, data = dict(batch_size=8, seed=0, drop=0.0, importance=False), built_in(16, 1000)
    seen = [draw_step(data, config, Diffusion(), first + i, slice(0, 8)) for i in range(2)]
    for i, (x0, t, noise, y, _) in enumerate(seen):
        places = range((first + i) * 8, (first + i + 1) * 8)
        images, labels = shapes([int(epoch_order(1000, 0, place // 1000)[place % 1000]) for place in places], 16)
        assert torch.equal(x0, torch.from_numpy(images) / 127.5 - 1) and y.tolist() == labels.tolist()
    assert not torch.equal(seen[0][2], seen[1][2])


def test_a_hundred_thousand_packed_images_open_at_once(tmp_path):
    count = 100_000
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(count, 3, 8, 8))
    images[:] = (np.arange(count) % 251)[:, None, None, None]
    np.save(tmp_path / "labels.npy", np.arange(count) % 10)
    meta = dict(dataset="many", split="train", count=count, size=8, classes=list("abcdefghij"))
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    del images
    since = time.process_time()
    data = Packed(tmp_path)
    order = epoch_order(count, 0, 0)[:256].numpy()
    x, y = data.batch(order, generator("step", 0, 0))
    took = time.process_time() - since
    print(f"open and first batch: {took:.3f} s")
    assert took < 0.5 and y.tolist() == (order % 10).tolist()
    assert torch.equal(x[:, 0, 0, 0], torch.from_numpy(order % 251).float() / 127.5 - 1)


def watched():
    """watched.csv: step, resident pages, CPU seconds of the last ten steps, and of step 0 on a copy, five times, after
    them: what the machine's own pace would be seen in.
    """
    import train
    small()
    update, file, mark, diffusion = train.update, open("watched.csv", "w", buffering=1), [0], Diffusion()
    data, tally, copies = built_in(8), torch.zeros(10, 4, dtype=torch.float64), []

    def watch(model, ema, moments, config, step, skips):
        copies[:] = copies or copy.deepcopy((model, ema, moments, skips))
        update(model, ema, moments, config, step, skips)
        if step % 10 == 9:
            now = time.process_time()
            for _ in range(5):
                train.backward(copies[0], diffusion, draw_step(data, config, diffusion, 0, slice(None)), tally, config)
                update(*copies[:3], config, 0, copies[3])
            after = time.process_time()
            with open("/proc/self/statm") as pages:
                print(step + 1, pages.read().split()[1], now - mark[0], after - now, sep=",", file=file)
            mark[0] = time.process_time()
    train.update = watch


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_5000_steps_keep_their_pace_and_their_memory(script, tmp_path):
    script("train.py", "--size", 8, "--batch-size", 4, "--steps", 5000, "--log-every", 50, "--save-every", 500,
           "--sample-steps", 1, "--out", "run", change=watched)
    _, pages, seconds, work = np.loadtxt(tmp_path / "watched.csv", delimiter=",").T[:, 100:]     # 1,000 warm up
    early, late = (np.median(part) for part in np.split(seconds / work, 2))  # the machine's own pace divided out
    drift = pages[-1] / pages[0] - 1
    print(f"{np.median(seconds) * 100:.2f} ms a step, {late / early - 1:+.1%}; "
          f"{pages[-1] * 4 / 1024:.0f} MiB, {drift:+.2%}")
    assert drift < 0.01 and abs(late / early - 1) < 0.1                      # under 2 % on an idle machine
    lines = (tmp_path / "run/log.csv").read_text().splitlines()
    assert len(lines) == 101 and lines[0] == HEADER and all(line.count(",") == 12 for line in lines)


def test_a_pack_that_another_run_has_finished_stays(tmp_path, monkeypatch):
    """Of two that began together the second finds it finished once it has the lock."""
    (tmp_path / "src").mkdir()
    for i, image in enumerate(shapes(range(3), 8)[0].transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(tmp_path / f"src/{i}.png")
    data.pack(tmp_path / "src", 8, tmp_path / "pack", workers=1)
    before = (tmp_path / "pack/images.npy").read_bytes()
    meta = json.loads((tmp_path / "pack/meta.json").read_text())
    (tmp_path / "pack/meta.json").rename(tmp_path / "meta.json")
    monkeypatch.setattr(data, "lock", lambda out: (tmp_path / "meta.json").rename(out / "meta.json"))   # while one waits
    with pytest.raises(files.BadInput, match="meanwhile"):
        data.begin(tmp_path / "pack", "images", (3, 8, 8), np.uint8, meta)
    assert (tmp_path / "pack/images.npy").read_bytes() == before and Packed(tmp_path / "pack").images[:].any()
