"""Train a diffusion model with the Min-SNR weighting.

    python train.py                                             # built-in images, CPU, minutes; then a grid
    torchrun --nproc-per-node 8 train.py --dataset imagenet64   # a preset of the paper, on data/imagenet64
    python train.py --resume                                    # go on where out/shapes was stopped

A run depends on its flags and --seed alone: not on the number of processes, --accum, or having been stopped.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.adamw import adamw
from torch.utils.flop_counter import FlopCounterMode

import model_unet
import model_vit
from data import CIFAR10, DATASETS, Images, Packed, built_in, facts, generator, imagenet, shapes
from diffusion import TARGETS, WEIGHTINGS, Diffusion
from fid import fd_pixels
from files import BadInput, Parser, lock, read, replace, run
from sample import build_model, draw, find_vae, grid, to_device

# One row per result of the papers, the default of a data set first. From the paper (section 4.1, appendix C):
# steps, batch, learning rate, warm-up, betas, EMA, schedule, targets of ImageNet-256, label drop and cfg of
# vit-l, Heun steps of vit-l and ImageNet-256. From the official scripts: weight decay, target of vit-l, label
# drop of ImageNet-256, cfg of vit-xl. Inferred: targets and Heun steps of CelebA, other rows' cfg, label
# drop and Heun steps of ImageNet-64's other rows (figure 8 is DPM-Solver, guided by ADM's classifier). The
# curriculum paper's rows: its settings, its 250 evaluations as 125 Heun steps; "shapes", "folder": ours.
DEMO = dict(lr=4e-3, warmup=100, betas=(.90, .99), ema=.99, decay=1.0, curriculum=240)
CLTS = dict(weighting="snr", betas=(.8, .999))                         # plain eps loss, Adam
LINEAR = dict(schedule="linear", curriculum=300_000)                   # of --timesteps clts: its last step
PRESETS = [
#    data set       network        target steps    batch  drop  cfg heun  other than DEFAULT     FID
    ("shapes",      "vit-tiny",    "x0",      2_400,   64, .10, 1.5,  18, DEMO),
    ("shapes",      "unet-tiny",   "x0",      1_500,   64, .10, 1.5,  18, DEMO | dict(lr=2e-3)),
    ("celeba64",    "vit-s",       "x0",    500_000,  128, .00, 1.0,  30, dict(warmup=5_000)), # table 3: 2.14
    ("celeba64",    "unet-celeba", "eps",   500_000,  128, .00, 1.0,  30, dict(warmup=5_000)), # table 3: 1.60
    ("imagenet64",  "vit-l",       "eps",   800_000, 1024, .15, 1.5,  20, {}),                 # table 4: 2.28
    ("imagenet64",  "unet-adm",    "eps",   900_000, 1024, .15, 1.5,  20, {}),                 # app. C: 2.11
    ("imagenet64",  "vit-b",       "x0",    800_000,  512, .15, 1.0,  20, {}),                 # figure 8
    ("imagenet256", "vit-b",       "x0",  1_000_000,  256, .15, 1.5,  30, {}),                 # table 2: 4.92
    ("imagenet256", "vit-xl",      "x0",  7_000_000,  256, .15, 1.5,  50, {}),                 # table 5: 2.06
    ("imagenet256", "vit-xl",      "eps", 2_100_000,  256, .15, 1.5,  50, {}),                 # table 5: 2.08
    ("imagenet256", "unet-b",      "x0",  1_000_000,  256, .15, 1.5,  30, {}),                 # table 1: 4.28
    ("imagenet256", "unet-ldm",    "eps", 1_400_000,  256, .15, 1.5,  50, {}),                 # table 5: 2.81
    ("imagenet128", "unet-adm128", "eps", 4_000_000,  256, .00, 1.0, 125, CLTS | LINEAR),
    ("cifar10",     "unet-cifar",  "eps",   500_000,  128, .00, 1.0, 125, CLTS | dict(T=4000, classes=0)),
    ("folder",      "vit-s",       "x0",    100_000,  128, .10, 1.5,  30, dict(warmup=1_000)),
]
COLUMNS = "dataset model target steps batch_size drop cfg sample_steps other".split()
DEFAULT = dict(weighting="min_snr", gamma=5.0, timesteps="uniform", importance=False, curriculum=50_000,
               schedule="cosine", T=1000, classes=None, lr=1e-4, warmup=0, decay=0.0, ema=.9999,
               interval=None)
SIZES = {**model_vit.SIZES, **model_unet.SIZES}
SKIPS = 10                                             # updates left out in a row, that end a run
UGD = dict(ugd_every=500, ugd_bins=50, ugd_samples=64, ugd_lambda=.01)      # in the config with it alone
FREE = "steps cfg sample_steps interval data log_every save_every sample_every".split()   # even on --resume
MANY, BELOW_1 = 2 ** 62, 1 - 1e-9
RANGES = dict(steps=(1, MANY), batch_size=(1, 1e6), lr=(1e-12, 1e3), warmup=(0, MANY), decay=(0, 1),
              drop=(0, 0.999), betas=(0, BELOW_1), ema=(0, BELOW_1), weight_decay=(0, 1e3),
              gamma=(1e-12, 1e12), T=(1, 1e6), patch=(1, 1e4), size=(1, 1e4), seed=(0, MANY),
              cfg=(0, 1e3), sample_steps=(1, 1e4), interval=(0, MANY), accum=(1, 1e6), log_every=(1, MANY),
              save_every=(1, MANY), sample_every=(0, MANY), ugd_every=(1, MANY), ugd_bins=(1, 1e6),
              ugd_samples=(1, 1e6), ugd_lambda=(0, 1e9))


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    # what: a flag left out takes the preset's value, or on --resume the run's own
    add("--dataset", help=f"{', '.join(DATASETS)}, or any packed data/NAME (default: shapes)")
    add("--data", help="packed folder (default: data/DATASET)")
    add("--size", type=int, help="image side, free for the built-in shapes alone (default: 16)")
    add("--classes", type=int, help="0: unconditional, whatever the labels (default: as many as there are)")
    add("--model", choices=SIZES, help="network")
    add("--patch", type=int, help="patch side (default: 4 pixels, 2 of latents)")
    # the paper
    add("--target", choices=TARGETS, help="what the network predicts")
    add("--weighting", choices=[*WEIGHTINGS, "ugd"], help="of the loss over t, defined on x0 (default:\n"
                                                          "min_snr); ugd: solved from gradients, pareto.py")
    add("--ugd-every", type=int, help="steps between its solutions (default: 500)")
    add("--ugd-bins", type=int, help="bins of t, a gradient each (default: 50)")
    add("--ugd-samples", type=int, help="samples a bin (default: 64)")
    add("--ugd-lambda", type=float, help="of eq. 11, / median squared gradient (default: 0.01)")
    add("--timesteps", help="density of t: uniform (default), clts:MU:STEP (share of T, last step of the\n"
                            "curriculum), laplace:MU:B, logit_normal:M:S, cosine_scaled:S, or the name alone")
    add("--importance", action=argparse.BooleanOptionalAction,
        help="divide the loss by q T: the density serves the objective of uniform t")
    add("--gamma", type=float, help="clamp of min_snr and max_snr (default: 5)")
    add("--schedule", choices=("cosine", "linear"), help="noise schedule (default: cosine)")
    add("--T", type=int, help="timesteps (default: 1000)")
    # optimisation
    add("--steps", type=int, help="total optimizer steps, those before a --resume included; with --decay\n"
                                  "another total is another learning rate, not the same run prolonged")
    add("--batch-size", type=int, help="global: images per optimizer step, over all processes")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--decay", type=float, help="share of the run, at its end, in which the rate falls linearly to 0")
    add("--betas", type=float, nargs=2, help="AdamW")
    add("--weight-decay", type=float, help="AdamW (default: 0.03)")
    add("--drop", type=float, help="probability of replacing the label by the null label, for guidance")
    add("--ema", type=float, help="rate of the exponential moving average of the weights")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half (default: all but shapes)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="bfloat16 = autocast (default on a GPU)")
    add("--seed", type=int, help="of everything random (default: 0)")
    add("--cfg", type=float, help="guidance scale of the sample grids")
    add("--sample-steps", type=int, help="Heun steps of the sample grids")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"), help="guide the grids only for LO <= t <= HI")
    # this machine: none of these changes the result
    add("--accum", type=int, default=1, help="micro-batches per step and process, for small memories")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--grad-ckpt", action="store_true", help="keep the blocks' inputs alone and compute the rest again\n"
                                                 "for the gradient: less memory (see --dry-run), more time")
    add("--data-on-gpu", action="store_true", help="hold the whole data set in the device's memory")
    add("--out", help="folder of the run (default: out/DATASET)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--log-every", type=int, help="steps between log lines (default: 100)")
    add("--save-every", type=int, help="steps between checkpoints; the last is always saved (default: 1000)")
    add("--sample-every", type=int, help="steps between sample grids; 0: only at the end (default: 0)")
    add("--dry-run", action="store_true", help="print configuration, FLOPs, speed, memory and days, no more")
    return parser.parse_args()


def preset(dataset, model=None, target=None):
    """The row of a data set, network and target as a dict; a network without one takes the data set's first
    row, with the betas and weight decay of its kind.
    """
    rows = [dict(zip(COLUMNS, row)) for row in PRESETS]
    rows = [row for row in rows if row["dataset"] == dataset] or [{**rows[-1], "dataset": dataset}]
    model = model or rows[0]["model"]
    rows = [row for row in rows if row["model"] == model] or [{**rows[0], "model": model}]
    row = next((row for row in rows if row["target"] == target), rows[0])
    unet = model in model_unet.SIZES
    usual = dict(betas=(.9, .999), weight_decay=0.0) if unet else dict(betas=(.99, .99), weight_decay=0.03)
    other = row.pop("other")
    row = DEFAULT | usual | row | other
    return row | dict(betas=list(row["betas"]))


def stand_in(dataset):
    """64 random images of the shape of a data set that is not here, for --dry-run."""
    size, classes, _ = DATASETS[dataset]
    g = generator("stand-in", 0, 0)
    names = CIFAR10 if dataset == "cifar10" else list(imagenet())[2] if classes else []
    images = torch.randint(256, (64, 3, size, size), dtype=torch.uint8, generator=g)
    if dataset == "imagenet256":
        images = torch.randn(64, 8, size // 8, size // 8, generator=g).half() / 2 ** .5      # mean and std
    meta = dict(dataset=dataset, classes=list(names), scale=1.0)
    return Images(images.numpy(), np.zeros(64, np.int64), meta)


def brief(classes, other):
    """What there is to say of a list of class names beside another: their number and where they part."""
    part = next((k for k, (a, b) in enumerate(zip(classes, other)) if a != b), min(len(classes), len(other)))
    return f"{len(classes)}" + (f" (number {part}: {classes[part]!r})" if part < len(classes) else "")


def settings(args, device, saved=None):
    """-> config: the preset's row, or on --resume the saved config, under the flags given."""
    old = saved or {}
    name = args.dataset or old.get("dataset", "shapes")
    row = preset(name, args.model or old.get("model"), args.target or old.get("target"))
    curriculum = row.pop("curriculum")
    config = dict(row, data=f"data/{name}", seed=0, patch=None, flip=None, log_every=100, save_every=1000,
                  sample_every=0, dtype="bfloat16" if device.type == "cuda" else "float32")
    if (old or config | vars(args))["weighting"] == "ugd":
        config.update(UGD)
    elif flags := [f"--{key.replace('_', '-')}" for key in UGD if getattr(args, key) is not None]:
        raise BadInput(f"{flags[0]}: needs --weighting ugd")
    given = {key: value for key, value in vars(args).items() if value is not None and key in config}
    name, *values = given.get("timesteps", "").split(":")
    if name == "clts":
        given["timesteps"] = ":".join([name, *values, *["0.3", str(curriculum)][len(values):]])
    if saved is not None:
        if missing := sorted(key for key in {*config, "size", "classes"} if key not in saved or
                             saved[key] is None and config.get(key) is not None):
            raise BadInput(f"{args.out}/ckpt.pt: its config lacks {', '.join(missing)}")
        usual = {**config, "size": 1}                                    # a value has the type it always has
        if odd := [key for key in usual if None not in (usual[key], saved[key]) and key != "classes"
                   and type(saved[key]) is not type(usual[key])]:
            raise BadInput(f"{args.out}/ckpt.pt: its config is damaged ({odd[0]} {saved[odd[0]]!r})")
        given.setdefault("classes", len(saved["classes"]))
        for key, value in given.items():
            before = len(saved[key]) if key == "classes" else saved[key]
            if key not in FREE and value != before:
                flag = key.replace("_", "-")
                raise BadInput(f"--{flag}: found {value}, the run in {args.out} has {before}")
        config = saved
    config = {**config, **given}                                             # classes: how many, None: all
    for key, (low, high) in RANGES.items():
        value = config.get(key, getattr(args, key, None))
        parts = value if key in ("betas", "interval") and value else [] if value is None else [value]
        if not all(low <= part <= high for part in parts):
            raise BadInput(f"--{key.replace('_', '-')}: found {value}, expected {low:g} to {high:g}")
    if config["interval"] and not config["interval"][0] <= config["interval"][1] < config["T"]:
        raise BadInput(f"--interval: found {config['interval']}, expected LO <= HI < {config['T']}")
    return config


def open_data(args, config, saved):
    """The data set that the config names, unconditional where it says so. Raises BadInput where the data are
    not what their name, the flags or the run that is resumed promise.
    """
    name, classes = config["dataset"], config["classes"]
    if name == "shapes" and args.data:
        raise BadInput(f"--data {args.data}: shapes are built in; name the data set with --dataset")
    if name == "shapes":
        data = built_in(config.get("size", args.size or 16))
    elif args.dry_run and name in DATASETS and not args.data and not Path(config["data"]).exists():
        data = stand_in(name)
    else:
        data = Packed(config["data"])
    if classes not in (None, 0, len(data.classes)):
        raise BadInput(f"--classes: found {classes}, {config['data']} has {len(data.classes)}, or 0")
    data.classes = data.classes if classes != 0 else []
    kind, held = ("latents" if x else "images" for x in (name == "imagenet256", data.latents))
    official, packed = DATASETS.get(name, (0, 0, 0))[1], data.meta.get("dataset")
    for what, found, expected in (("dataset", packed, name if {packed, name} <= DATASETS.keys() else None),
                                  ("content", held, kind if name in DATASETS else None),
                                  ("--size", data.size, args.size), ("size", data.size, saved.get("size")),
                                  ("number of classes", len(data.meta["classes"]), official or None),
                                  ("classes", data.classes, saved.get("classes")),
                                  ("data", facts(data.meta), saved.get("facts"))):
        if expected is not None and found != expected:
            if what == "classes":
                found, expected = brief(found, expected), brief(expected, found)
            raise BadInput(f"{what}: {config['data']} has {found}, expected {expected}")
    if data.latents:
        probe = data.batch(np.linspace(0, len(data) - 1, 256).astype(int), generator("probe", 0, 0))[0].std()
        if not 0.7 <= probe <= 1.3:
            raise BadInput(f"{config['data']}: scaled latents have a standard deviation of {probe:.3f}, "
                           "expected 0.7 to 1.3: another autoencoder, or a damaged file")
    return data


def configure(args, device, saved=None):
    """-> (data, config), which hold together: what a run depends on. Raises BadInput."""
    config = settings(args, device, saved)
    data = open_data(args, config, saved or {})
    pixels, vit = config["dataset"] != "shapes" and not data.latents, config["model"] in model_vit.SIZES
    config.update(patch=config["patch"] or (2 if data.latents else 4) if vit else None,
                  flip=pixels if config["flip"] is None else config["flip"])
    data.flip = config["flip"]
    if data.latents and data.flip:
        raise BadInput("--flip: latents cannot be mirrored; vae.py --mirror encodes both")
    if vit and data.size % config["patch"]:
        raise BadInput(f"--patch: found {config['patch']}, expected a divisor of the image side {data.size}")
    if args.patch and not vit:
        raise BadInput(f"--patch {args.patch}: {config['model']} has no patches")
    if not data.classes:
        if args.drop or (args.cfg or 1) != 1:
            raise BadInput("--drop, --cfg: found no classes, expected 0 and 1")
        config.update(drop=0.0, cfg=1.0)
    if config["cfg"] != 1 and not config["drop"]:
        raise BadInput(f"--cfg {config['cfg']}: a model trained with --drop 0 cannot be guided, expected 1")
    if config["interval"] and config["cfg"] == 1:
        raise BadInput(f"--interval {config['interval']}: there is no guidance at --cfg 1")
    network = dict(img_size=data.size, in_channels=data.channels, num_classes=len(data.classes),
                   **json.loads(json.dumps(SIZES[config["model"]])))         # as in config.json: no tuples
    if vit:
        network.update(patch_size=config["patch"], T=config["T"], short_run=config["model"] == "vit-tiny")
    return data, {**config, "size": data.size, "classes": data.classes, "network": network,
                  "facts": facts(data.meta), **{key: data.meta.get(key) for key in ("vae", "vae_file")}}


def checkpoint(path, previous):
    """-> the state of the run to resume; from `previous` where a kill between two renames left that alone.
    Raises BadInput for a damaged one, which says whether the one before it is whole.
    """
    def whole(path):
        state = read(path)
        for part, kind in (*((part, dict) for part in ("model", "ema", "optimizer", "config")),
                           ("step", int), ("tally", torch.Tensor)):
            if not isinstance(state.get(part), kind):
                raise BadInput(f"{path}: not a checkpoint to resume from ({part} missing or damaged)")
        return state
    if not path.exists() and previous.exists():
        return whole(previous)
    try:
        return whole(path)
    except BadInput as error:
        try:
            step = whole(previous)["step"]
        except BadInput:
            raise error from None
        raise BadInput(f"{error}; delete it to go on from {previous.name}, whole, of step {step:,}") from None


def fresh(part):
    """The same dicts, lists and values afresh, equal strings one object: a pickle tells its values alone."""
    if isinstance(part, dict):
        return {fresh(key): fresh(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [fresh(value) for value in part]
    return sys.intern(part) if type(part) is str else part


def draw_step(data, config, diffusion, step, rows):
    """Everything random in one step, drawn for the whole global batch and cut to this process's rows."""
    B, N, seed = config["batch_size"], len(data), config["seed"]
    g = generator("step", seed, step)
    places = torch.arange(step * B, (step + 1) * B)                      # in an endless sequence of epochs
    indices = torch.cat([epoch_order(N, seed, epoch)[places[places // N == epoch] % N]
                         for epoch in (places // N).unique().tolist()])
    x0, y = data.batch(indices.numpy(), g, rows)
    t, ratio = (part[rows] for part in diffusion.draw(B, g, step))
    noise = torch.randn(B, *x0.shape[1:], generator=g)[rows]
    dropped = torch.rand(B, generator=g)[rows] < config["drop"]
    scale = ratio if config["importance"] else torch.ones_like(ratio)
    return x0, t, noise, torch.where(dropped, len(data.classes), y), scale


@functools.lru_cache(maxsize=2)
def epoch_order(N, seed, epoch):
    """Permutation of 0 .. N-1 for one epoch."""
    return torch.randperm(N, generator=generator("epoch", seed, epoch))


def ahead(make, first, last, threads=1):
    """make(first), ..., make(last - 1), each prepared in a thread while as many steps before it run."""
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(make, step) for step in range(first, min(first + threads, last))]
        for step in range(first, last):
            if step + threads < last:
                jobs.append(pool.submit(make, step + threads))
            yield jobs.pop(0).result()


def backward(net, diffusion, batch, tally, config, accum=1, world=1):
    """Loss and gradients of this process's rows (x0, t, noise, y, scale), micro-batch by micro-batch; DDP
    exchanges gradients in the last one only. Adds the sums of a log line to tally (10,4), by range of t.
    """
    tens = torch.arange(10, device=tally.device)[:, None]
    for i, (x0, t, noise, y, scale) in enumerate(zip(*(part.chunk(accum) for part in batch))):
        nothing = contextlib.nullcontext()
        with net.no_sync() if world > 1 and i + 1 < accum else nothing:
            with torch.autocast(x0.device.type, torch.bfloat16) if config["dtype"] == "bfloat16" else nothing:
                loss, mse = diffusion.loss(net, x0, t, noise, y)
            loss = loss * scale.to(loss.dtype)                               # 1, or 1 / (q T)
            (loss.sum() * (world / config["batch_size"])).backward()         # DDP divides by world
        with torch.no_grad():
            sums = torch.stack([loss, mse, mse / diffusion.factor[t], torch.ones_like(mse)], 1).double()
            sums = torch.where(sums.isfinite().all(1, keepdim=True), sums, 0)
            tally += (t * 10 // config["T"] == tens).double() @ sums         # (10,B) @ (B,4)


def zero_moments(model):
    """AdamW's state at the beginning, under the names that torch.optim gives it."""
    return {i: dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p)) for i, p in enumerate(model.parameters())}


@torch.no_grad()
def update(model, ema, moments, config, step, skips):
    """One step of AdamW, left out where a gradient is not finite, which the host learns with the next log
    line, and one of the moving average of the weights. skips (3,) long: how many were left out in a row,
    since the last line, and the first of these. After SKIPS in a row all are.
    """
    used = [(p, p.grad, m) for p, m in zip(model.parameters(), moments.values()) if p.grad is not None]
    params, grads, states = map(list, zip(*used))
    row, count, first = skips
    bad = ~torch.stack(torch._foreach_norm(grads)).sum().isfinite() | (row >= SKIPS)
    skips.copy_(torch.stack([(row + 1) * bad, count + bad, torch.where(bad & (count == 0), step, first)]))
    # AdamW as a function: the class would import the compiler first, which takes as long as all of PyTorch
    means, squares, steps = ([m[key] for m in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    adamw(params, grads, means, squares, [], steps, fused=True, found_inf=bad.float(), amsgrad=False,
          beta1=config["betas"][0], beta2=config["betas"][1], lr=learning_rate(config, step),
          weight_decay=config["weight_decay"], eps=1e-8, maximize=False)       # found_inf: nothing is changed
    model.zero_grad()
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - config["ema"])


def learning_rate(config, step):
    """Linear warm-up, constant, and over the last `decay` of the run linearly to 0."""
    rise = min(1, (step + 1) / max(config["warmup"], 1))
    fall = min(1, (1 - step / config["steps"]) / config["decay"]) if config["decay"] else 1
    return config["lr"] * rise * fall


HEADER = "step,loss,mse," + ",".join(f"x0_mse_{i}" for i in range(10))    # bin i: t in [i T/10, (i+1) T/10)


def log_row(step, tally):
    """tally (10,4), sums of loss, mse, x0-space mse and 1 in ten bins of t -> one line of log.csv."""
    loss, mse, *_ = (tally.sum(0) / tally.sum(0)[3]).tolist()
    bins = (tally[:, 2] / tally[:, 3]).tolist()                              # nan where no t fell into a bin
    return f"{step},{loss:.9g},{mse:.9g}," + ",".join(f"{value:.9g}" for value in bins)


def sanity(model, config, data, n=256):
    """FD-pixels to 2,048 of the data's images, of n samples and of n real images that were not trained on."""
    how = dict(steps=config["sample_steps"], cfg=config["cfg"])
    drawn = torch.cat([draw(model, config, range(k, k + 64), **how) for k in range(0, n, 64)])
    real, unseen = (shapes(ks, config["size"])[0] for ks in (range(2048), range(len(data), len(data) + n)))
    return fd_pixels(drawn, real), fd_pixels(unseen, real)


def dry_run(config, model, ema, moments, diffusion, parts, micro, world, device):
    """Print the configuration, FLOPs, and what a step of `parts` times `micro` images takes here: measured on
    random numbers, 1, 2, 4, ... images at a time until that takes seconds, fills `micro` or the memory.
    """
    for key, value in config.items():
        print(f"  {key:<13} {len(value) if key == 'classes' else json.dumps(value)}")
    if config["dataset"] != "shapes" and not Path(config["data"]).exists():
        print(f"{config['data']} is not here: random numbers stand in")
    C, S = config["network"]["in_channels"], config["network"]["img_size"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_model(config)(torch.empty(1, C, S, S), *torch.zeros(2, 1, dtype=torch.long))
    forward = counter.get_total_flops() / 1e9
    print(f"{forward:,.1f} GFLOP an image forward, {3 * forward:,.1f} in training", flush=True)

    def seconds(work):                                                       # of a call, the first left out
        work(), wait(device)
        count, since = 0, time.monotonic()
        while count == 0 or time.monotonic() - since < 0.5:
            work(), wait(device)
            count += 1
        return (time.monotonic() - since) / count

    def passes():
        backward(model, diffusion, (x, t, x, t, torch.ones_like(t)), tally, config)

    def repeated():                                                          # an update, with the same gradients
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad
        update(model, ema, moments, config, 0, skips)

    tally = torch.zeros(10, 4, dtype=torch.float64, device=device)
    skips = torch.zeros(3, dtype=torch.long, device=device)
    n, each = 0, 0.0
    while n < micro and each < 2:
        B = min(max(2 * n, 1), micro)
        x = torch.randn(B, C, S, S, device=device, dtype=next(model.parameters()).dtype)
        t = torch.zeros(B, dtype=torch.long, device=device)
        try:
            n, each = B, seconds(passes)
        except torch.OutOfMemoryError:
            break
    if not n:
        raise BadInput(f"--dry-run: one image does not fit into the memory of {device}; try --grad-ckpt")
    grads = [p.grad for p in model.parameters()]
    step = parts * micro / n * each + (last := seconds(repeated))
    if config["weighting"] == "ugd":
        bins, P = config["ugd_bins"], sum(p.numel() for p in model.parameters())
        solving = bins * config["ugd_samples"] * math.ceil(4 * bins * P / 2 ** 30) / n * each / world
        print(f"UGD: about {solving:,.1f} s a solution, one in {config['ugd_every']} steps, counted below")
        step += solving / config["ugd_every"]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()
    rate, hours = parts * micro * world / step, config["steps"] * step / 3600
    print(f"dry run: {rate:,.2f} images/s, {step * 1e3:,.0f} ms a step ({last * 1e3:,.0f} of it the update), "
          f"{rate * 3 * forward / 1e3:,.2f} TFLOP/s; measured with {n} images at a time, peak memory "
          f"{peak / 2**30:.2f} GiB per process, without data and communication\n"
          f"{config['steps']:,} steps: {hours:,.1f} hours, {hours / 24:,.1f} days")


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_rss():
    """Bytes of memory this process held at most; the system counts in KiB on Linux and in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    args = parse()

    # ------------------------------------------------------------------------------- processes and device
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    say = print if rank == 0 else lambda *a, **k: None
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # ----------------------------------------------------------------------------- configuration and data
    args.out = Path(args.out or f"out/{args.dataset or 'shapes'}").resolve()
    ckpt, previous, log_file = (args.out / name for name in ("ckpt.pt", "ckpt_previous.pt", "log.csv"))
    if (ckpt.exists() or previous.exists()) and not (args.resume or args.dry_run):
        raise BadInput(f"--out {args.out}: holds a run already; go on with --resume or choose another folder")
    if args.resume and args.out.is_dir() and not args.dry_run:
        lock(args.out)                                                   # the run before may be saving still
    state = checkpoint(ckpt, previous) if args.resume else None
    try:
        data, config = configure(args, device, state and state["config"])
    except (TypeError, KeyError, AttributeError) as error:
        if state is None:
            raise
        raise BadInput(f"{ckpt}: its config is damaged ({type(error).__name__}: {error})") from None
    if config["dtype"] == "bfloat16":
        torch.set_float32_matmul_precision("high")                       # TF32 where autocast leaves float32
    B, steps = config["batch_size"], config["steps"]
    log_every, save_every, sample_every = (config[f"{what}_every"] for what in ("log", "save", "sample"))
    if state and not 0 <= state["step"] <= steps:
        raise BadInput(f"--steps: found {steps}, the run in {args.out} has done {state['step']}")
    if state and steps != state["config"]["steps"] and config["decay"]:
        say(f"warning: --steps was {state['config']['steps']}: the past was not that of a {steps}-step run")
    if B % (world * args.accum):
        raise BadInput(f"--batch-size {B}: global, must divide by {world} processes x --accum {args.accum}")
    micro = B // (world * args.accum)
    rows = slice(rank * B // world, (rank + 1) * B // world)

    # --------------------------------------------------------------------------------- network, optimizer
    torch.manual_seed(config["seed"])
    dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
    try:
        keys = ("schedule", "T", "target", "weighting", "gamma", "timesteps")
        ugd = config["weighting"] == "ugd"
        table = {**config, "weighting": "const"} if ugd else config          # until its first solution
        diffusion = Diffusion(*(table[key] for key in keys)).to(device)
        if state:                                                        # no memory until shapes are right
            with torch.device("meta"):
                build_model(config).load_state_dict(state["model"], assign=True)
        model = to_device(build_model(config), device, dtype)
    except ValueError as error:
        raise BadInput(str(error)) from None
    except Exception as error:                                           # whatever damage raises
        if not state:
            raise
        raise BadInput(f"{ckpt}: weights and config disagree ({str(error)[:200]})") from None
    model.grad_ckpt = args.grad_ckpt
    ema = copy.deepcopy(model).requires_grad_(False)
    moments = zero_moments(model)
    first, tally, log = 0, torch.zeros(10, 4, dtype=torch.float64, device=device), []
    if state:
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            for i, moment in moments.items():
                for key, value in moment.items():
                    if (found := state["optimizer"]["state"][i][key]).shape != value.shape:
                        raise ValueError("optimizer moments of another shape")
                    value.copy_(found)
            tally += state["tally"].to(tally) * (rank == 0)              # the sums since the last log line
            if ugd:
                diffusion.weight.copy_(state["weight"])
        except Exception as error:                                       # whatever damage raises
            why = " ".join(str(error).split())[:200]
            raise BadInput(f"{ckpt}: weights and config disagree ({why})") from None
        first = state["step"]
        lines = log_file.read_text(errors="replace").splitlines() if log_file.exists() else []
        log = [line for line in lines if (number := line.split(",")[0]).isdecimal() and int(number) <= first]
        state = None                                                         # its memory is needed
    if args.compile:
        torch._dynamo.config.suppress_errors = True                      # no compiler: a warning, and eager
        model.compile()                                                  # in place: names stay plain
    net, control = model, None
    if world > 1 and not args.dry_run:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")                         # for the stop signal, off the GPU
        net = torch.nn.parallel.DistributedDataParallel(model, [local] if device.type == "cuda" else None)

    def save(step, total):
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=dict(state=moments),
                     step=step, config=config, tally=total.cpu(),
                     **({"weight": diffusion.weight.cpu()} if ugd else {}))
        replace(ckpt, lambda f: torch.save(fresh(state), f), previous)

    def picture(step):
        path = args.out / f"samples_{step:06d}.png"
        try:
            vae = find_vae(config, device)
        except BadInput as error:
            return f"{ckpt}: no grid ({error})"
        return grid(ema, config, path, steps=config["sample_steps"], cfg=config["cfg"],
                    interval=config["interval"], vae=vae)

    params = sum(p.numel() for p in model.parameters())
    say(f"{config['model']}: {params / 1e6:.1f}M parameters, {config['target']} prediction, "
        f"{config['weighting']} weighting, gamma {config['gamma']:g}, {config['timesteps']} t, "
        f"{config['dtype']} on {device.type}")
    say(f"{config['dataset']}: {len(data):,} images {data.size} x {data.size}, {len(data.classes)} classes; "
        f"global batch {B} = {micro} x {world} processes x {args.accum} accumulation")
    if data.meta.get("split", "train") != "train":
        say(f"warning: {config['data']} is the {data.meta['split']} split of {config['dataset']}")
    if args.gamma is not None and config["weighting"] not in ("min_snr", "max_snr", "soft_min_snr"):
        say(f"warning: --gamma {args.gamma:g} changes nothing, the weighting is {config['weighting']}")
    rarest = 1 / (diffusion.density(steps).min() * diffusion.T)
    if args.importance and (config["timesteps"] == "uniform" or rarest > 1e4):
        what = "changes nothing" if rarest < 1.01 else f"multiplies the loss of the rarest t by {rarest:.0e}"
        say(f"warning: --importance {what}")
    if 1 / (1 - min(config["ema"], 1 - 1e-9)) > steps:
        say(f"warning: an EMA of {config['ema']} averages over more steps than the run's {steps}")
    if args.dry_run:
        return rank or dry_run(config, model, ema, moments, diffusion, args.accum, micro, world, device)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        lock(args.out)
        replace(args.out / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
        print(f"writing to {args.out}", flush=True)

    # -------------------------------------------------------------------------------------- training loop
    stop, signals, lost = 0, [], ""
    skips = torch.zeros(3, dtype=torch.long, device=device)
    for name in (signal.SIGINT, signal.SIGTERM):                         # a second Ctrl-C interrupts at once
        signal.signal(name, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))
    if args.data_on_gpu:
        try:
            data.to(device)
        except torch.OutOfMemoryError:
            raise BadInput(f"--data-on-gpu: {config['data']} does not fit into {device}'s memory") from None
    pin = lambda part: part.pin_memory() if device.type == "cuda" and part.device.type == "cpu" else part
    parts = lambda step: [pin(part) for part in draw_step(data, config, diffusion, step, rows)]
    share = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))     # a CPU's cores train
    batches = ahead(parts, first, steps, max(1, min(4, share)) if device.type == "cuda" else 1)
    since, waited, solving, mark, done = time.monotonic(), 0.0, 0.0, first, first
    for step in range(first, steps):
        # grid of the steps before: here, as a kill between checkpoint and grid must not lose it
        if rank == 0 and sample_every and step and step % sample_every == 0:
            print(picture(step), flush=True)

        # UGD: the weights of the loss, solved anew from fresh gradients, one table for all processes
        if ugd and step % config["ugd_every"] == 0:
            from pareto import ugd_table
            now = time.monotonic()
            how = [config[key] for key in ("ugd_bins", "ugd_samples", "ugd_lambda")]
            x0_weight = ugd_table(model, diffusion, data, *how, seed=f"{config['seed']} {step}").to(device)
            if world > 1:
                dist.broadcast(x0_weight, 0)
            diffusion.weight = x0_weight / diffusion.factor
            took = time.monotonic() - now
            solving += took
            say(f"step {step:,}: UGD weights solved in {took:.1f} s, {solving:.1f} s so far", flush=True)

        # data: prepared by a thread, already cut to this process
        now = time.monotonic()
        x0, t, noise, y, scale = (part.to(device, non_blocking=True) for part in next(batches))
        waited += time.monotonic() - now

        # loss and gradients, then update of weights and EMA
        batch = x0.to(dtype), t, noise.to(dtype), y, scale
        backward(net, diffusion, batch, tally, config, args.accum, world)
        update(model, ema, moments, config, step, skips)

        # stop signal, agreed on by all processes
        done, stop = step + 1, max(signals, default=0)
        if world > 1:
            flag = torch.tensor([stop])
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=control)
            stop = int(flag)

        # log, save, sample
        last = done == steps
        logs, saves = last or done % log_every == 0, last or stop or done % save_every == 0
        if logs or saves:
            total = tally.clone()
            if world > 1:
                dist.all_reduce(total)
            row, count, at = skips.tolist()
            if count:
                say(f"warning: from step {at + 1:,} on, gradients were not finite in {count:,} steps; their "
                    "updates were left out", flush=True)
                skips[1] = 0
            if row >= SKIPS:
                lost = f"gradients of {SKIPS} steps in a row, from step {done - row + 1:,} on,"
            weights = [*model.parameters(), *ema.parameters()]
            if not lost and not torch.stack(torch._foreach_norm(weights)).sum().isfinite():
                lost = f"weights at step {done:,}"
            if lost:
                break
        if logs:
            log.append(log_row(done, total))
            seconds, since = time.monotonic() - since, time.monotonic()
            loss, mse, *_ = (total.sum(0) / total.sum(0)[3]).tolist()
            say(f"step {done:,} / {steps:,}   loss {loss:.4f}   {config['target']} mse {mse:.4f}   "
                f"{(done - mark) * B / seconds:,.0f} images/s   "
                f"data {waited / seconds:.1%}   {(steps - done) * seconds / (done - mark) / 60:.1f} min left",
                flush=True)
            mark, waited = done, 0.0
            tally.zero_()
            total.zero_()
        if rank == 0 and (logs or saves):
            replace(log_file, lambda f: f.write("\n".join([HEADER, *log, ""]).encode()))
        if rank == 0 and saves:
            save(done, total)
        if stop:
            break

    # ------------------------------------------------------------------------------------------------ end
    if world > 1:
        time.sleep(0.2)                      # gloo's threads need the GIL to drop their last tensors, and are
        dist.destroy_process_group()         # joined with the GIL held: without the pause 1 exit in 6 hung
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if lost:
        say(f"{lost} are not finite; an earlier checkpoint was left as it is: {ckpt}")
        sys.exit(3)
    elif stop:
        say(f"stopped; checkpoint of step {done}: {ckpt}; go on with --resume")
        sys.exit(128 + stop)
    elif rank == 0:
        if config["dataset"] == "shapes":
            found, floor = sanity(ema, config, data)
            print(f"FD-pixels {found:.3f} of 256 samples (256 other real images: {floor:.3f})", flush=True)
        print(picture(steps))


if __name__ == "__main__":
    run(main)
