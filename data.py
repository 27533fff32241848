"""Images in, batches out: the built-in shapes, the packed format, and `python data.py` that makes it.

    python data.py --src DIR --size 64 --out data/NAME   # sub-folders are the classes (or none); restartable
    python data.py --check data/NAME                     # counts, classes and a contact sheet

A packed folder holds images.npy, uint8 (N,3,S,S), labels.npy, int64 (N,), and meta.json, which is written
last: a folder without meta.json is an unfinished pack.
"""
import argparse
import colorsys
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import struct
import sys
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHUNK = 64                                       # images that a worker packs at a time


class BadInput(ValueError):
    """A user's mistake: its text is the one line that is printed before exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line too, and which takes no abbreviations."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise BadInput(message)


def run(main):
    """Call main(); a user's mistake and a full disk become one line and exit code 2, not a traceback."""
    try:
        main()
    except (BadInput, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":                     # once, not once a process
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped", file=sys.stderr) or 130)


def generator(purpose, seed, k):
    """A CPU generator for number k of a purpose ("step" 7 of seed 0): the same numbers on every machine.
    PyTorch's mt19937 takes 32 bits, so k is added to a hash of the rest: no two of 2^32 k are alike.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed((int.from_bytes(digest[:4], "little") + k) % 2 ** 32)


def replace(path, write):
    """write(file) to a neighbour of path, then rename: path is the old file or the new one, never half."""
    part = Path(f"{path}.{os.environ.get('RANK', 0)}.part")              # a killed run's is written over
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:     # torch.save turns a full disk into RuntimeError
        raise BadInput(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        part.unlink(missing_ok=True)


def hash_file(path):
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(path):
    """The dict in a checkpoint or weight file: tensors and plain values, no other object is unpickled."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:                           # torch.load skips the checksums
                if bad := archive.testzip():
                    raise ValueError(f"{bad} does not match its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                              # of foreign pickles: refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, KeyError,
            EOFError, TypeError, AttributeError, IndexError, OSError) as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"holds a foreign object, {foreign[1]}" if foreign else f"damaged, {type(error).__name__}"
        raise BadInput(f"{path}: cannot be loaded ({why})") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: found {type(state).__name__}, expected a checkpoint")
    return state


def progress(what, done, total, since, start=0):
    """One line with rate and time left; `start` of the `done` were there before `since`."""
    rate = (done - start) / max(time.time() - since, 1e-9)
    left = f"{(total - done) / rate / 60:.1f} min left" if rate else ""
    end = "\n" if done == total else ""
    print(f"\r{what} {done:,} / {total:,}   {rate:,.0f}/s   {left}   ", end=end, flush=True)


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
    """images uint8 (N,3,S,S), labels int64 (N,) and meta (dict), from anywhere, as batches for training."""

    def __init__(self, images, labels, meta, flip=False):
        self.images, self.labels, self.meta, self.flip = images, labels, meta, flip
        self.size, self.channels, self.classes = images.shape[2], images.shape[1], meta["classes"]

    def __len__(self):
        return len(self.images)

    def batch(self, indices, generator=None, rows=slice(None)):
        """x float32 (B,C,S,S) in [-1,1] and y int64 (B,) of indices[rows].

        Flips (given flip=True and a generator) are drawn for all the indices and then cut to `rows`, so a
        process that loads its share of a global batch sees what a single one would have seen there.
        """
        chosen = np.asarray(indices)[rows]
        x = torch.from_numpy(self.images[chosen]).float().div_(127.5).sub_(1)
        if self.flip and generator is not None:
            flip = torch.rand(len(indices), generator=generator)[rows] < 0.5
            x[flip] = x[flip].flip(3)
        return x, torch.from_numpy(self.labels[chosen])


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

    def __init__(self, dir, flip=False):
        dir = Path(dir)
        if not (dir / "meta.json").is_file():
            state = "an unfinished pack" if (dir / "images.npy").exists() else "no packed data set"
            raise BadInput(f"{dir}: {state}, no meta.json; python data.py --src ... --out {dir} makes it")
        try:
            meta = json.loads((dir / "meta.json").read_text())
            images, labels = (np.load(dir / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
            shape, names = (meta["count"], 3, meta["size"], meta["size"]), meta["classes"]
            if type(names) is not list or any(type(name) is not str for name in names):
                raise TypeError("classes: expected a list of names")
            if any(type(number) is not int or number < 1 for number in shape):
                raise TypeError("count, size: expected positive numbers")
            if any(type(array) is not np.memmap for array in (images, labels)):
                raise TypeError("images, labels: expected .npy files")
        except (ValueError, KeyError, TypeError, EOFError, OSError, RecursionError, SyntaxError) as error:
            raise BadInput(f"{dir}: damaged pack ({type(error).__name__}: {error})") from None
        for name, array, expected in (("images", images, (np.dtype("uint8"), shape)),
                                      ("labels", labels, (np.dtype("int64"), shape[:1]))):
            if (array.dtype, array.shape) != expected:
                raise BadInput(f"{dir}/{name}.npy: found {array.dtype} {array.shape}, meta.json promises "
                               f"{expected[0]} {expected[1]}")
        labels = np.array(labels)
        low, high = labels.min(initial=0), labels.max(initial=0)
        if low < 0 or high >= max(1, len(names)):
            raise BadInput(f"{dir}/labels.npy: found {low} .. {high}, expected {len(names)} classes")
        super().__init__(images, labels, meta, flip)


# ----------------------------------------------------------------------- folder of images -> packed file

def load_image(path):
    """Any image file -> 8-bit RGB as a person sees it: upright by EXIF, 16-bit grey scaled to 8, see-through
    parts on white, CMYK and palettes converted. Raises BadInput that names the file where it cannot be read.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")                              # of large pictures, odd metadata
            image.load()
            if max(image.size) > 400 * min(image.size):
                raise BadInput(f"{image.width} x {image.height} pixels are too narrow to crop a square from")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                                   # 16 bits; convert() would clip
                grey = np.asarray(image).astype(np.int64).clip(0, 65535)
                image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
            elif image.mode == "F":
                raise BadInput("floating-point pixels have no agreed range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def center_crop(image, size):
    """ADM's crop, uint8 (size,size,3): box-halve while a side is >= 2 size, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def list_images(src):
    """Paths below src in a fixed order, label of each, class names. Sub-folders of src are the classes,
    sorted by name (by number where all are numbers); a folder without sub-folders has none.
    """
    src = Path(src)
    if not src.is_dir():
        raise BadInput(f"--src {src}: no such folder")
    shown = lambda path: not path.name.startswith((".", "__MACOSX"))
    folders = [entry for entry in src.iterdir() if entry.is_dir() and shown(entry)]
    by_number = all(folder.name.isascii() and folder.name.isdecimal() for folder in folders)
    folders.sort(key=lambda folder: int(folder.name) if by_number else folder.name)
    pick = lambda found: sorted(path for path in found if path.suffix.lower() in SUFFIXES and shown(path))
    images = {folder: pick(folder.rglob("*")) for folder in folders or [src]}
    if folders and (loose := pick(src.iterdir())):
        raise BadInput(f"{loose[0]}: an image beside class folders ({folders[0].name}, ...) has no class")
    if not any(images.values()):
        raise BadInput(f"--src {src}: no images found ({' '.join(SUFFIXES)})")
    paths = [path for found in images.values() for path in found]
    labels = [label for label, found in enumerate(images.values()) for _ in found]
    return paths, np.array(labels, dtype=np.int64), [folder.name for folder in folders]


def end_with_parent():
    """Worker start: Ctrl-C is the parent's business, and a killed parent leaves no worker behind."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def pack_chunk(paths, size, file, first):
    """Worker: crop `paths` and write them to rows first, first + 1, ... of the memory map."""
    rows = np.lib.format.open_memmap(file, mode="r+")
    for row, path in enumerate(paths, first):
        rows[row] = center_crop(load_image(path), size).transpose(2, 0, 1)
    rows.flush()
    return len(paths)


def begin(file, journal, meta):
    """Number of images that a killed pack of the same `meta` left in `file`; a new file has none."""
    shape = (meta["count"], 3, meta["size"], meta["size"])
    if not journal.exists():
        np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):                               # a full disk shows now
            with open(file, "rb+") as f:
                os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
        return 0
    try:
        before, rows = json.loads(journal.read_text()), np.load(file, mmap_mode="r")
        same = {**before["meta"], "dataset": meta["dataset"]} == meta and rows.shape == shape
        done = before["done"]
        if same and rows.dtype == np.uint8 and type(done) is int and 0 <= done <= meta["count"]:
            return done
    except (ValueError, KeyError, TypeError, OSError, EOFError):
        pass
    raise BadInput(f"--out {file.parent}: an unfinished pack of other images or size, or damaged; remove it")


def pack(src, size, out, split="train", classes=None, workers=None):
    """Pack the images below `src` into folder `out`; after a kill it goes on, to the same bytes."""
    out = Path(out)
    if out.resolve().is_relative_to(Path(src).resolve()):
        raise BadInput(f"--out {out}: lies in --src {src}; expected another place")
    if workers is not None and workers < 1:
        raise BadInput(f"--workers: found {workers}, expected at least 1")
    paths, labels, names = list_images(src)
    if classes is not None and len(names) != classes:
        raise BadInput(f"--src {src}: found {len(names)} class folders, expected --classes {classes}")
    listing = "\n".join(f"{path.relative_to(src)}\0{label}" for path, label in zip(paths, labels))
    listing = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    meta = dict(dataset=out.name, split=split, count=len(paths), size=size, classes=names, listing=listing,
                crop="center (ADM)", filter="box halving, then bicubic")
    if (out / "meta.json").exists():
        if {**Packed(out).meta, "dataset": out.name} == meta:            # the folder may have been renamed
            return print(f"{out}: already packed, {len(paths):,} images")
        raise BadInput(f"--out {out}: already holds another packed data set; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    file, journal = out / "images.npy", out / "packing.json"
    done = begin(file, journal, meta)
    note = lambda: replace(journal, lambda f: f.write(json.dumps(dict(meta=meta, done=done)).encode()))
    note()
    since, noted, start = time.time(), time.time(), done
    with ProcessPoolExecutor(workers or os.cpu_count(), initializer=end_with_parent) as pool:
        firsts = range(done, len(paths), CHUNK)
        jobs = [pool.submit(pack_chunk, paths[i:i + CHUNK], size, file, i) for i in firsts]
        try:
            for job in jobs:
                done += job.result()
                if time.time() - noted > 1 or done == len(paths):
                    progress("packed", done, len(paths), since, start)
                    note()
                    noted = time.time()
        except BrokenProcessPool:
            raise BadInput(f"--out {out}: a worker was killed (out of memory?); run again") from None
        finally:
            pool.shutdown(cancel_futures=True)
    replace(out / "labels.npy", lambda f: np.save(f, labels))
    replace(out / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
    journal.unlink()
    print(f"{out}: {len(paths):,} images of {size} x {size}, {len(names)} classes")


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
    sheet = Path(dir) / "sheet.png"
    picks = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)
    replace(sheet, lambda f: tile(data.images[picks], 8).save(f, "PNG"))
    print(f"contact sheet: {sheet.resolve()}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--src", help="folder of images; its sub-folders are the classes")
    add("--size", type=int, help="side of the packed images in pixels")
    add("--out", help="packed folder to write, such as data/NAME")
    add("--split", default="train", help="recorded in meta.json")
    add("--classes", type=int, help="refuse a source with another number of class folders")
    add("--workers", type=int, help="processes that decode (default: one a core)")
    add("--check", metavar="DIR", help="print what a packed folder holds and draw a contact sheet")
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    if not (args.src and args.out and args.size and args.size > 0):
        raise BadInput("expected --src DIR --size S (at least 1) --out data/NAME, or --check data/NAME")
    pack(args.src, args.size, args.out, args.split, args.classes, args.workers)


if __name__ == "__main__":
    run(main)
