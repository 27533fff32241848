"""Images in, batches out: the built-in shapes, the packed format, and `python data.py` that makes it.

    python data.py --src DIR --size 64 --out data/NAME        # classes: dataset.json, or sub-folders, or none
    python data.py --dataset imagenet64 --src ILSVRC/train    # as the papers prepare it, into data/imagenet64

A packed folder holds images.npy, uint8 (N,3,S,S), or latents.npy, float16 (N,8,S/8,S/8), which vae.py writes,
labels.npy, int64 (N,), and meta.json. An image's label is -1 until the image is there, so the labels say what
is left to do, and the same command goes on after a kill, or when broken images are mended.
"""
import collections
import colorsys
import glob
import hashlib
import json
import os
import random
import re
import tarfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from files import (BadInput, Parser, at_least, download, env, progress, read_json, replace, run, say,
                   write_json)

CHUNK = 32                                       # images that one thread reads, encodes and writes at once
SUFFIXES = tuple(".png .jpg .jpeg .jpe .jfif .pjpeg .webp .bmp .gif .tif .tiff .ppm .pgm".split())
LABEL_SUFFIXES = set(".cls .csv .json .jsonl .npy .parquet .tsv .txt .xml".split())  # of files that may hold labels
SPLIT = r"(?i:(train|training|val|valid|validation|test)[-_]?(set)?\d*)"     # as folders are called
DARK = 20            # of 255: 12 bits in a 16-bit file become at most 16, and a crop overshoots a little
IMAGENETS = ("imagenet64", "imagenet128", "imagenet256")                     # the last as latents, by vae.py
DATASETS = {  # what these names promise: side, classes, images in the training set
    "shapes":      (16,  8,      100_000),
    "cifar10":     (32,  10,     50_000),
    "celeba64":    (64,  0,      162_770),
    "imagenet64":  (64,  1000, 1_281_167),
    "imagenet128": (128, 1000, 1_281_167),
    "imagenet256": (256, 1000, 1_281_167),
}


def generator(purpose, seed, k):
    """A CPU generator for number k of a purpose ("step" 7 of seed 0): the same numbers on every machine.

    PyTorch's mt19937 takes 32 bits, so k is added to a hash of the rest: the numbers of one purpose and seed
    never coincide, those of two may by chance.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    first = int.from_bytes(digest[:4], "little")
    return torch.Generator().manual_seed((first + k) % 2 ** 32)


# ---------------------------------------------------------------------------------------- the built-in images

def arc(centre, radius, start, stop, points=48):
    """Points on a circle, complex, from angle start to angle stop in half turns. 4 points close a triangle."""
    return centre + radius * np.exp(1j * np.pi * np.linspace(start, stop, points))


def heart():
    a = 2 * np.pi * np.arange(48) / 48
    waves = np.cos(np.outer(a, [1, 2, 3, 4]))
    y = waves @ [13, -5, -2, -1]
    return np.sin(a) ** 3 - 1j * y / 16


SHAPES = {  # name: outline about the origin, x + y j with y pointing down; a second outline is a hole
    "circle":   [arc(0, 1, 0, 2)],
    "ring":     [arc(0, 1, 0, 2), arc(0, 0.5, 0, 2)],
    "square":   [arc(0, 1, -0.25, 1.75, points=5)],
    "triangle": [arc(0, 1, -0.5, 1.5, points=4)],
    "cross":    [np.outer([1, 1j, -1, -1j],      # an arm, turned by quarters
                          [-.3 - 1j, .3 - 1j, .3 - .3j]).ravel()],
    "glass":    [np.array([-.8 - 1j, .8 - 1j, .12 + 0j,
                           .8 + 1j, -.8 + 1j, -.12 + 0j])],
    "heart":    [heart()],
    # both arcs of the moon end in cos(0.3 pi) +- sin(0.3 pi) j = 0.588 +- 0.809 j
    "moon":     [np.append(arc(0, 1, 0.3, 1.7),
                           arc(0.588, 0.809, 1.5, 0.5))],
}


def colour(rng, darkest, brightest):
    """Random red, green and blue, 0 .. 255, of a brightness from darkest to brightest."""
    hue, saturation = rng.random(), rng.uniform(0.2, 1)
    parts = colorsys.hsv_to_rgb(hue, saturation, rng.uniform(darkest, brightest))
    return tuple(round(255 * part) for part in parts)


def draw_shape(index, size):
    """uint8 (3,size,size) of class index % 8: free colours, mild changes of place, scale and angle."""
    rng = random.Random(index)                   # numbers in a fixed order, none of them dependent on size
    shape, ground = colour(rng, 0.8, 1), colour(rng, 0.1, 0.4)
    centre = complex(rng.uniform(.42, .58), rng.uniform(.42, .58))
    scale = rng.uniform(.31, .42)
    angle = rng.uniform(-.3, .3)
    side = 4 * size
    image = Image.new("RGB", (side, side), ground)
    outlines = list(SHAPES.values())[index % len(SHAPES)]
    for outline, fill in zip(outlines, (shape, ground)):
        points = side * (centre + scale * np.exp(1j * angle) * outline)
        ImageDraw.Draw(image).polygon(points.view(float).tolist(), fill)     # x, y, x, y, ...
    image = image.reduce(4)                      # 4 x 4 averages: anti-aliased
    return np.asarray(image).transpose(2, 0, 1)


def shapes(indices, size):
    """uint8 (N,3,size,size) and int64 labels (N,); image i depends on i and size alone."""
    images = np.array([draw_shape(int(i), size) for i in indices])
    return images, np.asarray(indices, dtype=np.int64) % len(SHAPES)


# ----------------------------------------------------------------------------------------- batches (training)

def send(tensor, device):
    """A tensor of the CPU on the device. The host does not wait for a GPU to take it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Images:
    """images, labels int64 (N,) and meta (dict), from anywhere, as batches for training.

    images are uint8 (N,3,S,S), or latents: float16 (N,8,S,S), mean and std of the posterior, unscaled.
    images may be any object with a shape that is indexed by an array of row numbers, such as Shapes. meta["classes"]
    lists the names of the classes, meta["scale"] is the factor of latents. Raises BadInput for labels that
    are not int64 or lie outside 0 .. classes - 1.
    """

    def __init__(self, images, labels, meta, flip=False):
        self.images, self.labels = images, labels
        self.meta, self.flip = meta, flip
        self.device = torch.device("cpu")                                    # where the images are
        self.latents = images.shape[1] == 8
        self.size = images.shape[2]
        self.channels = 4 if self.latents else 3
        self.classes = meta["classes"]
        fits = labels.dtype == np.int64 and labels.shape == images.shape[:1]
        if not fits or labels.min() < 0 or labels.max() >= max(1, len(self.classes)):
            name = meta.get("dataset", "the data")
            raise BadInput(f"labels of {name}: found {labels.dtype} {labels.shape} from {labels.min()} to "
                           f"{labels.max()}, expected int64 {images.shape[:1]} from 0 to "
                           f"{max(1, len(self.classes)) - 1}")

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, generator=None, rows=slice(None)):
        """x float32 (B,C,S,S) in [-1,1], or scaled latents, and y int64 (B,) of indices[rows].

        Flips (given flip=True and a generator) and the posterior's noise are drawn for all the indices and
        then cut to `rows`, so a process that loads its share of a global batch sees what a single one would
        have seen there. Without a generator: no flips, and the posterior's mean.
        """
        chosen = np.asarray(indices)[rows]
        y = torch.from_numpy(self.labels[chosen])
        if self.device.type != "cpu":
            chosen = send(torch.from_numpy(chosen), self.device)
        x = torch.as_tensor(self.images[chosen]).float()
        if self.latents:
            mean, std = x.chunk(2, 1)
            if generator is not None:
                noise = torch.randn(len(indices), *mean.shape[1:], generator=generator)[rows]
                mean = mean + std * send(noise, self.device)
            return mean * self.meta["scale"], y
        x.div_(127.5).sub_(1)
        if self.flip and generator is not None:
            flip = torch.rand(len(indices), generator=generator)[rows] < 0.5
            flip = send(flip, self.device)[:, None, None, None]
            x = torch.where(flip, x.flip(3), x)
        return x, y

    def to(self, device):
        """Hold all the images in the device's memory."""
        self.device = torch.device(device)
        self.images = torch.tensor(self.images[:], device=device)
        return self


class Shapes:
    """The first `count` shapes as an array (count,3,size,size); each is drawn where it is read, in 0.1 ms."""

    def __init__(self, count, size):
        self.shape = (count, 3, size, size)

    def __getitem__(self, indices):
        numbers = np.arange(self.shape[0])[indices]
        return shapes(numbers, self.shape[2])[0]


def built_in(size, count=100_000, flip=False):
    """The first `count` shapes as a data set."""
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    meta = dict(dataset="shapes", split="train", count=count, size=size, classes=list(SHAPES))
    return Images(Shapes(count, size), labels, meta, flip)


def layout(meta):
    """-> file name, dtype and shape of the array in a packed folder; only latents have a scale."""
    count, size = meta["count"], meta["size"]
    if "scale" in meta:
        return "latents.npy", "float16", (count, 8, size // 8, size // 8)
    return "images.npy", "uint8", (count, 3, size, size)


def load_array(file, dtype, shape):
    """A .npy file of this dtype and shape, memory-mapped. Raises BadInput."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from None
    if array.dtype != dtype or array.shape != shape:
        raise BadInput(f"{file}: found {array.dtype} {array.shape}, meta.json promises {dtype} {shape}")
    return array


class Packed(Images):
    """A packed folder, memory-mapped.

    Raises BadInput for a folder that is no pack, is unfinished, or contradicts itself.
    """

    def __init__(self, dir, flip=False):
        dir = Path(dir)
        if not (dir / "meta.json").exists():
            raise BadInput(f"{dir}: no packed data set, as it has no meta.json; python data.py --src DIR "
                           f"--size S --out {dir} makes one of images, vae.py one of latents")
        meta = read_json(dir / "meta.json")
        if not {"count", "size", "classes"} <= meta.keys():
            raise BadInput(f"{dir}: its meta.json is damaged")
        name, dtype, shape = layout(meta)
        images = load_array(dir / name, dtype, shape)
        labels = load_array(dir / "labels.npy", "int64", shape[:1])
        if labels.min() < 0:
            raise BadInput(f"{dir}: unfinished; the command that began it goes on")
        super().__init__(images, labels, meta, flip)


# -------------------------------------------------------------------------------- image files and their crops

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no others: Pillow runs Ghostscript for some
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
          Image.DecompressionBombError)          # what Pillow and zipfile raise for damaged files


def load_image(path, plain=False):
    """Any image file -> 8-bit RGB as a person sees it; path is a Path, or a zipfile.Path for one in a .zip.

    It is upright by EXIF, grey of 0 .. 65535 is scaled to 8 bits, see-through parts lie on white, CMYK and
    palettes are converted. `plain` converts and no more, as the papers did. Raises BadInput that names the file.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        if not plain:
            image = as_seen(image)
        return image.convert("RGB")
    except DAMAGE as error:
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def as_seen(image):
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):               # 16 or 32 bits, which convert() would clip
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadInput(f"pixels from {grey.min()} to {grey.max()}, expected 0 to 65535")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise BadInput("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image


def center_crop(image, size):
    """ADM's crop, uint8 (size,size,3): box-halve while a side is >= 2 size, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def celeba_crop(image, size):
    """ScoreSDE's crop of CelebA's aligned images: the central 140 x 140, then bilinear with antialiasing."""
    centre = image.crop((19, 39, 159, 179))
    return np.asarray(centre.resize((size, size), Image.BILINEAR))


SAID = set()                                     # lines of say_once, which threads call


def say_once(line):
    if line not in SAID:
        SAID.add(line)
        say(line)


def read_image(path, size, dataset):
    """uint8 (3,size,size) of an image file, of the papers' data as they read it."""
    image = load_image(path, plain=dataset in DATASETS)
    if min(image.size) < size:
        say_once(f"warning: images smaller than {size} x {size} are enlarged")
    if dataset != "celeba64":
        return center_crop(image, size).transpose(2, 0, 1)
    if image.size != (178, 218):
        raise BadInput(f"{path}: found {image.width} x {image.height} pixels, img_align_celeba has 178 x 218")
    return celeba_crop(image, size).transpose(2, 0, 1)


# ------------------------------------------------------------------------ what is on disk -> names and labels

def find_files(src):
    """-> the folder or .zip as a path, the names of the images below it in a fixed order, and of all else.

    Hidden files are left out, and so is the folder that a Mac adds to a .zip.
    """
    if src.is_dir():
        root, found = src, glob.glob("**", root_dir=src, recursive=True)
    elif zipfile.is_zipfile(src):
        root = zipfile.Path(src)
        found = root.root.namelist()
        if "\\" in "".join(found):
            raise BadInput(f"{src}: its names have \\ in place of /; unpack it and give the folder")
    else:
        raise BadInput(f"{src}: no folder or .zip")
    names = sorted(name.replace(os.sep, "/").rstrip("/") for name in found)
    names = [name for name in names if not re.search(r"(^|/)(\.|__MACOSX/)", f"{name}/")]
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    return root, images, set(names).difference(images)


def say_left_out(files):
    """Kinds and numbers of files that are not read, those that may hold labels as a warning."""
    kinds = collections.Counter(Path(name).suffix.lower() or "without suffix" for name in files)
    for words, chosen in (("left out:", kinds.keys() - LABEL_SUFFIXES),
                          ("warning: no labels are read from", kinds.keys() & LABEL_SUFFIXES)):
        if chosen:
            say(words, ", ".join(f"{kinds[kind]:,} {kind}" for kind in sorted(chosen)))


def by_folder(names, folders=()):
    """-> label of each image and class names, from images' names; folders are all that there are.

    The folders below the one that all images share are the classes, sorted by name. Images in no such folder
    have no classes. Raises BadInput for folders that are no classes: train, val, ... and 00000, 01000, ...
    """
    own = [os.path.dirname(name) for name in names]
    shared = os.path.commonpath(own)
    tops = [folder[len(shared):].strip("/").partition("/")[0] for folder in own]
    classes, labels = np.unique(tops, return_inverse=True)
    classes = classes.tolist()
    parts = [name for name in classes if re.fullmatch(rf"\d*000|{SPLIT}", name)]
    deep = any(re.match(rf"/?{SPLIT}/.*/", name[len(shared):]) for name in names)
    if deep or parts == classes:
        raise BadInput(f"--src: the folders {', '.join(parts[:3])} are parts of a data set, no classes; "
                       f"give one of them, .../{parts[0]}, or add --classes 0 to pack all without labels")
    if len(classes) > 1 and classes[0] == "":
        loose = names[tops.index("")]
        raise BadInput(f"--src: {loose} lies beside the class folders {classes[1]}, ..., so it has no class")
    above = shared
    if len(classes) == 1:
        say(f"all images are in one folder, {shared or '.'}: no classes; sub-folders would be classes")
        above = os.path.dirname(shared)
    beside = {Path(folder).name for folder in folders if os.path.dirname(folder) == above}
    say_empty(beside.difference(classes, [os.path.basename(shared)]))
    return labels.tolist(), [name for name in classes if name]


def say_empty(classes):
    if classes:
        say(f"warning: classes without images, {len(classes):,}: {', '.join(sorted(classes)[:10])}")


def by_json(file, names):
    """-> the same from a dataset.json of EDM or StyleGAN: {"labels": [[name, label], ...]}, or null for none.

    The classes are called 0, 1, ... Raises BadInput.
    """
    try:
        table = json.loads(file.read_text())["labels"]
        if table is None:
            return [0] * len(names), []
        if len(table) > len(names):
            say(f"warning: {file} has {len(table):,} labels for {len(names):,} images")
        table = dict(table)
        labels = [table[name] for name in names]
        wrong = [label for label in labels if type(label) is not int or not 0 <= label < 10 ** 6]
        if wrong:
            raise ValueError(wrong[0])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f'{file}: expected {{"labels": [[name, label], ...]}} with every image and '
                       f"labels from 0 on, found {error!r}; --classes 0 packs without labels") from None
    classes = [str(k) for k in range(max(labels) + 1)]
    say_empty(set(classes).difference(map(str, labels)))
    return labels, classes


def imagenet():
    """ImageNet's 1,000 classes, {wnid: name}, in the order of the labels."""
    table = Path(__file__).parent / "assets" / "imagenet.txt"
    lines = table.read_text().splitlines()       # wnid, number in the ILSVRC kit, name
    return dict(line.split(" ", 2)[::2] for line in lines)


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_SPLITS = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}


def read_cifar10(src, split):
    """cifar-10-binary.tar.gz -> uint8 (N,3,32,32), labels (N,). A record is a byte of label and 3,072 of image."""
    records = []
    try:
        with tarfile.open(src) as archive:
            for name in CIFAR10_SPLITS[split]:
                file = archive.extractfile(f"cifar-10-batches-bin/{name}.bin")
                batch = np.frombuffer(file.read(), np.uint8)
                records.append(batch.reshape(-1, 1 + 3 * 32 * 32))
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
        raise BadInput(f"--src {src}: no cifar-10-binary.tar.gz of --split {split} ({error!r})") from None
    records = np.concatenate(records)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def class_names(dataset):
    """The names of the classes of a published data set, or [] where it has none."""
    if dataset == "cifar10":
        return list(CIFAR10)
    return list(imagenet().values()) if dataset in IMAGENETS else []


CELEBA = {  # first and last number of each split
    "train": ("000001", "162770"),
    "val":   ("162771", "182637"),
    "test":  ("182638", "202599"),
}


def listing(src, size, dataset, split, labelled, skip_broken):
    """-> read, names, labels, class names, broken: a data set of the papers, or any folder or .zip of images.

    read(name) is the image uint8 (3,size,size). Of one that cannot be read it is black, and broken[name] is
    the error. skip_broken reads every image at once and takes those names away.
    """
    broken = {}
    if dataset == "cifar10":
        images, labels = read_cifar10(src, split)
        labels, classes = (labels.tolist(), CIFAR10) if labelled else ([0] * len(images), [])
        return images.__getitem__, range(len(images)), labels, classes, broken
    root, names, others = find_files(src)
    folders = {name for name in others if (root / name).is_dir()}
    say_left_out(others - folders - {"dataset.json", "protocol.json"})
    if dataset == "celeba64":                    # divided by number, as in list_eval_partition.txt
        first, last = CELEBA.get(split, ("", ""))
        names = [name for name in names if first <= Path(name).stem <= last]

    def read(name):
        try:
            return read_image(root / name, size, dataset)
        except BadInput as error:
            broken[name] = str(error)
            return np.zeros((3, size, size), np.uint8)

    if skip_broken:
        parts = [names[k:k + CHUNK] for k in range(0, len(names), CHUNK)]
        in_threads("checked", lambda part: list(map(read, part)), parts)
        names = [name for name in names if name not in broken]
    if not names:
        raise BadInput(f"--src {src}: found no images ({' '.join(SUFFIXES)}) of --split {split} "
                       "that can be read")

    table = root / "dataset.json"
    if not labelled:
        labels, classes = [0] * len(names), []
    elif table.exists():
        labels, classes = by_json(table, names)
    else:
        labels, classes = by_folder(names, folders)
    if dataset in IMAGENETS and labelled:
        if classes != sorted(imagenet()):
            raise BadInput(f"--src {src}: found {len(classes)} classes, {', '.join(classes[:3])}, ..., expected "
                           "ImageNet's 1,000 folders, n01440764 to n15075141, and no dataset.json")
        classes = class_names(dataset)
    return read, names, labels, classes, broken


# ---------------------------------------------------------------------------------------------------- packing

CROPS = {  # any other data set's is ADM's
    "cifar10":  "as published",
    "celeba64": "center 140, antialiased bilinear (ScoreSDE)",
}
UNHASHED = ("dataset", "vae_file")               # in a pack's meta: the names that it goes by


def fingerprint(meta):
    """What of a pack's meta makes its content, as one hash: all but the names it goes by."""
    content = {key: meta[key] for key in meta if key not in UNHASHED}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def begin(out, meta, rank):
    """Make folder out and its arrays, unless they are there: the images empty and every label -1.

    meta.json comes first and the labels last: where they are, the rest is there.
    Raises BadInput where it holds something else.
    """
    notes, labels = out / "meta.json", out / "labels.npy"
    # asked first, as rank 0 may write all between these lines; a kill may have left a .part
    foreign = out.exists() and any(file.suffix != ".part" for file in out.iterdir())
    if notes.exists():
        foreign = fingerprint(read_json(notes)) != fingerprint(meta)
    if foreign:
        raise BadInput(f"--out {out}: holds other images, or a pack that was begun with others or other "
                       "settings; remove it, or choose a new folder")
    if rank == 0 and not labels.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(notes, meta)
        name, dtype, shape = layout(meta)
        np.lib.format.open_memmap(out / name, "w+", dtype, shape)            # makes the file that fill() writes into
        nothing = np.full(shape[0], -1, dtype=np.int64)
        replace(labels, lambda file: np.save(file, nothing))
    while not labels.exists():                   # the first of several processes makes them
        time.sleep(0.1)


def pack(src, size, out, split="train", dataset=None, encode=None, rank=0, world=1, labelled=True,
         skip_broken=False, **more):
    """Pack the images below `src` into folder `out`; after a kill it goes on, to the same bytes.

    dataset is the name of the folder unless given; the papers' data sets are read as the papers read them.
    encode(images uint8 (n,3,S,S)) -> the array to store in their place, as vae.py does; several threads call it.
    Of several processes the one of number `rank` makes every `world`-th chunk. Without `labelled` there are no
    classes. skip_broken leaves out the images that cannot be read; else a BadInput names them when the others
    are packed. `more` goes into meta.json.
    """
    src, out = Path(src), Path(out)
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"--out {out}: lies in --src {src}")
    dataset = dataset or out.name
    if dataset == "shapes":
        raise BadInput("shapes: is the name of the built-in images; choose another")
    read, names, labels, classes, broken = listing(src, size, dataset, split, labelled, skip_broken)
    if broken:                                   # by now only with skip_broken
        more["broken"] = dict(count=len(broken), names=sorted(broken)[:10])
        say(f"warning: broken images left out, {len(broken):,}: {', '.join(sorted(broken)[:10])}")
        broken.clear()
    official = DATASETS.get(dataset, (0, 0, 0))[2]
    if split == "train" and official not in (0, len(names)):
        say(f"warning: found {len(names):,} images, the training set of {dataset} has {official:,}")
    digest = hashlib.sha256(json.dumps([*zip(names, labels)]).encode())
    labels = np.array(labels, dtype=np.int64)
    meta = dict(dataset=dataset, split=split, count=len(labels), size=size,
                classes=classes, listing=digest.hexdigest(),
                crop=CROPS.get(dataset, "box halving, bicubic, center (ADM)"), **more)
    brightest = []                               # value of each chunk

    def make(chunk):
        images = np.array([read(names[row]) for row in chunk])
        failed = [row for row in chunk if names[row] in broken]
        labels[failed] = -1                      # they stay to be done
        brightest.append(images.max())
        return encode(images) if encode else images

    begin(out, meta, rank)
    fill(out, meta, labels, make, rank, world)
    if not brightest and rank == 0:
        say(f"{out}: was packed already, nothing was read")
    look_back(out, broken, brightest, world)
    if np.load(out / "labels.npy").min() >= 0:
        some = ": " + ", ".join(classes[:10]) if classes else ""
        say(f"{out}: {len(labels):,} images of {size} x {size}, {len(classes)} classes{some}")


def look_back(out, broken, brightest, world):
    """Raise BadInput that names the broken images which this run met, or warn where all images are dark. One of
    several processes prints its line and ends well, as torchrun would stop the others in the middle of their work.
    """
    if broken:
        line = (f"{out}: unfinished; broken images, {len(broken):,}: {'; '.join(sorted(broken.values())[:10])}; "
                f"mend them and repeat the command, or remove {out} and add --skip-broken")
        if world == 1:
            raise BadInput(line)
        print(line)
    if brightest and max(brightest) <= DARK:
        say(f"warning: no pixel of the images packed now is above {max(brightest)} of 255; where 16-bit files "
            "hold 12 bits, multiply by 16, or convert to 8 bits first")


def in_threads(what, function, chunks):
    """Call function(chunk) for each; the line of progress counts the items."""
    done, total, since = 0, sum(map(len, chunks)), time.monotonic()
    with ThreadPoolExecutor() as pool:
        for chunk, _ in zip(chunks, pool.map(function, chunks)):
            done += len(chunk)
            progress(what, done, total, since)


def fill(out, meta, labels, make, rank, world):
    """Write make(chunk), then the labels, for this process's chunks of the rows that are not there yet.

    Each thread makes chunks of its own, so some images are read while others are encoded. make sets the label
    of a row to -1 where it failed.
    """
    file = out / layout(meta)[0]
    written = np.load(out / "labels.npy", mmap_mode="r+")
    rows = np.arange(len(labels))
    unfinished = np.unique(rows[written < 0] // CHUNK)
    chunks = [rows[CHUNK * k:CHUNK * (k + 1)] for k in unfinished if k % world == rank]

    def write(chunk):
        images = make(chunk)
        with open(file, "r+b") as array:         # on a full disk this raises; writing to a memory map kills
            # The rows are the end of the file: counted from there, the header of the .npy does not matter.
            array.seek((chunk[0] - len(rows)) * images[0].nbytes, os.SEEK_END)
            array.write(images.tobytes())
            array.flush()
            os.fsync(array.fileno())
        written[chunk] = labels[chunk]

    in_threads("packed", write, chunks)


def tile(images, columns):
    """uint8 (N,3,S,S) -> one PIL image, `columns` to a row, unfilled places grey."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "grey")
    for k, image in enumerate(images):
        place = (k % columns * width, k // columns * height)
        sheet.paste(Image.fromarray(image.transpose(1, 2, 0)), place)
    return sheet


def contact_sheet(dir):
    """Draw 64 images of a packed folder, from the first to the last, into its sheet.png."""
    data = Packed(dir)
    picks = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)
    sheet = tile(data.images[picks], 8)
    replace(Path(dir) / "sheet.png", lambda file: sheet.save(file, "PNG"))


def pack_flags(add):
    """The flags that vae.py has as well."""
    add("--split", choices=("train", "val", "test"), default="train",
        help="recorded in meta.json; of cifar10 and celeba64 it also chooses the images")
    add("--classes", type=int, choices=[0], help="pack without labels")
    add("--skip-broken", action="store_true",
        help="leave out images that cannot be read; reads all of them once more, before packing")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--src", help="folder or .zip of images, whose dataset.json or sub-folders give the classes; of "
                      "cifar10 its cifar-10-binary.tar.gz, of celeba64 img_align_celeba, of imagenet ILSVRC's train")
    add("--out", type=Path, help="packed folder to write, such as data/NAME (default: data/DATASET)")
    add("--dataset", choices=("cifar10", "celeba64", "imagenet64", "imagenet128"),
        help="one of the papers' (default: the last part of --out, if it is one)")
    add("--download", action="store_true", help="fetch cifar10 into data/; the others ask you to register")
    add("--size", type=at_least(1, 4096), help="side in pixels of the packed images, each the centre "
        "square of its file (default: the data set's)")
    pack_flags(add)
    args = parser.parse_args()
    out = args.out or Path(f"data/{args.dataset}")
    dataset = args.dataset or out.name
    if args.download:
        if dataset != "cifar10" or args.src:
            raise BadInput("--download: fetches cifar10, in place of a --src")
        args.src = Path("data/cifar-10-binary.tar.gz")
        if not args.src.exists():
            download(CIFAR10_URL, args.src, CIFAR10_SHA256, "--src")
    size = DATASETS[dataset][0] if dataset in DATASETS else args.size
    if args.size not in (None, size):
        raise BadInput(f"--size: found {args.size}, {dataset} has {size}")
    if not (args.src and size and (args.out or args.dataset)):
        raise BadInput("expected --src DIR --size S --out data/NAME; or --dataset NAME --src DIR, as a data set "
                       "of the papers has its own size, or --dataset cifar10 --download")
    pack(args.src, size, out, args.split, dataset,
         labelled=args.classes is None, skip_broken=args.skip_broken)
    contact_sheet(out)


if __name__ == "__main__":
    run(main)
