"""The built-in images, image files of every kind, the packed format, and what is refused."""
import io
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Packed, built_in, center_crop, generator, load_image, shapes
from files import BadInput


def picture(size=(40, 30), seed=0):
    """A smooth colour picture, different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * np.stack([x, y, (x + y + seed % 7) % 1], 2)).astype(np.uint8))


@pytest.fixture
def tree(tmp_path):
    """Three classes of 30 images each."""
    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(30):
            picture((40 + i, 30), seed=label).save(tmp_path / "src" / name / f"{i}.png")
    return tmp_path / "src"


# -------------------------------------------------------------------------------------------- built-in images

@pytest.mark.parametrize("size", [16, 33])
def test_shapes_depend_on_index_and_size_alone(size):
    images, labels = shapes(range(24), size)
    assert images.shape == (24, 3, size, size) and images.dtype == np.uint8 and labels.dtype == np.int64
    again, _ = shapes([17, 3, 5], size)
    assert np.array_equal(again, images[[17, 3, 5]]) and labels.tolist() == [i % 8 for i in range(24)]
    assert len({image.tobytes() for image in images}) == 24 and set(labels) == set(range(8)) and len(data.SHAPES) == 8
    colours = [len(np.unique(image.reshape(3, -1).T, axis=0)) for image in images]
    assert min(colours) > 4                                                  # two colours and the smooth edge between


def test_shapes_are_the_same_scene_at_any_size():
    small, large = shapes(range(16), 16)[0].astype(float), shapes(range(16), 64)[0].astype(float)
    shrunk = large.reshape(16, 3, 16, 4, 16, 4).mean((3, 5))
    assert np.abs(shrunk - small).mean() < 3 and np.abs(shrunk - small[::-1]).mean() > 20


# -------------------------------------------------------------------------------------------------- conversion

def save(path, image, **how):
    image.save(path, **how)
    return load_image(path)


def test_colour_modes(tmp_path):
    rgb = picture()
    near = lambda a, b, tol: np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean() < tol
    assert np.array_equal(np.asarray(save(tmp_path / "rgb.png", rgb)), np.asarray(rgb))
    grey = save(tmp_path / "grey.png", rgb.convert("L"))
    assert grey.mode == "RGB" and np.array_equal(np.asarray(grey)[..., 1], np.asarray(rgb.convert("L")))
    assert near(save(tmp_path / "palette.png", rgb.quantize(200)), rgb, 8)
    assert near(save(tmp_path / "cmyk.jpg", rgb.convert("CMYK"), quality=95), rgb, 6)
    assert near(save(tmp_path / "one.png", rgb.convert("1")), rgb.convert("1").convert("RGB"), 0.01)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 257, 1000], [30000, 40000, 65000, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        found = np.asarray(save(tmp_path / name, Image.fromarray(values)))
        assert np.array_equal(found[..., 0], np.round(values / 257).astype(np.uint8)), name


def test_transparency_goes_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 200                                                       # a hidden red under everything
    rgba[0, 0, 3], rgba[0, 1, 3] = 255, 128
    found = np.asarray(save(tmp_path / "alpha.png", Image.fromarray(rgba)))
    assert found[0, 0].tolist() == [200, 0, 0] and found[1, 1].tolist() == [255, 255, 255]
    assert np.allclose(found[0, 1], [227, 127, 127], atol=1)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    found = np.asarray(save(tmp_path / "key.png", palette, transparency=1))
    assert found[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright, exif = picture(), Image.Exif()
    exif[0x0112] = orientation
    undo = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
            6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}.get(orientation)
    stored = upright.transpose(undo) if undo is not None else upright
    found = save(tmp_path / "turned.png", stored, exif=exif)
    assert found.size == upright.size and np.array_equal(np.asarray(found), np.asarray(upright))


def test_center_crop():
    """ADM's recipe by hand on sizes where each stage is plain: 160 x 96 -> halve twice -> 40 x 24 -> cut 24."""
    image = picture((160, 96))
    a = np.asarray(image).astype(float)
    for _ in range(2):
        a = np.round(a.reshape(a.shape[0] // 2, 2, a.shape[1] // 2, 2, 3).mean((1, 3)) + 1e-6)
    found = center_crop(image, 24)
    error = np.abs(found - a[:, 8:32])                                       # Pillow rounds after each direction
    assert found.shape == (24, 24, 3) and error.max() <= 2 and error.mean() < 0.7
    for width, height in ((37, 53), (53, 37), (31, 97)):                     # the recipe in full, odd sizes
        image = picture((width, height))
        while min(image.size) >= 48:
            image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
        scale = 24 / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
        a, x, y = np.array(image), (image.size[0] - 24) // 2, (image.size[1] - 24) // 2
        assert np.array_equal(center_crop(picture((width, height)), 24), a[y:y + 24, x:x + 24])
    for width, height in ((24, 24), (25, 31), (31, 25), (7, 90), (500, 26)):  # smaller sides are enlarged
        assert center_crop(picture((width, height)), 24).shape == (24, 24, 3)


# ------------------------------------------------------------------------------------------------------ packing

def test_pack_and_check(tree, script, tmp_path):
    text = script("data.py", "--src", "src", "--size", 16, "--out", "data/pets", "--workers", 2)
    assert "90 images" in text and "packed 90 / 90" in text
    pack = Packed(tmp_path / "data/pets")
    assert len(pack) == 90 and pack.classes == ["cat", "dog", "eel"] and np.bincount(pack.labels).tolist() == [30] * 3
    first = sorted((tree / "dog").iterdir())[4]
    assert np.array_equal(pack.images[34], center_crop(load_image(first), 16).transpose(2, 0, 1))
    assert pack.meta["crop"] and pack.meta["filter"] and pack.meta["split"] == "train" and pack.meta["size"] == 16
    assert {p.name for p in (tmp_path / "data/pets").iterdir()} == {"images.npy", "labels.npy", "meta.json"}
    assert "already packed" in script("data.py", "--src", "src", "--size", 16, "--out", "data/pets")
    script("data.py", "--src", "src", "--size", 8, "--out", "data/pets", code=2)
    text = script("data.py", "--check", "data/pets")
    assert "3 classes" in text and "30  'dog'" in text and Image.open(tmp_path / "data/pets/sheet.png").size == (128, 128)


def test_flat_folder_has_no_classes_and_numbers_sort_as_numbers(tmp_path):
    for name in ("10", "9", "2"):
        (tmp_path / "numbers" / name).mkdir(parents=True)
        picture().save(tmp_path / "numbers" / name / "a.PNG")
    assert data.list_images(tmp_path / "numbers")[2] == ["2", "9", "10"]
    paths, labels, names = data.list_images(tmp_path / "numbers" / "9")
    assert [path.name for path in paths] == ["a.PNG"] and names == [] and labels.tolist() == [0]


def test_killed_and_restarted_pack_has_the_same_bytes(tree, script, start_fork, tmp_path):
    picture((800, 600)).save(tree / "cat" / "big.jpg")
    for i in range(500):                                                     # enough work to be killed in the middle of
        os.link(tree / "cat" / "big.jpg", tree / "cat" / f"x{i}.jpg")
    script("data.py", "--src", "src", "--size", 64, "--out", "whole")
    process, _ = start_fork("data.py", "--src", "src", "--size", 64, "--out", "parts", "--workers", 1)
    journal, done = (tmp_path / "parts" / name for name in ("packing.json", "done.npy"))
    while not (journal.exists() and np.load(done).any()):
        assert process.is_alive(), "finished before it was killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "parts/meta.json").exists() and not np.load(done).all()
    with pytest.raises(BadInput, match="unfinished"):
        Packed(tmp_path / "parts")
    script("data.py", "--src", "src", "--size", 32, "--out", "parts", code=2)
    script("data.py", "--src", "src", "--size", 64, "--out", "parts")
    for name in ("images.npy", "labels.npy"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_packing_refuses(tree, script, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, named in ((("--src", "nowhere"), "nowhere"), (("--src", "empty"), "empty"), (("--src", "src", "--classes", 4), "3 class folders")):
        assert named in script("data.py", *words, "--size", 16, "--out", "out", code=2)
    assert not (tmp_path / "out").exists()
    assert "nothing" in script("data.py", "--check", "nothing", code=2)
    (tree / "._loose.png").write_bytes(b"a Mac's shadow of a file")
    (tree / "__MACOSX").mkdir()
    assert data.list_images(tree)[2] == ["cat", "dog", "eel"]
    picture().save(tree / "loose.png")
    assert "loose.png" in script("data.py", "--src", "src", "--size", 16, "--out", "out", code=2)
    (tree / "loose.png").unlink()
    whole = io.BytesIO()
    picture((200, 200)).save(whole, "JPEG")
    (tree / "dog" / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    assert "cut.jpg" in script("data.py", "--src", "src", "--size", 16, "--out", "out", code=2)
    assert not (tmp_path / "out/meta.json").exists()
    (tree / "dog" / "cut.jpg").write_bytes(b"not an image at all")
    assert "cut.jpg" in script("data.py", "--src", "src", "--size", 16, "--out", "out2", code=2)


def test_damaged_journals_are_refused(tree, script, tmp_path):
    words = ("data.py", "--src", "src", "--size", 16, "--out", "pets")
    script(*words)
    meta = json.loads((tmp_path / "pets/meta.json").read_text())
    (tmp_path / "pets/meta.json").unlink()
    journal, done = tmp_path / "pets/packing.json", tmp_path / "pets/done.npy"
    np.save(done, np.array([1, 0], dtype=np.uint8))
    for text in ("", "null", "[]", "{}", json.dumps({**meta, "size": 8}), json.dumps({**meta, "count": 3})):
        journal.write_text(text)
        assert "unfinished" in script(*words, code=2), text
    journal.write_text(json.dumps(meta))
    for wrong in (np.zeros(3, np.uint8), np.zeros(2, int), np.array([None, None])):
        np.save(done, wrong)
        assert "unfinished" in script(*words, code=2)
    np.save(done, np.array([1, 0], dtype=np.uint8))
    script(*words)
    assert json.loads((tmp_path / "pets/meta.json").read_text()) == meta
    assert sorted(path.name for path in (tmp_path / "pets").iterdir()) == ["images.npy", "labels.npy", "meta.json"]


def test_damaged_packs_are_refused(tmp_path):
    images, labels = shapes(range(8), 8)
    meta = dict(count=8, size=8, classes=["a"] * 8)

    def write(images=images, labels=labels, meta=meta):
        np.save(tmp_path / "images.npy", images)
        np.save(tmp_path / "labels.npy", labels)
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    write()
    assert len(Packed(tmp_path)) == 8
    for wrong in (dict(images=images[:7]), dict(labels=labels[:7]), dict(images=images.astype(np.float32)), dict(labels=labels + 1),
                  dict(meta={}), dict(meta={**meta, "size": 16}), dict(images=np.array([None] * 8)), dict(meta=[1])):
        write(**wrong)
        with pytest.raises(BadInput):
            Packed(tmp_path)
    write()
    whole = (tmp_path / "images.npy").read_bytes()
    for wrong in (whole[:500], whole[:60], b""):
        (tmp_path / "images.npy").write_bytes(wrong)
        with pytest.raises(BadInput):
            Packed(tmp_path)


# ------------------------------------------------------------------------------------------------------ batches

def test_batches_scale_flip_and_slice():
    pool = built_in(16, count=50, flip=True)
    indices = np.array([7, 3, 44, 3, 20, 11])
    x, y = pool.batch(indices)
    assert x.shape == (6, 3, 16, 16) and x.dtype == torch.float32 and torch.equal(y, torch.tensor([7, 3, 4, 3, 4, 3]))
    assert torch.allclose(x, torch.from_numpy(pool.images[indices]).float() / 127.5 - 1) and x.min() >= -1 and x.max() <= 1
    flipped, _ = pool.batch(indices, generator("test", 0, 1))
    same, mirrored = ((flipped == other).flatten(1).all(1) for other in (x, x.flip(3)))
    assert (same | mirrored).all() and same.any() and mirrored.any()
    parts = [pool.batch(indices, generator("test", 0, 1), rows)[0] for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), flipped)
    mirrored = torch.cat([pool.batch([9] * 500, generator("test", 0, i))[0] for i in range(4)]) != pool.batch([9])[0]
    assert 900 < mirrored.flatten(1).any(1).sum() < 1100                     # 1000 expected, sd 22
    still = built_in(16, 50).batch(indices, generator("test", 0, 1))[0]
    assert torch.equal(still, x)


def test_generators_of_one_purpose_never_repeat():
    first = {torch.rand(4, generator=generator("image", 0, k)).tolist()[3] for k in range(3000)}
    assert len(first) > 2995
    assert not torch.equal(torch.rand(4, generator=generator("image", 0, 5)), torch.rand(4, generator=generator("step", 0, 5)))


def test_tile():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 4), np.uint8)
    sheet = np.asarray(data.tile(images, 3))
    assert sheet.shape == (4, 12, 3) and sheet[0, 5, 0] == 1 and sheet[2, 0, 0] == 3 and sheet[3, 11, 0] == 128
