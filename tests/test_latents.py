"""Latent diffusion end to end: JPEGs in class folders -> latents -> a trained ViT -> PNGs, on one process or two."""
import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, formula, relative
from PIL import Image

from data import Packed, center_crop, generator, imagenet, load_image, shapes
from vae import SCALE, load_vae, mean_std

WNIDS = list(imagenet())[0]


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    """An autoencoder made by formula, its latents brought to unit scale as the published one's are."""
    golden = np.load(ROOT / "tests/golden/vae.npz")
    state = formula(golden["compvis_keys"], golden["compvis_shapes"])
    x = torch.from_numpy(shapes(range(16), 16)[0]) / 127.5 - 1
    mean = load_vae(state).moments(x)[:, :4]
    state["quant_conv.weight"][:4] /= mean.std() * SCALE
    state["quant_conv.bias"][:4] = 0
    state["quant_conv.weight"][4:] *= 0.1
    state["quant_conv.bias"][4:] = torch.tensor([-3.0, -2.5, -2.0, -1.5])
    path = tmp_path_factory.mktemp("vae") / "formula.pt"
    torch.save(dict(state_dict=state), path)
    return path


@pytest.fixture
def tree(tmp_path):
    """70 JPEGs in 1,000 class folders, most of them empty; colour, grey and a CMYK image."""
    images = shapes(range(70), 24)[0].transpose(0, 2, 3, 1)
    for wnid in WNIDS:
        (tmp_path / f"train/{wnid}").mkdir(parents=True)
    for i, image in enumerate(images):
        image = Image.fromarray(np.ascontiguousarray(image[:, :20] if i % 2 else image))
        image = image.convert({3: "L", 4: "CMYK"}.get(i, "RGB"))
        image.save(tmp_path / f"train/{WNIDS[i * 7]}/{i}.JPEG", "JPEG", quality=92)
    return tmp_path / "train"


@pytest.mark.slow
def test_from_jpegs_to_samples(tree, vae_file, script, start_fork, tmp_path):
    words = ("vae.py", "--src", "train", "--vae", vae_file, "--size", 16)
    text = script(*words, "--out", "data/imagenet256")
    assert "70 images, 1,000 classes, 'tench, Tinca tinca' .. 'toilet tissue, toilet paper, bathroom tissue'; unknown autoencoder, float32" in text and "encoded 70 / 70" in text
    assert "already packed" in script(*words, "--out", "data/imagenet256")
    pack = Packed(tmp_path / "data/imagenet256")
    assert pack.latents and pack.images.shape == (70, 8, 2, 2) and pack.meta["scale"] == SCALE and pack.size == 2
    assert pack.labels.tolist() == [7 * i for i in range(70)] and len(pack.classes) == 1000 and pack.channels == 4
    # the stored mean and std are the autoencoder's, and a batch is the posterior's sample, scaled
    paths = [tree / f"{WNIDS[i * 7]}/{i}.JPEG" for i in (5, 69)]
    x = torch.from_numpy(np.stack([center_crop(load_image(path), 16) for path in paths])).permute(0, 3, 1, 2) / 127.5 - 1
    mean, std = mean_std(load_vae(vae_file).moments(x))
    assert relative(pack.images[[5, 69]], torch.cat([mean, std], 1)) < 1e-3
    g, noise = generator("step", 0, 3), torch.randn(3, 4, 2, 2, generator=generator("step", 0, 3))
    drawn, labels = pack.batch([9, 5, 69], g, slice(1, 3))
    assert relative(drawn, (mean + std * noise[1:]) * SCALE) < 1e-3 and labels.tolist() == [35, 483]
    assert relative(pack.batch([5, 69])[0], mean * SCALE) < 1e-3
    whole = Packed(tmp_path / "data/imagenet256").to("cpu")
    again = whole.batch([9, 5, 69], generator("step", 0, 3), slice(1, 3))
    assert torch.is_tensor(whole.images) and torch.equal(again[0], drawn) and torch.equal(again[1], labels)

    # two processes, and one killed and restarted, write the same bytes
    script(*words, "--out", "two/imagenet256", processes=2, env=dict(OMP_NUM_THREADS="2"))    # on other threads too
    (process, _), done = start_fork(*words, "--out", "killed/imagenet256"), tmp_path / "killed/imagenet256/done.npy"
    while not (done.exists() and done.stat().st_size > 128 and np.load(done).any()):
        assert process.is_alive(), "finished before it was killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not np.load(done).all()
    script(*words, "--out", "killed/imagenet256", processes=2)
    for name in ("latents.npy", "labels.npy", "meta.json"):
        one, two, killed = ((tmp_path / folder / "imagenet256" / name).read_bytes() for folder in ("data", "two", "killed"))
        assert one == two == killed, name
    assert {path.name for path in done.parent.iterdir()} == {"latents.npy", "labels.npy", "meta.json"}

    # train, resume, sample
    words = ("train.py", "--dataset", "imagenet256", "--model", "vit-tiny", "--batch-size", 8, "--sample-steps", 1, "--log-every", 5)
    text = script(*words, "--steps", 12)
    assert "imagenet256: 70 images 2 x 2, 1000 classes" in text and "FD-pixels" not in text
    assert Image.open(text.splitlines()[-1]).size == (8 * 64, 8 * 64)                      # 16 pixels, shown at 4 times the side
    script(*words, "--steps", 12, "--data-on-gpu", "--out", "held")
    config = json.loads((tmp_path / "out/imagenet256/config.json").read_text())
    assert config["network"]["patch_size"] == 2 and config["vae_file"] == str(vae_file) and not config["flip"]
    one, two = (torch.load(tmp_path / run / "ckpt.pt", weights_only=True)["ema"] for run in ("out/imagenet256", "held"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    sample = ("sample.py", "--ckpt", "out/imagenet256", "--steps", 2, "--cfg", 1.5, "--interval", 0, 800)
    script(*sample, "--n", 5, "--batch-size", 3, "--out", "drawn")
    script(*sample, "--n", 5, "--out", "drawn.npz")
    stack = np.stack([np.asarray(Image.open(tmp_path / f"drawn/{k:06d}.png")) for k in range(5)])
    other = np.load(tmp_path / "drawn.npz")["arr_0"]
    off = np.abs(stack.astype(int) - other)                                  # rounding of another batch size
    assert stack.shape == other.shape == (5, 16, 16, 3) and off.max() <= 1 and (off > 0).mean() < 0.01
    assert "holds latents" in script("fid.py", "drawn", "data/imagenet256", "--features", "pixels", code=2)

    # what would mix two autoencoders or data sets is refused
    other = tmp_path / "other.pt"
    state = torch.load(vae_file, weights_only=True)["state_dict"]
    torch.save({**state, "decoder.conv_out.bias": state["decoder.conv_out.bias"] + 1}, other)
    assert "vae" in script(*sample, "--n", 5, "--out", "drawn", "--vae", other, code=2)
    meta = json.loads((tmp_path / "two/imagenet256/meta.json").read_text())
    (tmp_path / "two/imagenet256/meta.json").write_text(json.dumps({**meta, "dtype": "bfloat16"}))
    assert "two/imagenet256 has" in script(*words, "--resume", "--steps", 14, "--data", "two/imagenet256", code=2)

    # without the autoencoder the run still trains, and says what it cannot draw
    moved = json.loads((tmp_path / "two/imagenet256/meta.json").read_text())
    moved["vae_file"] = "gone.pt"
    (tmp_path / "two/imagenet256/meta.json").write_text(json.dumps(moved))
    text = script(*words, "--steps", 2, "--data", "two/imagenet256", "--out", "blind")
    assert "no grid" in text and "gone.pt" in text
    assert "gone.pt" in script("sample.py", "--ckpt", "blind", "--n", 1, code=2)
    script("sample.py", "--ckpt", "blind", "--n", 1, "--steps", 2, "--vae", vae_file)


def test_released_latent_weights(golden, vae_file, script, tmp_path):
    torch.save(golden("vit_cond")[1], tmp_path / "released.pt")
    words = ("sample.py", "--ckpt", "released.pt", "--target", "x0", "--heads", 4, "--cfg", 2.1, "--interval", 0, 800)
    assert "--vae" in script(*words, code=2)
    script(*words, "--vae", vae_file, "--steps", 2, "--n", 2, "--out", "two.npz")
    found, protocol = np.load(tmp_path / "two.npz"), json.loads((tmp_path / "two.protocol.json").read_text())
    assert found["arr_0"].shape == (2, 64, 64, 3) and found["arr_0"].std() > 5 and protocol["size"] == 64


@pytest.mark.slow
def test_mirrored_and_unconditional_latents(vae_file, script, tmp_path):
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(shapes(range(6), 16)[0].transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(tmp_path / f"mine/{i:02d}.png")
    words = ("vae.py", "--src", "mine", "--vae", vae_file, "--size", 16)
    script(*words, "--out", "data/mine", "--mirror")
    script(*words, "--out", "data/plain")
    both, plain = (Packed(tmp_path / f"data/{name}") for name in ("mine", "plain"))
    assert len(both) == 12 and len(plain) == 6 and np.array_equal(both.images[::2], plain.images) and both.meta["mirror"]
    x = torch.from_numpy(shapes([4], 16)[0]).flip(3) / 127.5 - 1
    assert relative(np.array(both.images[9:10, :4]), mean_std(load_vae(vae_file).moments(x))[0]) < 1e-3
    assert "no contact sheet" in script("data.py", "--check", "data/mine")
    words = ("train.py", "--dataset", "mine", "--model", "vit-tiny", "--batch-size", 4, "--sample-steps", 1, "--steps", 2)
    assert "--mirror" in script(*words, "--flip", code=2)
    script(*words)


def test_latents_of_a_wrong_scale_are_refused(script, tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data/mine"
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.zeros(50, dtype=np.int64))
    meta = dict(count=50, size=32, classes=[], scale=SCALE)
    for std, refused in ((1 / SCALE, False), (0.6 / SCALE, True), (1.5 / SCALE, True)):
        rows = np.concatenate([rng.normal(0, std, (50, 4, 4, 4)), np.full((50, 4, 4, 4), 1e-3)], 1)
        np.save(folder / "latents.npy", rows.astype(np.float16))
        (folder / "meta.json").write_text(json.dumps(meta))
        words = ("train.py", "--dataset", "mine", "--model", "vit-tiny", "--steps", 1, "--batch-size", 1, "--dry-run")
        assert "standard deviation" in script(*words, code=2) if refused else script(*words)
    (folder / "meta.json").write_text(json.dumps({**meta, "scale": 0}))
    assert "scale" in script(*words, code=2)


@pytest.mark.slow
def test_bfloat16_threads_and_a_cut_file(vae_file, script, tmp_path):
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(shapes(range(3), 64)[0].transpose(0, 2, 3, 1)):
        Image.fromarray(image).save(tmp_path / f"mine/{i}.png")
    words = ("vae.py", "--src", "mine", "--size", 64)
    script(*words, "--vae", vae_file, "--out", "full", env=dict(OMP_NUM_THREADS="2"))
    script(*words, "--vae", vae_file, "--out", "half", "--dtype", "bfloat16")
    full, half = (np.array(Packed(tmp_path / name).images) for name in ("full", "half"))
    model, threads = load_vae(vae_file), torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.from_numpy(shapes(range(3), 64)[0]) / 127.5 - 1
    alone = torch.cat([torch.cat(mean_std(model.moments(image[None])), 1) for image in x]).half().numpy()
    torch.set_num_threads(threads)
    assert np.array_equal(full, alone) and 1e-4 < relative(half, full) < 0.05
    os.rename(vae_file, tmp_path / "moved.pt")                               # the same weights elsewhere are the same
    try:
        assert "already packed" in script(*words, "--vae", "moved.pt", "--out", "full")
        meta = json.loads((tmp_path / "full/meta.json").read_text())
        (tmp_path / "full/meta.json").rename(tmp_path / "full/packing.json")
        np.save(tmp_path / "full/done.npy", np.ones(1, dtype=np.uint8))
        (tmp_path / "full/latents.npy").write_bytes((tmp_path / "full/latents.npy").read_bytes()[:300])
        assert "unfinished" in script(*words, "--vae", "moved.pt", "--out", "full", code=2)
        assert meta["dtype"] == "float32" and not (tmp_path / "full/meta.json").exists()
    finally:
        os.rename(tmp_path / "moved.pt", vae_file)


def test_refusals(tree, vae_file, script, tmp_path):
    words = ("vae.py", "--src", "train", "--size", 16)
    (tmp_path / "text.ckpt").write_text("<html>not found</html>")
    assert "text.ckpt" in script(*words, "--vae", "text.ckpt", "--out", "data/x", code=2)
    (tree / "n99999999").mkdir()
    words = (*words, "--vae", vae_file)
    assert "n99999999" in script(*words, "--out", "data/imagenet256", code=2)
    (tree / "n99999999").rmdir()
    for extra, named in (("--size", 20), "--size"), (("--workers", 0), "--workers"), (("--classes", 3), "expected 3"):
        assert named in script(*words, "--out", "data/x", *extra, code=2)
    (tree / "n01440764/0.JPEG").write_bytes((tree / "n01440764/0.JPEG").read_bytes()[:200])
    assert "n01440764/0.JPEG" in script(*words, "--out", "data/x", code=2)
    assert not (tmp_path / "data/x/meta.json").exists()
