"""Images/s, memory and MFU of every part, each beside a plain baseline that takes turns with it.

    python bench.py                                      # everything; on a CPU with networks cut to fit
    python bench.py train --model vit-b --batch-size 4   # one network, whole
    python bench.py sample data                          # some parts
    python bench.py train --model vit-b --batch-size 4 --official DIR   # and the official code, cloned to DIR

A line is the median of --rounds rounds, in each of which everything that is compared runs in turn. The last
column is our time over that of what is named: below 1 is faster. MFU: FLOPs counted on the network, thrice
the forward pass in training, over the time, over the rate of a large matrix product in the same rounds. A
line is a process of its own; GiB is the most memory that it held.
"""
import contextlib
import copy
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Packed, center_crop, pack
from diffusion import Diffusion, sampler
from fid import Inception, frechet_distance
from files import BadInput, Parser, run
from sample import build_model, to_device
from vae import VAE

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TRAIN = str(Path(__file__).with_name("train.py"))
LINE = "{:<40} {:>6} {:>10} {:>10} {:>6} {:>6}   {}"


# --------------------------------------------------------------------------------------------- measuring

def turns(rounds, *calls):
    """Seconds of each call in each round, (rounds, calls); short ones are repeated until they are no noise."""
    def seconds(call, repeats=1):
        since = time.perf_counter()
        for _ in range(repeats):
            call()
        train.wait(DEVICE)
        return (time.perf_counter() - since) / repeats

    once = [seconds(call) and seconds(call) for call in calls]               # the first warms it
    repeats = [1 + int(max(0.1, max(once) / 5) / each) for each in once]
    return np.array([[*map(seconds, calls, repeats)] for _ in range(rounds)])


def product():
    """-> (call, FLOPs): the matrix product that MFU is relative to, 8192^3 in bfloat16, on a CPU 2048^3."""
    n, dtype = (8192, torch.bfloat16) if GPU else (2048, torch.float32)
    a, b, c = torch.randn(3, n, n, device=DEVICE).to(dtype)
    return lambda: torch.mm(a, b, out=c), 2 * n ** 3


def flops(make, *inputs):
    """Of a forward pass of the network that make() returns, run on tensors without content."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        make()(*(torch.zeros_like(part, device="meta") for part in inputs))
    return counter.get_total_flops()


def show(name, n, seconds, *others, work=0, gib=0.0):
    """A line: n images took seconds[:, 0] of each round, the others [:, 1], [:, 2], ..., and, where the FLOPs
    of the images are given as `work`, a product of `product` [:, -1].
    """
    each = np.median(seconds[:, 0])
    mfu = f"{np.median(work / seconds[:, 0] * seconds[:, -1] / product()[1]):.1%}" if work else ""
    ratios = [f"{np.median(seconds[:, 0] / seconds[:, k]):.3g} {other}" for k, other in enumerate(others, 1)]
    print(LINE.format(name, n, f"{n / each:,.4g}", f"{each * 1e3:,.4g}", f"{gib:.2f}" if gib else "", mfu,
                      ", ".join(ratios)), flush=True)


def memory():
    """GiB that were held at most: of the GPU, else by this process."""
    return (torch.cuda.max_memory_allocated() if GPU else train.peak_rss()) / 2 ** 30


def begin(method, part, args, *what):
    """In the new process: part(args, *what), whose own workers start as a script's do."""
    multiprocessing.set_start_method(method, force=True)
    part(args, *what)


def alone(part, args, *what):
    """Run part(args, *what) in a process of its own. Where that is killed for its memory, a line says so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(begin, multiprocessing.get_start_method(), part, args, *what).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            print(" ".join(map(str, what)) + ": does not fit into the memory", flush=True)


# ---------------------------------------------------------------------------------------------- training

def plain_blocks(model, dim, depth, heads):
    """The same ViT with PyTorch's own layers."""
    heads = heads if dim % heads == 0 else 8                                 # ViT-S: 6 heads of 85
    model.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True) for _ in range(depth))
    return model


def stepper(model, data, config, plain=False):
    """-> (whole, passes): a step of train.py as a call, and its forward and backward pass alone. plain: with
    AdamW and EMA as one writes them first.
    """
    diffusion = Diffusion(config["schedule"], config["T"], config["target"], config["weighting"]).to(DEVICE)
    ema = copy.deepcopy(model).requires_grad_(False)
    moments = None if plain else train.zero_moments(model)
    optimizer = torch.optim.AdamW(model.parameters(), config["lr"], config["betas"],
                                  weight_decay=config["weight_decay"]) if plain else None
    pin = lambda part: part.pin_memory() if GPU else part
    draw = lambda step: [pin(part) for part in train.draw_step(data, config, diffusion, step, slice(None))]
    batches, tally = train.ahead(draw, 0, 10 ** 9), torch.zeros(10, 4, dtype=torch.float64, device=DEVICE)
    skips = torch.zeros(3, dtype=torch.long, device=DEVICE)
    batch = [part.to(DEVICE) for part in next(batches)]

    def whole():
        batch[:] = [part.to(DEVICE, non_blocking=True) for part in next(batches)]
        train.backward(model, diffusion, batch, tally, config)
        if not plain:
            return train.update(model, ema, moments, config, 0, skips)
        optimizer.step()
        optimizer.zero_grad()
        for average, p in zip(ema.parameters(), model.parameters()):
            average.data.mul_(config["ema"]).add_(p.data, alpha=1 - config["ema"])

    def passes():
        train.backward(model, diffusion, batch, tally, config)
        model.zero_grad()
    return whole, passes


def official(folder, B):
    """A step of the official repository's TrainLoop on ViT-B, B latents that are in memory already. What
    little the step uses of the packages that the repository imports stands here.
    """
    sys.path.insert(0, folder)
    for name, parts in (("wandb", dict(run=None)), ("blobfile", {}),
                        ("timm.models.registry", dict(register_model=lambda make: make)),
                        ("timm.models.layers", dict(drop_path=lambda x, *_: x, to_2tuple=lambda n: (n, n),
                                                    trunc_normal_=nn.init.trunc_normal_))):
        sys.modules[name] = types.SimpleNamespace(**parts)
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    from guided_diffusion.train_util import TrainLoop
    from guided_diffusion.vision_transformer import vit_base_patch2_32
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    flags = dict(in_chans=4, drop_label_prob=0.15, use_fp16=GPU, class_cond=True)
    model = vit_base_patch2_32(depth=12, **flags).to(DEVICE)
    how = dict(image_size=32, noise_schedule="cosine", predict_xstart=True, mse_loss_weight_type="min_snr_5")
    _, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **how, "class_cond": True})
    loop = TrainLoop(model=model, diffusion=diffusion, data=None, batch_size=B, microbatch=-1, lr=1e-4,
                     ema_rate="0.9999", log_interval=10, save_interval=10 ** 9, resume_checkpoint="",
                     use_fp16=GPU, weight_decay=0.03, betas=(0.99, 0.99))
    x, y = torch.randn(B, 4, 32, 32), torch.zeros(B, dtype=torch.long)
    return lambda: loop.run_step(x, {"y": y})


def configured(dataset, model, *flags):
    """-> data, config of a preset of train.py; random numbers where the data are not here."""
    sys.argv = ["train.py", "--dry-run", "--dataset", dataset, "--model", model, *map(str, flags)]
    return train.configure(train.parse(), DEVICE)


def training(args, dataset, model, name="", B=None, network={}, flags=()):
    """A line of one network: a step of train.py beside one of the plain network; `network`: changes to it."""
    data, config = configured(dataset, model, *flags)
    shape, vit = config["network"], "depth" in config["network"]
    with torch.device("meta"):
        large = sum(p.numel() for p in build_model(config).parameters()) > 150e6
    if large and not GPU and not args.model:
        shape.update(dict(depth=4) if vit else dict(channels=64))
        name += f" cut to {'4 layers' if vit else '64 channels'}"
    shape.update(network)
    x = torch.zeros(1, shape["in_channels"], shape["img_size"], shape["img_size"])
    t = torch.zeros(1, dtype=torch.long)
    work = 3 * flops(lambda: build_model(config), x, t, t)
    B = args.batch_size or B or (config["batch_size"] if GPU else max(1, min(64, int(150e9 / work))))
    config["batch_size"] = B
    torch.manual_seed(0)
    ours = to_device(build_model(config), DEVICE)
    step, passes = stepper(ours, data, config)
    step(), step()
    gib = memory()
    plain = build_model(config)
    size = {key: shape[key] for key in ("dim", "depth", "heads")} if vit else {}
    plain = plain_blocks(plain, **size) if vit else plain
    calls = [step, stepper(plain.to(DEVICE), data, config, plain=True)[0], passes, product()[0]]
    others = ["TransformerEncoder" if vit else "NCHW" if GPU else "plain AdamW, EMA", "forward and backward"]
    if args.official and model == "vit-b" and data.latents:
        calls.insert(3, official(args.official, B))
        others.append("official")
    for end in ("", " compiled")[:1 + args.compile]:
        if end:
            ours.compile()
        show(f"{dataset} {model}{name}{end}", B, turns(args.rounds, *calls), *others, work=B * work, gib=gib)


# ---------------------------------------------------------------------------- sampling, autoencoder, metrics

class Halves(nn.Module):
    """A network that takes the two halves of a batch, with and without labels, one after the other."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes = model, model.num_classes

    def forward(self, x, t, y):
        return torch.cat([self.model(*part) for part in zip(*(part.chunk(2) for part in (x, t, y)))])


def sampling(args, dataset, model, B):
    _, config = configured(dataset, model)
    model, diffusion = to_device(build_model(config), DEVICE).eval(), Diffusion()
    z = torch.randn(B, model.in_channels, model.img_size, model.img_size, device=DEVICE)
    y = torch.arange(B, device=DEVICE) % model.num_classes
    work = flops(lambda: build_model(config), z[:1], y[:1], y[:1])
    how = dict(cfg=1.5), dict(cfg=2.1, interval=(0, 800)), dict()
    calls = [lambda net=net, how=how: sampler(net, diffusion, z, y, 30, **how)
             for net, how in ((model, how[0]), (model, how[1]), (model, how[2]), (Halves(model), how[0]))]
    seconds = turns(args.rounds, *calls, product()[0])
    for k, name, forwards, beside, against in ((0, ", guided", 118, "two calls", 3),
                                               (1, ", guided in t 0..800", 89, "guided", 0),
                                               (2, "", 59, "guided", 0)):
        show(f"{dataset} {config['model']}, Heun 30{name}", B, seconds[:, [k, against, -1]], beside,
             work=B * work * forwards)


def autoencoder(args, S, B):
    vae, plain = VAE().to(DEVICE), VAE().to(DEVICE, memory_format=torch.contiguous_format)
    x, z = torch.randn(B, 3, S, S, device=DEVICE), torch.randn(B, 4, S // 8, S // 8, device=DEVICE)
    for name, ours, part, given in (("encode", vae.moments, lambda v: v.encoder, x),
                                    ("decode", vae.decode, lambda v: v.decoder, z)):
        with torch.no_grad():
            seconds = turns(args.rounds, lambda: ours(given), lambda: part(plain)(given), product()[0])
        show(f"VAE {name} {S} x {S}", B, seconds, "NCHW", work=B * flops(lambda: part(VAE()), given[:1]))


def features(args, S, B):
    images = torch.randint(256, (B, 3, S, S), dtype=torch.uint8, device=DEVICE)
    plain, model = Inception().to(DEVICE), Inception().fuse().to(DEVICE, memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = turns(args.rounds, lambda: model(images), lambda: [plain(part) for part in images.split(1)],
                        product()[0])
    show(f"FID features of {S} x {S}", B, seconds, "one by one, batch norm apart",
         work=B * flops(Inception, images[:1]))


def distance(args, D):
    a, b = (np.cov(np.random.default_rng(k).normal(size=(2 * D, D)), rowvar=False) for k in (0, 1))
    mu = np.zeros(D)
    seconds = turns(args.rounds, lambda: frechet_distance(mu, a, mu, b), lambda: scipy.linalg.sqrtm(a @ b))
    show(f"Frechet distance, {D} dimensions", 1, seconds, "scipy.linalg.sqrtm")


# ---------------------------------------------------------------------------------------- data and processes

def packing(args, S, n=768):
    """n JPEGs of 500 x 375, packed; and beside it opened and cropped one after the other, not stored."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source = Path(folder) / "source" / "class"
        source.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for k in range(n):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            small.resize((500, 375), Image.BICUBIC).save(source / f"{k}.jpg", quality=90)
        outs = iter(range(10 ** 9))
        crop = lambda path: np.asarray(center_crop(Image.open(path).convert("RGB"), S))
        seconds = turns(args.rounds, lambda: pack(source.parent, S, Path(folder) / str(next(outs))),
                        lambda: [crop(path) for path in sorted(source.iterdir())])
    show(f"pack JPEGs 500 x 375 to {S} x {S}", n, seconds, f"one process ({os.cpu_count()} cores)")


def reading(args, n=2048, B=256):
    """B of n latents at random, from a packed folder and from one .pt file an image."""
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        latents = rng.standard_normal((n, 8, 32, 32)).astype(np.float16)
        np.save(folder / "latents.npy", latents), np.save(folder / "labels.npy", np.zeros(n, np.int64))
        meta = dict(dataset="bench", split="train", count=n, size=256, classes=["all"], scale=0.18215)
        (folder / "meta.json").write_text(json.dumps(meta))
        for k in range(n):
            torch.save(torch.from_numpy(latents[k].copy()), folder / f"{k}.pt")
        data, g = Packed(folder), torch.Generator()
        chosen = lambda: rng.integers(0, n, B)
        files = lambda: torch.stack([torch.load(folder / f"{k}.pt") for k in chosen()])
        seconds = turns(args.rounds, lambda: torch.from_numpy(data.images[chosen()]), files,
                        lambda: data.batch(chosen(), g))
    show("read latents of 32 x 32", B, seconds, "one .pt file an image")
    show("  and draw them from the posterior", B, seconds[:, [2, 1]], "one .pt file an image")


def script(*flags, until, env=(), torchrun=0):
    """Start train.py in a temporary folder -> (seconds until a line has `until`, that line)."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    with tempfile.TemporaryDirectory() as folder:
        since = time.perf_counter()
        words = [sys.executable, "-u", *start * bool(torchrun), TRAIN, "--out", folder + "/run"]
        process = subprocess.Popen([*words, *map(str, flags)],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env={**os.environ, **dict(env)})
        for line in process.stdout:
            if until in line:
                break
        seconds = time.perf_counter() - since
        process.terminate()                                                  # spares the samples at the end
        process.communicate()
    return seconds, line


def starting(args):
    first = lambda: script("--steps", 1, "--log-every", 1, until="step 1 /")[0]
    torch_alone = [sys.executable, "-c", "import torch"]
    rows = []
    for _ in range(args.rounds):
        since = first()
        before = time.perf_counter()
        subprocess.run(torch_alone)
        rows.append((since, time.perf_counter() - before))
    show("train.py: start to first step", 1, np.array(rows), "import torch")


def processes(args, steps=40):
    """The demo on 1, 2, ... processes of one thread (a GPU) each."""
    for count in (1, 2, 4, 8)[:max(2, torch.cuda.device_count().bit_length())]:
        rates = []
        for _ in range(args.rounds):
            _, line = script("--steps", 10 * steps, "--log-every", steps // 2, torchrun=count,
                             until=f"step {steps} /", env=dict(OMP_NUM_THREADS="1"))
            rates.append(float(re.search(r"([\d,]+) images/s", line)[1].replace(",", "")))
        seconds = 64 / np.array(rates)[:, None]
        show(f"shapes vit-tiny, {count} processes of 1 thread", 64, seconds)


# ------------------------------------------------------------------------------------------- command line

PARTS = {
    "train": [(training, *row) for row in dict.fromkeys(row[:2] for row in train.PRESETS[:-1])],
    "sample": [(sampling, "imagenet256", "vit-xl", 128) if GPU else (sampling, "shapes", "vit-tiny", 16)],
    "vae": [(autoencoder, 256, 64) if GPU else (autoencoder, 128, 2)],
    "fid": [(features, 256, 256) if GPU else (features, 64, 16), (distance, 2048 if GPU else 768)],
    "data": [(packing, 64), (reading,), (starting,)],
    "growth": [*[(training, "shapes", "vit-tiny", "", B) for B in (1, 4, 16, 64, 256)],
               *[(training, "shapes", "vit-tiny", f" {(side // 4) ** 2 + 2} tokens", 16, {}, ("--size", side))
                 for side in (8, 16, 32, 64)],
               *[(training, "shapes", "vit-tiny", f" width {dim}", 16, dict(dim=dim))
                 for dim in (96, 192, 384, 768)],
               (processes,)],
}


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    add("--model", choices=train.SIZES, help="train: this one alone, and whole")
    add("--batch-size", type=int, help="train: images a step (default: the preset's, on a CPU a few)")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--compile", action="store_true", help="train: a line with torch.compile as well")
    add("--official", metavar="DIR", help="train: beside a clone of the official repository")
    args = parser.parse_args()
    if foreign := set(args.parts) - PARTS.keys():
        raise BadInput(f"{foreign.pop()}: expected some of {', '.join(PARTS)}")
    for flag, value in (("rounds", args.rounds), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise BadInput(f"--{flag}: found {value}, expected at least 1")
    if args.official and not Path(args.official, "guided_diffusion").is_dir():
        raise BadInput(f"--official {args.official}: expected a clone of the official repository")
    call, work = product()
    rate = work / np.median(turns(args.rounds, call))
    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, PyTorch {torch.__version__}; a large matrix product: {rate / 1e12:,.3g} TFLOP/s")
    if not GPU:
        print("to fit a CPU, batches are small and networks of more than 150M parameters are cut")
    print(LINE.format("", "images", "images/s", "ms", "GiB", "MFU", "time over that of"), flush=True)
    for part in args.parts or PARTS:
        for function, *what in PARTS[part]:
            if part != "train" or args.model in (None, what[1]):
                alone(function, args, *what)


if __name__ == "__main__":
    run(main)
