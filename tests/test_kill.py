"""Killed at any moment and started again: the same bytes as a run left alone, and nothing beside them."""
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKS, ROOT, forked
from PIL import Image

from data import shapes

WRITES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")


class Toy(torch.nn.Module):
    """In place of the autoencoder, whose 84M weights take seconds to read."""

    def moments(self, x):
        return torch.nn.functional.avg_pool2d(x, 8).mean(1, keepdim=True) * torch.linspace(-1, 1, 8)[:, None, None]


def dying(words, folder, env, log, moment, share, count):
    """forked(), with small networks and packed in chunks of 4, that dies by SIGKILL at the moment of a given number:
    before a file is opened for writing, renamed, linked or removed, before a folder is made or removed, between two
    chunks of a pack, or in the middle of a write, whose file has `share` of its bytes then. File `count` lists them.
    """
    import data
    import files
    import vae
    data.CHUNK, vae.load_vae = 4, lambda path: Toy()
    pid, seen, fsync, progress = os.getpid(), [], os.fsync, data.progress

    def here(what, fd=None):
        if os.getpid() == pid:                                               # not in its workers
            seen.append(what)
            if len(seen) == moment:
                if fd is not None:
                    os.ftruncate(fd, int(share * os.fstat(fd).st_size))
                os.kill(pid, signal.SIGKILL)

    def hook(event, args):
        opens = event == "open" and not isinstance(args[0], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (opens or event in WRITES) and (folder / os.fspath(args[0])).is_relative_to(folder):
            here(f"{event} {Path(os.fspath(args[0])).name}")
    os.chdir(folder)
    sys.addaudithook(hook)
    os.fsync = lambda fd: (here("write", fd), fsync(fd))
    data.progress = files.progress = lambda *a, **k: (here("chunk"), progress(*a, **k))
    try:
        forked(words, folder, env, log)
    finally:
        count.write_text("\n".join(seen))


def left(folder):
    """Processes that still run in a folder."""
    def where(pid):
        try:
            return os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            return ""
    return [pid for pid in os.listdir("/proc") if pid.isdecimal() and where(pid) == str(folder)]


@pytest.fixture
def survive(tmp_path):
    """survive(words, again, out, kills, timed) runs a script in folder "0" left alone, then in folder after folder
    killed, at `kills` moments spread over all there are and at `timed` random times, and started once more; asks for
    equal bytes of everything in `out`. again(folder) -> the words of the second start. Returns the number of kills.
    """
    def run(words, folder, moment=0, share=0.0, seconds=None):
        words = [str(ROOT / words[0]), *map(str, words[1:])]
        env, log, count = {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "log.txt", tmp_path / "count.txt"
        process = FORKS.Process(target=dying, args=(words, folder, env, log, moment, share, count))
        since = time.monotonic()
        process.start()
        process.join(120 if seconds is None else seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        return process.exitcode, time.monotonic() - since

    def contents(folder):
        return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    def call(words, again, out, kills, timed, seed=0):
        rng, killed = random.Random(seed), 0
        (tmp_path / "0").mkdir()
        code, took = run(words, tmp_path / "0")
        assert code == 0
        whole, moments = contents(tmp_path / "0" / out), (tmp_path / "count.txt").read_text().splitlines()
        assert len(moments) >= kills and whole and not any(name.endswith(".part") for name in whole)
        for i in range(1, kills + timed + 1):
            folder, moment = tmp_path / str(i), 0
            folder.mkdir()
            if i <= kills:
                moment = 1 + int((i - 1 + rng.random()) * len(moments) / kills)
                code, _ = run(words, folder, moment, rng.random())
                assert code == -signal.SIGKILL
            else:
                code, _ = run(words, folder, seconds=rng.random() * took)
            killed += code != 0
            where = f"{i}: {moments[moment - 1] if moment else 'at some time'} ({moment})"
            assert code == 0 or run(again(folder), folder)[0] == 0, where
            until = time.monotonic() + 5
            while sys.platform == "linux" and left(folder):
                assert time.monotonic() < until, f"{where}: workers are left"
                time.sleep(0.05)
            found = contents(folder / out)
            assert found.keys() == whole.keys(), where
            assert [name for name in whole if whole[name] != found[name]] == [], where
        return killed
    return call


def pictures(folder, count, side=16):
    folder.mkdir()
    for i, image in enumerate(shapes(range(count), side)[0].transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


TRAIN = ("train.py", "--steps", 8, "--batch-size", 4, "--log-every", 2, "--save-every", 3, "--sample-every", 2,
         "--sample-steps", 1, "--size", 8, "--ema", 0.5, "--out", "run")


@pytest.mark.slow
def test_train_py_killed_twenty_times(survive):
    def again(folder):
        started = any((folder / "run" / name).exists() for name in ("ckpt.pt", "ckpt_previous.pt"))
        return ("train.py", "--resume", "--out", "run") if started else TRAIN
    assert survive(TRAIN, again, "run", 17, 3) >= 18


@pytest.mark.slow
def test_data_py_killed_twenty_times(survive, tmp_path):
    words = ("data.py", "--src", pictures(tmp_path / "src", 18), "--size", 8, "--workers", 2, "--out", "pack")
    assert survive(words, lambda folder: words, "pack", 16, 4) >= 17


@pytest.mark.slow
def test_vae_py_killed_twenty_times(survive, tmp_path):
    (tmp_path / "vae.pt").write_bytes(b"weights")
    words = ("vae.py", "--src", pictures(tmp_path / "src", 18), "--vae", tmp_path / "vae.pt", "--size", 8,
             "--workers", 1, "--out", "pack")
    assert survive(words, lambda folder: words, "pack", 18, 2) >= 18


@pytest.mark.slow
@pytest.mark.parametrize("out, kills", [("drawn.npz", 16), ("drawn", 4)])
def test_sample_py_killed_twenty_times(survive, script, tmp_path, out, kills):
    script("train.py", "--steps", 1, "--batch-size", 4, "--sample-steps", 1, "--model", "vit-tiny", "--out", "run")
    words = ("sample.py", "--ckpt", tmp_path / "run", "--n", 10, "--batch-size", 4, "--steps", 2, "--out", f"all/{out}")
    assert survive(words, lambda folder: words, "all", kills, 1) >= kills


def listed():
    """Every batch that sample.py draws, as a line of batches.txt."""
    import sample
    draw = sample.draw

    def write(model, config, ks, *a, **k):
        with open("batches.txt", "a") as file:
            print(*ks, file=file)
        return draw(model, config, ks, *a, **k)
    sample.draw = write


def test_images_are_drawn_again_in_the_batches_they_were_drawn_in(script, tmp_path):
    """The bits of an image may depend on its batch, as those of a sum on its order."""
    script("train.py", "--steps", 1, "--batch-size", 4, "--sample-steps", 1, "--out", "run")
    words = ("sample.py", "--ckpt", "run", "--n", 10, "--batch-size", 4, "--steps", 1, "--out", "drawn")
    script(*words)
    for k in (1, 9):
        (tmp_path / f"drawn/{k:06d}.png").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "drawn").glob("*.png")}
    script(*words, change=listed)
    assert (tmp_path / "batches.txt").read_text().splitlines() == ["0 1 2 3", "8 9"]
    assert all((tmp_path / "drawn" / name).stat().st_mtime_ns == stamp for name, stamp in times.items())
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 10
