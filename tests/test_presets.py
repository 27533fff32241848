"""Each result of the papers: the README's table is what its command resolves to, and a reduced copy runs."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import train
from sample import build_model, draw, load_checkpoint
from train import PRESETS, SIZES, preset

CPU = torch.device("cpu")
README = (ROOT / "README.md").read_text()


def resolved(words, monkeypatch, tmp_path):
    """The config of a command line, on random numbers in place of the data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--dry-run"])
    args = train.parse()
    args.out = Path("out")
    return train.configure(args, CPU)[1]


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


# ------------------------------------------------------------------------------------------------- the tables

def table(heading):
    """Rows of the README's table whose first column is `heading`, as dicts."""
    lines = README[README.index(f"| {heading} |"):].splitlines()
    split = lambda line: [cell.strip().strip("`") for cell in line.strip("| ").split("|")]
    rows = lines[2:next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [dict(zip(split(lines[0]), split(row))) for row in rows]


ROWS = table("result, FID")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["train.py ..."])
def test_the_readmes_table_is_what_its_commands_resolve_to(row, monkeypatch, tmp_path):
    config = resolved(row["train.py ..."].split(), monkeypatch, tmp_path)
    assert f"{parameters(config) / 1e6:.1f}M" == row["parameters"]
    weighting = config["weighting"] + (f" {config['gamma']:g}" if config["weighting"] == "min_snr" else "")
    weighting += f", {config['timesteps']}" if config["timesteps"] != "uniform" else ""
    guidance = f", cfg {config['cfg']:g}" if config["cfg"] != 1 else ""
    assert (config["model"], config["target"], weighting) == (row["network"], row["predicts"], row["weighting"])
    assert (f"{config['steps']:,}", f"{config['batch_size']:,}") == (row["steps"], row["batch"])
    assert f"Heun {config['sample_steps']}{guidance}" == row["sampling"] and f"{config['drop']:g}" == row["drop"]


def test_every_preset_is_in_the_readmes_table(monkeypatch, tmp_path):
    shown = [resolved(row["train.py ..."].split(), monkeypatch, tmp_path) for row in ROWS]
    shown = {(config["dataset"], config["model"], config["target"]) for config in shown}
    assert {row[:3] for row in PRESETS if row[0] != "folder"} <= shown


def test_what_all_presets_share_and_where_they_differ():
    rows = {row[:3]: preset(*row[:3]) for row in PRESETS}
    for (name, network, _), row in rows.items():
        unet, curriculum = network.startswith("unet"), name in ("cifar10", "imagenet128")
        assert row["weight_decay"] == (0.0 if unet else 0.03)
        if name != "shapes":
            assert (row["lr"], row["ema"], row["decay"]) == (1e-4, 0.9999, 0.0)
            assert row["betas"] == ([.8, .999] if curriculum else [.9, .999] if unet else [.99, .99])
        assert row["warmup"] == {"celeba64": 5000, "shapes": 100, "folder": 1000}.get(name, 0)
        assert row["schedule"] == ("linear" if name == "imagenet128" else "cosine")
        assert row["T"] == (4000 if name == "cifar10" else 1000) and row["interval"] is None
        assert row["weighting"] == ("snr" if curriculum else "min_snr") and row["gamma"] == 5
        assert row["classes"] == (0 if name == "cifar10" else None) and len(row) == 23
        assert row["timesteps"] == "uniform" and row["importance"] is False
        assert row["curriculum"] == {"imagenet128": 300_000, "shapes": 240}.get(name, 50_000)
    assert rows["shapes", "vit-tiny", "x0"]["betas"] == [.9, .99] and rows["shapes", "vit-tiny", "x0"]["lr"] == 4e-3
    assert rows["shapes", "unet-tiny", "x0"]["lr"] == 2e-3 and rows["shapes", "unet-tiny", "x0"]["ema"] == .99
    assert SIZES["unet-celeba"]["head_channels"] == SIZES["unet-adm"]["head_channels"] == 64
    assert [SIZES[name]["heads"] for name in ("unet-b", "unet-ldm", "unet-adm128", "unet-cifar")] == [4, 1, 4, 4]


def test_networks_and_targets_without_a_row():
    for name, network, target in (("shapes", "vit-tiny", "x0"), ("celeba64", "vit-s", "x0"), ("imagenet64", "vit-l", "eps"),
                                  ("imagenet256", "vit-b", "x0"), ("cifar10", "unet-cifar", "eps"), ("my photos", "vit-s", "x0")):
        row = preset(name)
        assert (row["dataset"], row["model"], row["target"]) == (name, network, target)
    assert preset("imagenet256", target="eps")["model"] == "vit-b"
    assert preset("imagenet256", "vit-xl")["steps"] == 7_000_000 and preset("imagenet256", "vit-xl", "eps")["steps"] == 2_100_000
    assert preset("my photos", "unet-b")["betas"] == [.9, .999] and preset("shapes", "vit-s")["betas"] == [.9, .99]
    row = preset("my photos")
    assert (row["steps"], row["batch_size"], row["warmup"], row["drop"], row["cfg"]) == (100_000, 128, 1000, 0.1, 1.5)
    assert preset("celeba64", "unet-b")["warmup"] == 5000 and preset("celeba64", "vit-b")["model"] == "vit-b"


# --------------------------------------------------------------------------------------------- a reduced copy

def pack(dataset, folder):
    """A packed data set of 16 random images of the right shape, labels and names."""
    size, classes, _ = data.DATASETS[dataset]
    names = data.CIFAR10 if dataset == "cifar10" else list(data.imagenet())[2] if classes else []
    rng, meta = np.random.RandomState(0), dict(dataset=dataset, split="train", count=16, size=size, classes=list(names))
    folder.mkdir(parents=True)
    if dataset == "imagenet256":
        np.save(folder / "latents.npy", (rng.randn(16, 8, 32, 32) * 4).astype(np.float16))
        meta.update(scale=0.18215)
    else:
        np.save(folder / "images.npy", rng.randint(0, 256, (16, 3, size, size), np.uint8))
    np.save(folder / "labels.npy", rng.randint(0, max(classes, 1), 16))
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.slow
@pytest.mark.parametrize("dataset, network, target", [row[:3] for row in PRESETS if row[0] not in ("shapes", "folder")])
def test_a_reduced_copy_takes_two_steps_and_samples(dataset, network, target, monkeypatch, tmp_path, script):
    """The same code path at less width and depth; what the checkpoint knows is all that sample.py needs."""
    less = dict(channels=32, res_blocks=1, head_channels=32, context_dim=32, dim=48, depth=2, heads=2)
    small = {key: less[key] if key in less and value is not None else value for key, value in SIZES[network].items()}
    monkeypatch.setitem(train.SIZES, network, small)
    monkeypatch.chdir(tmp_path)
    pack(dataset, tmp_path / "data" / dataset)
    words = ["--dataset", dataset, "--model", network, "--target", target, "--steps", 2, "--batch-size", 2, "--sample-steps", 1]
    words += ["--timesteps", "clts"] * (dataset in ("cifar10", "imagenet128"))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()
    model, config = load_checkpoint(tmp_path / "out" / dataset)
    row = preset(dataset, network, target)
    assert config["step"] == 2 and config["target"] == target and config["cfg"] == row["cfg"] and config["flip"] == (dataset != "imagenet256")
    assert len(config["classes"]) == model.num_classes == {"cifar10": 0, "celeba64": 0}.get(dataset, 1000)
    images = draw(model, config, range(2), steps=2, cfg=config["cfg"])
    assert images.shape == (2, *((4, 32, 32) if dataset == "imagenet256" else (3, *2 * [data.DATASETS[dataset][0]])))
    if dataset != "imagenet256":
        assert next((tmp_path / "out" / dataset).glob("samples_000002.png"))
        words = ("sample.py", "--ckpt", f"out/{dataset}", "--n", 2, *(("--classes", "golden retriever,3") if model.num_classes else ()))
        text = script(*words, "--out", "grid.png")
        assert f"heun {1} steps, cfg {row['cfg']}" in text and (tmp_path / "grid.png").exists()


def test_unconditional_on_labelled_data(script, tmp_path):
    """--classes 0: no label reaches the network, guidance is refused, and --resume keeps it."""
    words = ("train.py", "--classes", 0, "--batch-size", 8, "--sample-steps", 1, "--model", "vit-tiny")
    text = script(*words, "--steps", 2, "--out", "run")
    assert "0 classes" in text
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert state["config"]["classes"] == [] and state["config"]["drop"] == 0 and state["config"]["network"]["num_classes"] == 0
    script("train.py", "--out", "run", "--resume", "--steps", 3)
    for extra in (("--classes", 8), ("--cfg", 2), ("--drop", 0.1)):
        script("train.py", "--out", "run", "--resume", "--steps", 4, *extra, code=2)
    assert "expected 1" in script("sample.py", "--ckpt", "run", "--cfg", 2, code=2)
    assert "has 8" in script("train.py", "--classes", 7, "--out", "other", code=2)


# -------------------------------------------------------------------------------------------------- refusals

def test_another_data_set_network_or_number_of_classes_is_refused(script, tmp_path, monkeypatch):
    """By a line that names what was found and what was expected."""
    pack("imagenet64", tmp_path / "data/imagenet64")
    pack("celeba64", tmp_path / "data/celeba64")
    (tmp_path / "data/celeba64").rename(tmp_path / "data/other")
    for words, parts in ((("--dataset", "imagenet64", "--data", "data/other"), ("celeba64", "imagenet64")),
                         (("--dataset", "imagenet128", "--data", "data/imagenet64"), ("imagenet64", "imagenet128")),
                         (("--dataset", "imagenet64", "--classes", 10), ("10", "1000")),
                         (("--dataset", "celeba64", "--data", "data/imagenet64"), ("imagenet64", "celeba64")),
                         (("--interval", 5, 2), ("--interval", "[5, 2]")), (("--interval", 0, 1000), ("1000",)),
                         (("--interval", 0, 5, "--cfg", 1), ("--interval", "--cfg 1"))):
        text = script("train.py", *words, "--out", "x", code=2)
        assert all(part in text for part in parts), text
    words = ("--model", "vit-tiny", "--batch-size", 4, "--sample-steps", 1, "--steps", 1, "--interval", 100, 700)
    script("train.py", "--dataset", "imagenet64", *words, "--cfg", 1.5, "--out", "run")
    meta = tmp_path / "data/imagenet64/meta.json"
    whole = meta.read_text()
    for change, parts in ((lambda meta: meta["classes"].__setitem__(7, "hen"), ("1000 (number 7: 'hen')", "1000 (number 7: 'cock')")),
                          (lambda meta: meta.update(split="val"), ("data: data/imagenet64 has", "expected"))):
        other = json.loads(whole)
        change(other)
        meta.write_text(json.dumps(other))
        text = script("train.py", "--out", "run", "--resume", "--steps", 2, code=2)
        assert all(part in text for part in parts) and len(text) < 300, text
    meta.write_text(whole)
    for words, parts in ((("--model", "vit-s"), ("vit-s", "vit-tiny")), (("--dataset", "shapes"), ("shapes", "imagenet64")),
                         (("--classes", 0), ("0", "1000")), (("--target", "v"), ("v", "eps"))):
        text = script("train.py", "--out", "run", "--resume", "--steps", 2, *words, code=2)
        assert all(part in text for part in parts) and len(text) < 300, text
    # sampling: the run's own interval unless told otherwise; class names of several words, and ambiguous ones
    text = script("sample.py", "--ckpt", "run", "--n", 2, "--out", "npz.npz", "--classes", "golden retriever, TENCH,3")
    protocol = json.loads((tmp_path / "npz.protocol.json").read_text())
    assert protocol["interval"] == [100, 700] and protocol["steps"] == 1 and protocol["labels"] == [207, 0, 3]
    script("sample.py", "--ckpt", "run", "--n", 1, "--cfg", 1, "--out", "plain.npz")
    assert json.loads((tmp_path / "plain.protocol.json").read_text())["interval"] is None
    assert "classes 134 and 517" in script("sample.py", "--ckpt", "run", "--classes", "crane", "--out", "x.png", code=2)
    assert "1000 classes" in script("sample.py", "--ckpt", "run", "--classes", "unicorn", "--out", "x.png", code=2)
    assert "eps" in script("sample.py", "--ckpt", "run", "--target", "x0", "--out", "x.png", code=2)


def test_dry_run_without_the_data(monkeypatch, capsys, tmp_path):
    """Configuration, FLOPs and days of a preset whose data are not here, as the first of two processes; FLOPs of a ViT on
    256 + 2 tokens by hand.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.SIZES, "vit-b", dict(dim=768, depth=1, heads=12))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "imagenet256", "--dry-run", "--accum", "2", "--batch-size", "8"])
    train.main()
    text, D, N = capsys.readouterr().out, 768, 258
    flops = 2 * (N * 12 * D * D + 2 * N * N * D + 2 * 256 * 16 * D)          # blocks, attention, patches in and out
    assert f"{flops / 1e9:.1f} GFLOP an image forward, {3 * flops / 1e9:.1f} in training" in text
    assert re.search(r'target +"x0"', text) and re.search(r"batch_size +8", text) and "random numbers stand in" in text
    rate, step, update, speed, hours, days = (float(x.replace(",", "")) for x in re.search(
        r"dry run: ([\d.,]+) images/s, ([\d,]+) ms a step \(([\d,]+) .*, ([\d.,]+) TFLOP/s; measured with 2 images .*"
        r"\n1,000,000 steps: ([\d.,]+) hours, ([\d.,]+) days", text).groups())
    assert rate * step / 1e3 == pytest.approx(8, rel=0.03) and hours == pytest.approx(1e6 * step / 3.6e6, rel=0.03)
    assert speed == pytest.approx(rate * 3 * flops / 1e12, rel=0.2) and 0 < update < step
    assert days == pytest.approx(hours / 24, rel=0.01, abs=0.06) and not list(tmp_path.iterdir())


def test_dry_run_adds_up_its_parts(monkeypatch, capsys, tmp_path):
    """On a clock that every pass moves by 3 s an image and every update by 5 s: 2 parts of 4 images, 2 x 12 + 5 s."""
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    config = resolved(["--dataset", "shapes", "--batch-size", "8"], monkeypatch, tmp_path)
    model, ema = build_model(config), build_model(config)

    class Loss:
        factor = torch.ones(1000)

        def loss(self, model, x, *rest):
            clock[0] += 3 * len(x)
            value = model(x, *rest[:1], rest[2]).mean((1, 2, 3))
            return value, value.detach()

    def update(*_):
        clock[0] += 5
    monkeypatch.setattr(train, "update", update)
    train.dry_run(config, model, ema, None, Loss(), 2, 4, 1, CPU)
    text = capsys.readouterr().out                                           # the first image already takes seconds
    assert "dry run: 0.28 images/s, 29,000 ms a step (5,000 of it the update)" in text and "with 1 images" in text
    ugd = {**config, **train.UGD, "weighting": "ugd", "ugd_every": 400, "ugd_samples": 32}
    train.dry_run(ugd, model, ema, None, Loss(), 2, 4, 2, CPU)        # 50 x 32 x 3 s by 2 processes: 6 s a step
    text = capsys.readouterr().out
    assert "UGD: about 2,400.0 s a solution, one in 400 steps" in text and " 35,000 ms a step" in text


def test_stand_ins_are_for_missing_data_alone(script, tmp_path):
    assert "celba64" in script("train.py", "--dataset", "celeba64", "--data", "data/celba64", "--dry-run", code=2)
    assert "no packed data set" in script("train.py", "--dataset", "mine", "--dry-run", code=2)
    assert "data/celeba64 has 64, expected 32" in script("train.py", "--dataset", "celeba64", "--size", 32, "--dry-run", code=2)


def test_a_damaged_config_is_refused_on_resume(script, tmp_path):
    words = ("train.py", "--model", "vit-tiny", "--batch-size", 8, "--sample-steps", 1, "--T", 500, "--interval", 0, 400)
    script(*words, "--steps", 1, "--out", "run")
    assert "< 500" in script(*words[:-2], 0, 600, "--out", "other", code=2)
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    for change in (dict(classes=None), dict(betas=3), dict(interval="x"), dict(cfg="x"), dict(T=None), dict(model="nope")):
        torch.save({**state, "config": {**state["config"], **change}}, tmp_path / "run/ckpt.pt")
        script("train.py", "--out", "run", "--resume", code=2)
    torch.save(state, tmp_path / "run/ckpt.pt")
    script("train.py", "--out", "run", "--resume", "--steps", 2, "--interval", 0, 300)        # may change
    assert json.loads((tmp_path / "run/config.json").read_text())["interval"] == [0, 300]


def test_packs_of_another_size_or_kind_are_refused(script, tmp_path):
    pack("imagenet64", tmp_path / "data/imagenet64")
    file = tmp_path / "data/imagenet64/meta.json"
    whole = json.loads(file.read_text())
    names = [name for name in whole["classes"] if name != "crane"]           # 998
    file.write_text(json.dumps({key: value for key, value in {**whole, "classes": names}.items() if key != "dataset"}))
    np.save(tmp_path / "data/imagenet64/labels.npy", np.zeros(16, np.int64))
    text = script("train.py", "--dataset", "imagenet64", code=2)
    assert "has 998, expected 1000" in text
    file.write_text(json.dumps({**whole, "dataset": "mine"}))
    assert "has images, expected latents" in script("train.py", "--dataset", "imagenet256", "--data", "data/imagenet64", code=2)


@pytest.mark.parametrize("weighting, has", [("min_snr", 1), ("max_snr", 1), ("soft_min_snr", 1), ("p2", 0), ("const", 0), ("snr", 0)])
def test_a_gamma_that_changes_nothing_is_said(weighting, has, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "dry_run", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--weighting", weighting, "--gamma", "3", "--dry-run"])
    train.main()
    assert ("changes nothing" in capsys.readouterr().out) == (not has)
