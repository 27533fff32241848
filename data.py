"""Images in, batches out: the built-in shapes, the packed format, and `python data.py`, which packs images.

    python data.py --src DIR --size 64 --out data/NAME        # classes: dataset.json, or sub-folders, or none
    python data.py --dataset imagenet64 --src ILSVRC/train    # as the papers prepare it, into data/imagenet64

A packed folder holds three files. images.npy is uint8 (N,3,S,S); vae.py writes latents.npy, float16
(N,8,S/8,S/8), in its place. labels.npy is int64 (N,), and meta.json says what the folder is. A label is -1
until its image is written, so the labels say what is left to do: the same command goes on after a kill, or
after broken images are mended. Hidden files are not read.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from files import BadInput, Parser, at_least, download, progress, read_json, replace, run, say, write_json

CHUNK = 32                                       # images that one thread reads, encodes and writes at once
SUFFIXES = tuple(".png .jpg .jpeg .jpe .jfif .pjpeg .webp .bmp .gif .tif .tiff .ppm .pgm".split())
SPLIT = r"(?i:(train|training|val|valid|validation|test)[-_]?(set)?\d*)"     # names such as test_set, val2017
IMAGENETS = ("imagenet64", "imagenet128", "imagenet256")                     # the last as latents, by vae.py
DATASETS = {  # what these names promise: side in pixels, classes, images in the training set
    "shapes":      (16,  8,      100_000),
    "cifar10":     (32,  10,     50_000),
    "celeba64":    (64,  0,      162_770),
    "imagenet64":  (64,  1000, 1_281_167),
    "imagenet128": (128, 1000, 1_281_167),
    "imagenet256": (256, 1000, 1_281_167),
}


def generator(purpose, seed, k):
    """The k-th CPU generator of a purpose, such as "step", and a seed: the same numbers on every machine.

    PyTorch's CPU generator uses 32 bits of its seed. The k-th takes a hash of purpose and seed, plus k: two
    generators of one purpose and seed never coincide, those of different ones may by chance.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    first = int.from_bytes(digest[:4], "little")
    return torch.Generator().manual_seed((first + k) % 2 ** 32)


# ---------------------------------------------------------------------------------------- the built-in images

# A point (x, y) is the complex number x + y j, and y points down.

def arc(centre, radius, start, stop, points=48):
    """Points on a circle from angle `start` to angle `stop`, in half turns.

    Few points make a polygon: 4 over a whole turn, of which the last is the first, are a triangle.
    """
    return centre + radius * np.exp(1j * np.pi * np.linspace(start, stop, points))


def heart():
    """The curve x = 16 sin^3 a, y = 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a, upright and 1/16 the size."""
    a = 2 * np.pi * np.arange(48) / 48
    waves = np.cos(np.outer(a, [1, 2, 3, 4]))
    y = waves @ [13, -5, -2, -1]
    return np.sin(a) ** 3 - 1j * y / 16


SHAPES = {  # name: its outline about the origin, and a hole's
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
    """uint8 (3,size,size): a shape of class index % 8 in random colours, place, scale and angle.

    The random numbers depend on the index alone, so an image is the same scene at any size.
    """
    rng = random.Random(index)
    shape, ground = colour(rng, 0.8, 1), colour(rng, 0.1, 0.4)
    centre = complex(rng.uniform(.42, .58), rng.uniform(.42, .58))
    scale = rng.uniform(.31, .42)
    angle = rng.uniform(-.3, .3)
    side = 4 * size                              # drawn four times as large
    image = Image.new("RGB", (side, side), ground)
    outlines = list(SHAPES.values())[index % len(SHAPES)]
    for outline, fill in zip(outlines, (shape, ground)):
        points = side * (centre + scale * np.exp(1j * angle) * outline)
        ImageDraw.Draw(image).polygon(points.view(float).tolist(), fill)     # x, y, x, y, ...
    image = image.reduce(4)                      # the mean of 4 x 4 pixels smooths the edges
    return np.asarray(image).transpose(2, 0, 1)


def shapes(indices, size):
    """uint8 (N,3,size,size) and int64 labels (N,); image i depends on i and size alone."""
    images = np.array([draw_shape(int(i), size) for i in indices])
    return images, np.asarray(indices, dtype=np.int64) % len(SHAPES)


# ----------------------------------------------------------------------------------------- batches (training)

def send(tensor, device):
    """A CPU tensor moved to the device; the CPU does not wait until a GPU has it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Images:
    """A data set that gives batches for training. It holds images, labels int64 (N,) and a dict, meta.

    images are uint8 (N,3,S,S), or the autoencoder's latents: float16 (N,8,S,S), 4 channels of means and 4
    of standard deviations, unscaled. S is `size`; for latents it is 1/8 of meta["size"], the side of the
    images. Any object serves that has a shape and is indexed by an array of row numbers, such as Shapes.
    meta["classes"] lists the names of the classes, meta["scale"] is the factor of latents. Raises BadInput for
    labels that are not int64 or lie outside 0 .. classes - 1.
    """

    def __init__(self, images, labels, meta, flip=False):
        self.images, self.labels = images, labels
        self.meta, self.flip = meta, flip
        self.latents = images.shape[1] == 8
        self.size = images.shape[2]
        self.channels = 4 if self.latents else 3
        self.classes = meta["classes"]
        highest = max(1, len(self.classes)) - 1                              # without classes all labels are 0
        fits = labels.dtype == np.int64 and labels.shape == images.shape[:1]
        if not fits or labels.min() < 0 or labels.max() > highest:
            name = meta.get("dataset", "the data")
            raise BadInput(f"labels of {name}: found {labels.dtype} {labels.shape} from {labels.min()} to "
                           f"{labels.max()}, expected int64 {images.shape[:1]} from 0 to {highest}")

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, generator=None, rows=slice(None)):
        """The images and labels of indices[rows] -> x float32 (B,C,S,S), images in [-1,1] or scaled latents, on
        the device that holds the images, and y int64 (B,) on the CPU.

        The generator draws which images are mirrored (where flip=True) and the noise of latents. It draws for
        all the indices, and `rows` are cut out after that: a process that loads its share of a global batch
        gets what a single process would have there. Without a generator no image is mirrored and latents are
        their means.
        """
        chosen = np.asarray(indices)[rows]
        y = torch.from_numpy(self.labels[chosen])
        if torch.is_tensor(self.images):                                     # on a device
            chosen = send(torch.from_numpy(chosen), self.images.device)
        x = torch.as_tensor(self.images[chosen]).float()
        if self.latents:
            mean, std = x.chunk(2, 1)
            if generator is not None:
                noise = torch.randn(len(indices), *mean.shape[1:], generator=generator)[rows]
                mean = mean + std * send(noise, x.device)
            return mean * self.meta["scale"], y
        x.div_(127.5).sub_(1)
        if self.flip and generator is not None:
            mirrored = torch.rand(len(indices), generator=generator)[rows] < 0.5
            mirrored = send(mirrored, x.device)[:, None, None, None]
            x = torch.where(mirrored, x.flip(3), x)
        return x, y

    def to(self, device):
        """Copy all the images to the device's memory, from which batches are then taken."""
        self.images = torch.tensor(self.images[:], device=device)
        return self


class Shapes:
    """The first `count` shapes as an array (count,3,size,size); each is drawn when it is read."""

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
    """-> file name, dtype and shape of the images or latents in a packed folder. Only latents have a scale."""
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

    def __init__(self, dir):
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
        super().__init__(images, labels, meta)


# -------------------------------------------------------------------------------- image files and their crops

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no others: Pillow runs Ghostscript for some
SAID = set()


def say_once(line):
    """Say a line that many images call for the first time only."""
    if line not in SAID:
        SAID.add(line)
        say(line)


def load_image(path, plain=False):
    """-> a PIL image, 8-bit RGB, of an image file: a Path, or a zipfile.Path for one in a .zip.

    It is what a person sees: upright by EXIF, 16-bit grey scaled to 8 bits, see-through parts on white. Of an
    animation it is the first frame. `plain` converts to RGB and does nothing else, as the papers did. Raises
    BadInput that names the file.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        if not plain:
            image = as_seen(image)
        return image.convert("RGB")
    except Exception as error:                   # a damaged file of each format raises its own kinds
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def as_seen(image):
    """The image upright, with 8-bit grey, on white; load_image adds the file's name to its errors."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):               # 16 or 32 bits, which convert() would clip
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadInput(f"pixels from {grey.min()} to {grey.max()}, expected 0 to 65535")
        if grey.max() < 4096:
            say_once("warning: a 16-bit image whose pixels are all below 4,096 becomes nearly black; where the "
                     "files hold 12 bits, multiply by 16, or convert to 8 bits first")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))      # rounded grey 255 / 65535
    if image.mode == "F":
        raise BadInput("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image


def center_crop(image, size):
    """ADM's crop, uint8 (size,size,3), from the official guided-diffusion.

    Halve the image while its shorter side is at least 2 size, make that side `size` by bicubic interpolation,
    and cut out the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def celeba_crop(image, size):
    """ScoreSDE's crop of CelebA's aligned images, uint8 (size,size,3).

    Cut out the central 140 x 140 and make it smaller by bilinear interpolation with antialiasing.
    """
    centre = image.crop((19, 39, 159, 179))
    return np.asarray(centre.resize((size, size), Image.BILINEAR))


def read_image(path, size, dataset):
    """uint8 (3,size,size) of an image file, cropped as ADM does; a data set of the papers as they do."""
    image = load_image(path, plain=dataset in DATASETS)
    if min(image.size) < size:
        say_once(f"warning: images smaller than {size} x {size} are enlarged")
    crop = center_crop
    if dataset == "celeba64":
        crop = celeba_crop
        if image.size != (178, 218):
            raise BadInput(f"{path}: found {image.width} x {image.height} pixels, img_align_celeba has 178 x 218")
    return crop(image, size).transpose(2, 0, 1)


# ------------------------------------------------------------------------ what is on disk -> names and labels

def find_files(src):
    """-> the folder or .zip as a path, the sorted names of the images below it, and a set of all other names.

    The other names are files and folders. Hidden ones are left out, and so is what a Mac adds to a .zip.
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
    hidden = r"(^|/)(\.|__MACOSX/)"              # a part of the name that begins with a dot, or is __MACOSX
    names = [name for name in names if not re.search(hidden, f"{name}/")]
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    return root, images, set(names).difference(images)


def warn(what, names):
    """Say how many names there are and the first ten, if there are any."""
    if names:
        say(f"warning: {what}, {len(names):,}: {', '.join(sorted(names)[:10])}")


def say_left_out(root, images, others):
    """Say which kinds of files are no images, and which folders hold none."""
    folders = {name for name in others if (root / name).is_dir()}
    files = others - folders - {"dataset.json", "protocol.json"}             # of labels, and of sample.py
    kinds = collections.Counter(Path(name).suffix.lower() or "without suffix" for name in files)
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        say(f"left out: {counts}; labels come from sub-folders or a dataset.json alone")
    parents = {os.path.dirname(name) for name in [*images, *folders]}
    warn("folders without images", folders - parents)


def by_folder(names):
    """-> the label of each image, and the names of the classes.

    The classes are the folders next below the one that holds all images, sorted by name. Images that all lie
    in one folder have no classes. Raises BadInput for an image beside class folders, and where the folders are
    parts of a data set: all of them train, val, ..., or 00000, 01000, ..., or a train with folders of its own.
    """
    own = [os.path.dirname(name) for name in names]
    shared = os.path.commonpath(own)
    below = [folder[len(shared):].strip("/").split("/") for folder in own]
    tops = [folders[0] for folders in below]     # "" of an image that lies in no folder below
    classes, labels = np.unique(tops, return_inverse=True)
    classes, labels = classes.tolist(), labels.tolist()
    if classes == [""]:
        say(f"all images are in one folder, {shared or '.'}: no classes; sub-folders would be classes")
        return labels, []
    parts = [name for name in classes if re.fullmatch(rf"\d*000|{SPLIT}", name)]
    # in train/cat/1.png the class is below the part, so one such folder is enough
    deeper = any(len(folders) > 1 and re.fullmatch(SPLIT, folders[0]) for folders in below)
    if deeper or parts == classes:
        raise BadInput(f"--src: the folders {', '.join(parts[:3])} are parts of a data set, no classes; "
                       f"give one of them, .../{parts[0]}, or add --classes 0 to pack all without labels")
    if "" in classes:
        loose = names[tops.index("")]
        raise BadInput(f"--src: {loose} lies beside the class folders {classes[1]}, ..., so it has no class")
    return labels, classes


def by_json(file, names):
    """-> the same from a dataset.json of EDM or StyleGAN: {"labels": [[name, label], ...]}, or null for none.

    The classes are called 0, 1, ... Raises BadInput.
    """
    content = read_json(file)
    try:
        pairs = content["labels"]
        if pairs is None:
            return [0] * len(names), []
        table = dict(pairs)
        labels = [table[name] for name in names]
        wrong = [label for label in labels if type(label) is not int or not 0 <= label < 10 ** 6]
        if wrong:
            raise ValueError(wrong[0])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f'{file}: expected {{"labels": [[name, label], ...]}} with every image and '
                       f"labels from 0 on, found {error!r}; --classes 0 packs without labels") from None
    if len(pairs) > len(names):
        say(f"warning: {file} has {len(pairs):,} labels for {len(names):,} images")
    classes = [str(k) for k in range(max(labels) + 1)]
    warn("classes without images", set(classes).difference(map(str, labels)))
    return labels, classes


def imagenet():
    """ImageNet's 1,000 classes, {wnid: name}, in the order of the labels. A class's folder is its wnid."""
    table = Path(__file__).parent / "assets" / "imagenet.txt"
    rows = [line.split(" ", 2) for line in table.read_text().splitlines()]
    return {wnid: name for wnid, _, name in rows}                            # _: the number in the ILSVRC kit


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_SPLITS = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}


def read_cifar10(src, split):
    """cifar-10-binary.tar.gz -> images uint8 (N,3,32,32) and labels uint8 (N,). Raises BadInput.

    The files in it are records of 3,073 bytes: a label, and an image.
    """
    records = []
    try:
        with tarfile.open(src) as archive:
            for name in CIFAR10_SPLITS[split]:
                file = archive.extractfile(f"cifar-10-batches-bin/{name}.bin")
                batch = np.frombuffer(file.read(), np.uint8)
                records.append(batch.reshape(-1, 1 + 3 * 32 * 32))
    except Exception as error:                   # tarfile, gzip and zlib raise their own kinds
        raise BadInput(f"--src {src}: no cifar-10-binary.tar.gz of --split {split} ({error!r})") from None
    records = np.concatenate(records)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def class_names(dataset):
    """The names of the classes of a published data set, or [] where it has none."""
    if dataset in IMAGENETS:
        return list(imagenet().values())
    return CIFAR10 if dataset == "cifar10" else []


CELEBA = {  # first and last image of each split, as in list_eval_partition.txt
    "train": ("000001", "162770"),
    "val":   ("162771", "182637"),
    "test":  ("182638", "202599"),
}


def label(root, names, others, dataset):
    """-> the label of each image, and the names of the classes, by dataset.json or else by folders.

    Raises BadInput for labels that are missing or wrong, and for classes of ImageNet that are not its 1,000.
    """
    table = root / "dataset.json"
    nested = [name for name in others if name.endswith("/dataset.json")]
    if table.exists():
        labels, classes = by_json(table, names)
    elif nested:
        raise BadInput(f"--src: {min(nested)} is not read, as only a dataset.json at the top of --src gives "
                       "labels; give its folder, remove it, or add --classes 0 to pack without labels")
    else:
        labels, classes = by_folder(names)
    if dataset not in IMAGENETS:
        return labels, classes
    if classes != sorted(imagenet()):
        raise BadInput(f"--src: found {len(classes)} classes, {', '.join(classes[:3])}, ..., expected "
                       "ImageNet's 1,000 folders, n01440764 to n15075141, and no dataset.json")
    return labels, class_names(dataset)


def listing(src, size, dataset, split, labelled, skip_broken):
    """-> read, names, labels, class names, broken, of a data set of the papers or any folder or .zip of images.

    read(name) is the image, uint8 (3,size,size); for cifar10 a name is a row number. An image that cannot be
    read is black, and broken[name] says why. With skip_broken all images are read here first, and the broken
    ones are left out of the names. Raises BadInput.
    """
    broken = {}
    if dataset == "cifar10":
        images, labels = read_cifar10(src, split)
        labels, classes = (labels.tolist(), CIFAR10) if labelled else ([0] * len(images), [])
        return images.__getitem__, range(len(images)), labels, classes, broken
    root, names, others = find_files(src)
    if dataset == "celeba64":
        first, last = CELEBA[split]
        names = [name for name in names if first <= Path(name).stem <= last]

    def read(name):
        try:
            return read_image(root / name, size, dataset)
        except BadInput as error:
            broken[name] = str(error)
            return np.zeros((3, size, size), np.uint8)

    if skip_broken:
        in_threads("checked", lambda chunk: list(map(read, chunk)), in_chunks(names))
        names = [name for name in names if name not in broken]
    say_left_out(root, names, others)
    if not names:
        raise BadInput(f"--src {src}: found no images ({' '.join(SUFFIXES)}) of --split {split} "
                       "that can be read")
    labels, classes = [0] * len(names), []
    if labelled:
        labels, classes = label(root, names, others, dataset)
    return read, names, labels, classes, broken


# ---------------------------------------------------------------------------------------------------- packing

CROPS = {  # words of meta.json; any other data set's crop is ADM's
    "cifar10":  "as published",
    "celeba64": "center 140, antialiased bilinear (ScoreSDE)",
}


def fingerprint(meta):
    """A hash of a pack's meta without the names of its data set and autoencoder: the same for equal content."""
    content = {key: meta[key] for key in meta if key not in ("dataset", "vae_file")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def begin(out, meta, rank):
    """Make the files of a pack in folder `out`, unless they are there: the images empty and every label -1.

    meta.json is made first and the labels last: where the labels are, the rest is. Of several processes the
    one of rank 0 makes them, and the others wait. Raises BadInput where `out` holds something else.
    """
    notes, labels = out / "meta.json", out / "labels.npy"
    # The folder is looked at before meta.json is: rank 0 may write it in between. A kill may have left a .part.
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
        np.lib.format.open_memmap(out / name, "w+", dtype, shape)            # a header and zeros
        unwritten = np.full(shape[0], -1, dtype=np.int64)
        replace(labels, lambda file: np.save(file, unwritten))
    while not labels.exists():
        time.sleep(0.1)


def in_chunks(items):
    return [items[k:k + CHUNK] for k in range(0, len(items), CHUNK)]


def in_threads(what, function, chunks):
    """Call function(chunk) for each chunk, several at once, and show how many items of chunks are done."""
    done, total, since = 0, sum(map(len, chunks)), time.monotonic()
    with ThreadPoolExecutor() as pool:
        for chunk, _ in zip(chunks, pool.map(function, chunks)):
            done += len(chunk)
            progress(what, done, total, since)


def fill(out, meta, labels, make, rank, world):
    """Write the images that make(chunk) returns and then their labels, for the chunks where a label is missing.

    A chunk is an array of row numbers, and this process takes every `world`-th. Each thread makes a chunk of
    its own, so some images are read while others are encoded. Where make fails it sets labels[row] to -1.
    """
    path = out / layout(meta)[0]
    written = np.load(out / "labels.npy", mmap_mode="r+")
    if written.min() >= 0:
        say(f"{out}: was packed already, nothing is left to do")
    rows = np.arange(len(labels))
    chunks = [chunk for chunk in in_chunks(rows)[rank::world] if written[chunk].min() < 0]

    def write(chunk):
        images = make(chunk)
        with open(path, "r+b") as file:          # on a full disk this raises, where a memory map would crash
            # The rows are the end of the file: counted from there, the header of the .npy does not matter.
            file.seek((chunk[0] - len(rows)) * images[0].nbytes, os.SEEK_END)
            file.write(images.tobytes())
            file.flush()
            os.fsync(file.fileno())
        written[chunk] = labels[chunk]

    in_threads("packed", write, chunks)


def pack(src, size, out, split="train", dataset=None, encode=None, rank=0, world=1, labelled=True,
         skip_broken=False, **more):
    """Pack the images below `src` into folder `out`. Called again after a kill, it goes on, to the same bytes.

    dataset is by default the name of `out`; the papers' data sets are read as the papers read them.
    encode(images uint8 (n,3,S,S)) returns what is stored in their place; several threads call it. The process
    of number `rank` among `world` makes every `world`-th chunk. Without `labelled` there are no classes.
    Images that cannot be read are left out with skip_broken; else a BadInput names them when all others are
    packed. `more` goes into meta.json.
    """
    src, out = Path(src), Path(out)
    if out.resolve().is_relative_to(src.resolve()):
        raise BadInput(f"--out {out}: lies in --src {src}")
    dataset = dataset or out.name
    if dataset == "shapes":
        raise BadInput("shapes: is the name of the built-in images; choose another")
    read, names, labels, classes, broken = listing(src, size, dataset, split, labelled, skip_broken)
    if broken:                                   # those that skip_broken has found
        more["broken"] = dict(count=len(broken), names=sorted(broken)[:10])
        warn("broken images left out", broken)
        broken.clear()
    official = DATASETS[dataset][2] if dataset in DATASETS else len(names)
    if split == "train" and official != len(names):
        say(f"warning: found {len(names):,} images, the training set of {dataset} has {official:,}")
    digest = hashlib.sha256(json.dumps([*zip(names, labels)]).encode())
    labels = np.array(labels, dtype=np.int64)
    meta = dict(dataset=dataset, split=split, count=len(labels), size=size,
                classes=classes, listing=digest.hexdigest(),
                crop=CROPS.get(dataset, "box halving, bicubic, center (ADM)"), **more)

    def make(rows):
        images = np.array([read(names[row]) for row in rows])
        failed = [row for row in rows if names[row] in broken]
        labels[failed] = -1                      # they stay to be done
        return encode(images) if encode else images

    begin(out, meta, rank)
    fill(out, meta, labels, make, rank, world)
    if broken:
        line = (f"{out}: unfinished; broken images, {len(broken):,}: {'; '.join(sorted(broken.values())[:10])}; "
                f"mend them and repeat the command, or remove {out} and add --skip-broken")
        if world == 1:
            raise BadInput(line)
        print(line)                              # no error, because torchrun would then stop the other processes
    if np.load(out / "labels.npy").min() >= 0:
        named = f": {', '.join(classes[:10])}" if classes else ""
        say(f"{out}: {len(labels):,} images of {size} x {size}, {len(classes)} classes{named}")


def tile(images, columns):
    """uint8 (N,3,H,W) -> one PIL image with `columns` of them in a row; empty places are grey."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "grey")
    for k, image in enumerate(images):
        place = (k % columns * width, k // columns * height)
        sheet.paste(Image.fromarray(image.transpose(1, 2, 0)), place)
    return sheet


def contact_sheet(dir):
    """Draw 64 images of a packed folder, evenly spaced from the first to the last, into its sheet.png."""
    data = Packed(dir)
    picks = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)
    sheet = tile(data.images[picks], 8)
    replace(Path(dir) / "sheet.png", lambda file: sheet.save(file, "PNG"))


def pack_flags(add):
    """Add the flags that data.py and vae.py share."""
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
    out = args.out or Path(f"data/{args.dataset}")                           # where both are missing: see below
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
