"""The main job as a newcomer runs it: `python train.py`, then images of a class on demand."""
import functools
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data import shapes


@functools.cache
def judge():
    """A small convolutional classifier of the real shapes; the test refuses to go on where it is not nearly perfect."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
                        nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 8))
    x, y = (torch.from_numpy(part) for part in shapes(range(1_000_000, 1_010_000), 16))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(net(x[rows] / 127.5 - 1), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, y = (torch.from_numpy(part) for part in shapes(range(2_000_000, 2_002_000), 16))
    assert (net(x / 127.5 - 1).argmax(1) == y).float().mean() > 0.98
    return net


@pytest.mark.slow
@pytest.mark.parametrize("words, least, floors", [
    pytest.param((), 95, 3, id="whole"),                                     # the others: .ci/run; 12 would be chance
    pytest.param(("--steps", 800, "--batch-size", 32, "--sample-steps", 9), 20, 8, id="short"),
    pytest.param(("--model", "unet-tiny", "--steps", 150, "--sample-steps", 9, "--out", "out/shapes"), 35, 30, id="unet")])
def test_train_and_sample(words, least, floors, script, start_script, tmp_path):
    began = time.time()
    process = start_script("train.py", *words, env=dict(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2")))
    text = process.stdout.read()
    _, process.returncode, used = os.wait4(process.pid, 0)                   # of this process alone
    assert process.returncode == 0, text
    minutes, memory = (time.time() - began) / 60, used.ru_maxrss / 2 ** 20
    picture = text.splitlines()[-1]
    assert Image.open(picture).size == (8 * 64, 8 * 64) and memory < 2
    script("sample.py", "--ckpt", "out/shapes", "--n", 100, "--labels", "balanced", "--cfg", 1.5, "--out", "hundred.npz")
    file = np.load(tmp_path / "hundred.npz")
    x = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
    right = (judge()(x).argmax(1).numpy() == file["arr_1"]).sum()
    spread = len(np.unique(file["arr_0"].reshape(100, -1), axis=0))
    score, floor = map(float, re.search(r"FD-pixels (\S+) of .*: (\S+)\)", text).groups())
    print(f"\n{words}: {minutes:.1f} minutes, {memory:.2f} GiB, {right} of 100 samples recognised, "
          f"FD-pixels {score} (real images {floor})")
    assert right >= least and spread == 100 and score < floors * floor
