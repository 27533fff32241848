"""FID as the paper measured it: `python fid.py SAMPLES REFERENCE`, and the networks and formulas behind it.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # samples: PNG folder, npz, packed data
    python fid.py stats --data data/NAME --out ref.npz          # reference statistics of your own
    torchrun --nproc-per-node 8 fid.py SAMPLES REFERENCE        # the same number, sooner

The features are those of the 2015 Inception network with TF1's resize, as in NVlabs/edm and ADM's evaluator.
"""
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F


# ------------------------------------------------------------------------------------------ Inception-V3
# A branch is a chain of steps "name width kernel": kernel "3" keeps the size, "3v" does not pad, "3/2" strides
# too; "avg" and "max" pool 3 x 3 at stride 1, "max/2" at stride 2 without padding; a pair runs side by side.

STEM = ["Conv2d_1a_3x3 32 3/2", "Conv2d_2a_3x3 32 3v", "Conv2d_2b_3x3 64 3", "max/2",
        "Conv2d_3b_1x1 80 1", "Conv2d_4a_3x3 192 3v", "max/2"]


def block_a(pool):
    return [["branch1x1 64 1"], ["branch5x5_1 48 1", "branch5x5_2 64 5"],
            ["branch3x3dbl_1 64 1", "branch3x3dbl_2 96 3", "branch3x3dbl_3 96 3"], ["avg", f"branch_pool {pool} 1"]]


def block_c(c):
    return [["branch1x1 192 1"], [f"branch7x7_1 {c} 1", f"branch7x7_2 {c} 1x7", "branch7x7_3 192 7x1"],
            [f"branch7x7dbl_1 {c} 1", f"branch7x7dbl_2 {c} 7x1", f"branch7x7dbl_3 {c} 1x7", f"branch7x7dbl_4 {c} 7x1",
             "branch7x7dbl_5 192 1x7"], ["avg", "branch_pool 192 1"]]


def block_e(pool):
    return [["branch1x1 320 1"], ["branch3x3_1 384 1", ("branch3x3_2a 384 1x3", "branch3x3_2b 384 3x1")],
            ["branch3x3dbl_1 448 1", "branch3x3dbl_2 384 3", ("branch3x3dbl_3a 384 1x3", "branch3x3dbl_3b 384 3x1")],
            [pool, "branch_pool 192 1"]]


BLOCKS = {  # name: channels in, branches                                     # size and channels out
    "Mixed_5b": (192, block_a(32)), "Mixed_5c": (256, block_a(64)), "Mixed_5d": (288, block_a(64)),      # 35, 288
    "Mixed_6a": (288, [["branch3x3 384 3/2"], ["branch3x3dbl_1 64 1", "branch3x3dbl_2 96 3", "branch3x3dbl_3 96 3/2"],
                       ["max/2"]]),                                                                      # 17, 768
    "Mixed_6b": (768, block_c(128)), "Mixed_6c": (768, block_c(160)), "Mixed_6d": (768, block_c(160)),
    "Mixed_6e": (768, block_c(192)),
    "Mixed_7a": (768, [["branch3x3_1 192 1", "branch3x3_2 320 3/2"],
                       ["branch7x7x3_1 192 1", "branch7x7x3_2 192 1x7", "branch7x7x3_3 192 7x1", "branch7x7x3_4 192 3/2"],
                       ["max/2"]]),                                                                      # 8, 1280
    "Mixed_7b": (1280, block_e("avg")), "Mixed_7c": (2048, block_e("max")),                              # 8, 2048
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
    """Branches of a table, their outputs side by side in the channels; each unit a child of its own name."""

    def __init__(self, channels, branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = channels
            for step in branch:
                for unit in step if isinstance(step, tuple) else [step]:
                    if " " in unit:
                        name, out, kernel = unit.split()
                        self.add_module(name, Unit(width, int(out), kernel))
                width = int(out) if " " in unit else width

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            h = x
            for step in branch:
                if step == "avg":
                    h = F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)    # torchvision counts the padding
                elif step in ("max", "max/2"):
                    h = F.max_pool2d(h, 3, *((1, 1) if step == "max" else (2, 0)))
                elif isinstance(step, tuple):
                    h = torch.cat([getattr(self, unit.split()[0])(h) for unit in step], 1)
                else:
                    h = getattr(self, step.split()[0])(h)
            outputs.append(h)
        return torch.cat(outputs, 1)


class Inception(Branches):
    """uint8 (N,3,H,W) -> pool3 features (N,2048) float32, at any H and W."""

    def __init__(self):
        super().__init__(3, [STEM])
        for name, (channels, branches) in BLOCKS.items():
            self.add_module(name, Branches(channels, branches))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)                                      # batch statistics change the metric

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


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2), float64 (Heusel et al. 2017, eq. 6).

    With S1 = R R^T, tr((S1 S2)^1/2) is the sum of the roots of the eigenvalues of R^T S2 R, all real and >= 0: no
    sqrtm, no complex branch, finite for singular covariances. R is the Cholesky factor, or else the eigenvectors
    of the non-zero eigenvalues times their roots.
    """
    parts = (torch.as_tensor(np.asarray(part), dtype=torch.float64) for part in (mu1, sigma1, mu2, sigma2))
    mu1, sigma1, mu2, sigma2 = parts
    root, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:
        values, vectors = torch.linalg.eigh(sigma1)
        kept = values > values[-1] * 1e-14 * len(values)
        root = vectors[:, kept] * values[kept].sqrt()
    trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


# ------------------------------------------------------------------------------------------- the weights

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def load_inception(path_or_state_dict):
    """The published weights, 472 keys or 566 with batch counters, strictly -> Inception. Raises ValueError."""
    state = path_or_state_dict
    if not isinstance(state, dict):
        try:
            state = torch.load(state, map_location="cpu", weights_only=True)
        except Exception as error:                                       # whatever damage makes torch raise
            if isinstance(error, FileNotFoundError):
                raise ValueError(f"{path_or_state_dict}: no such file") from None
            raise ValueError(f"{path_or_state_dict}: cannot be loaded ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path_or_state_dict}: found {type(state).__name__}, expected a dict of tensors")
    model = Inception()
    own = model.state_dict()
    counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**counters, **state})
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"not the FID Inception's weights: {' '.join(str(error).split())[:200]}") from None
    return model


def find_inception(path=None):
    """-> (Inception, SHA-256 of its file): `path`, else torch.hub's cache, else a download, both checked."""
    from data import BadInput, hash_file
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    cached = [folder / name for name in (FILE, FILE.replace("pt_", "weights-")) if (folder / name).exists()]
    file = Path(path) if path else cached[0] if cached else folder / FILE
    if not path and not cached:
        print(f"downloading {URL}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"cannot download ({error}); put {FILE} (SHA-256 {SHA256}) into {folder} or name it "
                           "with --inception") from None
    if not file.is_file():
        raise BadInput(f"--inception {file}: no such file; expected {FILE} (SHA-256 {SHA256})")
    digest = hash_file(file)
    if digest != SHA256 and not path:
        raise BadInput(f"{file}: SHA-256 is {digest}, expected {SHA256}; remove it")
    if digest != SHA256:
        print(f"warning: {file} is not the published extractor: its numbers are not the literature's FID")
    try:
        return load_inception(file), digest
    except ValueError as error:
        raise BadInput(str(error)) from None


# -------------------------------------------------------------------------------------------- statistics

class Statistics:
    """Mean and covariance of feature rows, streamed in float64: add (n,D) at a time, in any portions."""

    def __init__(self, D, device="cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum, self.outer = (torch.zeros(*s, dtype=torch.float64, device=device) for s in ((D,), (D, D)))

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


def inception_score(probs, split=5000):
    """Mean over chunks in file order of exp(mean KL(p(y|x) || p(y))), as in ADM's evaluator."""
    scores = []
    for p in probs.double().split(split):
        scores.append((p * (p.log() - p.mean(0).log())).nansum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(reference, samples, k=3):
    """Kynkaanniemi et al. 2019: share of samples inside a reference's k-th neighbour ball, and the reverse."""
    def radii(x):                                                            # squared, itself left out
        return torch.cat([square(part, x).kthvalue(k + 1, dim=1).values for part in x.split(1000)])

    def square(a, b):
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

    def covered(x, centres, radius):
        inside = [(square(part, centres) <= radius).any(1) for part in x.split(1000)]
        return float(torch.cat(inside).double().mean())
    reference, samples = reference.double(), samples.double()
    return covered(samples, reference, radii(reference)), covered(reference, samples, radii(samples))


# ------------------------------------------------------------------------------------------------- files

def npy_header(member, name):
    """Shape of the uint8 array whose .npy stream `member` begins here."""
    from data import BadInput
    try:
        version = np.lib.format.read_magic(member)
        shape, fortran, dtype = {(1, 0): np.lib.format.read_array_header_1_0,
                                 (2, 0): np.lib.format.read_array_header_2_0}[version](member)
    except (ValueError, KeyError, EOFError) as error:
        raise BadInput(f"{name}: damaged array ({error})") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        raise BadInput(f"{name}: arr_0 is {dtype} {shape}, expected uint8 (N,H,W,3)")
    return shape


class Source:
    """Images on disk: a folder of PNGs (recursive), an npz with arr_0 uint8 (N,S,S,3), or packed data.

    `count`, `size`, `meta`; `batches(start, stop, batch)` yields uint8 (n,3,S,S). Raises BadInput.
    """

    def __init__(self, path):
        from data import BadInput, Packed
        self.path, self.meta, self.files, self.packed = Path(path), {}, None, None
        if (self.path / "meta.json").is_file():
            self.packed = Packed(self.path)
            self.meta = {key: self.packed.meta.get(key) for key in ("dataset", "split", "crop", "filter")}
            self.count, self.size = len(self.packed), self.packed.size
        elif self.path.is_dir():
            found = sorted(file for file in self.path.rglob("*") if file.is_file())
            if lossy := [file for file in found if file.suffix.lower() in (".jpg", ".jpeg", ".webp")]:
                raise BadInput(f"{lossy[0]}: JPEG changes the images and so the FID; expected PNG")
            self.files = [file for file in found if file.suffix.lower() == ".png"]
            if not self.files:
                raise BadInput(f"{path}: found no .png files")
            self.count, self.size = len(self.files), self.load(self.files[0]).shape[1]
        elif zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as archive:
                if "arr_0.npy" not in archive.namelist():
                    raise BadInput(f"{path}: found {archive.namelist()[:5]}, expected arr_0 or mu and sigma")
                with archive.open("arr_0.npy") as member:
                    self.count, self.size, *_ = npy_header(member, path)
        else:
            raise BadInput(f"{path}: expected a folder of PNGs, an npz or packed data")
        protocol = self.path / "protocol.json" if self.files else self.path.with_suffix(".protocol.json")
        if not self.packed and protocol.exists():
            self.meta = json.loads(protocol.read_text())

    def load(self, file):
        """One PNG as uint8 (3,S,S); all of a folder must be of one size."""
        from data import BadInput
        try:
            with Image.open(file) as image:
                array = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError) as error:
            raise BadInput(f"{file}: cannot be read as an image ({error})") from None
        size = getattr(self, "size", array.shape[1])
        if array.shape != (3, size, size):
            raise BadInput(f"{file}: found {array.shape[2]} x {array.shape[1]}, expected {size} x {size}")
        return array

    def batches(self, start, stop, batch):
        from data import BadInput
        places = [(i, min(i + batch, stop)) for i in range(start, stop, batch)]
        if self.packed or self.files:
            for i, j in places:
                yield torch.from_numpy(np.stack([self.load(file) for file in self.files[i:j]]) if self.files
                                       else np.array(self.packed.images[i:j]))
            return
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _, height, width, _ = npy_header(member, self.path)
            skip = start * height * width * 3
            while skip:
                skip -= len(member.read(min(skip, 1 << 24)))
            for i, j in places:
                block = member.read((j - i) * height * width * 3)
                if len(block) < (j - i) * height * width * 3:
                    raise BadInput(f"{self.path}: ends after {i:,} of {self.count:,} images")
                images = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(-1, height, width, 3)
                yield images.permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------ command line

def measure(source, n, extract, batch, device, everything=False):
    """Features of the first n images, each process its share -> dict of mu, sigma and, given `everything`,
    mu_s, sigma_s and all the features in file order.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, stop, since, done = rank * n // world, (rank + 1) * n // world, time.time(), 0
    pool, side, kept = None, None, []
    for images in source.batches(start, stop, batch):
        features, spatial = extract(images.to(device))
        pool = pool or Statistics(features.shape[1], device)
        pool.add(features)
        if everything:
            side = side or Statistics(spatial.shape[1], device)
            side.add(spatial)
            kept.append(features.cpu())
        done += len(images)
        if rank == 0:
            from data import progress
            progress(str(source.path), done, stop - start, since)
    found = dict(zip(("mu", "sigma"), pool.result()))
    if everything:
        found.update(zip(("mu_s", "sigma_s"), side.result()))
        parts = [torch.cat(kept)]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, torch.cat(kept))
        found["features"] = torch.cat(parts)
    return found


def stored(path):
    """(mu, sigma, ... as float64 dict, meta) of a statistics npz, or None where `path` holds images alone."""
    from data import BadInput
    if not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            found = {key: torch.from_numpy(np.asarray(file[key], dtype=np.float64))
                     for key in ("mu", "sigma", "mu_s", "sigma_s") if key in file.files}
            meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
            images = "arr_0" in file.files
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: damaged statistics ({error})") from None
    if images:
        source = Source(path)
        meta = {"size": source.size, **meta}
        print(f"{path}: using its mu and sigma, not the {source.count:,} images in arr_0")
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu in found and (found[mu].ndim != 1 or found[sigma].shape != 2 * found[mu].shape):
            raise BadInput(f"{path}: found {mu} {tuple(found[mu].shape)}, {sigma} "
                           f"{tuple(found[sigma].shape)}, expected (D,) and (D,D)")
    return found, meta


def side(path, args, extract, extractor, device, everything):
    """Statistics and metadata of one side of the comparison, from a statistics file or from images."""
    from data import BadInput
    if known := stored(path):
        found, meta = known
        if everything and zipfile.is_zipfile(path) and "arr_0" in np.load(path).files:
            source = Source(path)
            again = measure(source, source.count, extract, args.batch_size, device, True)
            found["features"] = again["features"]
        return found, {"file": str(path), **meta}
    source = Source(path)
    n = args.count or source.count
    if not 2 <= n <= source.count:
        raise BadInput(f"{path}: found {source.count:,} images, expected at least {max(n, 2):,}")
    found = measure(source, n, extract, args.batch_size, device, everything)
    return found, {"file": str(path), **source.meta, "n": n, "size": source.size, "extractor": extractor}


def main():
    from data import BadInput, Parser
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
    if making != bool(args.data and args.out) or not making and len(args.inputs) != 2:
        raise BadInput("expected SAMPLES REFERENCE, or stats --data DIR --out FILE.npz")
    if args.batch_size < 1 or args.features == "pixels" and args.metrics == "all":
        raise BadInput("--batch-size: expected at least 1; --metrics all needs --features inception")
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    everything = args.metrics == "all"
    if args.features == "pixels":
        extract, extractor = lambda images: (pixels(images), None), "pixels 8x8"
    else:
        model, extractor = find_inception(args.inception)
        model.to(device, memory_format=torch.channels_last)
        extract = lambda images: model(images, True) if everything else (model(images), None)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sides = [side(path, args, extract, extractor, device, everything)
             for path in ([args.data] if making else args.inputs)]
    if world > 1:
        time.sleep(0.2)                                                      # see the end of train.py
        dist.destroy_process_group()
    if rank:
        return
    if making:
        found, meta = sides[0]
        arrays = {key: value.numpy() for key, value in found.items() if key != "features"}
        from data import replace
        replace(args.out, lambda f: np.savez(f, **arrays, meta=json.dumps(meta)))
        return print(Path(args.out).resolve())
    report(sides, args, extractor, model if everything else None)


def report(sides, args, extractor, model):
    """Print the result line, warnings, and one JSON line with both sides' metadata."""
    from data import BadInput
    (a, meta_a), (b, meta_b) = sides
    meta_b = {"extractor": None, **meta_b}
    for key in ("size", "extractor"):
        found = [meta.get(key) for meta in (meta_a, meta_b)]
        if None not in found and found[0] != found[1]:
            raise BadInput(f"{args.inputs[0]} has {key} {found[0]}, {args.inputs[1]} has {key} {found[1]}")
    if a["mu"].shape != b["mu"].shape:
        raise BadInput(f"{args.inputs[0]} has {len(a['mu'])} features, {args.inputs[1]} has {len(b['mu'])}")
    n = meta_a.get("n")
    label = f"{n // 1000}K" if n and n % 1000 == 0 else n
    name = "FD-pixels" if args.features == "pixels" else "FID"
    result = {f"{name}-{label}": frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])}
    if args.metrics == "all":
        result["IS"] = inception_score(model.cpu().probs(a["features"]))
        if "mu_s" in b:
            result["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
        if "features" in b:
            result["precision"], result["recall"] = precision_recall(b["features"], a["features"])
    for key, value in result.items():
        print(f"{key} {value:.2f}")
    if n and n < (2_049 if name == "FID" else 193):
        print(f"warning: {n:,} images, too few for a covariance: far too high", file=sys.stderr)
    elif n and n < 50_000:
        print(f"warning: {n:,} images; published values are of 50,000 and lower", file=sys.stderr)
    print(json.dumps(dict(result=result, samples=meta_a, reference=meta_b, extractor=extractor,
                          resize="TF1 bilinear" if name == "FID" else None)))


if __name__ == "__main__":
    from data import run
    run(main)
