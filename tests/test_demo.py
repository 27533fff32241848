"""The main job as a newcomer runs it: `python train.py`, then images of a class on demand."""
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.judge import judge, recognised

VIT = ()
UNET = ("--model", "unet-tiny", "--out", "out/shapes")
SHORT = ("--batch-size", 32, "--sample-steps", 9)


@pytest.mark.parametrize("words, least, floors", [                           # by chance, 12 of 100 are recognised
    pytest.param(VIT, 95, 3, marks=pytest.mark.demo, id="vit"),
    pytest.param(UNET, 95, 3, marks=pytest.mark.demo, id="unet"),
    pytest.param((*VIT, *SHORT, "--steps", 300), 30, 30, marks=pytest.mark.slow, id="vit-short"),
    pytest.param((*UNET, *SHORT, "--steps", 150), 30, 30, marks=pytest.mark.slow, id="unet-short")])
def test_most_samples_are_recognised(words, least, floors, script, start_script, tmp_path):
    began = time.monotonic()
    process = start_script("train.py", *words)
    text, _ = process.communicate()
    minutes = (time.monotonic() - began) / 60
    assert process.returncode == 0, text
    assert Image.open(text.splitlines()[-1]).size == (8 * 64, 8 * 64)
    script("sample.py", "--ckpt", "out/shapes", "--n", 100, "--labels", "balanced", "--cfg", 1.5, "--out", "s.npz")
    file = np.load(tmp_path / "s.npz")
    images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(file["arr_1"])
    right = 100 * recognised(judge(), images, labels)
    score, floor = map(float, re.search(r"FD-pixels (\S+) of .*: (\S+)\)", text).groups())
    print(f"\n{minutes:.1f} minutes, {right:.0f} of 100 samples recognised, FD-pixels {score} (real: {floor})")
    assert right >= least and score < floors * floor
    assert len(images.flatten(1).unique(dim=0)) == 100                       # no two are the same
