"""The main job as a newcomer runs it: `python train.py`, then images of a class on demand."""
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data import built_in
from experiments.judge import recognised

UNET = ("--model", "unet-tiny", "--out", "out/shapes")
SHORT = ("--sample-steps", 9, "--cfg", 1)
REAL = 0.31                                      # FD-pixels of real images; a constant image has 25 times that
# Flags; how many images of 100 must be recognised, where 12 are by chance; FD-pixels at most, in units of REAL.
CASES = dict(
    vit=((), 95, 3),
    unet=(UNET, 95, 3),
    vit_short=((*SHORT, "--batch-size", 16, "--steps", 650), 0, 12),
    unet_short=((*UNET, *SHORT, "--batch-size", 32, "--steps", 110), 20, 25),
)


@pytest.mark.parametrize("words, least, most", [
    pytest.param(*CASES["vit"], marks=pytest.mark.demo, id="vit"),
    pytest.param(*CASES["unet"], marks=pytest.mark.demo, id="unet"),
    pytest.param(*CASES["vit_short"], marks=pytest.mark.slow, id="vit-short"),
    pytest.param(*CASES["unet_short"], marks=pytest.mark.slow, id="unet-short"),
])
def test_most_samples_are_recognised(words, least, most, script, start_script, tmp_path):
    began = time.monotonic()
    process = start_script("train.py", *words)
    text = process.stdout.read()
    assert process.wait() == 0, text
    minutes = (time.monotonic() - began) / 60
    picture = Image.open(text.splitlines()[-1])
    assert picture.size == (8 * 64, 8 * 64)
    how = ("--n", 100, "--labels", "balanced", "--cfg", 1.5)
    script("sample.py", "--ckpt", "out/shapes", *how, "--out", "s.npz")
    file = np.load(tmp_path / "s.npz")
    images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(file["arr_1"])
    right = round(100 * recognised(built_in(16), images, labels))
    score = float(re.search(r"FD-pixels (\S+) of", text)[1])
    print(f"\n{minutes:.1f} minutes, {right} of 100 recognised, FD-pixels {score}")
    assert right >= least
    assert score < most * REAL
    assert len(images.flatten(1).unique(dim=0)) == 100                       # no two are the same
