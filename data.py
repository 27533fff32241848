"""Images in, batches out: the built-in shapes, the packed format, and `python data.py` that makes it.

    python data.py --src DIR --size 64 --out data/NAME   # sub-folders are the classes (or none); restartable
    python data.py --check data/NAME                     # counts, classes and a contact sheet

A packed folder holds images.npy, uint8 (N,3,S,S), or latents.npy, float16 (N,8,S/8,S/8), which vae.py writes,
labels.npy, int64 (N,), and meta.json, which is written last: a folder without it is an unfinished pack.
"""
import argparse
import colorsys
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import struct
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHUNK = 64                                       # images that a worker packs at a time
CLASSES = {"shapes": 8, "celeba64": 0, "imagenet64": 1000, "imagenet256": 1000}  # what these names promise


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
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        if joined or os.environ.get("LOCAL_RANK", "0") == "0":           # before they join, all find the same
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
    """The dict in a checkpoint or weight file, torch's or .safetensors: tensors and plain values. No other
    object is ever unpickled. Raises BadInput.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:                           # torch.load skips the checksums
                if bad := archive.testzip():
                    raise ValueError(f"{bad} does not match its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                              # of foreign pickles: refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise BadInput(f"{path}: reading it needs a package: pip install safetensors") from None
    except Exception as error:                                           # whatever damage makes them raise
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"holds a foreign object, {foreign[1]}; save its tensors alone" if foreign else \
              f"damaged or no weights, {type(error).__name__}"
        raise BadInput(f"{path}: cannot be loaded ({why})") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: found {type(state).__name__}, expected a dict of tensors")
    return state


def read_json(path):
    """The dict in a JSON file. Raises BadInput."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: damaged, expected a JSON object ({error})") from None


def facts(meta):
    """What of a pack's meta makes its content, as one hash: all but the names it goes by."""
    kept = {key: meta[key] for key in sorted(meta) if key not in ("dataset", "vae_file")}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


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

    def __init__(self, dir, flip=False):
        dir = Path(dir)
        if not (dir / "meta.json").is_file():
            state = "an unfinished pack" if (dir / "packing.json").exists() else "no packed data set"
            raise BadInput(f"{dir}: {state}, no meta.json; python data.py --src ... --out {dir} makes it")
        meta = read_json(dir / "meta.json")
        try:
            kind = "latents" if (dir / "latents.npy").exists() else "images"
            images, labels = (np.load(dir / f"{name}.npy", mmap_mode="r") for name in (kind, "labels"))
            (channels, side), dtype = ((8, meta["size"] // 8), "float16") if kind == "latents" else \
                                      ((3, meta["size"]), "uint8")
            shape, names = (meta["count"], channels, side, side), meta["classes"]
            if kind == "latents" and not (type(meta["scale"]) is float and 0 < meta["scale"] < math.inf):
                raise ValueError("scale: expected a positive number")
            if type(meta.get("vae_file", "")) is not str:
                raise TypeError("vae_file: expected a path")
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
    shown = lambda path: not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(src).parts)
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


def crop_chunk(paths, size, mirror=False):
    """Worker: uint8 (n,3,size,size); with `mirror` every second path is the one before it again, flipped."""
    rows = []
    for j, path in enumerate(paths):
        if mirror and j % 2:
            rows.append(rows[-1][:, :, ::-1])
        else:
            rows.append(center_crop(load_image(path), size).transpose(2, 0, 1))
    return np.stack(rows)


def pack_chunk(paths, size, file, first):
    """Worker: crop `paths` and write them to rows first, first + 1, ... of the memory map."""
    rows = np.lib.format.open_memmap(file, mode="r+")
    rows[first:first + len(paths)] = crop_chunk(paths, size)
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


def plan(src, out, size, split="train", classes=None, repeat=1, **more):
    """-> paths, labels and meta of a pack of the images below `src`, each `repeat` times, in folder `out`."""
    src, out = Path(src), Path(out)
    if out.resolve().is_relative_to(src.resolve()):
        raise BadInput(f"--out {out}: lies in --src {src}; expected another place")
    paths, labels, names = list_images(src)
    classes = CLASSES.get(out.name) if classes is None else classes
    if classes is not None and len(names) != classes:
        raise BadInput(f"--src {src}: found {len(names)} class folders, expected {classes}")
    listing = "\n".join(f"{path.relative_to(src)}\0{label}" for path, label in zip(paths, labels))
    listing = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    paths, labels = [path for path in paths for _ in range(repeat)], labels.repeat(repeat)
    meta = dict(dataset=out.name, split=split, count=len(paths), size=size, classes=names, listing=listing,
                crop="center (ADM)", filter="box halving, then bicubic", **more)
    if (out / "meta.json").exists():
        if facts(Packed(out).meta) != facts(meta):
            raise BadInput(f"--out {out}: already holds another packed data set; choose a new folder")
        for name in ("packing.json", "done.npy"):                        # of one killed after its last step
            (out / name).unlink(missing_ok=True)
    return paths, labels, meta


def begin(out, kind, row, dtype, meta):
    """-> memory maps of `kind`.npy, (count, *row), and of done.npy, 1 for every CHUNK of rows that is there:
    new ones, or those that a killed pack of the same `meta` left.
    """
    file, flags, journal = (out / name for name in (f"{kind}.npy", "done.npy", "packing.json"))
    shape, chunks = (meta["count"], *row), (-(-meta["count"] // CHUNK),)
    if not journal.exists():
        out.mkdir(parents=True, exist_ok=True)
        for name in ("images.npy", "latents.npy"):                       # of a pack killed before its journal
            (out / name).unlink(missing_ok=True)
        np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):                               # a full disk shows now
            with open(file, "rb+") as f:
                os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
        np.save(flags, np.zeros(chunks, dtype=np.uint8))
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
        (out / name).unlink()
    size = f"{meta['size']} x {meta['size']}"
    print(f"{out}: {meta['count']:,} images of {size}, {len(meta['classes'])} classes")


def pack(src, size, out, split="train", classes=None, workers=None):
    """Pack the images below `src` into folder `out`; after a kill it goes on, to the same bytes."""
    out, workers = Path(out), os.cpu_count() if workers is None else workers
    if workers < 1:
        raise BadInput(f"--workers: found {workers}, expected at least 1")
    paths, labels, meta = plan(src, out, size, split, classes)
    if (out / "meta.json").exists():
        return print(f"{out}: already packed, {len(paths):,} images")
    _, done = begin(out, "images", (3, size, size), np.uint8, meta)
    todo, since, start = np.flatnonzero(done == 0), time.time(), int(done.sum()) * CHUNK
    jobs = [(paths[i * CHUNK:(i + 1) * CHUNK], size, out / "images.npy", i * CHUNK) for i in todo]
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
