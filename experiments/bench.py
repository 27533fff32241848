"""Images/s, MFU and memory of every part, each beside a plain baseline that takes turns with it.

    python -m experiments.bench                                      # everything; on a CPU with networks cut to fit
    python -m experiments.bench train --model vit-b --batch-size 4   # one network, whole
    python -m experiments.bench sample vae                           # some parts

A line is the median of --rounds rounds, in each of which everything that is compared runs in turn. The last
column is our time over that of what is named: below 1 is faster. MFU is the rate of the FLOPs counted on the
network (thrice the forward pass in training), over the rate of a large matrix product in the same rounds.
"""
import copy
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from diffusion import Diffusion, sampler
from fid import Inception
from files import Parser, at_least, run
from model_vit import ViT
from sample import MODELS, build_model, to_device
from vae import VAE

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIDE = 8192 if GPU else 2048             # of the matrix product that MFU is relative to, bfloat16 on a GPU
LINE = "{:<40} {:>6} {:>10} {:>10} {:>7} {:>6}   {}"


# --------------------------------------------------------------------------------------------- measuring

def seconds(call):
    """Of a call, repeated for at least 0.2 s."""
    count, since = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - since < 0.2:
        call()
        if GPU:
            torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - since) / count


def turns(rounds, *calls):
    """Seconds of each call, and of the matrix product, in each round: (rounds, calls + 1)."""
    a, b = torch.randn(2, SIDE, SIDE, device=DEVICE).to(torch.bfloat16 if GPU else torch.float32)
    calls = [*calls, lambda: a @ b]
    for call in calls:
        call()                                                               # warms it
    return np.array([[seconds(call) for call in calls] for _ in range(rounds)])


def flops(make, *inputs):
    """Of a forward pass of the network that make() returns, on tensors without content."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        make()(*(part.to("meta") for part in inputs))
    return counter.get_total_flops()


def show(name, n, work, ours, other, product, baseline):
    """One line: n images of `work` FLOPs each took `ours` seconds in each round, (rounds,), and the baseline and the
    matrix product of the same round `other` and `product`.
    """
    each = np.median(ours)
    mfu = np.median(n * work / ours * product) / (2 * SIDE ** 3)
    ratio = np.median(ours / other)
    memory = ""
    if GPU:
        memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
        torch.cuda.reset_peak_memory_stats()
    numbers = f"{n / each:,.4g}", f"{each * 1e3:,.4g}", memory, f"{mfu:.1%}"
    print(LINE.format(name, n, *numbers, f"{ratio:.3g} {baseline}"), flush=True)


# ---------------------------------------------------------------------------------------------- training

def plain(model):
    """The same network as one writes it first: a ViT with PyTorch's own layers."""
    if isinstance(model, ViT):
        dim, heads = model.pos_embed.shape[2], model.blocks[0].attn.heads
        heads = heads if dim % heads == 0 else 8                             # ViT-S has 6 heads of 85
        model.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True) for _ in model.blocks)
    return model.to(DEVICE)


def stepper(model, data, config, stock=False):
    """-> a step of train.py as a call; with stock=True AdamW and the EMA as one writes them first."""
    diffusion = Diffusion(target=config["target"], T=config["T"]).to(DEVICE)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config["lr"], config["betas"], fused=not stock)
    make_batch = lambda step: train.draw_step(data, config, diffusion, step, slice(None))
    batches = train.ahead(make_batch, 0, 10 ** 9)
    tally = torch.zeros(10, 4, dtype=torch.float64, device=DEVICE)
    skipped = torch.zeros((), device=DEVICE)

    def step():
        batch = [part.to(DEVICE) for part in next(batches)]
        train.backward(model, diffusion, batch, tally, config)
        if not stock:
            return train.update(model, ema, optimizer, config, 0, skipped)
        optimizer.step()
        optimizer.zero_grad()
        for average, p in zip(ema.parameters(), model.parameters()):
            average.mul_(config["ema"]).add_(p.detach(), alpha=1 - config["ema"])
    return step


def training(args, dataset, name):
    """A step of train.py beside one of the plain network."""
    sys.argv = ["train.py", "--dry-run", "--dataset", dataset, "--model", name]
    flags, _ = train.parse()
    data = train.open_data(flags)
    config = train.settle(flags, data)
    shape = config["network"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters())
    if parameters > 150e6 and not GPU and not args.model:
        shape.update(dict(depth=4) if "depth" in shape else dict(channels=64))
        name += " (cut)"
    x = torch.zeros(1, shape["in_channels"], shape["img_size"], shape["img_size"])
    t = torch.zeros(1, dtype=torch.long)
    work = 3 * flops(lambda: build_model(config), x, t, t)
    usual = config["batch_size"] if GPU else max(1, min(64, int(150e9 / work)))
    config["batch_size"] = args.batch_size or usual
    ours = stepper(to_device(build_model(config), DEVICE), data, config)
    other = stepper(plain(build_model(config)), data, config, stock=True)
    show(f"{dataset} {name}", config["batch_size"], work, *turns(args.rounds, ours, other).T, "plain")


# ---------------------------------------------------------------------------- sampling, autoencoder, metrics

def sampling(args):
    """Heun 30: guided, guided in an interval, not guided."""
    name, C, S, B = ("vit-xl", 4, 32, 128) if GPU else ("vit-tiny", 3, 16, 16)
    network, arguments = MODELS[name]
    make = lambda: network(**arguments, img_size=S, patch_size=S // 16 if GPU else 4, in_channels=C, num_classes=8)
    model = to_device(make(), DEVICE).eval()
    z = torch.randn(B, C, S, S, device=DEVICE)
    y = torch.arange(B, device=DEVICE) % 8
    work = flops(make, z[:1], y[:1], y[:1])
    ways = dict(cfg=1.5), dict(cfg=2.1, interval=(0, 800)), dict()
    calls = [lambda way=way: sampler(model, Diffusion(), z, y, 30, **way) for way in ways]
    *times, product = turns(args.rounds, *calls).T
    for ours, what, forwards in zip(times, ("guided", "guided in t 0 to 800", "not guided"), (118, 89, 59)):
        show(f"{name}, Heun 30, {what}", B, work * forwards, ours, times[0], product, "guided")


def autoencoder(args):
    S, B = (256, 64) if GPU else (128, 2)
    vae, other = VAE().to(DEVICE), VAE().to(DEVICE, memory_format=torch.contiguous_format)
    x = torch.randn(B, 3, S, S, device=DEVICE)
    z = torch.randn(B, 4, S // 8, S // 8, device=DEVICE)
    for what, ours, part, given in (("encode", vae.moments, "encoder", x), ("decode", vae.decode, "decoder", z)):
        plain_part = getattr(other, part)
        with torch.no_grad():
            times = turns(args.rounds, lambda: ours(given), lambda: plain_part(given)).T
        show(f"autoencoder, {what} {S} x {S}", B, flops(lambda: getattr(VAE(), part), given[:1]), *times, "NCHW")


def features(args):
    S, B = (256, 256) if GPU else (64, 16)
    images = torch.randint(256, (B, 3, S, S), dtype=torch.uint8, device=DEVICE)
    other = Inception().to(DEVICE)
    model = Inception().fuse().to(DEVICE, memory_format=torch.channels_last)
    with torch.no_grad():
        times = turns(args.rounds, lambda: model(images), lambda: other(images)).T
    show(f"FID features of {S} x {S}", B, flops(Inception, images[:1]), *times, "batch norm apart, NCHW")


PARTS = dict(sample=sampling, vae=autoencoder, fid=features)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", choices=["train", *PARTS, []], help="(default: all)")
    add("--model", choices=MODELS, help="train: this network, whole (default: all, cut to fit a CPU)")
    add("--batch-size", type=at_least(1), help="train: images a step (default: the preset's, on a CPU a few)")
    add("--rounds", type=at_least(1), default=5)
    args = parser.parse_args()
    rate = 2 * SIDE ** 3 / np.median(turns(args.rounds))
    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, PyTorch {torch.__version__}; a large matrix product: {rate / 1e12:,.3g} TFLOP/s")
    print(LINE.format("", "images", "images/s", "ms", "", "MFU", "time over that of"), flush=True)
    for part in args.parts or ["train", *PARTS]:
        if part in PARTS:
            PARTS[part](args)
            continue
        for dataset, name in dict.fromkeys(row[:2] for row in train.PRESETS[:-1]):
            if args.model in (None, name):
                training(args, dataset, name)


if __name__ == "__main__":
    run(main)
