"""The papers' data sets in the layouts they are published in: right ones to the array, wrong ones in one line."""
import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
import files
from data import Packed, celeba_crop, center_crop, imagenet, load_image
from files import BadInput

WNIDS, NUMBERS, NAMES = (list(column) for column in imagenet())
CROPS = np.load(ROOT / "tests/golden/crops.npz")                             # two photographs, as PNG, and their crops
WIDE, FACE = (Image.open(io.BytesIO(CROPS[name].tobytes())) for name in ("wide", "face"))     # 451 x 300, 178 x 218


# -------------------------------------------------------------------------------------------------------- crops

def test_adm_crop_of_a_photograph_to_the_bit():
    """Golden: guided-diffusion's own function, from enlarging nothing to halving twice."""
    for size in (64, 128, 256):
        assert np.array_equal(center_crop(WIDE, size), CROPS[f"wide_{size}"]), size
    assert np.array_equal(center_crop(FACE, 64), CROPS["face_64"])


def triangle(n_in, n_out):
    """(n_out,n_in) antialiased bilinear resampling: triangles of half-width n_in / n_out around each centre."""
    scale = n_in / n_out
    weight = (1 - abs((np.arange(n_in) + 0.5)[None] - (np.arange(n_out) + 0.5)[:, None] * scale) / scale).clip(0)
    return weight / weight.sum(1, keepdims=True)


def test_celeba_crop_is_scoresdes_antialiased_bilinear():
    """Golden: jax.image.resize of the central 140 x 140; and the same sum by hand in float64."""
    found, by_hand = celeba_crop(FACE, 64), np.asarray(FACE).astype(float)[39:179, 19:159]
    by_hand = np.einsum("yi,xj,ijc->yxc", triangle(140, 64), triangle(140, 64), by_hand)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    assert np.abs(by_hand - CROPS["celeba_64"]).max() < 1e-2 and np.abs(found - CROPS["celeba_64"]).max() < 1
    with pytest.raises(BadInput, match="178 x 218"):
        celeba_crop(WIDE, 64)


def test_the_papers_files_are_read_without_exif_and_alpha(tmp_path):
    exif, wide = Image.Exif(), WIDE.resize((40, 30))
    exif[0x0112] = 6
    wide.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (30, 40) and load_image(tmp_path / "turned.png", plain=True).size == (40, 30)
    seen = wide.convert("RGBA")
    seen.putalpha(0)
    seen.save(tmp_path / "clear.png")
    assert np.array_equal(load_image(tmp_path / "clear.png", plain=True), wide)


# ----------------------------------------------------------------------------------------------------- ImageNet

def jpeg(path, seed=0, mode="RGB", size=(90, 70)):
    path.parent.mkdir(parents=True, exist_ok=True)
    WIDE.crop((seed, seed, seed + size[0], seed + size[1])).convert(mode).save(path, "JPEG")


@pytest.fixture
def ilsvrc(tmp_path):
    """1,000 class folders, twelve images; .JPEG and .jpg, a grey one and a CMYK one."""
    for wnid in WNIDS:
        (tmp_path / "train" / wnid).mkdir(parents=True)
    for i in range(12):
        end, mode = ("jpg" if i == 5 else "JPEG"), {3: "L", 4: "CMYK"}.get(i, "RGB")
        jpeg(tmp_path / "train" / WNIDS[80 * i] / f"{WNIDS[80 * i]}_{i}.{end}", i, mode)
    return tmp_path / "train"


@pytest.mark.parametrize("name", ["imagenet64", "imagenet128"])
def test_imagenet(name, ilsvrc, script, tmp_path):
    text = script("data.py", "--dataset", name, "--src", "train")
    assert f"found 12 images, the training set of {name} has 1,281,167" in text
    pack, size = Packed(tmp_path / "data" / name), int(name[8:])
    assert pack.labels.tolist() == [80 * i for i in range(12)] and pack.classes[207] == "golden retriever"
    for i, path in ((3, ilsvrc / WNIDS[240]), (4, ilsvrc / WNIDS[320]), (5, ilsvrc / WNIDS[400])):
        plain = Image.open(next(path.iterdir())).convert("RGB")
        assert np.array_equal(pack.images[i], center_crop(plain, size).transpose(2, 0, 1))
    assert pack.meta["dataset"] == name and pack.meta["crop"] == "center (ADM)" and pack.meta["split"] == "train"
    assert "1000 classes" in script("data.py", "--check", f"data/{name}")


def test_imagenet_refuses_other_folders(ilsvrc, script, tmp_path):
    words = ("data.py", "--src", "train", "--out", "data/imagenet64")        # known by the name of the folder
    (ilsvrc / "n99999999").mkdir()
    assert "n99999999" in script(*words, code=2)
    (ilsvrc / "n99999999").rmdir()
    os.rename(ilsvrc / WNIDS[1], tmp_path / "kept")
    text = script(*words, code=2)
    assert "found 999 class folders" in text and f"lacks {WNIDS[1]}" in text
    os.rename(tmp_path / "kept", ilsvrc / "1")
    assert "found 1000 class folders" in script(*words, code=2)              # a number among the wnids
    for i in range(3):
        jpeg(tmp_path / "numeric" / str(i) / "a.JPEG")
        jpeg(tmp_path / "flat" / f"{i}.JPEG")
        jpeg(tmp_path / "above/train" / WNIDS[i] / "a.JPEG")
    for src, found in (("numeric", 3), ("flat", 0), ("above", 1)):
        text = script("data.py", "--src", src, "--dataset", "imagenet128", code=2)
        assert f"found {found} class folders, expected ImageNet's 1,000 wnids" in text and WNIDS[0] in text
    assert "has 64" in script(*words, "--size", 32, code=2) and not (tmp_path / "data").exists()


def test_the_list_of_imagenets_classes():
    assert WNIDS == sorted(set(WNIDS)) and len(WNIDS) == 1000 and sorted(map(int, NUMBERS)) == list(range(1, 1001))
    known = {"n01440764": "tench", "n02099601": "golden retriever", "n15075141": "toilet tissue", "n02119789": "kit fox"}
    for wnid, name in known.items():
        assert NAMES[WNIDS.index(wnid)].startswith(name)
    assert NUMBERS[WNIDS.index("n02119789")] == "1" and NUMBERS[WNIDS.index("n02100735")] == "2"    # the kit's order


@pytest.mark.parametrize("kind", ["pickle", "npz"])
def test_downsampled_imagenet(kind, script, tmp_path):
    """Rows of 3 x 64 x 64, labels 1 .. 1000 in the order of the ILSVRC kit; batch 10 comes after batch 2."""
    rows, labels = np.random.RandomState(0).randint(0, 256, (90, 12288), np.uint8), [1, 2, 1000] * 30
    for number, part in ((1, slice(0, 30)), (2, slice(30, 50)), (10, slice(50, 90))):
        batch = dict(data=rows[part], labels=labels[part], mean=np.zeros(12288))
        file = tmp_path / f"src/part{1 + (number > 1)}/train_data_batch_{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "npz":
            np.savez(f"{file}.npz", **{**batch, "labels": np.array(labels[part])})
        else:
            file.write_bytes(pickle.dumps(batch))
    script("data.py", "--src", "src", "--dataset", "imagenet64")
    pack = Packed(tmp_path / "data/imagenet64")
    assert np.array_equal(pack.images, rows.reshape(90, 3, 64, 64)) and pack.classes == NAMES
    expected = [WNIDS.index(wnid) for wnid in ("n02119789", "n02100735", WNIDS[NUMBERS.index("1000")])]
    assert pack.labels.tolist() == expected * 30
    for wrong in (dict(data=rows[:30], labels=[0] * 30), dict(data=rows[:30], labels=[1001] * 30), dict(data=rows[:30], labels=[1]),
                  dict(data=rows[:30].astype(float), labels=[1] * 30), dict(data=rows[:30, :9000], labels=[1] * 30), [1], {}):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad/train_data_batch_1").write_bytes(pickle.dumps(wrong))
        script("data.py", "--src", "bad", "--dataset", "imagenet64", "--out", "x", code=2)
    small = dict(data=rows[:30, :3072], labels=[1] * 30)                       # the 32 x 32 set
    (tmp_path / "bad/train_data_batch_1").write_bytes(pickle.dumps(small))
    assert "side 32" in script("data.py", "--src", "bad", "--dataset", "imagenet64", "--out", "x", code=2)


# ------------------------------------------------------------------------------------------------------- CelebA

@pytest.fixture
def celeba(tmp_path):
    """Nine images around the ends of the splits, as 178 x 218 JPEG."""
    for number in (1, 2, 3, 162770, 162771, 182637, 182638, 202598, 202599):
        turned = FACE.rotate(number % 7)
        path = tmp_path / f"celeba/img_align_celeba/{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        turned.save(path, "JPEG", quality=95)
    return tmp_path / "celeba"


def test_celeba_by_number_partition_and_zip(celeba, script, tmp_path):
    folder = celeba / "img_align_celeba"
    expected = np.stack([celeba_crop(load_image(folder / f"{i:06d}.jpg"), 64).transpose(2, 0, 1) for i in (1, 2, 3, 162770)])
    text = script("data.py", "--dataset", "celeba64", "--src", folder)
    pack = Packed(tmp_path / "data/celeba64")
    assert np.array_equal(pack.images, expected) and pack.classes == [] and "has 162,770" in text
    assert pack.meta["crop"] == "center 140 (ScoreSDE)" and "bilinear" in pack.meta["filter"]
    for split, count in (("val", 2), ("test", 3)):
        script("data.py", "--dataset", "celeba64", "--src", folder, "--split", split, "--out", split)
        assert len(Packed(tmp_path / split)) == count
    # a zip beside the table of the kit, in the kit's folders
    (celeba / "Img").mkdir()
    (celeba / "Eval").mkdir()
    with zipfile.ZipFile(celeba / "Img/img_align_celeba.zip", "w") as file:
        file.writestr("img_align_celeba/", "")
        for path in sorted(folder.iterdir(), reverse=True):
            file.write(path, f"img_align_celeba/{path.name}")
            file.writestr(f"__MACOSX/img_align_celeba/._{path.name}", "")
    words = ("data.py", "--dataset", "celeba64", "--src", celeba / "Img/img_align_celeba.zip")
    script(*words, "--out", "zipped")
    assert np.array_equal(Packed(tmp_path / "zipped").images, expected)
    table = celeba / "Eval/list_eval_partition.txt"
    lines = {path.name: "1" for path in folder.iterdir()} | {"000002.jpg": "0", "202599.jpg": "0", "000009.jpg": "0"}
    table.write_text("".join(f"{name} {part}\n" for name, part in lines.items()))
    script(*words, "--out", "parted", "--workers", 2)
    pack = Packed(tmp_path / "parted")
    assert len(pack) == 2 and np.array_equal(pack.images[0], expected[1])
    table.write_text("000001.jpg 0\n")
    assert "has no line for 000002.jpg" in script(*words, "--out", "x", code=2)
    # Kaggle's layout: a folder in a folder, a table with commas and a header
    (celeba / "Eval/list_eval_partition.txt").unlink()
    lines = "".join(f"{name},{part}\n" for name, part in lines.items())
    (celeba / "list_eval_partition.csv").write_text("image_id,partition\n" + lines)
    script("data.py", "--dataset", "celeba64", "--src", folder, "--out", "kaggle")
    assert np.array_equal(Packed(tmp_path / "kaggle").images, pack.images)


def test_celeba_refuses(celeba, script, tmp_path):
    folder = celeba / "img_align_celeba"
    words = ("data.py", "--dataset", "celeba64", "--src", folder, "--out", "x")
    assert "--split nope" in script(*words, "--split", "nope", code=2)
    WIDE.save(folder / "000004.jpg")                                         # of the images "in the wild"
    assert "000004.jpg: found 451 x 300" in script(*words, code=2)
    os.rename(folder / "000004.jpg", folder / "cat.jpg")
    assert "cat.jpg" in script(*words, code=2)
    (folder / "cat.jpg").unlink()
    (celeba / "more").mkdir()
    FACE.save(celeba / "more/000001.png")
    assert "several images of one number" in script("data.py", "--dataset", "celeba64", "--src", celeba, "--out", "x", code=2)
    for number in (162771, 182637):
        (folder / f"{number}.jpg").unlink()
    assert "no images of the val split" in script(*words, "--split", "val", code=2)
    whole = (folder / "000001.jpg").read_bytes()
    (celeba / "cut.zip").write_bytes(whole)
    assert "cut.zip" in script("data.py", "--dataset", "celeba64", "--src", celeba / "cut.zip", "--out", "x", code=2)
    with zipfile.ZipFile(celeba / "bad.zip", "w") as file:
        file.writestr("000001.jpg", whole)
    raw = bytearray((celeba / "bad.zip").read_bytes())
    raw[200:300] = bytes(100)
    (celeba / "bad.zip").write_bytes(raw)
    assert "000001.jpg" in script("data.py", "--dataset", "celeba64", "--src", celeba / "bad.zip", "--out", "y", code=2)


def test_any_zip_is_a_folder(script, tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/deep/1.png"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        WIDE.crop((0, 0, 40 + len(name), 30)).save(tmp_path / "pets" / name)
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for path in sorted((tmp_path / "pets").rglob("*.png")):
            file.write(path, path.relative_to(tmp_path))
    for src in ("pets", "pets.zip"):
        script("data.py", "--src", src, "--size", 16, "--out", f"out/{src}", "--workers", 2)
    one, two = (tmp_path / "out" / name for name in ("pets", "pets.zip"))
    assert Packed(two).classes == ["cat", "dog"] and (one / "images.npy").read_bytes() == (two / "images.npy").read_bytes()


# ----------------------------------------------------------------------------------------------------- CIFAR-10

def python2(batch):
    """A batch as Python 2 pickled it in 2009: protocol 2, byte strings, numpy.core."""
    def text(string):
        return b"U" + bytes([len(string)]) + string
    rows = batch["data"].tobytes()
    out = b"\x80\x02}(" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR("
    out += b"K\x01M" + len(batch["data"]).to_bytes(2, "little") + b"M\x00\x0c\x86cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR("
    out += b"K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    out += b"T" + len(rows).to_bytes(4, "little") + rows + b"tb" + text(b"labels") + b"]("
    return out + b"".join(b"K" + bytes([label]) for label in batch["labels"]) + b"eu."


@pytest.fixture
def cifar(tmp_path):
    """-> (rows, labels) of five batches of 20 images in cifar-10-batches-py and its tar.gz, as published."""
    rows, labels = np.random.RandomState(1).randint(0, 256, (120, 3072), np.uint8), np.arange(120) % 10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        part = dict(data=rows[20 * i:20 * i + 20], labels=labels[20 * i:20 * i + 20].tolist())
        (folder / name).write_bytes(python2(part))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=data.CIFAR10)))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as file:
        file.add(folder, "cifar-10-batches-py")
    return rows.reshape(-1, 3, 32, 32), labels


def test_cifar10(cifar, script, tmp_path):
    rows, labels = cifar
    assert pickle.loads((tmp_path / "cifar-10-batches-py/test_batch").read_bytes(), encoding="latin1")["data"].shape == (20, 3072)
    for src in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
        text = script("data.py", "--dataset", "cifar10", "--src", src, "--out", f"out/{src}")
        pack = Packed(tmp_path / "out" / src)
        assert np.array_equal(pack.images, rows[:100]) and pack.labels.tolist() == labels[:100].tolist()
        assert pack.classes[3] == "cat" and pack.meta["crop"] == "as published" and "has 50,000" in text
        script("data.py", "--dataset", "cifar10", "--src", src, "--split", "test", "--out", f"test/{src}")
        assert np.array_equal(Packed(tmp_path / "test" / src).images, rows[100:])
    assert "--split val" in script("data.py", "--dataset", "cifar10", "--src", src, "--split", "val", code=2)
    (tmp_path / "empty").mkdir()
    assert "no CIFAR-10" in script("data.py", "--dataset", "cifar10", "--src", "empty", code=2)


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.parametrize("protocol", range(5))
def test_a_malicious_pickle_is_refused_and_not_run(protocol, cifar, script, tmp_path):
    batch = pickle.dumps(dict(data=cifar[0][:20].reshape(20, -1), labels=[Planted()] * 20), protocol)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(batch)
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as file:
        file.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    for src in ("bad.tar.gz", "cifar-10-batches-py"):
        text = script("data.py", "--dataset", "cifar10", "--src", src, "--out", "x", code=2)
        assert "data_batch_3" in text and "foreign object" in text and "system" in text
    assert not (tmp_path / "planted").exists() and not (tmp_path / "x").exists()


def test_damaged_batches_are_refused(cifar, script, tmp_path):
    words, file = ("data.py", "--dataset", "cifar10", "--out", "x", "--src"), tmp_path / "cifar-10-batches-py/data_batch_2"
    whole = file.read_bytes()
    for wrong in (b"", b"no pickle", whole[:5000], whole[:-1], pickle.dumps({"data": 3}), pickle.dumps(dict(data=np.array([None] * 3), labels=[1]))):
        file.write_bytes(wrong)
        assert "data_batch_2" in script(*words, "cifar-10-batches-py", code=2)
    whole = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    for wrong in (whole[:len(whole) // 2], gzip.compress(b"text"), b"text"):
        (tmp_path / "cut.tar.gz").write_bytes(wrong)
        script(*words, "cut.tar.gz", code=2)


def test_killed_and_restarted_batches_have_the_same_bytes(script, start_fork, tmp_path):
    rows = np.random.RandomState(2).randint(0, 256, (3000, 3072), np.uint8)
    for k in range(5):
        part = dict(data=rows[600 * k:600 * k + 600], labels=[k] * 600)
        (tmp_path / f"data_batch_{k + 1}").write_bytes(pickle.dumps(part))
    words = ("data.py", "--dataset", "cifar10", "--src", ".")
    (process, _), done = start_fork(*words, "--out", "../parts"), tmp_path.parent / "parts/done.npy"
    try:
        while process.is_alive() and not (done.exists() and done.stat().st_size > 128 and np.load(done).any()):
            time.sleep(0.001)
        process.kill()
        process.join()
        script(*words, "--out", "../parts")
        assert np.array_equal(Packed(tmp_path.parent / "parts").images, rows.reshape(-1, 3, 32, 32))
    finally:
        for path in (tmp_path.parent / "parts").iterdir():
            path.unlink()


def test_download_checks_the_hash(tmp_path):
    """From a server on this machine: the file appears with the right hash alone."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/x" else 404)
            self.end_headers()
            self.wfile.write(b"content")
        log_message = lambda *_: None
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, right = f"http://127.0.0.1:{server.server_port}", hashlib.sha256(b"content").hexdigest()
    try:
        files.download(f"{url}/x", tmp_path / "sub/x", right, "--src")
        assert (tmp_path / "sub/x").read_bytes() == b"content"
        for path, digest in (("x", "0" * 64), ("y", right)):
            with pytest.raises(BadInput, match="--src"):
                files.download(f"{url}/{path}", tmp_path / "sub/y", digest, "--src")
            assert not (tmp_path / "sub/y").exists()
    finally:
        server.shutdown()


def test_download_refuses(script, tmp_path):
    assert "cifar10" in script("data.py", "--dataset", "celeba64", "--download", code=2)
    assert "--src" in script("data.py", "--dataset", "cifar10", "--src", "x", "--download", code=2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar-10-python.tar.gz").write_bytes(b"half")
    assert "SHA-256" in script("data.py", "--dataset", "cifar10", "--download", code=2)


# ------------------------------------------------------------------------------------------- odd trees and archives

def pets(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        WIDE.crop((i, 0, 40 + i, 30)).save(folder / name)
    return folder


def test_archives_of_any_making(script, tmp_path):
    """`tar czf x.tar.gz .`, members in any order, upper-case suffix, four workers on one zip."""
    names = [f"cat/{i}.png" for i in range(150)] + [f"dog/{i}.png" for i in range(150)]
    pets(tmp_path / "src", names)
    with tarfile.open(tmp_path / "dot.tar.gz", "w:gz") as file:
        file.add(tmp_path / "src", ".")
    with zipfile.ZipFile(tmp_path / "UPPER.ZIP", "w") as file:
        for name in reversed(names):
            file.write(tmp_path / "src" / name, f"./{name}" if name < "d" else name)
        file.writestr("__MACOSX/x.png", b"")
    for i, src in enumerate(("src", "dot.tar.gz", "UPPER.ZIP")):
        script("data.py", "--src", src, "--size", 16, "--out", f"o{i}", "--workers", 4)
        assert Packed(tmp_path / f"o{i}").classes == ["cat", "dog"]
        assert (tmp_path / f"o{i}/images.npy").read_bytes() == (tmp_path / "o0/images.npy").read_bytes()


def test_odd_archives_are_refused_by_name(script, tmp_path):
    image, out = pets(tmp_path / "src", ["cat/1.png"]) / "cat/1.png", ("--size", 16, "--workers", 1, "--out", "x")
    for i, odd in enumerate(("/cat/1.png", "x//cat/1.png", "../cat/1.png", "cat\\1.png")):
        with zipfile.ZipFile(tmp_path / f"{i}.zip", "w") as file:
            file.writestr("dog/1.png", image.read_bytes())
            file.writestr(zipfile.ZipInfo(odd), image.read_bytes())
        assert "relative to its top" in script("data.py", "--src", f"{i}.zip", *out, code=2), odd
    with tarfile.open(tmp_path / "links.tar", "w") as file:
        file.add(image, "cat/1.png")
        for name, kind in (("dog/1.png", tarfile.SYMTYPE), ("dog/2.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "nowhere/1.png"
            file.addfile(member)
    script("data.py", "--src", "links.tar", *out)
    assert len(Packed(tmp_path / "x")) == 1
    (tmp_path / "a.txt").write_text("text")
    assert "no such folder" in script("data.py", "--src", "a.txt", *out, code=2)


def test_links_in_a_circle_and_other_peoples_folders_are_refused(script, tmp_path):
    pets(tmp_path / "src", ["cat/1.png"])
    os.symlink("..", tmp_path / "src/cat/back")
    assert "back" in script("data.py", "--src", "src", "--size", 16, "--out", "x", code=2)
    (tmp_path / "src/cat/back").unlink()
    pets(tmp_path / "far", ["1.png"])
    os.symlink(tmp_path / "far", tmp_path / "src/eel")                       # a class that lies elsewhere is fine
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("mine", "file"):
        assert "other things" in script("data.py", "--src", "src", "--size", 16, "--out", out, code=2)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    script("data.py", "--src", "src", "--size", 16, "--out", "x")
    assert Packed(tmp_path / "x").classes == ["cat", "eel"]


def test_images_deep_below_their_class_come_by_folder(tmp_path):
    pets(tmp_path / "src", ["b/z/1.png", "b/a/2.png", "b/a.png", "a/y.png"])
    paths, labels, names = data.list_images(tmp_path / "src")
    assert [path.relative_to(tmp_path / "src").as_posix() for path in paths] == ["a/y.png", "b/a/2.png", "b/a.png", "b/z/1.png"]
    assert labels.tolist() == [0, 1, 1, 1] and names == ["a", "b"]
    assert data.list_images(pets(tmp_path / "one", ["cat/1.png"]))[2] == ["cat"]        # one class is a class


def test_rotated_files_as_the_papers_and_as_people_see_them(script, ilsvrc, tmp_path):
    exif, turned = Image.Exif(), ilsvrc / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    exif[0x0112] = 3                                                         # upside down
    WIDE.save(turned, exif=exif)
    script("data.py", "--src", "train", "--out", "data/imagenet64")
    script("data.py", "--src", "train", "--out", "data/mine", "--size", 64)
    official, mine = (Packed(tmp_path / "data" / name).images[0].astype(int) for name in ("imagenet64", "mine"))
    assert np.abs(official - center_crop(WIDE, 64).transpose(2, 0, 1)).mean() < 3
    assert np.abs(mine[:, ::-1, ::-1] - official).mean() < 3 < np.abs(mine - official).mean()


def test_splits_have_folders_of_their_own_and_are_named(cifar, script, tmp_path):
    words = ("data.py", "--dataset", "cifar10", "--src", "cifar-10-batches-py")
    script(*words)
    text = script(*words, "--split", "test")
    assert "warning" not in text and len(Packed(tmp_path / "data/cifar10-test")) == 20 and len(Packed(tmp_path / "data/cifar10")) == 100
    text = script("train.py", "--dataset", "cifar10", "--data", "data/cifar10-test", "--model", "vit-tiny", "--dry-run", "--batch-size", 1)
    assert "is the test split" in text
    (tmp_path / "cifar-10-batches-py/more").mkdir()
    for name in ("more/data_batch_1", "data_batch_1.npz"):
        os.link(tmp_path / "cifar-10-batches-py/data_batch_1", tmp_path / "cifar-10-batches-py" / name)
        assert "twice" in script(*words, "--out", "x", code=2)
        (tmp_path / "cifar-10-batches-py" / name).unlink()
    for labels in ([10] * 20, [-1] * 20):
        batch = pickle.dumps(dict(data=cifar[0][:20].reshape(20, -1), labels=labels))
        (tmp_path / "cifar-10-batches-py/data_batch_5").write_bytes(batch)
        assert "labels outside" in script(*words, "--out", "x", code=2)


def test_validation_batch_of_the_downsampled_imagenet(script, tmp_path):
    rows = np.random.RandomState(0).randint(0, 256, (5, 12288), np.uint8)
    (tmp_path / "val_data").write_bytes(pickle.dumps(dict(data=rows, labels=[1, 2, 3, 4, 5])))
    script("data.py", "--dataset", "imagenet64", "--src", ".", "--split", "val", "--out", "../val")
    assert len(Packed(tmp_path.parent / "val")) == 5
    for path in (tmp_path.parent / "val").iterdir():
        path.unlink()
    (tmp_path.parent / "val").rmdir()


@pytest.mark.parametrize("text", [b"cnumpy\nload\n.", b"cevil\n_reconstruct\n.", b"cbuiltins\neval\n.", b"c_codecs\nlookup\n.",
                                  b"cnumpy.core.multiarray\nfromfile\n.", b"ccodecs\nencode\n.", b"cx\nndarray\n."])
def test_no_other_name_is_looked_up(text):
    with pytest.raises(BadInput, match="foreign object"):
        files.Arrays(io.BytesIO(text)).load()


def test_a_damaged_pickle_does_not_reserve_memory(tmp_path):
    """LONG_BINPUT of a huge index: the unpickler in C would reserve 64 GB for it."""
    assert files.Arrays(io.BytesIO(b"\x80\x02]r\xff\xff\xff\xff.")).load() == []


def test_partition_tables_as_they_are_found(celeba, script, tmp_path):
    folder, table = celeba / "img_align_celeba", celeba / "list_eval_partition.txt"
    names, words = sorted(path.name for path in folder.iterdir()), ("data.py", "--dataset", "celeba64", "--src", folder)
    for i, text in enumerate(("\r\n".join(f"{name} 0" for name in names), "\ufeff" + "\n".join(f"{name}\t0" for name in names),
                              "\n".join(f"{name}, 0 " for name in [*names, names[0]]))):
        table.write_text(text, newline="")
        script(*words, "--out", f"x{i}")
        assert len(Packed(tmp_path / f"x{i}")) == 9
    table.write_text("\n".join(f"{name} 0" for name in names) + f"\n{names[0]} 1\n")
    assert "two lines" in script(*words, "--out", "y", code=2)
    table.unlink()
    for name in ("000000.jpg", "202600.jpg", "\u0661\u0661\u0661\u0661\u0661\u0661.jpg"):
        FACE.save(folder / name)
        assert "000001.jpg to 202599.jpg" in script(*words, "--out", "y", code=2)
        (folder / name).unlink()
