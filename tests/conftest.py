import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from files import run  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count()))))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture
def golden():
    """golden(name) -> (arrays as tensors, state dict as float32) of the canonical implementation's values."""
    def load(name):
        file = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        return arrays, {key[3:]: value.float() for key, value in arrays.items() if key.startswith("sd/")}
    return load


METHOD = multiprocessing.get_start_method()          # of a script's own workers, which a fork would change
FORKS = multiprocessing.get_context("forkserver")    # of a process that has only imported: a start costs no imports
FORKS.set_forkserver_preload(["conftest", "train", "pareto", "torch._dynamo"])   # the last: of meta tensors


def forked(words, folder, env, file, change=None):
    """A script as if started by itself: its folder, environment, arguments, output, exit code; first change()."""
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    multiprocessing.set_start_method(METHOD, force=True)
    sys.argv = words
    if change:
        change()
    run(importlib.import_module(Path(words[0]).stem).main)


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script("train.py", "--steps", 3, ...) runs one of the project's scripts in an empty folder, on one thread, checks
    its exit code and returns what it printed. A refusal (code 2) runs in this process and must be one line. Under
    torchrun or another environment it is a process of its own, else a fork, in which change() is called first.
    """
    def call(*words, code=0, torchrun=0, env=(), timeout=240, change=None):
        words = [str(ROOT / words[0]), *map(str, words[1:])]
        if code == 2 and not change:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as exit:
                run(importlib.import_module(Path(words[0]).stem).main)
            text = capsys.readouterr().err
            assert exit.value.code == 2 and len(text.splitlines()) == 1, text
            return text
        if torchrun or env:
            start = [sys.executable]
            if torchrun:
                start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
            done = subprocess.run(start + words, cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
                                  env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)})
            text, found = done.stdout + done.stderr, done.returncode
        else:
            file = tmp_path.parent / f"{tmp_path.name}.txt"
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = FORKS.Process(target=forked, args=(words, tmp_path, env, file, change))
            process.start()
            process.join(timeout)
            process.kill()                                                   # where the time is over
            process.join()
            text, found = file.read_text(), process.exitcode
        assert found == code, text
        return text
    return call


@pytest.fixture
def start_fork(tmp_path):
    """start_fork(..., change=None) -> (running process, file of its output): script's fork, not waited for."""
    running = []

    def call(*words, change=None):
        file = tmp_path.parent / f"{tmp_path.name}.{len(running)}.txt"
        file.write_text("")
        words = [str(ROOT / words[0]), *map(str, words[1:])]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = FORKS.Process(target=forked, args=(words, tmp_path, env, file, change))
        process.start()
        running.append(process)
        return process, file
    yield call
    for process in running:
        process.kill()
        process.join()


@pytest.fixture
def start_script(tmp_path):
    """Like script, but returns the running process; whatever still runs at the end of the test is killed."""
    running = []

    def call(*words, torchrun=(), env=()):
        start = [sys.executable, *(("-m", "torch.distributed.run", *torchrun) if torchrun else ())]
        process = subprocess.Popen([*start, str(ROOT / words[0]), *map(str, words[1:])], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **dict(env)})
        running.append(process)
        return process
    yield call
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def relative(found, expected):
    """Largest error relative to the largest expected value."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def formula(keys, shapes):
    """The weights that the golden values of the Inception and the autoencoder were computed with."""
    state = {}
    for key, shape in zip(map(str, keys), shapes):
        shape = tuple(int(side) for side in str(shape).strip("()").split(",") if side)
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            n *= np.sqrt(2 / np.prod(shape[1:])).astype(np.float32)
        elif key.endswith("running_var"):
            n = np.exp(0.1 * n)
        else:
            n = 0.1 * n + (0 if key.endswith(("running_mean", "bias")) else 1)
        state[key] = torch.from_numpy(n.astype(np.float32))
    return state
