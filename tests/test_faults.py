"""What goes wrong on the way: numbers that are not finite, damaged checkpoints, two runs in one folder."""
import json
import time

import numpy as np
import torch

from data import read
from train import SKIPS, epoch_order, update, zero_moments

TINY = ("--steps", 12, "--batch-size", 8, "--log-every", 2, "--save-every", 4, "--sample-steps", 2)
LATENTS = ("--dataset", "bad", "--model", "vit-tiny", "--drop", 0, "--cfg", 1)


def test_an_update_that_is_not_finite_changes_nothing():
    """Weights, both moments, their step counts and the average; and after ten in a row nothing moves any more."""
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
    text = script("train.py", *LATENTS, *TINY, "--out", "run")
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
    text = script("train.py", *LATENTS, *TINY, "--steps", 30, "--save-every", 3, "--log-every", 30, "--out", "run", code=3)
    assert "gradients of 10 steps in a row, from step 1 on, are not finite" in text
    assert read(tmp_path / "run/ckpt.pt")["step"] == 9                       # of finite weights: nothing was changed


def test_the_checkpoint_before_the_last_is_kept_and_offered(script, tmp_path):
    script("train.py", *TINY, "--out", "whole")
    script("train.py", *TINY, "--out", "run")
    last, before = tmp_path / "run/ckpt.pt", tmp_path / "run/ckpt_previous.pt"
    assert read(last)["step"] == 12 and read(before)["step"] == 8
    data = last.read_bytes()
    last.write_bytes(data[:len(data) // 2])
    text = script("train.py", "--out", "run", "--resume", code=2)
    assert "ckpt.pt" in text and "delete it to go on from ckpt_previous.pt, whole, of step 8" in text
    assert "holds a run already" in script("train.py", *TINY, "--out", "run", code=2)
    last.unlink()
    script("train.py", "--out", "run", "--resume")
    whole, found = read(tmp_path / "whole/ckpt.pt"), read(last)
    assert found["step"] == whole["step"] == 12
    for part in ("model", "ema"):
        assert all(torch.equal(value, found[part][name]) for name, value in whole[part].items())
    before.write_bytes(b"")
    last.write_bytes(b"")
    assert "delete it" not in script("train.py", "--out", "run", "--resume", code=2)


def test_one_folder_is_one_runs(script, start_script, tmp_path):
    process = start_script("train.py", *TINY, "--steps", 100_000, "--out", "run")
    while not (tmp_path / "run/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert "another run is writing there" in script("train.py", "--out", "run", "--resume", code=2)
    process.kill()
    process.wait()
    script("train.py", "--out", "run", "--resume", "--steps", read(tmp_path / "run/ckpt.pt")["step"] + 1)
