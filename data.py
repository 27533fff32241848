"""Images in, batches out: the built-in shapes, the packed format, and `python data.py` that makes it.

    python data.py --src DIR --size 64 --out data/NAME       # sub-folders are the classes, or none
    python data.py --dataset imagenet64 --src ILSVRC/train   # as the papers prepare it, into data/imagenet64
    python data.py --check data/NAME                         # counts, classes and a contact sheet

A packed folder holds images_00000.npy, images_00001.npy, ..., each uint8 (256,3,S,S), the last one shorter,
or latents_00000.npy, ..., float16 (256,8,S/8,S/8), which vae.py writes. Beside them lie labels.npy, int64
(N,), and meta.json. That comes last: until then plan.json is there, and the same command goes on.
"""
import colorsys
import functools
import glob
import hashlib
import json
import os
import pickle
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

from files import BadInput, Parser, at_least, download, progress, read_json, replace, run, say, write_json

SHARD = 256                                      # images in a file of a packed folder
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
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

    PyTorch's mt19937 takes 32 bits, so k is added to a hash of the rest: no two of 2^32 k are alike.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    first = int.from_bytes(digest[:4], "little")
    return torch.Generator().manual_seed((first + k) % 2 ** 32)


# ---------------------------------------------------------------------------------------- the built-in images

def polygon(corners, turn=0.0):
    """Corners of a regular polygon on the unit circle, from straight up, turned by a share of a full turn."""
    return np.exp(2j * np.pi * (turn - 0.25 + np.arange(corners) / corners))


def arc(x, radius, start, stop):
    """48 points of a circle around x, from angle start to angle stop, both in half turns."""
    return x + radius * np.exp(1j * np.pi * np.linspace(start, stop, 48))


def heart():
    a = 2 * np.pi * np.arange(48) / 48
    waves = np.cos(np.outer(a, [1, 2, 3, 4]))
    y = waves @ [13, -5, -2, -1]
    return np.sin(a) ** 3 - 1j * y / 16


SHAPES = {  # name: outline in the unit circle, x + y j with y pointing down; a second outline is a hole
    "circle":   [arc(0, 1, 0, 2)],
    "ring":     [arc(0, 1, 0, 2), arc(0, 0.5, 0, 2)],
    "square":   [polygon(4, turn=0.125)],
    "triangle": [polygon(3)],
    "cross":    [np.array([-.3 - 1j, .3 - 1j, .3 - .3j,
                           1 - .3j, 1 + .3j, .3 + .3j,
                           .3 + 1j, -.3 + 1j, -.3 + .3j,
                           -1 + .3j, -1 - .3j, -.3 - .3j])],
    "glass":    [np.array([-.8 - 1j, .8 - 1j, .12 + 0j,
                           .8 + 1j, -.8 + 1j, -.12 + 0j])],
    "heart":    [heart()],
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

class Images:
    """images, labels int64 (N,) and meta (dict), from anywhere, as batches for training.

    images are uint8 (N,3,S,S), or latents: float16 (N,8,S,S), mean and std of the posterior, unscaled.
    Anything with a shape that gives the rows of an array of indices will do. meta["classes"] lists the names
    of the classes, meta["scale"] is the factor of latents. Raises BadInput for labels that are not int64 or
    lie outside 0 .. classes - 1.
    """

    def __init__(self, images, labels, meta, flip=False):
        self.images, self.labels = images, labels
        self.meta, self.flip = meta, flip
        self.latents = images.shape[1] == 8
        self.size = images.shape[2]
        self.channels = 4 if self.latents else 3
        self.classes = meta["classes"]
        found = f"labels of {meta.get('dataset', 'the data')}: found {labels.dtype} {labels.shape}"
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise BadInput(f"{found}, expected int64 ({len(images)},)")
        if labels.min() < 0 or labels.max() >= max(1, len(self.classes)):
            raise BadInput(f"{found} from {labels.min()} to {labels.max()}, "
                           f"expected {len(self.classes)} classes")

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
        y = torch.from_numpy(self.labels[chosen])
        if self.latents:
            mean, std = x.chunk(2, 1)
            if generator is not None:
                noise = torch.randn(len(indices), *mean.shape[1:], generator=generator)[rows]
                mean = mean + std * noise.to(mean.device)
            return mean * self.meta["scale"], y
        x.div_(127.5).sub_(1)
        if self.flip and generator is not None:
            flip = torch.rand(len(indices), generator=generator)[rows] < 0.5
            x[flip] = x[flip].flip(3)
        return x, y

    def to(self, device):
        """Hold all the images in the device's memory."""
        dtype = torch.float16 if self.latents else torch.uint8
        held = torch.empty(self.images.shape, dtype=dtype, device=device)
        for part in np.array_split(np.arange(len(self)), 1 + len(self) // 4096):
            held[part] = torch.as_tensor(self.images[part]).to(device)
        self.images = held
        return self


class Rows:
    """An array of this shape whose rows are made or found one by one, by row(i)."""

    def __init__(self, shape, row):
        self.shape, self.row = shape, row

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        return np.array([self.row(int(i)) for i in indices])


def built_in(size, count=100_000, flip=False):
    """The first `count` shapes as a data set; each is drawn where it is read, 0.1 ms an image."""
    images = Rows((count, 3, size, size), functools.partial(draw_shape, size=size))
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    meta = dict(dataset="shapes", split="train", count=count, size=size,
                classes=list(SHAPES))
    return Images(images, labels, meta, flip)


def load_array(file, dtype, shape):
    """A .npy file of this dtype and shape, memory-mapped. Raises BadInput.

    The map is PyTorch's, which holds no file open: a process may open some 1,000 alone.
    """
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from None
    if array.dtype != dtype or array.shape != shape:
        raise BadInput(f"{file}: found {array.dtype} {array.shape}, meta.json promises {dtype} {shape}")
    size = file.stat().st_size
    content = torch.from_file(str(file), size=size, dtype=torch.uint8).numpy()
    return content[array.offset:].view(dtype).reshape(shape)             # behind the header


def shards(dir, kind, count):
    """The files that hold `count` rows and the rows of each: {DIR/KIND_00000.npy: range(0, 256), ...}"""
    parts = {}
    for start in range(0, count, SHARD):
        file = dir / f"{kind}_{start // SHARD:05d}.npy"
        parts[file] = range(start, min(start + SHARD, count))
    return parts


def load_shards(dir, kind, dtype, shape):
    """The rows in the files of a packed folder as one array (N,C,S,S). Raises BadInput."""
    maps = []
    for file, rows in shards(dir, kind, shape[0]).items():
        maps.append(load_array(file, dtype, (len(rows), *shape[1:])))
    return Rows(shape, lambda i: maps[i // SHARD][i % SHARD])


class Packed(Images):
    """A packed folder, memory-mapped.

    Raises BadInput for a folder that is none, unfinished or contradicts itself.
    """

    def __init__(self, dir, flip=False):
        dir = Path(dir)
        if not (dir / "meta.json").exists():
            raise BadInput(f"{dir}: no packed data set, or an unfinished one, as it has no meta.json; "
                           f"python data.py --src ... --out {dir} makes it")
        meta = read_json(dir / "meta.json")
        count, size = meta["count"], meta["size"]
        kind, dtype, shape = "images", "uint8", (count, 3, size, size)
        if "scale" in meta:
            kind, dtype, shape = "latents", "float16", (count, 8, size // 8, size // 8)
        images = load_shards(dir, kind, dtype, shape)
        labels = load_array(dir / "labels.npy", "int64", (count,))
        super().__init__(images, labels, meta, flip)


# -------------------------------------------------------------------------------- image files and their crops

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no others: Pillow runs Ghostscript for some
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile,
          Image.DecompressionBombError)          # what Pillow and zipfile raise for damaged files


def load_image(path, plain=False, archive=None):
    """Any image file, or member of a ZipFile -> 8-bit RGB as a person sees it.

    It is upright by EXIF, 16-bit grey is scaled to 8, see-through parts lie on white, CMYK and palettes are
    converted. `plain` converts and no more, as the papers did. Raises BadInput that names the file.
    """
    try:
        with (archive.open(path) if archive else open(path, "rb")) as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        if not plain:
            image = as_seen(image)
        return image.convert("RGB")
    except DAMAGE as error:
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def as_seen(image):
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):               # 16 bits, which convert() would clip
        grey = np.asarray(image).astype(np.int32).clip(0, 65535)
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


@functools.cache
def open_zip(path):
    return zipfile.ZipFile(path)


def read_image(src, size, dataset, name):
    """uint8 (3,size,size) of the image `name` in a folder or .zip, of the papers' data as they read it."""
    archive = open_zip(src) if src.is_file() else None
    path = name if archive else src / name
    image = load_image(path, dataset in DATASETS, archive)
    if dataset != "celeba64":
        return center_crop(image, size).transpose(2, 0, 1)
    if image.size != (178, 218):
        raise BadInput(f"{path}: found {image.width} x {image.height} pixels, img_align_celeba has 178 x 218")
    return celeba_crop(image, size).transpose(2, 0, 1)


# ------------------------------------------------------------------------ what is on disk -> names and labels

def image_names(src):
    """Names of the images in a folder and those below it, or in a .zip; hidden files are left out."""
    if src.is_dir():
        found = glob.glob("**", root_dir=src, recursive=True)
        names = [name.replace(os.sep, "/") for name in found]
    elif zipfile.is_zipfile(src):
        names = open_zip(src).namelist()
    else:
        raise BadInput(f"--src {src}: no such folder or .zip")
    hidden = re.compile(r"(^|/)(\.|__MACOSX)")
    names = [name for name in names if name.lower().endswith(SUFFIXES) and not hidden.search(name)]
    if not names:
        raise BadInput(f"--src {src}: no images found ({' '.join(SUFFIXES)})")
    return sorted(names)


def list_images(src):
    """Names of the images in a fixed order, label of each, class names.

    The folders below the one that all images share are the classes, sorted by name, or by number where all
    are numbers. Images in no such folder have no classes.
    """
    names = image_names(src)
    shared = os.path.commonpath([os.path.dirname(name) for name in names])
    below = [name[len(shared):].strip("/") for name in names]
    folders = [os.path.dirname(name).partition("/")[0] for name in below]
    classes = sorted(set(folders))
    if classes == [""]:
        return names, [0] * len(names), []
    if "" in classes:
        loose = names[folders.index("")]
        raise BadInput(f"{src}/{loose}: lies beside the class folders {classes[1]}, ..., so it has no class")
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    label = {name: number for number, name in enumerate(classes)}
    return names, [label[folder] for folder in folders], classes


def imagenet():
    """ImageNet's 1,000 classes, {wnid: name}, in the order of the labels."""
    table = Path(__file__).parent / "assets" / "imagenet.txt"
    lines = table.read_text().splitlines()       # wnid, number in the ILSVRC kit, name
    return dict(line.split(" ", 2)[::2] for line in lines)


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_SPLITS = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}


class Batch(pickle.Unpickler):
    """Reads a batch of CIFAR-10, a dict of numpy arrays and lists, and knows no other name than theirs."""
    known = {"ndarray": np.ndarray, "dtype": np.dtype, "encode": str.encode,
             "_reconstruct": np.zeros(0).__reduce__()[0]}

    def find_class(self, module, name):
        if name not in self.known:
            raise pickle.UnpicklingError(f"holds a foreign object, {module}.{name}")
        return self.known[name]


def read_cifar10(src, split):
    """cifar-10-python.tar.gz, or the folder in it -> uint8 (N,3,32,32), labels as a list."""
    images, labels = [], []
    try:
        for name in CIFAR10_SPLITS[split]:
            if src.is_dir():
                file = open(src / name, "rb")
            else:
                file = tarfile.open(src).extractfile(f"cifar-10-batches-py/{name}")
            batch = Batch(file, encoding="latin1").load()
            images.append(batch["data"].reshape(-1, 3, 32, 32))
            labels += batch["labels"]
    except (OSError, EOFError, KeyError, ValueError,
            pickle.UnpicklingError, tarfile.TarError) as error:
        raise BadInput(f"--src {src}: no CIFAR-10 of --split {split} as published ({error!r})") from None
    return np.concatenate(images), labels


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


def listing(src, size, dataset, split):
    """-> read, names, labels, class names, crop, filter of a data set of the papers or any folder of images.

    read(name) is the image uint8 (3,size,size).
    """
    if dataset == "cifar10":
        images, labels = read_cifar10(src, split)
        return images.__getitem__, range(len(images)), labels, CIFAR10, "as published", "as published"
    read = functools.partial(read_image, src, size, dataset)
    names, labels, classes = list_images(src)
    if dataset == "celeba64":                    # divided by number, as in list_eval_partition.txt
        first, last = CELEBA.get(split, ("", ""))
        names = [name for name in names if first <= Path(name).stem <= last]
        return read, names, [0] * len(names), [], "center 140 (ScoreSDE)", "bilinear, antialiased"
    if dataset in IMAGENETS:
        known = imagenet()
        wrong = sorted(known.keys() ^ classes)
        if wrong:
            raise BadInput(f"--src {src}: found {len(classes)} class folders, expected ImageNet's 1,000 "
                           f"wnids; {wrong[0]} is lacking, or is none of them")
        classes = list(known.values())
    return read, names, labels, classes, "center (ADM)", "box halving, then bicubic"


# ---------------------------------------------------------------------------------------------------- packing

NAMES = ("dataset", "vae_file")                  # in a pack's meta, what it goes by


def fingerprint(meta):
    """What of a pack's meta makes its content, as one hash: all but the names it goes by."""
    content = {key: meta[key] for key in sorted(meta) if key not in NAMES}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def begin(out, meta):
    """Write plan.json into folder out, unless an unfinished pack is there. -> whether a finished one is.

    Raises BadInput where it holds something else.
    """
    arrays = list(out.glob("*.npy"))
    for name in ("plan.json", "meta.json"):
        if (out / name).exists():
            found = read_json(out / name)
            keys = (meta | found).keys() - set(NAMES)
            other = sorted(key for key in keys if found.get(key) != meta.get(key))
            if other:
                raise BadInput(f"--out {out}: holds a pack of another {', '.join(other)}; "
                               "expected a new folder")
            return name == "meta.json"
    if arrays:
        raise BadInput(f"--out {out}: holds {arrays[0].name} and no plan.json; expected a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", meta)
    return False


def pack(src, size, out, split="train", dataset=None, workers=None, mirror=False, encode=None,
         rank=0, world=1, **more):
    """Pack the images below `src` into folder `out`; after a kill it goes on, to the same bytes.

    With mirror every image comes twice, as it is and mirrored. encode(images uint8 (n,3,S,S)) -> the array to
    store in their place, as vae.py does. Of several processes the one of number `rank` makes every `world`-th
    file. `more` goes into meta.json. Raises BadInput.
    """
    src, out = Path(src), Path(out)
    dataset = dataset or out.name
    read, names, labels, folders, crop, filter = listing(src, size, dataset, split)
    if not names:
        raise BadInput(f"--src {src}: found no images of split {split}")
    official = DATASETS.get(dataset, (0, 0, 0))[2]
    if split == "train" and official not in (0, len(names)):
        say(f"warning: found {len(names):,} images, the training set of {dataset} has {official:,}")
    digest = hashlib.sha256(json.dumps([*zip(names, labels)]).encode())
    copies = 2 if mirror else 1
    count = len(names) * copies
    meta = dict(dataset=dataset, split=split, count=count, size=size,
                classes=folders, listing=digest.hexdigest(), mirror=mirror,
                crop=crop, filter=filter, **more)
    if begin(out, meta):
        return say(f"{out}: already packed, {count:,} images")

    def row(i):                                                              # uint8 (3,size,size)
        image = read(names[i // copies])
        return image[:, :, ::-1] if i % copies else image

    parts = shards(out, "latents" if encode else "images", count)
    fill(parts, row, encode, workers, rank, world)
    if rank > 0:
        return
    while not all(file.exists() for file in parts):                          # those of the other processes
        time.sleep(1)
    labels = np.repeat(np.array(labels, dtype=np.int64), copies)
    replace(out / "labels.npy", lambda file: np.save(file, labels))
    for leftover in out.glob("*.part"):                                      # of a killed run
        leftover.unlink()
    os.replace(out / "plan.json", out / "meta.json")
    say(f"{out}: {count:,} images of {size} x {size}, {len(folders)} classes")


def fill(parts, row, encode, workers, rank, world):
    """Write this process's share of the files; the next one's images are read while one is encoded."""
    own = list(parts)[rank::world]
    todo = [file for file in own if not file.exists()]
    total = sum(len(parts[file]) for file in own)
    done = start = total - sum(len(parts[file]) for file in todo)
    since = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        coming = [pool.map(row, parts[file]) for file in todo[:1]]
        for k, file in enumerate(todo, 1):
            coming += [pool.map(row, parts[after]) for after in todo[k:k + 1]]
            images = np.array(list(coming.pop(0)))
            if encode:
                images = encode(images)
            replace(file, lambda f: np.save(f, images))
            done += len(images)
            if rank == 0:
                progress("packed", done, total, since, start)


def tile(images, columns):
    """uint8 (N,3,S,S) -> one PIL image, `columns` to a row, unfilled places grey."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "grey")
    for k, image in enumerate(images):
        place = (k % columns * width, k // columns * height)
        sheet.paste(Image.fromarray(image.transpose(1, 2, 0)), place)
    return sheet


def check(dir):
    """Print what a packed folder holds and draw 64 of its images."""
    data = Packed(dir)
    print(json.dumps(data.meta | dict(classes=len(data.classes))))
    counts = np.bincount(data.labels, minlength=len(data.classes))
    for label, name in enumerate(data.classes):
        print(f"{label:5d}  {counts[label]:9,}  {name!r}")
    if data.latents:
        return print("latents: no contact sheet; vae.py made them")
    sheet = Path(dir) / "sheet.png"
    picks = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)
    image = tile(data.images[picks], 8)
    replace(sheet, lambda file: image.save(file, "PNG"))
    print(f"contact sheet: {sheet.resolve()}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=("cifar10", "celeba64", "imagenet64", "imagenet128"),
        help="one of the papers' (default: the last part of --out, if it is one)")
    add("--src", help="folder or .zip of images, whose sub-folders are the classes; of cifar10 its\n"
                      "cifar-10-python.tar.gz, of celeba64 img_align_celeba, of imagenet ILSVRC's train")
    add("--download", action="store_true", help="fetch cifar10 into data/; the others ask you to register")
    add("--size", type=at_least(1), help="side of the packed images in pixels (default: the data set's)")
    add("--out", help="packed folder to write, such as data/NAME (default: data/DATASET)")
    add("--split", default="train", help="val and test where they are published; recorded in meta.json")
    add("--workers", type=at_least(1), default=os.cpu_count(), help="threads that decode")
    add("--check", metavar="DIR", help="print what a packed folder holds and draw a contact sheet")
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    dataset = args.dataset or Path(args.out or "").name
    if args.download and dataset == "cifar10":
        args.src = Path("data") / Path(CIFAR10_URL).name
        if not args.src.exists():
            download(CIFAR10_URL, args.src, CIFAR10_SHA256, "--src")
    side = DATASETS.get(dataset, [args.size])[0]
    if not (args.src and dataset and side) or args.size not in (None, side):
        raise BadInput("expected --src DIR --size S --out data/NAME, or a --dataset of the papers, which has "
                       "its own size, and its --src or, of cifar10, --download")
    out = args.out or f"data/{dataset}"
    pack(args.src, side, out, args.split, dataset, args.workers)


if __name__ == "__main__":
    run(main)
