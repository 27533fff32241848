"""FID as the paper measured it: `python fid.py SAMPLES REFERENCE`, and the networks and formulas behind it.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # samples: PNG folder, npz, packed data
    python fid.py stats --data data/NAME --out ref.npz          # reference statistics of your own
    torchrun --nproc-per-node 8 fid.py SAMPLES REFERENCE        # the same number, sooner

The features are those of the 2015 Inception network with TF1's resize, as in NVlabs/edm and ADM's evaluator.
"""
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval


# ------------------------------------------------------------------------------------------ Inception-V3
# A line is a branch: steps, separated by commas, of name, width, kernel. Kernel "3" keeps the size, "3v" does
# not pad, "3/2" neither and strides; "avg" and "max" pool 3 x 3 at stride 1, "max/2" at stride 2 without
# padding; steps joined by "+" run side by side. The branches of a block are joined in the channels.

STEM = "1a_3x3 32 3/2, 2a_3x3 32 3v, 2b_3x3 64 3, max/2, 3b_1x1 80 1, 4a_3x3 192 3v, max/2"

BLOCK_A = """1x1 64 1
             5x5_1 48 1, 5x5_2 64 5
             3x3dbl_1 64 1, 3x3dbl_2 96 3, 3x3dbl_3 96 3
             avg, _pool {0} 1"""
BLOCK_B = """3x3 384 3/2
             3x3dbl_1 64 1, 3x3dbl_2 96 3, 3x3dbl_3 96 3/2
             max/2"""
BLOCK_C = """1x1 192 1
             7x7_1 {0} 1, 7x7_2 {0} 1x7, 7x7_3 192 7x1
             7x7dbl_1 {0} 1, 7x7dbl_2 {0} 7x1, 7x7dbl_3 {0} 1x7, 7x7dbl_4 {0} 7x1, 7x7dbl_5 192 1x7
             avg, _pool 192 1"""
BLOCK_D = """3x3_1 192 1, 3x3_2 320 3/2
             7x7x3_1 192 1, 7x7x3_2 192 1x7, 7x7x3_3 192 7x1, 7x7x3_4 192 3/2
             max/2"""
BLOCK_E = """1x1 320 1
             3x3_1 384 1, 3x3_2a 384 1x3 + 3x3_2b 384 3x1
             3x3dbl_1 448 1, 3x3dbl_2 384 3, 3x3dbl_3a 384 1x3 + 3x3dbl_3b 384 3x1
             {0}, _pool 192 1"""

BLOCKS = {  # name: channels in, branches                                    # out: side, channels
    "Mixed_5b": (192,  BLOCK_A.format(32)),  "Mixed_5c": (256, BLOCK_A.format(64)),
    "Mixed_5d": (288,  BLOCK_A.format(64)),                                  # 35, 288
    "Mixed_6a": (288,  BLOCK_B),
    "Mixed_6b": (768,  BLOCK_C.format(128)), "Mixed_6c": (768, BLOCK_C.format(160)),
    "Mixed_6d": (768,  BLOCK_C.format(160)), "Mixed_6e": (768, BLOCK_C.format(192)),     # 17, 768
    "Mixed_7a": (768,  BLOCK_D),                                             # 8, 1280
    "Mixed_7b": (1280, BLOCK_E.format("avg")), "Mixed_7c": (2048, BLOCK_E.format("max")),   # 8, 2048
}


class Unit(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(self, channels, width, kernel):
        super().__init__()
        size = [int(side) for side in kernel.rstrip("v").split("/")[0].split("x")]
        size = size * 2 if len(size) == 1 else size
        padding = 0 if kernel[-1] == "v" or "/" in kernel else [side // 2 for side in size]
        self.conv = nn.Conv2d(channels, width, size, 2 if "/" in kernel else 1, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """The branches of a table, their outputs joined in the channels; each unit is a child of its own name."""

    def __init__(self, channels, table, prefix="branch"):
        super().__init__()
        self.branches = []                       # [branch [step [unit names, or a pooling]]]
        for line in table.splitlines():
            width, branch = channels, []
            for step in line.split(","):
                names = []
                for name, *shape in (unit.split() for unit in step.split("+")):
                    if shape:
                        name, out = prefix + name, int(shape[0])
                        self.add_module(name, Unit(width, out, shape[1]))
                    names.append(name)
                width = out if shape else width
                branch.append(names)
            self.branches.append(branch)

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            h = x
            for names in branch:
                if names == ["avg"]:
                    h = F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)    # torchvision counts the padding
                elif names == ["max"]:
                    h = F.max_pool2d(h, 3, 1, 1)
                elif names == ["max/2"]:
                    h = F.max_pool2d(h, 3, 2)
                else:
                    h = [getattr(self, name)(h) for name in names]
                    h = torch.cat(h, 1) if len(h) > 1 else h[0]
            outputs.append(h)
        return torch.cat(outputs, 1) if len(outputs) > 1 else h


class Inception(Branches):
    """uint8 (N,3,H,W) -> pool3 features (N,2048) float32, at any H and W."""

    def __init__(self):
        super().__init__(3, STEM, "Conv2d_")
        for name, (channels, table) in BLOCKS.items():
            self.add_module(name, Branches(channels, table))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)                                      # batch statistics change the metric

    def fuse(self):
        """Every batch norm into its convolution: the same features to 1e-6, 1.14 x as fast on a CPU."""
        for unit in self.modules():
            if isinstance(unit, Unit):
                unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()
        return self.requires_grad_(False)

    def forward(self, images, spatial=False):
        """With spatial=True also the sFID features (N,2023): 7 channels of Mixed_6d.branch1x1, rows first."""
        x = (resize(images.float()) - 128) / 128                             # (N,3,299,299) in [-1, 0.992]
        x = super().forward(x.contiguous(memory_format=torch.channels_last))
        for name in BLOCKS:
            if name == "Mixed_6d" and spatial:
                seven = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        return (features, seven) if spatial else features

    def probs(self, features):
        """Class probabilities (N,1008) for the Inception Score: without fc's bias, as in ADM's evaluator."""
        return (features @ self.fc.weight.T).softmax(1)


def resize(x, size=299):
    """TF1's bilinear resize -> (N,C,size,size): source = i H / size, no half-pixel shift, no antialiasing."""
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = source.long().clamp(max=n - 1)
        high, share = (low + 1).clamp(max=n - 1), source - low
        share = share.view(-1, 1) if dim == 2 else share
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x


FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def load_inception(path_or_state_dict):
    """The published weights, 472 keys or 566 with counters, every one needed -> Inception, or ValueError."""
    state = path_or_state_dict
    if not isinstance(state, dict):
        from files import read
        state = read(state)
    model = Inception()
    try:
        model.load_state_dict(dict(state))                               # without metadata counters may lack
    except Exception as error:                                           # whatever damage makes it raise
        raise ValueError(f"not the FID Inception's weights: {' '.join(str(error).split())[:200]}") from None
    return model


def find_inception(path=None):
    """-> (fused Inception, SHA-256 of its file): `path`, else torch.hub's cache, else a download."""
    from files import BadInput, download, hash_file
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    cached = [folder / name for name in (FILE, FILE.replace("pt_", "weights-")) if (folder / name).exists()]
    file = Path(path) if path else cached[0] if cached else folder / FILE
    if not path and not cached:
        download(URL, file, SHA256, "--inception")
    if not file.is_file():
        raise BadInput(f"--inception {file}: no such file; expected {FILE} (SHA-256 {SHA256})")
    digest = hash_file(file)
    if digest != SHA256 and not path:
        raise BadInput(f"{file}: SHA-256 is {digest}, expected {SHA256}; remove it")
    try:
        model = load_inception(file).fuse()
    except ValueError as error:
        raise BadInput(f"{file}: {error}") from None
    if digest != SHA256 and os.environ.get("RANK", "0") == "0":
        print(f"warning: {file} is not the published file: not the literature's FID")
    return model, digest


# ----------------------------------------------------------------------------------------------- metrics

class Statistics:
    """Mean and covariance of feature rows, streamed in float64: add (n,D) at a time, in any portions."""

    def __init__(self, D, device="cpu"):
        self.n, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                        for shape in ((), (D,), (D, D)))

    def add(self, features):
        features = features.double()
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def result(self):
        """-> mu (D,), sigma (D,D) with n - 1 in the denominator, over all processes."""
        if dist.is_initialized():
            for part in (self.n, self.sum, self.outer):
                dist.all_reduce(part)
        mu = self.sum / self.n
        return mu.cpu(), ((self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)).cpu()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2), float64 (Heusel et al. 2017, eq. 6).

    With S1 = R R^T, tr((S1 S2)^1/2) is the sum of the roots of the eigenvalues of R^T S2 R, all real and
    >= 0: no sqrtm, no complex branch, finite for singular covariances. R is the Cholesky factor, or else the
    eigenvectors of the non-zero eigenvalues times their roots.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(part), dtype=torch.float64)
                                for part in (mu1, sigma1, mu2, sigma2))
    root, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:
        values, vectors = torch.linalg.eigh(sigma1)
        kept = values > values[-1] * 1e-14 * len(values)
        root = vectors[:, kept] * values[kept].sqrt()
    trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return float(distance.clamp(min=0))                                      # rounding of equal sets


def inception_score(probs, split=5000):
    """Mean over chunks in file order of exp(mean KL(p(y|x) || p(y))), as in ADM's evaluator."""
    scores = []
    for p in probs.double().split(split):
        scores.append((p * (p.log() - p.mean(0).log())).nansum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(reference, samples, k=3):
    """Kynkaanniemi et al. 2019: share of samples inside a reference's k-th neighbour ball, and the reverse.
    Distances are float64 here; ADM's evaluator has the same rule with float16 distances.
    """
    def squares(a, b):                                                       # (len(a), len(b))
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

    def covered(x, centres):
        radius = torch.cat([squares(part, centres).kthvalue(k + 1, 1)[0] for part in centres.split(1000)])
        inside = torch.cat([(squares(part, centres) <= radius).any(1) for part in x.split(1000)])
        return inside.double().mean()
    reference, samples = reference.double(), samples.double()
    return float(covered(samples, reference)), float(covered(reference, samples))


def pixels(images):
    """uint8 (N,3,H,W) -> (N,192): 8 x 8 average-pooled pixels in [0,1], for FD-pixels, which is no FID."""
    return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)


def fd_pixels(a, b):
    """Frechet distance of average-pooled pixels between two sets of uint8 images (N,3,H,W)."""
    sides = []
    for images in (a, b):
        statistics = Statistics(192)
        statistics.add(pixels(torch.as_tensor(images)))
        sides += statistics.result()
    return frechet_distance(*sides)


# ----------------------------------------------------------------------------------------- images on disk

def arr_0(archive, path):
    """-> stream of the pixels in an opened npz, their shape (N,S,S,3). Raises BadInput."""
    from files import BadInput
    try:
        stream = archive.open("arr_0.npy")
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        size = archive.getinfo("arr_0.npy").file_size
    except Exception as error:                                           # whatever damage makes them raise
        found = f"found {archive.namelist()[:5]}, expected arr_0, or mu and sigma"
        raise BadInput(f"{path}: {found} ({error})") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise BadInput(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N,S,S,3)")
    if not (0 < math.prod(shape) < size and shape[1] <= 8192):
        raise BadInput(f"{path}: arr_0 is {shape}, but holds {size:,} bytes")
    return stream, shape


class Source:
    """A folder of PNGs (recursive), an npz with arr_0 uint8 (N,S,S,3), or packed data.

    `count`, `size`, `meta`; `batches(start, stop, batch)` yields uint8 (n,3,S,S). Raises BadInput.
    """

    def __init__(self, path):
        from data import SUFFIXES, Packed
        from files import BadInput, open_zip, read_json
        self.path, self.meta, self.files, self.packed = Path(path), {}, None, None
        protocol = self.path / "protocol.json"
        if (self.path / "meta.json").is_file():
            self.packed = Packed(self.path)
            if self.packed.latents:
                raise BadInput(f"{path}: holds latents, expected images")
            kept = ("dataset", "split", "crop", "filter", "listing")
            self.meta = {key: self.packed.meta.get(key) for key in kept}
            self.count, self.size = len(self.packed), self.packed.size
        elif self.path.is_dir():
            found = sorted(file for file in self.path.rglob("*") if file.is_file())
            self.files = [file for file in found if file.suffix.lower() == ".png"]
            if other := [file for file in found if file.suffix.lower() in {*SUFFIXES, ".jfif"} - {".png"}]:
                raise BadInput(f"{other[0]}: expected PNG; JPEG changes the images and so the FID")
            if not self.files:
                raise BadInput(f"{path}: found no .png files")
            self.count, self.size = len(self.files), self.load(self.files[0]).shape[1]
        elif self.path.is_file() and zipfile.is_zipfile(self.path):          # a pipe would block
            with open_zip(self.path, self.path.stat().st_size, swell=1100) as archive:   # read in parts
                _, (self.count, self.size, *_) = arr_0(archive, path)
            protocol = self.path.with_suffix(".protocol.json")
        else:
            raise BadInput(f"{path}: expected a folder of PNGs, an npz or packed data")
        if protocol.exists():
            self.meta = read_json(protocol)
        self.promised = self.meta.get("n", self.count)                       # by sample.py

    def load(self, file):
        """One PNG as uint8 (3,S,S); all of a folder must be of one size."""
        from data import load_image
        from files import BadInput
        with open(file, "rb") as start:
            if start.read(4) != b"\x89PNG":
                raise BadInput(f"{file}: its content is not PNG")
        array = np.asarray(load_image(file)).transpose(2, 0, 1)
        size = getattr(self, "size", array.shape[1])
        if array.shape != (3, size, size):
            raise BadInput(f"{file}: found {array.shape[2]} x {array.shape[1]}, expected {size} x {size}")
        return array

    def batches(self, start, stop, batch):
        from files import BadInput
        places = [(i, min(i + batch, stop)) for i in range(start, stop, batch)]
        if self.packed:
            yield from (torch.from_numpy(np.array(self.packed.images[i:j])) for i, j in places)
        elif self.files:
            with ThreadPoolExecutor() as pool:                               # decoding leaves Python's lock
                for i, j in places:
                    yield torch.from_numpy(np.stack(list(pool.map(self.load, self.files[i:j]))))
        else:
            with zipfile.ZipFile(self.path) as archive:
                stream, (_, side, _, _) = arr_0(archive, self.path)
                each = side * side * 3
                try:
                    for skip in range(start * each, 0, -(1 << 24)):
                        stream.read(min(skip, 1 << 24))
                    for i, j in places:
                        block = np.frombuffer(stream.read((j - i) * each), dtype=np.uint8)
                        block = block.reshape(j - i, side, side, 3).transpose(0, 3, 1, 2)
                        yield torch.from_numpy(block.copy())
                except Exception as error:                               # whatever damage makes them raise
                    raise BadInput(f"{self.path}: damaged, {error}") from None


def measure(source, n, extract, batch, device):
    """Statistics of the first n images, each process its share -> dict of mu and sigma, and where `extract`
    gives spatial features too, of mu_s, sigma_s and `features`, (n,D) in file order.
    """
    from files import BadInput, progress
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if n < world:
        raise BadInput(f"{source.path}: {n} images are too few for {world} processes")
    start, stop, since, done = rank * n // world, (rank + 1) * n // world, time.monotonic(), 0
    streams, kept = [], []
    for images in source.batches(start, stop, batch):
        parts = extract(images.to(device))                                   # features, spatial features
        streams = streams or [Statistics(part.shape[1], device) for part in parts]
        for stream, part in zip(streams, parts):
            stream.add(part)
        kept += [parts[0].cpu()] if len(parts) > 1 else []
        done += len(images)
        if rank == 0:
            progress(str(source.path), done, stop - start, since)
    found = {}
    for stream, suffix in zip(streams, ("", "_s")):
        found[f"mu{suffix}"], found[f"sigma{suffix}"] = stream.result()
    if kept:
        gathered = [torch.cat(kept)] * world
        if world > 1:
            dist.all_gather_object(gathered, torch.cat(kept))
        found["features"] = torch.cat(gathered)
    return found


def stored(path):
    """(dict of mu, sigma, ..., float64; metadata) of a statistics npz, or None where `path` holds images."""
    from files import BadInput, open_zip, silent
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with silent(), np.load(path) as file:
            if not {"mu", "sigma"} & set(file.files):
                return None
            open_zip(path, Path(path).stat().st_size, swell=20).close()
            if not {"mu", "sigma"} <= set(file.files):
                return None
            found = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in file.files}
            if any(value.dtype.kind != "f" for value in found.values()):
                raise ValueError("mu, sigma: expected floating-point numbers")
            found = {key: torch.from_numpy(value.astype(np.float64)) for key, value in found.items()}
            meta = dict(json.loads(str(file["meta"])) if "meta" in file.files else {})
        for mu, sigma in [("mu", "sigma"), ("mu_s", "sigma_s")][:len(found) // 2]:
            D = len(found[mu])
            if found[mu].shape != (D,) or found[sigma].shape != (D, D):
                raise ValueError(f"{mu} is {tuple(found[mu].shape)}, {sigma} is {tuple(found[sigma].shape)}")
            if not (found[mu] + found[sigma]).isfinite().all() or found[sigma].diagonal().min() < 0:
                raise ValueError(f"{mu}, {sigma} are no mean and covariance")
        if type(meta.get("n", 0)) is not int:
            raise ValueError("n: expected a number")
    except Exception as error:                                           # whatever damage makes numpy raise
        raise BadInput(f"{path}: damaged statistics ({error})") from None
    return found, meta


# ------------------------------------------------------------------------------------------ command line

def side(path, count, extractor):
    """One side of the comparison -> its statistics, None where they are to be measured; its images, None
    where there are none; its metadata.
    """
    from files import BadInput
    if known := stored(path):
        found, meta = known
        with zipfile.ZipFile(path) as archive:                           # ADM's reference batches have both
            images = Source(path) if "arr_0.npy" in archive.namelist() else None
        meta = {"size": images and images.size, **meta, "of": meta.get("file"), "file": str(path)}
        return found, images, {**meta, "keys": "mu, sigma" + ", not arr_0" * bool(images)}
    images = Source(path)
    n = images.count if count is None else count
    if not 2 <= n <= images.count:
        raise BadInput(f"{path}: found {images.count:,} images, expected at least {max(n, 2):,}")
    if count is None and images.promised != n:
        raise BadInput(f"{path}: found {n:,} images, protocol.json promises {images.promised}")
    meta = dict(file=str(path), n=n, size=images.size, extractor=extractor)
    return None, images, {**images.meta, **meta}


def main():
    from files import BadInput, Parser, replace
    parser = Parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="SAMPLES REFERENCE, or the word stats")
    add("--data", help="stats: images to measure")
    add("--out", help="stats: npz to write")
    add("--count", type=int, help="use the first COUNT images of each side (default: all)")
    add("--features", choices=("inception", "pixels"), default="inception", help="pixels: FD-pixels")
    add("--metrics", choices=("fid", "all"), default="fid", help="all: also IS, sFID, precision and recall")
    add("--inception", help=f"weights file (default: {FILE} in torch.hub's cache, else downloaded)")
    add("--batch-size", type=int, default=64, help="images at a time in each process")
    args = parser.parse_args()
    making = args.inputs == ["stats"]
    flags = bool(args.data), bool(args.out), len(args.inputs)
    if flags != ((True, True, 1) if making else (False, False, 2)):
        raise BadInput("expected SAMPLES REFERENCE, or stats --data DIR --out FILE.npz")
    if args.batch_size < 1 or args.count is not None and args.count < 2:
        raise BadInput(f"--batch-size {args.batch_size}, --count {args.count}: expected at least 1 and 2")
    if args.features == "pixels" and args.metrics == "all":
        raise BadInput("--metrics all: needs --features inception")
    if making and Path(args.out).resolve() == Path(args.data).resolve():
        raise BadInput(f"--out {args.out}: is --data itself")

    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    model, extractor = None, "pixels 8x8"
    extract = lambda images: (pixels(images),)
    if args.features == "inception":
        model, extractor = find_inception(args.inception)
        model.to(device, memory_format=torch.channels_last)
        extract = lambda images: model(images, True) if args.metrics == "all" else (model(images),)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    paths, sides = [args.data] if making else args.inputs, []
    opened = [side(path, args.count, extractor) for path in paths]
    for key in ("size", "extractor"):                                        # before the long part
        values = [meta[key] for _, _, meta in opened if meta.get(key) is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise BadInput(f"{paths[0]} has {key} {values[0]}, {paths[1]} has {key} {values[1]}")
    for found, images, meta in opened:
        if found and images and rank == 0:
            print(f"{meta['file']}: its mu and sigma are used, not the {images.count:,} images in arr_0")
        if found is None:
            found = measure(images, meta["n"], extract, args.batch_size, device)
        elif images and args.metrics == "all":                               # precision and recall use them
            more = measure(images, images.count, extract, args.batch_size, device)
            found["features"] = more["features"]
        sides.append((found, meta))
    if world > 1:
        time.sleep(0.2)                                                      # see the end of train.py
        dist.destroy_process_group()
    if making and rank == 0:
        found, meta = sides[0]
        found.pop("features", None)
        replace(args.out, lambda f: np.savez(f, **found, meta=json.dumps(meta)))
        print(Path(args.out).resolve())
    elif rank == 0:
        report(*args.inputs, sides, extractor, model)


def report(samples, reference, sides, extractor, model):
    """Print the result line, warnings, and one JSON line with both sides' metadata."""
    from files import BadInput, hash_file
    (a, meta_a), (b, meta_b) = sides
    if len(a["mu"]) != len(b["mu"]):
        raise BadInput(f"{samples} has {len(a['mu'])} features, {reference} has {len(b['mu'])}")
    n = meta_a.get("n")
    name = "FID" if model else "FD-pixels"
    label = f"-{n // 1000}K" if n and n % 1000 == 0 else f"-{n}" if n else ""
    result = {f"{name}{label}": frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])}
    if "features" in a:
        weight = next(model.parameters())
        result["IS"] = inception_score(model.probs(a["features"].to(weight)))
        if all({"mu_s", "sigma_s"} <= part.keys() for part in (a, b)):
            result["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
        if min(len(part.get("features", a["features"])) for part in (a, b)) < 4:
            raise BadInput("--metrics all: precision and recall need at least 4 images a side")
        if "features" in b:
            parts = (side["features"].to(weight.device) for side in (b, a))
            result["precision"], result["recall"] = precision_recall(*parts)
        missing = [key for key in ("sFID", "precision", "recall") if key not in result]
        if missing:
            print(f"warning: {reference} lacks what {', '.join(missing)} need", file=sys.stderr)
    if not all(map(math.isfinite, result.values())):
        raise BadInput(f"{samples}, {reference}: features that are not finite; damaged weights?")
    for meta in (meta_a, meta_b):
        if Path(meta["file"]).is_file():
            meta["sha256"] = hash_file(meta["file"])
    for key, value in result.items():
        print(f"{key} {value:.2f}")
    least = len(a["mu"]) + 1
    if n and n < 50_000:
        why = "too few for a covariance, far too high" if n < least else "published values are of 50,000"
        print(f"warning: {n:,} images: {why}", file=sys.stderr)
    print(json.dumps(dict(result=result, samples=meta_a, reference=meta_b, extractor=extractor,
                          resize="TF1 bilinear" if model else None)))


if __name__ == "__main__":
    from files import run
    run(main)
