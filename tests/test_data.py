"""The built-in images, image files of every kind, the papers' data sets, the packed format, batches."""
import functools
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from data import Images, Packed, built_in, celeba_crop, center_crop, generator, load_image, shapes
from files import BadInput

WNIDS = list(data.imagenet())
CROPS = np.load(ROOT / "tests/golden/crops.npz")             # two photographs, as PNG, and their crops
WIDE = Image.open(io.BytesIO(CROPS["wide"].tobytes()))       # 451 x 300
FACE = Image.open(io.BytesIO(CROPS["face"].tobytes()))       # 178 x 218


def picture(number=0, size=(40, 30)):
    """A part of a photograph, another one for each number."""
    right, lower = number + size[0], number + size[1]
    return WIDE.crop((number, number, right, lower))


def pictures(folder, *names):
    """Image files of these names below a folder, one number after the other."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number % 200).save(folder / name)
    return folder


def pets(folder):
    return pictures(folder, "cat/1.png", "cat/2.png", "dog/deep/1.png")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


PACK = ("data.py", "--src", "src", "--size", 16, "--out", "out")


# -------------------------------------------------------------------------------------------- built-in images

@pytest.mark.parametrize("size", [16, 33])
def test_shapes_depend_on_index_and_size_alone(size):
    images, labels = shapes(range(24), size)
    again, _ = shapes([17, 3, 5], size)
    assert images.shape == (24, 3, size, size)
    assert labels.tolist() == [*range(8)] * 3
    assert np.array_equal(again, images[[17, 3, 5]])
    assert len(np.unique(images, axis=0)) == 24


def test_shapes_are_the_same_scene_at_any_size():
    small = shapes(range(16), 16)[0].astype(float)
    large = shapes(range(16), 64)[0].astype(float)
    shrunk = large.reshape(16, 3, 16, 4, 16, 4).mean((3, 5))
    assert np.abs(shrunk - small).mean() < 3
    assert np.abs(shrunk - small[::-1]).mean() > 20


# -------------------------------------------------------------------------------- image files and their crops

def through_a_file(path, image, **how):
    image.save(path, **how)
    return np.asarray(load_image(path)).astype(int)


@pytest.mark.parametrize("name, mode, error", [
    ("rgb.png", "RGB", 0),
    ("grey.png", "L", 0),
    ("palette.gif", "P", 12),
    ("cmyk.jpg", "CMYK", 8),
    ("bits.png", "1", 0),
    ("rgb.webp", "RGB", 8),
])
def test_every_colour_mode_becomes_rgb(tmp_path, name, mode, error):
    image = picture().convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    found = through_a_file(tmp_path / name, image)
    assert np.abs(found - expected).mean() <= error


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 257, 1000, 30000, 40000, 65000, 65535]], dtype=np.uint16)
    found = through_a_file(tmp_path / name, Image.fromarray(values))
    assert np.array_equal(found[..., 0], np.round(values / 257))


@pytest.mark.parametrize("values", [[-1, 100], [0, 65536]])
def test_values_beyond_sixteen_bits_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(BadInput, match=f"deep.tif: .*pixels from {values[0]} to {values[1]}"):
        load_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("highest, warned", [(4095, True), (65535, False)])
def test_twelve_bits_in_sixteen_are_warned_of(script, tmp_path, highest, warned):
    (tmp_path / "src").mkdir()
    Image.fromarray(np.eye(16).astype(np.uint16) * highest).save(tmp_path / "src/deep.png")
    assert ("multiply by 16" in script(*PACK)) == warned


def test_transparency_goes_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[..., 0] = 200                                                       # a hidden red under everything
    rgba[..., 3] = 255, 128, 0
    found = through_a_file(tmp_path / "alpha.png", Image.fromarray(rgba))
    expected = [[200, 0, 0], [227, 127, 127], [255, 255, 255]]
    assert np.abs(found[0] - expected).max() <= 1


@pytest.mark.parametrize("orientation, turn", [
    (2, Image.FLIP_LEFT_RIGHT),
    (3, Image.ROTATE_180),
    (4, Image.FLIP_TOP_BOTTOM),
    (5, Image.TRANSPOSE),
    (6, Image.ROTATE_90),
    (7, Image.TRANSVERSE),
    (8, Image.ROTATE_270),
])
def test_exif_turns_users_images_and_not_the_papers(tmp_path, orientation, turn):
    exif, file = Image.Exif(), tmp_path / "turned.png"
    exif[0x0112] = orientation
    stored = picture().transpose(turn)
    assert np.array_equal(through_a_file(file, stored, exif=exif), picture())
    assert np.array_equal(load_image(file, plain=True), stored)


@pytest.mark.parametrize("name, size", [("wide", 64), ("wide", 128), ("wide", 256), ("face", 64)])
def test_adm_crop_of_a_photograph_to_the_bit(name, size):
    """Golden values of guided-diffusion's own function; these sizes take no, one and two halvings."""
    image = {"wide": WIDE, "face": FACE}[name]
    assert np.array_equal(center_crop(image, size), CROPS[f"{name}_{size}"])


@pytest.mark.parametrize("size", [(24, 24), (25, 31), (31, 25), (7, 90), (500, 26)])
def test_images_of_any_size_are_cropped_to_a_square(size):
    assert center_crop(picture(size=size), 24).shape == (24, 24, 3)


def test_celebas_crop_is_scoresdes_antialiased_bilinear():
    """Golden values of jax.image.resize, as float, of the central 140 x 140."""
    error = celeba_crop(FACE, 64) - CROPS["celeba_64"]
    assert np.abs(error).max() < 1


# ---------------------------------------------------------------------------------------------------- packing

def test_a_pack_holds_cropped_images_in_order_labels_and_a_sheet_and_is_made_once(script, tmp_path):
    pets(tmp_path / "src")
    assert "3 images of 16 x 16, 2 classes: cat, dog\n" in script(*PACK)
    pack = Packed(tmp_path / "out")
    crop = center_crop(load_image(tmp_path / "src/cat/2.png"), 16)
    assert np.array_equal(pack.images[1], crop.transpose(2, 0, 1))
    assert pack.classes == ["cat", "dog"]
    assert pack.labels.tolist() == [0, 0, 1]
    assert Image.open(tmp_path / "out/sheet.png").size == (128, 16)
    found = contents(tmp_path / "out")
    assert "was packed already, nothing is left to do" in script(*PACK)
    assert contents(tmp_path / "out") == found


@pytest.mark.parametrize("top", ["", "pets/"])
def test_a_zip_is_a_folder(script, tmp_path, top):
    pets(tmp_path / "src")
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as file:
        for name in ("dog/deep/1.png", "cat/2.png", "cat/1.png"):
            file.write(tmp_path / "src" / name, top + name)
        file.writestr(f"__MACOSX/{top}cat/._1.png", b"a Mac's shadow of a file")
    script(*PACK)
    assert "warning" not in script(*PACK, "--src", "src.zip", "--out", "zipped")
    one, two = contents(tmp_path / "out"), contents(tmp_path / "zipped")
    assert one["images.npy"] == two["images.npy"]
    assert one["labels.npy"] == two["labels.npy"]
    assert Packed(tmp_path / "zipped").classes == ["cat", "dog"]


def test_folders_are_classes_and_a_flat_folder_has_none(tmp_path):
    pictures(tmp_path, "b/c/1.PNG", "b/a.png", "a/a.jpg", "a/.hidden.png", ".hidden/a.png")
    (tmp_path / "a/notes.txt").write_text("no image")
    names = ["a/a.jpg", "b/a.png", "b/c/1.PNG"]
    assert data.find_files(tmp_path)[:2] == (tmp_path, names)
    assert data.by_folder(names) == ([0, 1, 1], ["a", "b"])
    assert data.by_folder(["top/" + name for name in names]) == ([0, 1, 1], ["a", "b"])
    assert data.by_folder(["b/1.png", "b/2.png"]) == ([0, 0], [])


@pytest.mark.parametrize("words, named", [
    ("--src nowhere --size 16", "nowhere"),
    ("--src empty --size 16", "empty"),
    ("--src loose --size 16", "b.png"),
    ("--src src", "--size"),
    ("--src src --size 0", "--size"),
    ("--src src --size 32 --out imagenet64", "imagenet64 has 64"),
    ("--src src --size 16 --download", "--download"),
    ("--src src --size 16 --split trian", "--split"),
    ("--size 16", "--src"),
])
def test_mistakes_are_one_line(script, tmp_path, words, named):
    pets(tmp_path / "src")
    pictures(tmp_path / "loose", "a/1.png", "b.png")
    (tmp_path / "empty").mkdir()
    assert named in script("data.py", "--out", "out", *words.split(), code=2)
    assert not (tmp_path / "out").exists()


def edm(folder, table, *names):
    """Images, and a dataset.json with this table of labels."""
    pictures(folder, *names)
    (folder / "dataset.json").write_text(json.dumps(dict(labels=table)))


NAMES = "00000/a.png", "00000/b.png", "00001/c.png"


@pytest.mark.parametrize("table, labels, classes", [
    ([["00001/c.png", 0], ["00000/b.png", 1], ["00000/a.png", 3]], [3, 1, 0], ["0", "1", "2", "3"]),
    (None, [0, 0, 0], []),
])
@pytest.mark.parametrize("src", ["src", "src.zip"])
def test_dataset_json_gives_the_labels(script, tmp_path, table, labels, classes, src):
    edm(tmp_path / "src", table, *NAMES)
    shutil.make_archive(tmp_path / "src", "zip", tmp_path / "src")
    script(*PACK, "--src", src)
    pack = Packed(tmp_path / "out")
    assert pack.labels.tolist() == labels
    assert pack.classes == classes


@pytest.mark.parametrize("table, named", [
    ([["00000/a.png", 0], ["00000/b.png", 1]], "00001/c.png"),
    ([[name, -1] for name in NAMES], "-1"),
    ([[name, 0.5] for name in NAMES], "0.5"),
    ("cat", "dataset.json"),
])
def test_a_dataset_json_without_right_labels_is_refused(script, tmp_path, table, named):
    edm(tmp_path / "src", table, *NAMES)
    assert named in script(*PACK, code=2)


def test_labels_without_images_are_said(script, tmp_path):
    edm(tmp_path / "src", [["00000/a.png", 2], ["absent.png", 0]], "00000/a.png")
    said = script(*PACK)
    assert "dataset.json has 2 labels for 1 images" in said
    assert "classes without images, 2: 0, 1\n" in said


@pytest.mark.parametrize("names", [
    ("00000/0.png", "01000/1000.png"),
    ("training_set/1.png", "test_set/1.png"),
    ("train2017/1.png", "val2017/1.png"),
    ("train/cat/1.png", "Val/cat/1.png"),
    ("notes/1.png", "train/cat/1.png"),
    ("top/train/1.png", "top/test/1.png"),
])
def test_folders_that_are_no_classes_are_refused(script, tmp_path, names):
    pictures(tmp_path / "src", *names)
    assert "--classes 0" in script(*PACK, code=2)
    script(*PACK, "--classes", 0)
    assert Packed(tmp_path / "out").classes == []


@pytest.mark.parametrize("classes", [
    [f"{k}" for k in range(2000)],
    [f"{k:05d}" for k in range(43)],
    ["bus", "train"],
])
def test_true_classes_may_look_like_parts(classes):
    names = [f"{name}/1.png" for name in classes]
    assert data.by_folder(names)[1] == sorted(classes)


def test_what_is_left_out_is_said(script, tmp_path):
    pictures(tmp_path / "src", "cat/1.png", "dog/1.png")
    (tmp_path / "src/zebra").mkdir()
    for name in ("cat/1.heic", "cat/2.HEIC", "zebra/raw", "cat/1.cls", "labels.csv", ".hidden"):
        (tmp_path / "src" / name).touch()
    said = script(*PACK)
    assert "left out: 1 .cls, 1 .csv, 2 .heic, 1 without suffix; labels come from" in said
    assert "warning: folders without images, 1: zebra\n" in said


def test_one_folder_has_no_classes_and_jpegs_have_many_suffixes(script, tmp_path):
    (tmp_path / "src/cat").mkdir(parents=True)
    for name in ("1.jfif", "2.pjpeg"):
        picture().save(tmp_path / "src/cat" / name, "JPEG")
    said = script(*PACK)
    assert "in one folder, cat: no classes" in said
    assert "2 images of 16 x 16, 0 classes" in said


def test_small_images_are_enlarged_and_said(script, tmp_path):
    (tmp_path / "src").mkdir()
    for k in range(2):
        picture().resize((20, 15)).save(tmp_path / f"src/{k}.png")
    assert script(*PACK).count("images smaller than 16 x 16 are enlarged") == 1


@pytest.mark.parametrize("out, named", [
    ("src/pack", "--out src/pack: lies in --src src"),
    ("src", "--out src: lies in --src src"),
    ("data/shapes", "built-in"),
])
def test_places_that_a_pack_would_spoil_are_refused(script, tmp_path, out, named):
    pictures(tmp_path / "src", "0.png")
    assert named in script(*PACK[:-1], out, code=2)


def test_an_encrypted_zip_is_one_line(script, tmp_path):
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as file:
        file.writestr("a.png", b"image")
    whole = bytearray((tmp_path / "src.zip").read_bytes())
    whole[whole.index(b"PK\1\2") + 8] |= 1                                   # its flag in the directory
    (tmp_path / "src.zip").write_bytes(whole)
    assert "encrypted" in script(*PACK, "--src", "src.zip", code=2)


def test_a_dataset_json_below_the_top_is_refused(script, tmp_path):
    edm(tmp_path / "src/ffhq", [[name, 0] for name in NAMES], *NAMES)
    assert "ffhq/dataset.json is not read" in script(*PACK, code=2)
    script(*PACK, "--src", "src/ffhq")
    script(*PACK, "--out", "without", "--classes", 0)
    assert Packed(tmp_path / "without").classes == []


def test_a_zip_with_backslashes_is_refused(script, tmp_path):
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as file:
        file.writestr("cats\\0.png", b"")
    assert "in place of /" in script(*PACK, "--src", "src.zip", code=2)


def broken(folder, *numbers):
    """120 images of two classes in a folder; those of these numbers are cut."""
    names = [f"{'ab'[k % 2]}/{k:03d}.png" for k in range(120)]
    pictures(folder, *names)
    for k in numbers:
        os.truncate(folder / names[k], 1000)
    return [names[k] for k in numbers]


def test_broken_images_are_named_when_all_others_are_packed(script, tmp_path):
    names = broken(tmp_path / "src", *range(0, 24, 2))
    shutil.make_archive(tmp_path / "src", "zip", tmp_path / "src")
    said = script(*PACK, "--src", "src.zip", code=2)
    assert "broken images, 12: " in said
    assert names[9] in said and names[10] not in said
    assert np.sum(np.load(tmp_path / "out/labels.npy") < 0) == 12
    broken(tmp_path / "src")                                                 # mended
    script(*PACK)
    script(*PACK, "--out", "whole/out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole/out")


def test_skip_broken_leaves_them_out_to_the_same_bytes(script, tmp_path):
    names = broken(tmp_path / "src", 8, 33)
    said = script(*PACK, "--out", "skipped/out", "--skip-broken")
    assert "warning: broken images left out, 2: a/008.png, b/033.png" in said
    assert Packed(tmp_path / "skipped/out").meta["broken"] == dict(count=2, names=names)
    for name in names:
        (tmp_path / "src" / name).unlink()
    script(*PACK)
    found, expected = contents(tmp_path / "skipped/out"), contents(tmp_path / "out")
    assert found.pop("meta.json") != expected.pop("meta.json")
    assert found == expected


def test_a_folder_that_holds_another_pack_is_refused(script, tmp_path):
    pets(tmp_path / "src")
    script(*PACK)
    assert "other settings" in script(*PACK, "--size", 32, code=2)
    (tmp_path / "src/cat/2.png").rename(tmp_path / "src/cat/3.png")
    assert "other images" in script(*PACK, code=2)
    (tmp_path / "out/meta.json").unlink()
    before = contents(tmp_path / "out")
    assert "choose a new folder" in script(*PACK, code=2)
    assert contents(tmp_path / "out") == before


def dies(name, moment):
    """Kill this process before its `moment`-th call of os.NAME."""
    calls, function = itertools.count(1), getattr(os, name)

    def call(*words):
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words)
    setattr(os, name, call)


@pytest.mark.skipif(sys.platform == "win32", reason="kills")
@pytest.mark.parametrize("name, moment", [("replace", 1), ("replace", 2), ("fsync", 3), ("fsync", 7)])
def test_killed_and_restarted_pack_has_the_same_bytes(script, tmp_path, name, moment):
    """Killed before meta.json, before labels.npy, and while the first and a later image are written."""
    pictures(tmp_path / "src", *(f"{k % 2}/{k}.png" for k in range(300)))
    words = ("data.py", "--src", "src", "--size", 8, "--out")
    script(*words, "whole/pack")
    out = tmp_path / "killed/pack"
    script(*words, out, code=9, change=functools.partial(dies, name, moment))
    with pytest.raises(BadInput):
        Packed(out)
    script(*words, out)
    assert contents(out) == contents(tmp_path / "whole/pack")


# -------------------------------------------------------------------------------------- the papers' data sets

def test_imagenet_is_read_as_adm_reads_it_in_the_order_of_its_1000_folders(script, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3                                                         # upside down, not for the papers
    picture().save(tmp_path / "one.JPEG", exif=exif)
    for wnid in WNIDS:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        os.link(tmp_path / "one.JPEG", tmp_path / "train" / wnid / f"{wnid}_1.JPEG")
    words = ("data.py", "--out", "data/imagenet64", "--src", "train")
    assert "the training set of imagenet64 has 1,281,167" in script(*words)
    pack = Packed(tmp_path / "data/imagenet64")
    assert pack.labels.tolist() == list(range(1000))
    assert pack.classes[207] == "golden retriever"
    plain = center_crop(Image.open(tmp_path / "one.JPEG"), 64)
    assert (pack.images[[0, 255, 256, 999]] == plain.transpose(2, 0, 1)).all()
    (tmp_path / "train" / WNIDS[7]).rename(tmp_path / "train/cock")
    assert "expected ImageNet's 1,000" in script(*words, code=2)


def test_the_names_of_published_classes():
    names = dict(zip(WNIDS, data.class_names("imagenet256")))
    assert WNIDS == sorted(names)
    assert len(names) == 1000
    assert names["n02119789"].startswith("kit fox")
    assert names["n15075141"].startswith("toilet tissue")
    assert data.class_names("cifar10")[3] == "cat"
    assert data.class_names("celeba64") == []


@pytest.fixture
def celeba(tmp_path):
    """Both ends of the three splits, turned a little."""
    (tmp_path / "img").mkdir()
    for number in (1, 162770, 162771, 182637, 182638, 202599):
        turned = FACE.rotate(number % 7)
        turned.save(tmp_path / f"img/{number:06d}.jpg", quality=95)
    return tmp_path / "img"


CELEBA = ("data.py", "--out", "data/celeba64", "--src", "img")


@pytest.mark.parametrize("split, first, last", [
    ("train", "000001", "162770"),
    ("val", "162771", "182637"),
    ("test", "182638", "202599"),
])
def test_celeba_is_split_by_number(celeba, script, tmp_path, split, first, last):
    script(*CELEBA, "--split", split)
    pack = Packed(tmp_path / "data/celeba64")
    images = [load_image(celeba / f"{name}.jpg") for name in (first, last)]
    expected = np.array([celeba_crop(image, 64) for image in images])
    assert len(pack) == 2
    assert np.array_equal(pack.images[[0, 1]], expected.transpose(0, 3, 1, 2))
    assert pack.classes == []


def test_celeba_refuses_images_in_the_wild(celeba, script):
    WIDE.save(celeba / "000004.jpg")
    assert "000004.jpg: found 451 x 300" in script(*CELEBA, code=2)


@pytest.fixture
def cifar(tmp_path):
    """-> (images, labels) of six batches of 20 records in a tar.gz."""
    rows = np.random.RandomState(1).randint(0, 256, (120, 3072), np.uint8)
    labels = np.arange(120, dtype=np.uint8) % 10
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k, name in enumerate(names):
        part = slice(20 * k, 20 * k + 20)
        records = np.column_stack([labels[part], rows[part]])
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as file:
        file.add(folder, folder.name)
    return rows.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("split, part", [("train", slice(0, 100)), ("test", slice(100, 120))])
def test_cifar10_keeps_its_bytes_and_its_order(cifar, script, tmp_path, split, part):
    images, labels = cifar
    script("data.py", "--out", "data/cifar10", "--src", "cifar-10-binary.tar.gz", "--split", split)
    pack = Packed(tmp_path / "data/cifar10")
    assert np.array_equal(pack.images, images[part])
    assert np.array_equal(pack.labels, labels[part])
    assert pack.meta["split"] == split


def test_cifar10_without_labels(cifar, script, tmp_path):
    script("data.py", "--out", "data/cifar10", "--src", "cifar-10-binary.tar.gz", "--classes", 0)
    assert Packed(tmp_path / "data/cifar10").classes == []


@pytest.mark.parametrize("name, content, said", [
    ("data_batch_1.bin", b"1234", "reshape"),
    ("data_batch_1", b"", "not found"),
])
def test_other_archives_than_cifars_are_refused(script, tmp_path, name, content, said):
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    assert said in script("data.py", "--out", "data/cifar10", "--src", "cifar.tar.gz", code=2)


# ------------------------------------------------------------------------------------------ packs and batches

def write_pack(folder, images, labels, **meta):
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    meta = dict(count=len(images), size=images.shape[2], classes=["a", "b"]) | meta
    (folder / "meta.json").write_text(json.dumps(meta))


def test_the_built_in_images_can_be_held_in_memory():
    held = built_in(8, 50).to("cpu")
    assert torch.equal(held.images, torch.from_numpy(shapes(range(50), 8)[0]))


@pytest.mark.parametrize("damage, named", [
    (dict(images=np.zeros((4, 3, 8, 8), np.float32)), "images.npy"),
    (dict(labels=np.zeros(3, np.int64)), "labels.npy"),
    (dict(labels=np.array([0, 1, -1, 0])), "unfinished"),
    (dict(size=16), "images.npy"),
])
def test_a_pack_that_contradicts_itself_is_refused(tmp_path, damage, named):
    right = dict(images=np.zeros((4, 3, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    write_pack(tmp_path, **right | damage)
    with pytest.raises(BadInput, match=named):
        Packed(tmp_path)


def test_a_cut_file_of_a_pack_is_named(tmp_path):
    write_pack(tmp_path, np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64))
    os.truncate(tmp_path / "images.npy", 300)
    with pytest.raises(BadInput, match="images.npy: cannot be read"):
        Packed(tmp_path)


@pytest.mark.parametrize("labels", [
    np.arange(1, 9),
    np.arange(-1, 7),
    np.arange(8.0),
    np.arange(7),
])
def test_labels_of_another_kind_or_range_are_refused(labels):
    """Label 8 of 8 classes would train the null label."""
    images, right = shapes(range(8), 8)
    meta = dict(classes=list("abcdefgh"))
    assert Images(images, right, meta).batch([5])[1].tolist() == [5]
    with pytest.raises(BadInput, match="labels"):
        Images(images, labels, meta)


def test_batches_are_scaled_and_without_a_generator_not_flipped():
    pool, indices = built_in(16, count=50, flip=True), [7, 3, 44, 3]
    x, y = pool.batch(indices)
    expected = torch.from_numpy(shapes(indices, 16)[0]) / 127.5 - 1
    assert x.dtype == torch.float32
    assert torch.allclose(x, expected)
    assert y.tolist() == [7, 3, 4, 3]
    unflipped, _ = built_in(16, 50).batch(indices, generator("test", 0, 1))
    assert torch.equal(unflipped, x)


def test_half_the_images_are_flipped_and_rows_are_a_part_of_the_whole():
    pool, indices = built_in(8, count=50, flip=True), [9] * 500 + [3, 7]
    x, _ = pool.batch(indices)
    flipped, _ = pool.batch(indices, generator("test", 0, 1))
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert torch.equal(mirrored, torch.rand(502, generator=generator("test", 0, 1)) < 0.5)
    for rows in (slice(0, 100), slice(400, 502)):
        part, _ = pool.batch(indices, generator("test", 0, 1), rows)
        assert torch.equal(part, flipped[rows])


def test_latents_are_drawn_from_the_posterior_and_scaled():
    rows = np.random.RandomState(0).rand(6, 8, 2, 3).astype(np.float16)
    pool = Images(rows, np.zeros(6, np.int64), dict(classes=[], scale=0.5), flip=True)
    indices, part = [5, 1, 4], slice(1, 3)
    mean, std = torch.from_numpy(rows[indices]).float().chunk(2, 1)
    noise = torch.randn(3, 4, 2, 3, generator=generator("step", 0, 3))
    expected = (mean + std * noise) * 0.5
    drawn, _ = pool.batch(indices, generator("step", 0, 3), part)
    assert torch.allclose(drawn, expected[part])
    assert torch.allclose(pool.batch(indices)[0], mean * 0.5)


def test_generators_of_one_purpose_never_repeat():
    def number(purpose, k):
        return torch.rand((), generator=generator(purpose, 0, k)).item()
    assert len({number("image", k) for k in range(3000)}) > 2995
    assert number("image", 5) != number("step", 5)


def test_the_fingerprint_of_a_pack_is_not_its_name():
    found = data.fingerprint(dict(dataset="a", vae_file="b", size=8))
    assert found == data.fingerprint(dict(size=8, dataset="c", vae_file="d"))
    assert found != data.fingerprint(dict(dataset="a", vae_file="b", size=16))


def test_tiles_fill_a_row_then_the_next_and_the_rest_is_grey():
    images = np.empty((5, 3, 2, 4), np.uint8)
    images[:] = np.arange(5)[:, None, None, None]
    sheet = np.asarray(data.tile(images, 3))
    assert sheet.shape == (4, 12, 3)
    assert [sheet[0, 5, 0], sheet[2, 0, 0], sheet[3, 11, 0]] == [1, 3, 128]
