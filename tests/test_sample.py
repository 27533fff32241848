"""Sampling from checkpoints: image k depends on (checkpoint, seed, k) alone; what is refused."""
import hashlib
import json
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from files import BadInput
from diffusion import Diffusion, sampler
from sample import (RELEASED, find_classifier, build_model, draw, grid, load_checkpoint, parse_classes, read, start,
                    to_uint8)
from train import SIZES as NETWORKS, preset

SIZES = dict(img_size=8, patch_size=2, in_channels=3, num_classes=5, dim=48, depth=2, heads=4)


@pytest.fixture
def ckpt(tmp_path):
    """A checkpoint whose EMA weights answer loudly and differ from the raw ones."""
    config = dict(dataset="toy", network=SIZES, target="x0", schedule="cosine", T=1000, drop=0.1, ema=0.9, cfg=1.5, sample_steps=4,
                  classes=["a", "b", "c", "d", "e"])
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = build_model(config)
        torch.nn.init.normal_(model.linear_projection.weight, std=0.1)
        states.append(model.state_dict())
    torch.save(dict(model=states[0], ema=states[1], optimizer={}, step=3, config=config), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_to_uint8():
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0, -1 + 0.99 / 255, -1 + 1.01 / 255])).tolist() == [0, 255, 128, 0, 1]


def test_image_k_depends_on_k_alone(ckpt, script, tmp_path):
    model, config = load_checkpoint(ckpt)
    y, z = zip(*(start(0, k, "random", SIZES) for k in range(8)))
    out = {}
    for size in (1, 3, 8):
        ks = [list(range(i, min(i + size, 8))) for i in range(0, 8, size)]
        for part in ks:
            again = [start(0, k, "random", SIZES) for k in part]
            assert all(label == y[k] and torch.equal(noise, z[k]) for k, (label, noise) in zip(part, again))
        out[size] = torch.cat([sampler(model, Diffusion(), torch.stack([z[k] for k in part]), torch.tensor([y[k] for k in part]), 4, 1.5)
                               for part in ks])
    assert (out[1] - out[8]).abs().max() < 1e-4 and (out[3] - out[8]).abs().max() < 1e-4 and out[8].std() > 0.1
    words = ("--ckpt", ckpt, "--count", 8, "--labels", "random")
    script("sample.py", *words, "--out", "one")
    script("sample.py", *words, "--out", "two", processes=2)
    script("sample.py", *words, "--out", "three", "--batch-size", 3)
    for k in range(8):
        images = [np.asarray(Image.open(tmp_path / run / f"{k:06d}.png")).astype(int) for run in ("one", "two", "three")]
        assert np.abs(images[0] - images[1]).max() <= 1 and np.abs(images[0] - images[2]).max() <= 1
        assert np.abs(images[0] - to_uint8(out[8][k]).permute(1, 2, 0).numpy()).max() <= 1


def test_draw_uses_the_target_schedule_and_solver_of_the_run(ckpt):
    model, config = load_checkpoint(ckpt)
    config.update(target="v", schedule="linear", T=200)
    y, z = zip(*(start(3, k, [1, 4], SIZES) for k in range(5)))
    for how in (dict(steps=6, cfg=2.0, solver="euler"), dict(steps=3, cfg=1.0), dict(steps=5, cfg=3.0, interval=(0, 90))):
        by_hand = sampler(model, Diffusion("linear", 200, "v"), torch.stack(z), torch.tensor(y), **how)
        assert torch.equal(draw(model, config, range(5), seed=3, labels=[1, 4], **how), to_uint8(by_hand))


def test_a_grid_goes_on_after_64(ckpt, tmp_path):
    model, config = load_checkpoint(ckpt)
    grid(model, config, tmp_path / "grid.png", n=70, steps=1, cfg=1.0)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))[::8, ::8].reshape(14, 8, 5, 8, 3).transpose(0, 2, 1, 3, 4).reshape(70, -1)
    assert len(np.unique(sheet, axis=0)) == 70


def test_start_noise_is_unit_normal_and_labels_follow_the_rule():
    y, z = zip(*(start(3, k, "random", SIZES) for k in range(2000)))
    z = torch.stack(z)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and np.bincount(y, minlength=5).min() > 340
    assert [start(3, k, "balanced", SIZES)[0] for k in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert [start(3, k, [4, 1], SIZES)[0] for k in range(3)] == [4, 1, 4]
    assert all(torch.equal(start(3, k, rule, SIZES)[1], z[k]) for k in range(3) for rule in ("balanced", [2]))
    assert not torch.equal(start(4, 0, "random", SIZES)[1], z[0])


def test_only_the_checkpoint_is_needed(ckpt, script, tmp_path):
    text = script("sample.py", "--ckpt", ckpt)
    assert "EMA 0.9 @ step 3" in text and text.splitlines()[-1] == str(tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size == (5 * 64, 8 * 64)
    ema = (tmp_path / "samples.png").read_bytes()
    assert "raw @ step 3" in script("sample.py", "--ckpt", tmp_path, "--raw")
    assert (tmp_path / "samples.png").read_bytes() != ema


@pytest.mark.slow
def test_npz_and_folder_hold_the_same_images_with_their_protocol(ckpt, script, tmp_path):
    words = ("--ckpt", ckpt, "--count", 11, "--cfg", 2.1, "--interval", 0, 800, "--steps", 3, "--seed", 7, "--solver", "dpm++2m")
    script("sample.py", *words, "--out", "folder")
    script("sample.py", *words, "--out", "file.npz", processes=2)
    file = np.load(tmp_path / "file.npz")
    assert file["arr_0"].shape == (11, 8, 8, 3) and file["arr_0"].dtype == np.uint8
    for k in range(11):
        assert np.abs(np.asarray(Image.open(tmp_path / f"folder/{k:06d}.png")).astype(int) - file["arr_0"][k]).max() <= 1
    assert file["arr_1"].tolist() == [start(7, k, "random", SIZES)[0] for k in range(11)]
    protocols = [json.loads((tmp_path / name).read_text()) for name in ("folder/protocol.json", "file.protocol.json")]
    assert protocols[0] == protocols[1] and protocols[0]["interval"] == [0, 800] and protocols[0]["cfg"] == 2.1
    assert len(protocols[0]["checkpoint"]) == 64 and protocols[0]["n"] == 11 and protocols[0]["labels"] == "random"
    assert not (tmp_path / "file.npz.parts").exists()
    assert "n 11" in script("sample.py", *words[:2], "--n", 12, *words[4:], "--out", "folder", code=2)
    assert "exists" in script("sample.py", *words, "--out", "file.npz", code=2)
    os.rename(tmp_path / "folder", tmp_path / "late.npz.parts")              # killed before the npz was made of them
    script("sample.py", *words, "--out", "late.npz", processes=2)
    assert np.load(tmp_path / "late.npz")["arr_0"].shape == (11, 8, 8, 3) and not (tmp_path / "late.npz.parts").exists()


def test_finishes_what_a_killed_run_began(ckpt, script, start_fork, tmp_path):
    words = ("--ckpt", ckpt, "--n", 60, "--batch-size", 4, "--steps", 30)
    script("sample.py", *words, "--out", "whole.npz")
    process, _ = start_fork("sample.py", *words, "--out", "parts.npz")
    while not (tmp_path / "parts.npz.parts/000007.png").exists():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    kept = sorted((tmp_path / "parts.npz.parts").glob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in kept[:8]}
    assert 8 <= len(kept) < 60 and not (tmp_path / "parts.npz").exists()
    process, _ = start_fork("sample.py", *words, "--out", "parts.npz")
    while process.is_alive() and all(path.exists() for path in times):
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in times.items() if path.exists())
        time.sleep(0.01)
    process.join()
    assert process.exitcode == 0
    whole, parts = (np.load(tmp_path / name) for name in ("whole.npz", "parts.npz"))
    assert np.abs(whole["arr_0"].astype(int) - parts["arr_0"]).max() <= 1 and np.array_equal(whole["arr_1"], parts["arr_1"])


def test_classes_by_name_and_number(ckpt, script, tmp_path):
    script("sample.py", "--ckpt", ckpt, "--n", 4, "--classes", "c,0", "--out", "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [2, 0, 2, 0]
    for wrong in ("z", "5", "-1", ""):
        if wrong:
            assert "--classes" in script("sample.py", "--ckpt", ckpt, "--classes=" + wrong, code=2)


def test_released_files(golden, script, tmp_path):
    values, weights = golden("vit_uncond")
    torch.save(weights, tmp_path / "released.pt")
    assert "--target" in script("sample.py", "--ckpt", "released.pt", "--heads", 6, code=2)
    assert "heads" in script("sample.py", "--ckpt", "released.pt", "--target", "eps", code=2)
    words = ("--ckpt", "released.pt", "--target", "eps", "--heads", 6, "--steps", 3)
    assert "as released" in script("sample.py", *words, "--n", 4, "--out", "grid.png")
    model, config = load_checkpoint(tmp_path / "released.pt", target="eps", heads=6)
    expected = draw(model, config, range(4), steps=3, cfg=1.0)
    script("sample.py", *words, "--n", 4, "--out", "a.npz")
    assert np.abs(np.load(tmp_path / "a.npz")["arr_0"].astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    torch.save(golden("vit_cond")[1], tmp_path / "latent.pt")
    assert "latents" in script("sample.py", "--ckpt", "latent.pt", "--target", "x0", "--heads", 4, code=2)


class Foreign:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_refusals(ckpt, script, tmp_path):
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "config": {**state["config"], "network": {**SIZES, "img_size": 16}}}, tmp_path / "size.pt")
    torch.save({**state, "config": {**state["config"], "drop": 0.0, "cfg": 1.0}}, tmp_path / "nodrop.pt")
    torch.save({**state, "config": {**state["config"], "extra": Foreign()}}, tmp_path / "foreign.pt")
    torch.save({key: state[key] for key in ("ema", "step")}, tmp_path / "parts.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    few = dict(list(state["ema"].items())[1:])
    for name, change in dict(few=dict(ema=few), config=dict(config=[1]), schedule=dict(config={**state["config"], "schedule": "sine"}),
                             target=dict(config={"network": SIZES})).items():
        torch.save({**state, **change}, tmp_path / "wrong.pt")
        assert "disagree" in script("sample.py", "--ckpt", "wrong.pt", code=2), name
    os.mkdir(tmp_path / "others")
    Image.new("RGB", (8, 8)).save(tmp_path / "others/a.png")
    assert "protocol.json" in script("sample.py", "--ckpt", ckpt, "--out", "others", code=2)
    whole = ckpt.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_text("")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Foreign()))
    zipfile.ZipFile(tmp_path / "zip.pt", "w").close()
    for name, named in (("nothing.pt", "no such"), ("size.pt", "disagree"), ("foreign.pt", "system"), ("parts.pt", "missing"),
                        ("list.pt", "list"), ("cut.pt", "cut.pt"), ("text.pt", "text.pt"), ("empty.pt", "empty.pt"),
                        ("pickle.pt", "pickle.pt"), ("zip.pt", "zip.pt")):
        assert named in script("sample.py", "--ckpt", name, code=2), name
    assert "without label drop" in script("sample.py", "--ckpt", "nodrop.pt", "--cfg", 1.5, code=2)
    script("sample.py", "--ckpt", "nodrop.pt")
    for words in (("--target", "eps"), ("--n", 0), ("--interval", 800, 0), ("--classes", "a", "--labels", "random"),
                  ("--steps", -1), ("--batch-size", 0), ("--cfg", "nan"), ("--cfg", -1), ("--interval", 0, 800, "--cfg", 1),
                  ("--classes", ""), ("--out", "x.jpg"), ("--seeds", 1), ("--solver", "ddim")):
        assert words[0].lstrip("-") in script("sample.py", "--ckpt", ckpt, *words, code=2)
    assert not (tmp_path / "pwned").exists() and ckpt.read_bytes() == whole
    with pytest.raises(BadInput):
        read(tmp_path / "cut.pt")


def test_adm_weights_and_classifier(golden, script, tmp_path):
    """Files as ADM publishes them: learned sigma, a classifier beside; and their official names refused for others."""
    weights, classifier = golden("unet_adm")[1], golden("classifier")[1]
    head = {name: torch.cat([weights[name], torch.ones_like(weights[name])]) for name in ("out.2.weight", "out.2.bias")}
    torch.save({**weights, **head}, tmp_path / "adm.pt")
    torch.save(weights, tmp_path / "plain.pt")
    torch.save(classifier, tmp_path / "classifier.pt")
    torch.save({**classifier, "out.2.c_proj.weight": torch.zeros(7, 64, 1), "out.2.c_proj.bias": torch.zeros(7)}, tmp_path / "seven.pt")
    words = ("--ckpt", "adm.pt", "--heads", 2, "--steps", 2, "--n", 3, "--classes", "1,7")
    for out, extra in (("a.npz", ()), ("b.npz", ("--classifier", "classifier.pt", "--classifier-scale", 3)),
                       ("c.npz", ("--cfg", 1.5)), ("d.npz", ("--classifier", "classifier.pt", "--solver", "dpm++2m"))):
        script("sample.py", *words, *extra, "--out", out)
    a, b, c, d = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "abcd")
    assert a.shape == (3, 16, 16, 3) and len({image.tobytes() for image in (a, b, c, d)}) == 4
    protocol = json.loads((tmp_path / "b.protocol.json").read_text())
    assert protocol["target"] == "eps" and protocol["classifier_scale"] == 3
    assert protocol["classifier"] == hashlib.sha256((tmp_path / "classifier.pt").read_bytes()).hexdigest()
    model, config = load_checkpoint(tmp_path / "adm.pt", heads=2)
    guide = find_classifier(tmp_path / "classifier.pt", config)
    expected = draw(model, config, range(3), labels=[1, 7], steps=2, cfg=1.0, classifier=guide, classifier_scale=3.0)
    assert np.abs(b.astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    script("sample.py", *words, "--classifier", "classifier.pt", "--out", "folder")
    assert "classifier" in script("sample.py", *words, "--out", "folder", code=2)          # the same without it
    # an unconditional network takes its labels from the classifier
    bare = {key: value for key, value in weights.items() if key != "label_emb.weight"}
    torch.save(bare, tmp_path / "bare.pt")
    words = ("--ckpt", "bare.pt", "--heads", 2, "--target", "x0", "--schedule", "linear", "--steps", 2, "--n", 3, "--classes", 9)
    script("sample.py", *words, "--classifier", "classifier.pt", "--interval", 0, 900, "--out", "bare.npz")
    assert np.load(tmp_path / "bare.npz")["arr_1"].tolist() == [9, 9, 9]
    assert load_checkpoint(tmp_path / "bare.pt", target="x0", schedule="linear", heads=2)[1]["schedule"] == "linear"
    torch.save({**weights, "label_emb.weight": torch.zeros(1000, 128)}, tmp_path / "thousand.pt")
    assert "label drop" in script("sample.py", "--ckpt", "thousand.pt", "--heads", 2, "--target", "eps", "--cfg", 2, code=2)
    torch.save({**weights, "input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3), "out.2.weight": torch.zeros(6, 32, 3, 3),
                "out.2.bias": torch.zeros(6)}, tmp_path / "six.pt")
    for wrong, named in ((("--classifier-scale", 3), "--classifier-scale"), (("--classifier", "classifier.pt", "--classifier-scale", "nan"), "scale")):
        assert named in script("sample.py", "--ckpt", "adm.pt", "--heads", 2, *wrong, code=2)
    assert "6 channels" in script("sample.py", "--ckpt", "six.pt", "--heads", 2, code=2)
    assert load_checkpoint(tmp_path / "adm.pt", head_channels=16, size=32)[1]["network"]["img_size"] == 32
    for wrong, named in ((("--ckpt", "plain.pt", "--heads", 2), "--target"), (("--ckpt", "adm.pt", "--heads", 2, "--classifier", "adm.pt"), "adm.pt"),
                         (("--ckpt", "adm.pt", "--heads", 2, "--classifier", "none.pt"), "none.pt"), (("--ckpt", "classifier.pt"), "classifier.pt"),
                         (("--ckpt", "adm.pt", "--heads", 2, "--classifier", "seven.pt"), "num_classes is 7, the network's is 10")):
        assert named in script("sample.py", *wrong, code=2)


def test_published_files_are_known_by_their_shape(golden, tmp_path, monkeypatch):
    """RELEASED holds the shapes and settings of the presets; what it says is a default, and stays what it was."""
    for preset_, words in ((("imagenet256", "vit-xl", "x0"), "xl"), (("imagenet64", "vit-l", "eps"), "large")):
        row, size = preset(*preset_), NETWORKS[preset_[1]]
        name, known = RELEASED[4 if words == "xl" else 3, 1000, size["dim"], size["depth"]]
        assert words in name and known == {key: row[key] for key in ("target", "sample_steps", "cfg")}
    assert RELEASED[3, 1000, NETWORKS["unet-adm"]["channels"], 64][1] == dict(target="eps", sample_steps=50, cfg=1.0)
    weights = golden("vit_uncond")[1]
    torch.save(weights, tmp_path / "released.pt")
    model, _ = load_checkpoint(tmp_path / "released.pt", target="x0", heads=6)
    key = model.in_channels, 0, model.pos_embed.shape[2], len(model.blocks)
    monkeypatch.setitem(RELEASED, key, ("the file", dict(target="v", sample_steps=7, cfg=1.0)))
    for target, found in ((None, "v"), ("eps", "eps"), (None, "v")):
        config = load_checkpoint(tmp_path / "released.pt", target=target, heads=6)[1]
        assert (config["target"], config["sample_steps"], config["dataset"]) == (found, 7, "the file")
    # a UNet of ADM's width and side that has no learned sigma is someone else's
    weights = golden("unet_adm")[1]
    head = {name: torch.cat([weights[name]] * 2) for name in ("out.2.weight", "out.2.bias")}
    torch.save(weights, tmp_path / "plain.pt")
    torch.save({**weights, **head}, tmp_path / "adm.pt")
    model, config = load_checkpoint(tmp_path / "adm.pt", heads=2)
    monkeypatch.setitem(RELEASED, (3, model.num_classes, 32, 16), ("ADM's", dict(target="eps", sample_steps=9, cfg=1.0)))
    assert load_checkpoint(tmp_path / "adm.pt", heads=2)[1]["sample_steps"] == 9
    with pytest.raises(BadInput, match="--target"):
        load_checkpoint(tmp_path / "plain.pt", heads=2)
    for size, schedule in ((64, "cosine"), (128, "linear")):
        assert load_checkpoint(tmp_path / "adm.pt", heads=2, size=size)[1]["schedule"] == schedule
    assert load_checkpoint(tmp_path / "adm.pt", heads=2, size=128, schedule="cosine")[1]["schedule"] == "cosine"


def test_names_of_classes():
    config = dict(network=dict(num_classes=5), classes=["tench, Tinca tinca", "Ten", "ten", "crane", "crane, bird"])
    assert parse_classes("tinca TINCA,Ten,ten,3", config) == [0, 1, 2, 3]
    assert parse_classes("crane,bird", config) == [3, 4]                     # the whole name goes before a part of one
    for text in ("tenc", "tench tinca", "5", "-1", "", "9" * 5000, "TEN"):
        with pytest.raises(BadInput):
            parse_classes(text, config)


def test_our_own_checkpoint_says_its_shape_itself(ckpt, script):
    for words in (("--heads", 3), ("--head-channels", 8), ("--size", 16)):
        assert words[0] in script("sample.py", "--ckpt", ckpt, *words, "--out", "x.png", code=2)
