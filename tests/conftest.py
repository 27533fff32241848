import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")        # on arrays this small a second thread would only wait

import numpy as np  # noqa: E402
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import train  # noqa: E402
from files import run  # noqa: E402
from model_vit import ViT  # noqa: E402

SMALL = ViT, dict(dim=32, depth=2, heads=2, short_run=True)       # stands for vit-tiny in most tests
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long; run with -m slow")
    config.addinivalue_line("markers", "demo: the whole demos, 10 minutes; run with -m demo")
    config.addinivalue_line("markers", "gpu: what only a GPU shows; run with -m gpu, others do not see a GPU")
    config.option.markexpr = config.option.markexpr or "not slow and not demo and not gpu"
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""          # torch looks for GPUs when it first needs one, so later


@pytest.fixture
def golden():
    """golden(name) -> (arrays as tensors, state dict as float32) of the canonical implementation's values."""
    def load(name):
        file = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        return arrays, {key[3:]: value.float() for key, value in arrays.items() if key.startswith("sd/")}
    return load


# The tests start scripts as forks of a process that has imported everything already, which saves seconds each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])
METHOD = multiprocessing.get_start_method()          # of this platform, which a script's own workers are to get


def forked(words, folder, env, file, change=None, whole=False):
    """Be the script that `words` start in a folder, with this environment; what it prints goes to a file.

    change() is called first. Unless `whole`, vit-tiny is SMALL, and train.py does not measure FD-pixels at its end.
    """
    if not whole:
        sample.MODELS["vit-tiny"], train.sanity = SMALL, lambda *_: 0.0
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


def fork(file, folder, *words, env=(), change=None, whole=False):
    """Start forked("train.py", ...) in a folder, on one thread -> the running process."""
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    process = FORKS.Process(target=forked, args=(words, folder, env, file, change, whole))
    process.start()
    return process


def finish(processes, timeout=240):
    """Wait for processes, but kill them when the time is over -> the highest exit code."""
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    for process in processes:
        process.kill()                                                       # changes nothing where it has ended
        process.join()
    return max(abs(process.exitcode) for process in processes)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def group(processes):
    """What torchrun or a cluster's scheduler sets in the environment of each process. One alone gets nothing."""
    if processes == 1:
        return [{}]
    shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [{**shared, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script("train.py", "--steps", 3, ...) runs one of the project's scripts in an empty folder, on one thread,
    checks its exit code and returns what it printed.

    A refusal (code 2) runs in this process and must be one line. Anything else is a fork, in which change() is
    called first, or as many forks as torchrun would start for `processes`. vit-tiny is SMALL, unless `whole`.
    """
    def call(*words, code=0, processes=1, timeout=240, change=None, whole=False):
        if code == 2 and not change and processes == 1:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setitem(sample.MODELS, "vit-tiny", SMALL)
            monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *map(str, words[1:])])
            with pytest.raises(SystemExit) as exit:
                run(importlib.import_module(Path(words[0]).stem).main)
            text = capsys.readouterr().err
            assert exit.value.code == 2 and len(text.splitlines()) == 1, text
            return text
        files, running = [], []
        for rank, env in enumerate(group(processes)):
            files.append(tmp_path.parent / f"{tmp_path.name}.{rank}.txt")
            running.append(fork(files[rank], tmp_path, *words, env=env, change=change, whole=whole))
        found = finish(running, timeout)
        text = "".join(file.read_text() for file in files)
        assert found == code and "Traceback" not in text, text
        return text
    return call


@pytest.fixture
def start_script(tmp_path):
    """start_script("train.py", ...) starts a script from the command line, with the flags `torchrun` under torchrun
    -> the running process. Whatever still runs at the end of the test is killed.
    """
    running = []

    def call(*words, torchrun=()):
        start = [sys.executable]
        if torchrun:
            start += ["-m", "torch.distributed.run", *torchrun]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        start += [str(ROOT / words[0]), *map(str, words[1:])]
        process = subprocess.Popen(start, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True)
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
