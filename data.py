"""Images in, batches out: the built-in shapes, the packed format, and `python data.py` that makes it.

    python data.py --src DIR --size 64 --out data/NAME   # sub-folders are the classes (or none); restartable
    python data.py --dataset imagenet64 --src ILSVRC/train   # as the papers prepare it, into data/imagenet64
    python data.py --check data/NAME                     # counts, classes and a contact sheet

A packed folder holds images.npy, uint8 (N,3,S,S), or latents.npy, float16 (N,8,S/8,S/8), which vae.py writes,
labels.npy, int64 (N,), and meta.json, which is written last: a folder without it is an unfinished pack.
"""
import colorsys
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from files import (ARCHIVES, Arrays, BadInput, Parser, StandIn, download, hash_file, lock, open_archive,
                   open_zip, opened, progress, read_json, replace, run, silent, unlock)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHUNK = 64                                       # images that a worker packs at a time
DATASETS = {  # what these names promise: side, classes, images in the training set
    "shapes":      (16,  8,      100_000),
    "cifar10":     (32,  10,     50_000),
    "celeba64":    (64,  0,      162_770),
    "imagenet64":  (64,  1000, 1_281_167),
    "imagenet128": (128, 1000, 1_281_167),
    "imagenet256": (256, 1000, 1_281_167),       # as latents, which vae.py makes
}


def generator(purpose, seed, k):
    """A CPU generator for number k of a purpose ("step" 7 of seed 0): the same numbers on every machine.
    PyTorch's mt19937 takes 32 bits, so k is added to a hash of the rest: no two of 2^32 k are alike.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed((int.from_bytes(digest[:4], "little") + k) % 2 ** 32)


# ----------------------------------------------------------------------------------- the built-in images

def polygon(corners, turn=0.0):
    """Corners of a regular polygon on the unit circle, from straight up, turned by a share of a full turn."""
    angles = [2 * math.pi * (turn - 0.25 + i / corners) for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def arc(x, radius, start, stop):
    """48 points of a circle around (x, 0)."""
    angles = [start + (stop - start) * i / 47 for i in range(48)]
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def heart(a):
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return math.sin(a) ** 3, -y / 16


CIRCLE = arc(0, 1, 0, 2 * math.pi)
SHAPES = {  # name: outline in the unit circle; a second outline is a hole
    "circle":   [CIRCLE],
    "ring":     [CIRCLE, [(x / 2, y / 2) for x, y in CIRCLE]],
    "square":   [polygon(4, turn=0.125)],
    "triangle": [polygon(3)],
    "cross":    [[(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                  (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]],
    "glass":    [[(-.8, -1), (.8, -1), (.12, 0), (.8, 1), (-.8, 1), (-.12, 0)]],
    "heart":    [[heart(2 * math.pi * i / 48) for i in range(48)]],
    "moon":     [arc(0, 1, 0.3 * math.pi, 1.7 * math.pi) + arc(0.588, 0.809, 1.5 * math.pi, 0.5 * math.pi)],
}


def draw_shape(index, size):
    """uint8 (size,size,3) of class index % 8: free colours, mild changes of place, scale and angle."""
    rng = random.Random(index)                   # numbers in a fixed order, none of them dependent on size
    shape = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.8, 1))
    ground = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.1, 0.4))
    x0, y0, scale, angle = (rng.uniform(*r) for r in ((.42, .58), (.42, .58), (.31, .42), (-.3, .3)))
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    fill = [tuple(round(255 * value) for value in colour) for colour in (shape, ground)]
    image = Image.new("RGB", (4 * size, 4 * size), fill[1])
    for outline, colour in zip(list(SHAPES.values())[index % len(SHAPES)], fill):
        ImageDraw.Draw(image).polygon([(4 * size * (x0 + x * c - y * s), 4 * size * (y0 + x * s + y * c))
                                       for x, y in outline], fill=colour)
    return np.asarray(image.reduce(4))           # 4 x 4 averages: anti-aliased


def shapes(indices, size):
    """uint8 (N,3,size,size) and int64 labels (N,); image i depends on i and size alone."""
    images = np.stack([draw_shape(int(i), size) for i in indices]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.array([int(i) % len(SHAPES) for i in indices], dtype=np.int64)


# ------------------------------------------------------------------------------------ batches (training)

class Images:
    """images, labels int64 (N,) and meta (dict), from anywhere, as batches for training.

    images are uint8 (N,3,S,S), or latents: float16 (N,8,S,S), mean and std of the posterior, unscaled.
    """

    def __init__(self, images, labels, meta, flip=False):
        self.images, self.labels, self.meta, self.flip = images, labels, meta, flip
        self.latents = images.shape[1] == 8
        self.size, self.channels, self.classes = images.shape[2], 4 if self.latents else 3, meta["classes"]

    def __len__(self):
        return len(self.images)

    def batch(self, indices, generator=None, rows=slice(None)):
        """x float32 (B,C,S,S) in [-1,1], or scaled latents, and y int64 (B,) of indices[rows].

        Flips (given flip=True and a generator) and the posterior's noise are drawn for all the indices and
        then cut to `rows`, so a process that loads its share of a global batch sees what a single one would
        have seen there. Without a generator: no flips, and the posterior's mean.
        """
        chosen = np.asarray(indices)[rows]
        x = torch.as_tensor(self.images[chosen]).float()
        if self.latents:
            mean, std = x.chunk(2, 1)
            if generator is not None:
                noise = torch.randn(len(indices), *mean.shape[1:], generator=generator)[rows]
                mean = mean + std * noise.to(mean.device)
            return mean * self.meta["scale"], torch.from_numpy(self.labels[chosen])
        x.div_(127.5).sub_(1)
        if self.flip and generator is not None:
            flip = torch.rand(len(indices), generator=generator)[rows] < 0.5
            x[flip] = x[flip].flip(3)
        return x, torch.from_numpy(self.labels[chosen])

    def to(self, device):
        """Hold all the images in the device's memory."""
        first = torch.as_tensor(self.images[np.arange(1)])
        whole = torch.empty(len(self), *first.shape[1:], dtype=first.dtype, device=device)
        for i in range(0, len(self), 4096):
            whole[i:i + 4096] = torch.as_tensor(self.images[np.arange(i, min(i + 4096, len(self)))])
        self.images = whole
        return self


class Drawn:
    """The built-in images as an array (N,3,size,size) that is drawn where it is read, 0.1 ms an image."""

    def __init__(self, count, size):
        self.shape = (count, 3, size, size)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        return shapes(indices, self.shape[2])[0]


def built_in(size, count=100_000, flip=False):
    """The first `count` shapes as a data set."""
    meta = dict(dataset="shapes", split="train", count=count, size=size, classes=list(SHAPES))
    return Images(Drawn(count, size), np.arange(count) % len(SHAPES), meta, flip)


class Packed(Images):
    """A packed folder, memory-mapped. Raises BadInput where it is none, unfinished or contradicts itself."""

    @silent()
    def __init__(self, dir, flip=False):
        dir = Path(dir)
        if not (dir / "meta.json").is_file():
            state = "an unfinished pack" if (dir / "packing.json").exists() else "no packed data set"
            raise BadInput(f"{dir}: {state}, no meta.json; python data.py --src ... --out {dir} makes it")
        meta = read_json(dir / "meta.json")
        try:
            kind = "latents" if (dir / "latents.npy").exists() else "images"
            if not all((dir / f"{name}.npy").is_file() for name in (kind, "labels")):    # a pipe would block
                raise TypeError(f"{kind}.npy, labels.npy: expected files")
            images, labels = (np.load(dir / f"{name}.npy", mmap_mode="r") for name in (kind, "labels"))
            (channels, side), dtype = ((8, meta["size"] // 8), "float16") if kind == "latents" else \
                                      ((3, meta["size"]), "uint8")
            shape, names = (meta["count"], channels, side, side), meta["classes"]
            if kind == "latents" and not (type(meta["scale"]) is float and 0 < meta["scale"] < math.inf):
                raise ValueError("scale: expected a positive number")
            if any(type(meta.get(key, "")) is not str for key in ("dataset", "split", "vae_file")):
                raise TypeError("dataset, split, vae_file: expected names")
            if type(meta.get("vae") or {}) is not dict:
                raise TypeError("vae: expected a JSON object")
            if type(names) is not list or any(type(name) is not str for name in names):
                raise TypeError("classes: expected a list of names")
            if any(type(number) is not int or number < 1 for number in shape):
                raise TypeError("count, size: expected positive numbers")
            if any(type(array) is not np.memmap for array in (images, labels)):
                raise TypeError("images, labels: expected .npy files")
        except Exception as error:                                       # whatever damage makes numpy raise
            raise BadInput(f"{dir}: damaged pack ({type(error).__name__}: {error})") from None
        for name, array, expected in ((kind, images, (np.dtype(dtype), shape)),
                                      ("labels", labels, (np.dtype("int64"), shape[:1]))):
            if (array.dtype, array.shape) != expected:
                raise BadInput(f"{dir}/{name}.npy: found {array.dtype} {array.shape}, meta.json promises "
                               f"{expected[0]} {expected[1]}")
        labels = np.array(labels)
        low, high = labels.min(initial=0), labels.max(initial=0)
        if low < 0 or high >= max(1, len(names)):
            raise BadInput(f"{dir}/labels.npy: found {low} .. {high}, expected {len(names)} classes")
        super().__init__(images, labels, meta, flip)


# ------------------------------------------------------------------------------- image files and their crops

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no others: Pillow runs Ghostscript for some
Image.MAX_IMAGE_PIXELS = 1 << 26                 # Pillow refuses twice as many, 134 million


@silent()
def load_image(path, plain=False):
    """Any image file -> 8-bit RGB as a person sees it: upright by EXIF, 16-bit grey scaled to 8, see-through
    parts on white, CMYK and palettes converted; `plain` converts and no more, as the papers did. Raises
    BadInput that names the file where it cannot be read.
    """
    try:
        with opened(Path(path)) as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            if max(image.size) > 400 * min(image.size):
                raise BadInput(f"{image.width} x {image.height} pixels are too narrow to crop a square from")
            rgb = lambda image: image if image.mode == "RGB" else image.convert("RGB")     # spare a copy
            if plain:
                return rgb(image)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):                                   # 16 bits; convert() would clip
                grey = np.asarray(image).astype(np.int32).clip(0, 65535)
                image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
            elif image.mode == "F":
                raise BadInput("floating-point pixels have no agreed range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return rgb(image)
    except Exception as error:                                           # whatever damage makes Pillow raise
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def center_crop(image, size):
    """ADM's crop, uint8 (size,size,3): box-halve while a side is >= 2 size, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def celeba_crop(image, size):
    """ScoreSDE's crop of CelebA's aligned images, uint8 (size,size,3): the central 140 x 140, then bilinear
    with antialiasing.
    """
    if image.size != (178, 218):
        raise BadInput(f"found {image.width} x {image.height} pixels, expected img_align_celeba's 178 x 218")
    return np.asarray(image.crop((19, 39, 159, 179)).resize((size, size), Image.BILINEAR))


@silent()
def read_batch(path):
    """A published batch of small images, a pickle or .npz -> uint8 (N,3,S,S), labels as published (N,)."""
    try:
        with opened(path) as file:
            if path.suffix == ".npz":
                open_zip(file, file.seek(0, 2))
                file.seek(0)
            kept = np.load(file) if path.suffix == ".npz" else Arrays(file, encoding="latin1").load()
            rows, labels = (part.array() if isinstance(part, StandIn) else part
                            for part in (kept["data"], kept["labels"]))
        if type(labels) is list and all(type(label) is int for label in labels):
            labels = np.array(labels)
        side = math.isqrt(rows.shape[1] // 3)
        if rows.dtype != np.uint8 or labels.dtype.kind != "i" or not len(labels) == len(rows) > 0:
            raise TypeError(f"data {rows.dtype} {rows.shape}, labels {labels.dtype}")
        return rows.reshape(len(rows), 3, side, side), labels.astype(np.int64)
    except Exception as error:                                           # whatever damage makes them raise
        why = error if isinstance(error, BadInput) else f"damaged, {type(error).__name__}: {error}"
        raise BadInput(f"{path}: not a batch of images ({why})") from None


held_batch = functools.lru_cache(maxsize=1)(read_batch)                      # a worker reads row after row


def square(path, size, dataset=None):
    """uint8 (3,size,size) of an image file, or of row `path.name` of a published batch. The papers' data sets
    are read as the papers did, which knew no EXIF.
    """
    if path.name.isdecimal():
        image = held_batch(path.parent)[0][int(path.name)]
        if image.shape[1] != size:
            raise BadInput(f"{path.parent}: found images of side {image.shape[1]}, expected {size}")
        return image
    image = load_image(path, plain=dataset in DATASETS)
    try:
        return (celeba_crop if dataset == "celeba64" else center_crop)(image, size).transpose(2, 0, 1)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


# ------------------------------------------------------------------------ what is on disk -> paths and labels

def entries(src):
    """-> (base, names below it): the files in a folder or an archive, and its folders, which end with "/". An
    archive's only folder is unwrapped; hidden files are left out.
    """
    def stop(error):
        raise error
    if src.is_dir():
        names, seen = [], set()
        for top, folders, files in os.walk(src, onerror=stop, followlinks=True):
            if (real := os.path.realpath(top)) in seen:
                raise BadInput(f"--src {src}: {top} links to {real}, which is there already")
            seen.add(real)
            below = [*(f"{name}/" for name in folders), *files]
            names += [os.path.join(top, name)[len(str(src)) + 1:] for name in below]
    elif not src.is_file() or src.suffix.lower() not in ARCHIVES:
        raise BadInput(f"--src {src}: no such folder, .zip or .tar.gz")
    else:
        try:
            kept = open_archive(src, os.getpid())
            names = kept.namelist() if isinstance(kept, zipfile.ZipFile) else \
                [member.name + "/" * member.isdir() for member in kept if member.isdir() or member.isreg()]
        except Exception as error:                                       # whatever damage makes them raise
            raise BadInput(f"--src {src}: cannot be read as an archive ({error})") from None
        if odd := [name for name in names if re.search(r"^/|//|\\|(^|/)\.\.(/|$)", name)]:
            raise BadInput(f"--src {src}: holds {odd[0]!r}, expected names relative to its top")
        names = [name.removeprefix("./") for name in names]                  # of tar czf x.tar.gz .
    names = [name for name in names if name and not re.search(r"(^|/)(\.|__MACOSX)", name)]
    base = os.path.commonprefix([name.partition("/")[:2] for name in names])      # the only folder at the top
    if src.is_file() and base[1:] == ("/",):
        return src / base[0], [name[len(base[0]) + 1:] for name in names if name != base[0] + "/"]
    return src, names


def list_images(src):
    """Paths below src in a fixed order, label of each, class names. Sub-folders of src are the classes,
    sorted by name (by number where all are numbers); a folder without sub-folders has none.
    """
    base, names = entries(Path(src))
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    if all(folder.isascii() and folder.isdecimal() for folder in folders):
        folders.sort(key=int)
    label = {folder: number for number, folder in enumerate(folders)}
    images = [name.split("/") for name in names if name.lower().endswith(SUFFIXES)]
    if loose := [name for name, *below in images if folders and not below]:
        raise BadInput(f"{base / loose[0]}: an image beside class folders ({folders[0]}, ...) has no class")
    if not images:
        raise BadInput(f"--src {src}: no images found ({' '.join(SUFFIXES)})")
    images.sort(key=lambda parts: (label.get(parts[0], 0), parts))
    labels = [label.get(parts[0], 0) for parts in images]
    return [base.joinpath(*parts) for parts in images], np.array(labels, dtype=np.int64), folders


def imagenet():
    """-> ImageNet's 1,000 wnids, sorted as the labels are, their numbers in the ILSVRC kit, their names."""
    table = Path(__file__).parent / "assets" / "imagenet.txt"
    return zip(*(line.split(" ", 2) for line in table.read_text().splitlines()))


def list_imagenet(src):
    """ILSVRC's training folders, one a wnid: all of them and no others."""
    paths, labels, folders = list_images(src)
    wnids, _, names = imagenet()
    if lacking := sorted(set(wnids) - set(folders)) or sorted(set(folders) - set(wnids)):
        which = "lacks" if lacking[0] in wnids else "is no class:"
        raise BadInput(f"--src {src}: found {len(folders)} class folders, expected ImageNet's 1,000 wnids; "
                       f"{which} {lacking[0]}")
    return paths, labels, list(names)


def list_celeba(src, split):
    """CelebA's aligned images of one split, by their numbers in list_eval_partition.txt, or .csv, if it lies
    with them, else by the ranges of numbers that it holds: train to 162,770, val to 182,637, test to 202,599.
    """
    src = Path(src)
    splits = ("train", "val", "test")
    if split not in splits:
        raise BadInput(f"--split {split}: expected {', '.join(splits)}")
    base, names = entries(src)
    names = [name for name in names if name.lower().endswith(SUFFIXES)]
    found = {Path(name).stem: base / name for name in names}
    if len(found) != len(names):
        raise BadInput(f"--src {src}: holds several images of one number, expected img_align_celeba alone")
    right = lambda number: re.fullmatch("[0-9]{6}", number) and 1 <= int(number) <= 202_599
    if odd := [path for number, path in found.items() if not right(number)]:
        raise BadInput(f"{odd[0]}: expected CelebA's aligned images, 000001.jpg to 202599.jpg")
    tables = [folder / kit / f"list_eval_partition{end}" for folder in (src, *src.resolve().parents[:2])
              for kit in ("", "Eval") for end in (".txt", ".csv")]
    if table := next((table for table in tables if table.is_file()), None):
        text = table.read_text(encoding="utf-8-sig", errors="replace")
        lines = re.findall(r"^([0-9]{6})\.\w+[\t ,]+([012])\s*$", text, re.M)
        part = {number: int(k) for number, k in lines}
        if len(part) != len(set(lines)):
            raise BadInput(f"{table}: has two lines for one image")
    else:
        part = {number: (int(number) > 162_770) + (int(number) > 182_637) for number in found}
    if lost := sorted(found.keys() - part.keys()):
        raise BadInput(f"{table}: has no line for {found[lost[0]].name}")
    paths = [path for number, path in sorted(found.items()) if splits[part[number]] == split]
    if not paths:
        raise BadInput(f"--src {src}: no images of the {split} split found")
    return paths, np.zeros(len(paths), dtype=np.int64), []


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_FILE = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")
BATCHES = {("cifar10", "train"): r"data_batch_(\d+)", ("cifar10", "test"): r"test_batch()",
           ("imagenet64", "train"): r"train_data_batch_(\d+)", ("imagenet64", "val"): r"val_data()"}


def list_batches(src, dataset, split):
    """Published batches of small images, CIFAR-10's or the downsampled ImageNet's, or () where there are
    none; path `FILE/k` is row k.
    """
    if (dataset, split) not in BATCHES:
        return ()
    pattern = re.compile(BATCHES[dataset, split] + r"(\.npz)?")
    base, names = entries(Path(src))
    matches = [(pattern.fullmatch(name.split("/")[-1]), name) for name in names]
    files = dict(sorted((int(match[1] or 0), base / name) for match, name in matches if match))
    if len(files) != sum(bool(match) for match, _ in matches):
        raise BadInput(f"--src {src}: holds a batch of one number twice")
    files = list(files.values())
    labels = [read_batch(file)[1] for file in files]
    if not files:
        return ()
    paths = [file / str(k) for file, part in zip(files, labels) for k in range(len(part))]
    labels, names = np.concatenate(labels), CIFAR10
    if dataset == "imagenet64":                                          # labelled 1 .. 1000, the kit's order
        _, numbers, names = imagenet()
        place = np.full(1001, -1)
        place[np.array(numbers, dtype=int)] = range(1000)
        labels = np.where((labels > 0) & (labels <= 1000), place[labels.clip(0, 1000)], -1)
    if labels.min() < 0 or labels.max() >= len(names):
        raise BadInput(f"--src {src}: found labels outside the {len(names)} classes of {dataset}")
    return paths, labels, list(names)


def listing(src, dataset, split):
    """-> paths, labels, class names, (crop, filter) of a data set of the papers or any folder of images."""
    found = list_batches(src, dataset, split)
    if found:
        return *found, ("as published", "as published")
    if dataset == "cifar10":
        raise BadInput(f"--src {src}: found no CIFAR-10 of --split {split}, expected cifar-10-batches-py or "
                       "cifar-10-python.tar.gz, of train or test")
    if dataset == "celeba64":
        return *list_celeba(src, split), ("center 140 (ScoreSDE)", "bilinear, antialiased")
    found = list_imagenet(src) if dataset in DATASETS else list_images(src)
    return *found, ("center (ADM)", "box halving, then bicubic")


# --------------------------------------------------------------------------------- packing, in processes

def end_with_parent():
    """Worker start: Ctrl-C is the parent's business, and a killed parent leaves no worker behind."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    unlock()                                     # the run's lock ends with the run, not with its last worker
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def crop_chunk(paths, size, dataset, mirror=False):
    """Worker: uint8 (n,3,size,size); with `mirror` every second path is the one before it again, flipped."""
    rows = []
    for j, path in enumerate(paths):
        rows.append(rows[-1][:, :, ::-1] if mirror and j % 2 else square(path, size, dataset))
    return np.stack(rows)


def pack_chunk(paths, size, dataset, file, first):
    """Worker: crop `paths` and write them to rows first, first + 1, ... of the memory map."""
    rows = np.lib.format.open_memmap(file, mode="r+")
    rows[first:first + len(paths)] = crop_chunk(paths, size, dataset)
    rows.flush()


def in_workers(task, jobs, workers):
    """task(*job) of every job, in order, worked on ahead in processes."""
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        waiting = []
        try:
            for job in jobs:
                waiting.append(pool.submit(task, *job))
                if len(waiting) > 3 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BrokenProcessPool:
            raise BadInput("a worker process was killed (out of memory?); run again") from None
        finally:
            pool.shutdown(cancel_futures=True)


def facts(meta):
    """What of a pack's meta makes its content, as one hash: all but the names it goes by."""
    kept = {key: meta[key] for key in sorted(meta) if key not in ("dataset", "vae_file")}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


fingerprint = facts


def class_names(dataset):
    """The class names of a published data set, in the order of its labels; [] where there are none."""
    if dataset == "cifar10":
        return CIFAR10
    return list(imagenet())[2] if dataset.startswith("imagenet") else []


def plan(src, out, size, split="train", classes=None, dataset=None, repeat=1, **more):
    """-> paths, labels and meta of a pack of the images below `src`, each `repeat` times, in folder `out`."""
    src, out = Path(src), Path(out)
    dataset = dataset or out.name
    if dataset == "shapes":
        raise BadInput(f"--out {out}: shapes are built in; choose another name")
    if out.resolve().is_relative_to(src.resolve()):
        raise BadInput(f"--out {out}: lies in --src {src}; expected another place")
    paths, labels, names, (crop, filter) = listing(src, dataset, split)
    if classes is not None and len(names) != classes:
        raise BadInput(f"--src {src}: found {len(names)} class folders, expected {classes}")
    official = DATASETS.get(dataset, (0, 0, 0))[2]
    if official and split == "train" and len(paths) != official and os.environ.get("RANK", "0") == "0":
        print(f"warning: found {len(paths):,} images, the training set of {dataset} has {official:,}")
    digest = hashlib.sha256()
    for path, label in zip(paths, labels):
        digest.update(f"{path.relative_to(src)}\0{label}\n".encode("utf-8", "surrogateescape"))
    paths, labels = [path for path in paths for _ in range(repeat)], labels.repeat(repeat)
    meta = dict(dataset=dataset, split=split, count=len(paths), size=size, classes=names,
                listing=digest.hexdigest(), crop=crop, filter=filter, **more)
    if (out / "meta.json").exists():
        if facts(Packed(out).meta) != facts(meta):
            raise BadInput(f"--out {out}: already holds another packed data set; choose a new folder")
        for name in ("packing.json", "done.npy"):                        # of one killed after its last step
            (out / name).unlink(missing_ok=True)
    return paths, labels, meta


OURS = {"images.npy", "latents.npy", "done.npy", "labels.npy", "packing.json.0.part", "meta.json.0.part"}


def begin(out, kind, row, dtype, meta):
    """-> memory maps of `kind`.npy, (count, *row), and of done.npy, 1 for every CHUNK of rows that is there:
    new ones, or those that a killed pack of the same `meta` left.
    """
    file, flags, journal = (out / name for name in (f"{kind}.npy", "done.npy", "packing.json"))
    shape, chunks = (meta["count"], *row), (-(-meta["count"] // CHUNK),)
    if not journal.exists() and out.exists():
        if not (out.is_dir() and {path.name for path in out.iterdir()} <= OURS):
            raise BadInput(f"--out {out}: holds other things; expected a new folder")
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if (out / "meta.json").exists():
        raise BadInput(f"--out {out}: was packed by another run meanwhile")
    if not journal.exists():
        for name in ("images.npy", "latents.npy"):                       # of a pack killed before its journal
            (out / name).unlink(missing_ok=True)
        try:
            np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
            if hasattr(os, "posix_fallocate"):                           # a full disk shows now
                with open(file, "rb+") as f:
                    os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
            np.save(flags, np.zeros(chunks, dtype=np.uint8))
        except OSError as error:
            raise BadInput(f"{file}: cannot be written ({error.strerror or error})") from None
        replace(journal, lambda f: f.write(json.dumps(meta).encode()))
    try:
        before = read_json(journal)
        rows, done = (np.load(path, mmap_mode="r") for path in (file, flags))    # "r+" lengthens a cut file
        if (facts(before), rows.dtype, rows.shape, done.dtype, done.shape) == \
                (facts(meta), np.dtype(dtype), shape, np.uint8, chunks):
            return tuple(np.lib.format.open_memmap(path, mode="r+") for path in (file, flags))
    except Exception:                                                    # whatever damage makes numpy raise
        pass
    raise BadInput(f"--out {out}: an unfinished pack of other images or flags, or damaged; remove it")


def finish(out, labels, meta):
    """Write what makes a pack complete, meta.json last."""
    replace(out / "labels.npy", lambda f: np.save(f, labels))
    replace(out / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
    for name in ("packing.json", "done.npy"):
        (out / name).unlink(missing_ok=True)
    size = f"{meta['size']} x {meta['size']}"
    print(f"{out}: {meta['count']:,} images of {size}, {len(meta['classes'])} classes")


def pack(src, size, out, split="train", classes=None, dataset=None, workers=None):
    """Pack the images below `src` into folder `out`; after a kill it goes on, to the same bytes."""
    out, workers = Path(out), os.cpu_count() if workers is None else workers
    if workers < 1:
        raise BadInput(f"--workers: found {workers}, expected at least 1")
    paths, labels, meta = plan(src, out, size, split, classes, dataset)
    if paths[0].name.isdecimal():
        workers = 1                              # each holds the batch it reads; copying rows is no work
    if (out / "meta.json").exists():
        return print(f"{out}: already packed, {len(paths):,} images")
    _, done = begin(out, "images", (3, size, size), np.uint8, meta)
    todo, since, start = np.flatnonzero(done == 0), time.monotonic(), int(done.sum()) * CHUNK
    jobs = [(paths[i * CHUNK:(i + 1) * CHUNK], size, meta["dataset"], out / "images.npy", i * CHUNK)
            for i in todo]
    for _, i in zip(in_workers(pack_chunk, jobs, workers), todo):
        done[i] = 1
        progress("packed", min(int(done.sum()) * CHUNK, len(paths)), len(paths), since, start)
    finish(out, labels, meta)


def tile(images, columns):
    """uint8 (N,3,S,S) -> one PIL image, `columns` to a row, unfilled places grey."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, 3, h, w), 128, dtype=np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, 3, h, w).transpose(0, 3, 1, 4, 2)   # (rows,h,columns,w,3)
    return Image.fromarray(sheet.reshape(rows * h, columns * w, 3))


def check(dir):
    """Print what a packed folder holds and draw 64 of its images."""
    data = Packed(dir)
    counts = np.bincount(data.labels, minlength=len(data.classes))
    print(json.dumps({key: value for key, value in data.meta.items() if key != "classes"}))
    print(f"{len(data):,} images, {len(data.classes)} classes")
    for label, name in enumerate(data.classes[:20]):
        print(f"{label:5d}  {counts[label]:9,}  {name!r}")
    if len(data.classes) > 20:
        last, most = len(data.classes) - 1, counts.max()
        print(f"  ...  last: {last} {data.classes[last]!r}; {counts.min()} .. {most} images a class")
    if data.latents:
        return print("latents: no contact sheet; vae.py made them")
    sheet = Path(dir) / "sheet.png"
    picks = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)
    replace(sheet, lambda f: tile(data.images[picks], 8).save(f, "PNG"))
    print(f"contact sheet: {sheet.resolve()}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=[name for name in DATASETS if name not in ("shapes", "imagenet256")],
        help="one of the papers' (default: the last part of --out, if it is one)")
    add("--src", help="folder or .zip of images, its sub-folders are the classes; or as published:\n"
                      "cifar-10-python.tar.gz, img_align_celeba, ILSVRC's train, train_data_batch_*")
    add("--download", action="store_true", help="fetch cifar10, into data/; the others ask you to register")
    add("--size", type=int, help="side of the packed images in pixels (default: the data set's)")
    add("--out", help="packed folder to write, such as data/NAME (default: data/DATASET, data/DATASET-SPLIT)")
    add("--split", default="train", help="val and test where they are published; recorded in meta.json")
    add("--classes", type=int, help="refuse a source with another number of class folders")
    add("--workers", type=int, help="processes that decode (default: one a core)")
    add("--check", metavar="DIR", help="print what a packed folder holds and draw a contact sheet")
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    out = Path(args.out or f"data/{args.dataset}" + f"-{args.split}" * (args.split != "train"))
    dataset = args.dataset or (out.name if out.name in DATASETS else None)
    side = DATASETS[dataset][0] if dataset else None
    if args.download:
        if dataset != "cifar10" or args.src:
            raise BadInput("--download: expected --dataset cifar10 and no --src")
        args.src = Path("data") / CIFAR10_FILE[0].split("/")[-1]
        if not args.src.exists():
            download(CIFAR10_FILE[0], args.src, CIFAR10_FILE[1], "--src")
        if hash_file(args.src) != CIFAR10_FILE[1]:
            raise BadInput(f"{args.src}: its SHA-256 is not {CIFAR10_FILE[1]}; remove it")
    if not args.src or not (args.out or args.dataset) or (args.size or side or 0) < 1:
        raise BadInput("expected --dataset NAME --src DIR, or --src DIR --size S (1 or more) --out data/NAME,"
                       " or --check data/NAME")
    if side and args.size not in (None, side):
        raise BadInput(f"--size: found {args.size}, {dataset} has {side}")
    pack(args.src, args.size or side, out, args.split, args.classes, dataset, args.workers)


if __name__ == "__main__":
    run(main)
