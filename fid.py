"""FID as the paper measured it, and the network and formulas behind it: how far are samples from real images?

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # samples: npz, folder or .zip of PNGs, packed data
    python fid.py stats --data data/NAME --out ref.npz          # a reference of your own: its statistics

A network turns each image into features. FID is the Frechet distance between the features of two sets of images,
of which it takes the mean and the covariance, the statistics. The network is the Inception of December 2015, after
TensorFlow 1's resize, as in NVlabs/edm and in ADM's evaluator.

Samples are always measured on their images. A reference that has statistics is compared by them; what it lacks for
--metrics all is measured on the images in the same file.
"""
import collections
import contextlib
import json
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


# ------------------------------------------------------------------------------------------ Inception-V3
# The published weights belong to this network, which is not torchvision's. Here the average pool does not count
# the padding, and Mixed_7c takes the maximum where the other blocks take the average.

average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
maximum = nn.MaxPool2d(3, stride=1, padding=1)
halve = nn.MaxPool2d(3, stride=2)

# A block is a list of branches, whose outputs are joined in this order. A branch is a list of steps. A step is one
# of the pools above, or a unit: its name in the file of weights, then its width, kernel, stride and padding, which
# are the arguments of Unit. A unit that begins two branches is computed once.

STEM = [("Conv2d_1a_3x3", 32, 3, 2, 0),
        ("Conv2d_2a_3x3", 32, 3, 1, 0),
        ("Conv2d_2b_3x3", 64, 3),
        halve,
        ("Conv2d_3b_1x1", 80),
        ("Conv2d_4a_3x3", 192, 3, 1, 0),
        halve]


def block_a(pooled):                                     # pooled: the width of the branch with the pool
    return [[("branch1x1", 64)],
            [("branch5x5_1", 48), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [average, ("branch_pool", pooled)]]


BLOCK_B = [[("branch3x3", 384, 3, 2, 0)],
           [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, 0)],
           [halve]]


def block_c(inner):                                      # inner: the width inside the long branches
    row, column = (1, 7), (7, 1)
    return [[("branch1x1", 192)],
            [("branch7x7_1", inner), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
            [("branch7x7dbl_1", inner), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row),
             ("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)],
            [average, ("branch_pool", 192)]]


BLOCK_D = [[("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2, 0)],
           [("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2, 0)],
           [halve]]


def block_e(pool):
    row, column = (1, 3), (3, 1)
    single = ("branch3x3_1", 384)
    double = ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3)
    return [[("branch1x1", 320)],
            [single, ("branch3x3_2a", 384, row)],
            [single, ("branch3x3_2b", 384, column)],
            [*double, ("branch3x3dbl_3a", 384, row)],
            [*double, ("branch3x3dbl_3b", 384, column)],
            [pool, ("branch_pool", 192)]]


BLOCKS = {  # name: branches                channels and side of the output
    "Mixed_5b": block_a(32),              # 256, 35
    "Mixed_5c": block_a(64),              # 288, 35
    "Mixed_5d": block_a(64),              # 288, 35
    "Mixed_6a": BLOCK_B,                  # 768, 17
    "Mixed_6b": block_c(128),             # 768, 17
    "Mixed_6c": block_c(160),             # 768, 17
    "Mixed_6d": block_c(160),             # 768, 17
    "Mixed_6e": block_c(192),             # 768, 17
    "Mixed_7a": BLOCK_D,                  # 1280, 8
    "Mixed_7b": block_e(average),         # 2048, 8
    "Mixed_7c": block_e(maximum),         # 2048, 8
}


class Unit(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels, width, kernel=1, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)
        self.relu = nn.ReLU(inplace=True)


class Block(nn.Module):
    """(N,channels,H,W) -> the outputs of the branches, joined: (N,width,h,w). It holds its units by name."""

    def __init__(self, channels, branches):
        super().__init__()
        self.branches = branches
        self.width = 0
        for branch in branches:
            width = channels
            for step in branch:
                if isinstance(step, tuple):
                    name, out, *shape = step
                    self.add_module(name, Unit(width, out, *shape))
                    width = out
            self.width += width

    def forward(self, x):
        outputs, done = [], {}
        for branch in self.branches:
            h = x
            for step in branch:
                if isinstance(step, nn.Module):
                    h = step(h)
                    continue
                name = step[0]
                if name not in done:
                    done[name] = getattr(self, name)(h)
                h = done[name]
            outputs.append(h)
        return torch.cat(outputs, 1)


class Inception(Block):
    """uint8 (N,3,H,W) of any size -> features (N,2048), float32. It stays in eval mode.

    It is a Block whose one branch is the stem, because the published file has the stem's units at its top level.
    """

    def __init__(self):
        super().__init__(3, [STEM])
        width = self.width
        for name, branches in BLOCKS.items():
            block = Block(width, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, 1008)
        self.eval().requires_grad_(False)

    def forward(self, images, spatial=False):
        """With spatial=True also sFID's features (N,2023): 7 channels inside Mixed_6d, 17 x 17, row after row."""
        x = (resize(images.float()) - 128) / 128                             # (N,3,299,299) in [-1, 0.992]
        x = super().forward(x.contiguous(memory_format=torch.channels_last))     # (N,192,35,35)
        for name in BLOCKS:
            if name == "Mixed_6d":
                seven = self.Mixed_6d.branch1x1(x)[:, :7]                    # (N,7,17,17)
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        if spatial:
            return features, seven.permute(0, 2, 3, 1).flatten(1)
        return features

    def probs(self, features):
        """Class probabilities (N,1008) for the Inception Score; without fc's bias, as in ADM's evaluator."""
        return (features @ self.fc.weight.T).softmax(1)


def resize(x, size=299):
    """TensorFlow 1's bilinear resize, (N,C,n,n) -> (N,C,size,size): output pixel i is read at i n / size.

    PyTorch reads it at (i + 0.5) n / size - 0.5, but with align_corners at i n / size if the images have n + 1 and
    size + 1 pixels a side. So the last row and column are repeated at first, and cut off at the end.
    """
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[..., :size, :size]


# ----------------------------------------------------------------------------------------------- metrics

class Statistics:
    """Mean and covariance of features, in float64. They come in any portions (n,D), and are not kept."""

    def __init__(self):
        self.products = 0

    def add(self, features):
        rows = F.pad(features.double(), (0, 1), value=1)     # a column of ones: its products are sums, and n
        self.products += rows.T @ rows                       # (D+1,D+1)

    def result(self):
        """-> mu (D,) and sigma (D,D), whose denominator is n - 1. On the CPU."""
        products = self.products.cpu()
        n = products[-1, -1]
        mu = products[-1, :-1] / n
        return mu, (products[:-1, :-1] - n * torch.outer(mu, mu)) / (n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2) in float64 (Heusel et al. 2017, eq. 6).

    The last trace is the sum of the roots of the eigenvalues of S1 S2. With S1 = R R^T these are those of
    R^T S2 R, a symmetric matrix, so they are real and at least 0, also where the covariances are singular. The
    columns of R are the eigenvectors of S1 times the roots of their eigenvalues. Eigenvalues that are 0 but for
    rounding are left out.
    """
    given = mu1, sigma1, mu2, sigma2
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(part, dtype=torch.float64) for part in given)
    values, vectors = torch.linalg.eigh(sigma1)
    kept = values > values[-1] * 1e-14 * len(values)
    root = vectors[:, kept] * values[kept].sqrt()
    eigenvalues = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    shift = (mu1 - mu2).square().sum()
    traces = sigma1.trace() + sigma2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return float((shift + traces).clamp(min=0))          # of equal sets it is 0, and rounding may go below


def inception_score(probs, split=5000):
    """exp(mean KL(p(y|x) || p(y))) of class probabilities (N,classes) (Salimans et al. 2016). As in ADM's evaluator
    it is the mean over chunks of `split` images, in their order.
    """
    scores = []
    for p in probs.double().split(split):
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1)  # (n,)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def distances(points, centres):
    """Euclidean distances of (N,D) and (M,D), in portions (n,M), as all of them may not fit into memory."""
    for some in points.split(1000):
        yield torch.cdist(some, centres)


def covered(points, centres):
    """The share of the points that lie in some ball. Around each centre lies a ball that reaches to its third
    nearest neighbour among the centres.
    """
    nearest = [some.kthvalue(4).values for some in distances(centres, centres)]      # the nearest is itself
    radii = torch.cat(nearest)                                                       # (M,)
    inside = [(some <= radii).any(1) for some in distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def precision_recall(reference, samples):
    """Of features (N,D) and (M,D) (Kynkaanniemi et al. 2019): precision is the share of the samples that balls
    around the references cover, recall is the same with the sets exchanged. Distances are float64; ADM's evaluator
    has the same rule with float16.
    """
    reference, samples = reference.double(), samples.double()
    return covered(samples, reference), covered(reference, samples)


def kid(reference, samples, subset=1000, seed=0):
    """Kernel Inception distance of features (N,D) and (M,D) (Binkowski et al. 2018) -> mean and standard deviation
    over 100 pairs of random subsets, in float64.

    A subset has `subset` rows, or as many as the smaller set. The distance of two subsets is the unbiased MMD^2
    with the kernel k(x, y) = (x.y / D + 1)^3: the mean of k over two different rows of one subset, plus the same
    for the other, minus twice the mean of k over a row of each. It may be negative.
    """
    n = min(subset, len(reference), len(samples))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(100):
        subsets = [rows[rng.permutation(len(rows))[:n]] for rows in (reference, samples)]
        x = torch.cat(subsets).double()                                      # (2n,D)
        kernel = (x @ x.T / x.shape[1] + 1) ** 3
        kernel.fill_diagonal_(0)                                             # a row and itself do not count
        across = kernel[:n, n:].sum()
        within = kernel.sum() - 2 * across
        distance = within / (n * (n - 1)) - 2 * across / n ** 2
        found.append(float(distance))
    return np.mean(found), np.std(found)


def pixels(images):
    """uint8 (N,3,H,W) -> (N,192), features for FD-pixels, which is no FID: averages to 8 x 8 pixels, in [0,1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)


def fd_pixels(a, b):
    """FD-pixels: the Frechet distance of two sets of uint8 images (N,3,H,W) by `pixels`."""
    moments = []
    for images in (a, b):
        features = pixels(torch.as_tensor(images)).double()
        moments += [features.mean(0), features.T.cov()]
    return frechet_distance(*moments)


# ------------------------------------------------------------------------------- the weights of Inception
# The network and the metrics above need PyTorch and numpy alone. What follows uses other files of the project.

from data import Packed, find_files, generator, load_image  # noqa: E402
from files import (BadInput, NotFinite, Parser, allow_tf32, at_least, download, hash_file,  # noqa: E402
                   processes, progress, read, read_json, replace, run, say)

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
CACHED = f"{torch.hub.get_dir()}/checkpoints/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def load_inception(state):
    """Inception with the published weights, a file or a state dict: 472 tensors, or 566 with the counters of batch
    norm. Raises BadInput.
    """
    if not isinstance(state, dict):
        state = read(state)
    model = Inception()
    try:
        model.load_state_dict(state)                     # PyTorch lets a plain dict be without the counters
    except RuntimeError as error:
        raise BadInput(f"not the FID Inception's weights: {error!s:.200}") from None
    return model


# ----------------------------------------------------------------------------------------- what is on disk
# To open a path gives four things: the statistics that it has; its metadata; how many images it has; and
# take(rows), which reads some of them, uint8 (len(rows),3,S,S). Rows ascend, so that an npz is read forwards.

def open_any(path):
    if (path / "meta.json").exists():
        return open_pack(path)
    if path.suffix == ".npz":
        return open_npz(path)
    return open_folder(path)


def protocol(file):
    """What sample.py wrote about its images, such as their number n; {} for images of other origin."""
    return read_json(file) if file.exists() else {}


def open_pack(path):
    packed = Packed(path)
    if packed.latents:
        raise BadInput(f"{path}: holds latents, expected images")
    return {}, packed.meta, len(packed), packed.images.__getitem__


def open_folder(path):
    """The PNGs below a folder or in a .zip, in the order of their paths."""
    root, names, _ = find_files(path)
    names.sort(key=Path)
    meta = protocol(root / "protocol.json")
    for k, name in enumerate(names[:meta.get("n", 0)]):  # those beyond n are not measured
        stem = Path(name).stem
        if not stem.isdecimal() or int(stem) != k:
            raise BadInput(f"{path}: found {name}, expected image {k} of its protocol.json")
    kinds = {Path(name).suffix.lower() for name in names}
    if kinds != {".png"}:
        raise BadInput(f"{path}: found {sorted(kinds) or 'no images'}, expected .png; JPEG changes the FID")
    side = load_image(root / names[0]).width
    pool = ThreadPoolExecutor()                          # threads decode at the same time

    def load(row):
        file = root / names[row]
        image = load_image(file)
        if image.size != (side, side):
            raise BadInput(f"{file}: its size is {image.size}, expected square images, {side} x {side} as the first")
        return np.asarray(image).transpose(2, 0, 1)

    def take(rows):
        images = pool.map(load, rows)
        return np.stack(list(images))

    return {}, meta, len(names), take


def open_npz(path):
    """ADM's layout: images arr_0, uint8 (N,S,S,3), or grey (N,S,S) or (N,S,S,1); or statistics mu (D,), sigma (D,D),
    of sFID mu_s, sigma_s; or both. The images are never in memory as a whole.
    """
    with readable(path), np.load(path) as file:
        names = ("mu", "sigma", "mu_s", "sigma_s")
        statistics = {name: file[name].astype(float) for name in names if name in file}
        meta = protocol(path.with_suffix(".protocol.json"))
        if "meta" in file:                               # of `fid.py stats`
            meta = dict(json.loads(str(file["meta"])))
        if statistics and "arr_0" not in file:
            return statistics, meta, 0, None
        stream = zipfile.ZipFile(path).open("arr_0.npy")
        np.lib.format.read_magic(stream)
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
        N, S, *_ = shape
        grey = shape in [(N, S, S), (N, S, S, 1)]
        if dtype != np.uint8 or columns_first or not (grey or shape == (N, S, S, 3)):
            raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (N,S,S,3) in C order, or grey (N,S,S)")
    channels = 3
    if grey:
        channels = 1
        say(f"{path}: grey images, read as RGB")
    begin, each = stream.tell(), S * S * channels

    def take(rows):
        images = np.empty((len(rows), S, S, 3), np.uint8)
        with readable(path):
            for image, row in zip(images, rows):
                stream.seek(begin + row * each)
                values = np.frombuffer(stream.read(each), np.uint8)
                image[:] = values.reshape(S, S, channels)    # a grey value goes into three channels
        return images.transpose(0, 3, 1, 2)

    return statistics, meta, N, take


@contextlib.contextmanager
def readable(path):
    """What numpy, json, zipfile and zlib raise for a damaged file becomes one line that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: {error}") from None


def check_finite(path, statistics):
    """Raises NotFinite for statistics, or features, that hold inf or nan."""
    for name, values in statistics.items():
        if not torch.as_tensor(values).isfinite().all():
            raise NotFinite(f"{path}: {name} holds inf or nan, expected features that are finite")


def spread(count, total, seed):
    """-> `count` different numbers below total, ascending. The total is cut into `count` portions, whose sizes
    differ by at most 1, and one number of each is drawn. If count is total, these are all numbers.
    """
    edges = torch.arange(count + 1) * total // count
    places = torch.rand(count, generator=generator("count", seed, 0))        # each in [0,1), within its portion
    return (edges[:-1] + places.double() * edges.diff()).long().tolist()


def choose(path, meta, total, count, seed):
    """-> the rows to measure, ascending: `count` drawn ones; without a count the first n if the protocol has an n,
    else all. Notes a draw in meta["drawn"]. Raises BadInput for fewer than 4 rows, or more than there are.
    """
    promised = meta.get("n", total)
    available = min(promised, total)
    n = count or promised
    if not 4 <= n <= available:                          # precision needs three neighbours
        raise BadInput(f"{path}: found {total:,} images, {promised:,} in its protocol, expected at least "
                       f"{max(n, 4):,}")
    if promised < total:
        say(f"{path}: holds {total:,} images, {promised:,} of them by its protocol; measured are {n:,} of these")
    if count:
        meta["drawn"] = {"count": count, "seed": seed}
    return spread(n, available, seed)


def open_side(path, D, extractor, count, seed, by_images):
    """One side of the comparison -> its statistics, its metadata, the rows of the images that may be measured,
    and take(rows).

    Statistics of D features, which the extractor made, need no images. With `by_images` they are left aside.
    Raises BadInput, and NotFinite for statistics that are not finite.
    """
    statistics, meta, total, take = open_any(Path(path))
    rows = range(total)
    if by_images:
        if not total:
            raise BadInput(f"{path}: holds statistics without images, so it is no SAMPLES; the order is "
                           "python fid.py SAMPLES REFERENCE")
        statistics = {}
    if statistics:
        shapes = [np.shape(statistics.get(name)) for name in ("mu", "sigma")]
        if shapes != [(D,), (D, D)]:
            raise BadInput(f"{path}: mu and sigma are {shapes}, expected {D} features")
        check_finite(path, statistics)
        sigma = statistics["sigma"]
        if sigma.diagonal().min() < 0 or not np.allclose(sigma, sigma.T):
            raise BadInput(f"{path}: sigma is no covariance, which is symmetric and has no negative variance")
    else:
        rows = choose(path, meta, total, count, seed)
        meta.update(n=len(rows), extractor=extractor)
        meta.pop("classes", None)                        # a thousand names
    if total:
        meta["size"] = take(rows[:1]).shape[2]
    meta["file"] = str(path)
    return statistics, meta, rows, take


# ------------------------------------------------------------------------------------------ command line

def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    if sys.argv[1:2] == ["stats"]:
        add("stats", help="measure the images of --data")
        add("--data", required=True, help="images to measure")
        add("--out", required=True, help="npz to write")
    else:
        add("samples", help="folder or .zip of PNGs, npz or packed data")
        add("reference", help="the same, or an npz of statistics")
    add("--count", type=at_least(4), help="draw COUNT images of each side, one from each of COUNT equal parts "
        "of its order; a reference that has statistics stays as it is (default: all)")
    add("--seed", type=at_least(0), default=0, help="of the draw of --count")
    add("--features", choices=("inception", "pixels"), default="inception", help="pixels: FD-pixels, no FID")
    add("--metrics", choices=("fid", "all"), default="fid", help="all: also IS, sFID, precision, recall and KID")
    add("--inception", help=f"weights (default: {FILE} in torch.hub's cache, else downloaded)")
    add("--exact", action="store_true", help="float32 on a GPU, too, where the default is TF32")
    add("--batch-size", type=at_least(1), default=64, help="images at a time")
    args = parser.parse_args()
    if args.metrics == "all" and (args.features == "pixels" or "out" in args):
        raise BadInput("--metrics all: compares two sides by Inception's features")
    if "out" in args and (not args.out.endswith(".npz") or Path(args.out).resolve() == Path(args.data).resolve()):
        raise BadInput(f"--out {args.out}: expected a name that ends in .npz and is not --data itself")
    return args


def measure(take, rows, extract, batch_size, keep):
    """Statistics of the images of these rows: mu, sigma of extract's first features, and mu_s, sigma_s of its
    second ones, which are sFID's. With `keep` also `features`, the first ones themselves, (n,D) in the order of the
    rows.
    """
    streams = collections.defaultdict(Statistics)
    kept, since = [], time.monotonic()
    for i in range(0, len(rows), batch_size):
        some = rows[i:i + batch_size]
        parts = extract(take(some))
        for suffix, features in zip(("", "_s"), parts):
            streams[suffix].add(features)
        if keep:
            kept.append(parts[0].cpu())
        progress("images", i + len(some), len(rows), since)
    found = {}
    for suffix, stream in streams.items():
        found["mu" + suffix], found["sigma" + suffix] = stream.result()
    if keep:
        found["features"] = torch.cat(kept)
    return found


def main():
    args = flags()
    making = "out" in args
    _, _, device = processes()
    allow_tf32(not args.exact)

    # check both sides before the weights are fetched; their hash is known without them
    extractor, D = SHA256, 2048
    if args.inception:
        extractor = hash_file(args.inception)
    if args.features == "pixels":
        extractor, D = "pixels 8x8", 192
    paths = [args.data] if making else [args.samples, args.reference]
    sides = []
    for path in paths:                                   # the first is always measured on its images
        sides.append(open_side(path, D, extractor, args.count, args.seed, by_images=not sides))
    for key in ("size", "extractor"):
        values = [meta[key] for _, meta, *_ in sides if key in meta]
        if len(set(values)) > 1:
            raise BadInput(f"expected the same {key} in {paths}, found {values}")
    model = None
    if args.features == "inception":
        file = Path(args.inception or CACHED)
        if not file.exists():
            download(URL, file, SHA256, "--inception")
        if hash_file(file) != extractor:
            raise BadInput(f"{file}: its SHA-256 is not {extractor}; remove it")
        model = load_inception(file).to(device, memory_format=torch.channels_last)

    def extract(images):
        images = torch.tensor(images, device=device)
        if model:
            return model(images, spatial=True)
        return [pixels(images)]

    keep = args.metrics == "all"
    for statistics, meta, rows, take in sides:
        if rows and (keep or not statistics):
            measured = measure(take, rows, extract, args.batch_size, keep)
            check_finite(meta["file"], measured)
            meta["exact"] = args.exact or device.type == "cpu"
            statistics.update(measured | statistics)     # a file's own stay: ADM's are of more images than it holds
    if making:
        statistics, meta, *_ = sides[0]
        statistics["meta"] = json.dumps(meta)
        replace(args.out, lambda file: np.savez(file, **statistics))
        print(args.out)
    else:
        report(sides, extractor, model)


def report(sides, extractor, model):
    """Print the metrics, what speaks against them, and one JSON line with both sides' metadata."""
    (a, samples, *_), (b, reference, *_) = sides
    counted = [side for side in (samples, reference) if "n" in side]         # published statistics do not say
    n = min(side["n"] for side in counted)
    name = "FID" if model else "FD-pixels"
    distance = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    result = {f"{name}-{n}": distance}
    if "features" in a:
        features = a["features"].to(model.fc.weight)
        result["IS"] = inception_score(model.probs(features))
        if "mu_s" in b:
            given = a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"]
            result["sFID"] = frechet_distance(*given)
        else:
            say(f"left out: sFID, as {reference['file']} holds neither its statistics nor images")
        if "features" in b:
            real = b["features"].to(features)
            result["precision"], result["recall"] = precision_recall(real, features)
        else:
            say(f"left out: precision, recall and KID, as {reference['file']} holds no images")
    for key, value in result.items():
        print(f"{key} {value:.2f}")
    if "features" in b:
        result["KID"], result["KID_std"] = kid(real, features)
        print(f"KID {result['KID']:.6f}, standard deviation over the subsets {result['KID_std']:.6f}")
    if "n" not in reference:
        say(f"{reference['file']} does not say how many images and which network made it: taken as published")
    for side in counted:
        if side["n"] < 50_000:
            say(f"warning: {side['file']}: {side['n']:,} images bias the distance upwards; published FIDs are "
                f"of 50,000, and {len(a['mu']):,} features need at least {len(a['mu']) + 1:,}")
    if model and extractor != SHA256:
        say("warning: not the published weights, so not the literature's FID")
    found = dict(result=result, samples=samples, reference=reference, extractor=extractor)
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
