"""How fast a part of the project is, and how much memory it takes, beside a baseline.

    python -m experiments.bench train                                    # the demo's network
    python -m experiments.bench train --dataset imagenet256 --model vit-xl
    python -m experiments.bench sample --batch-size 16                   # Heun, guided or not
    python -m experiments.bench vae --batch-size 2                       # the autoencoder
    python -m experiments.bench fid --batch-size 16                      # FID's features

All flags but the part are train.py's: they choose the network, and --batch-size is the number of images of a call.
With --compile (a GPU's default, but not for the demo), training has a line with the compiled network and one
without. On a GPU all float32 products are TF32; train.py has them only beside bfloat16.

A line is the median of five rounds. In each round what is compared runs in turn, so that a busy machine slows all of
it. MFU, for model FLOPs utilisation, is the FLOPs a second of our call, over those of a large matrix product in the
same round. GiB is the peak of a GPU's memory in a call. `first` is the seconds of the first call, in which a network
may be compiled. The last column is our time over the time of the baseline that it names: below 1, we are faster.
A baseline does the same work in another way, but for two: a sampler that is guided throughout, and an autoencoder
without its 1x1 convolutions.
"""
import contextlib
import functools
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import train
from diffusion import Diffusion, sampler
from fid import Inception
from files import Parser, allow_tf32, processes, run
from model_vit import ViT
from sample import build_model, to_device
from vae import VAE

_, _, DEVICE = processes()
GPU = DEVICE.type == "cuda"
PRODUCT = 8192 if GPU else 2048          # rows and columns of the matrices of MFU's product, bfloat16 on a GPU
SIDE = 256 if GPU else 64                # pixels a side of the images for the autoencoder and for FID's network
ROUNDS = 5
LINE = "{:<36} {:>6} {:>10} {:>10} {:>8} {:>6} {:>6} {:>6}   {}"


# --------------------------------------------------------------------------------------------- measuring

def seconds(call):
    """Seconds of a call, the mean of as many calls as fill 0.2 s, at least one."""
    count, since = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - since < 0.2:
        call()
        if GPU:
            torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - since) / count


def flops(call):
    """FLOPs of a call, counted while it runs; on a CPU without fused attention, which PyTorch's counter misses."""
    plain_attention = contextlib.nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)
    with plain_attention, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak(call):
    """The most GiB of a GPU's memory that a call has in use at once, nan on a CPU."""
    if not GPU:
        call()
        return np.nan
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2 ** 30


def compare(name, n, ours, other, baseline):
    """Measure two functions and print a line. A call of `ours` processes n images, and so does one of `other`, whose
    name is `baseline`. The first call of `other` may only build networks.
    """
    since = time.perf_counter()
    memory = peak(ours)                                  # first, as the other takes memory once it is called
    first = time.perf_counter() - since
    work = flops(ours)
    dtype = torch.bfloat16 if GPU else torch.float32
    matrices = torch.randn(2, PRODUCT, PRODUCT, device=DEVICE).to(dtype)
    product = functools.partial(torch.matmul, *matrices)
    for warm_up in (other, other, product):              # twice, where the first call builds networks
        warm_up()
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([seconds(ours), seconds(other), seconds(product)])
    report(name, n, work, memory, first, np.array(rounds), baseline)


def report(name, n, work, memory, first, rounds, baseline):
    """Print a line. work: FLOPs of a call of ours; memory: GiB; first: seconds; rounds (R,3): seconds of a call of
    ours, of the other and of the matrix product.
    """
    ours, other, product = rounds.T
    took = np.median(ours)
    mfu = np.median(work / ours * product) / (2 * PRODUCT ** 3)
    columns = [
        f"{n / took:.4g}",
        f"{1e3 * took:.4g}",
        f"{work / took / 1e12:.3g}",
        f"{mfu:.1%}",
        f"{memory:.1f}",
        f"{first:.1f}",
        f"{np.median(ours / other):.3g} {baseline}",
    ]
    print(LINE.format(name, n, *columns), flush=True)


# ---------------------------------------------------------------------------------------------- training

# These are generators. The first next() builds the networks, which take memory; each later one is a training step.

def our_steps(flags, config, diffusion, batch, compiled):
    """Training steps of train.py, on one batch over and over."""
    model, ema, optimizer = train.make_networks(flags, config, DEVICE)
    if compiled:
        train.compile_network(model)
    tally = torch.zeros(10, 4, dtype=torch.float64, device=DEVICE)
    yield
    while True:
        train.backward(model, diffusion, batch, tally, config)
        train.update(model, ema, optimizer, config)
        yield


def plain_steps(config, diffusion, batch):
    """The same steps as one would write them at first: PyTorch's own blocks in a ViT, its AdamW and its average."""
    x0, t, noise, y, _ = batch
    model = build_model(config)
    if isinstance(model, ViT):
        dim, heads = model.pos_embed.shape[2], model.blocks[0].attn.heads
        if dim % heads:                                  # ViT-S has 6 heads of 85, which PyTorch's layer refuses
            heads = 8
        how = dict(activation=F.gelu, batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0, **how)
        model.blocks = nn.TransformerEncoder(layer, len(model.blocks), enable_nested_tensor=False).layers
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), config["lr"])
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(config["ema"]))
    yield
    while True:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=config["dtype"] == "bfloat16"):
            loss, _ = diffusion.loss(model, x0, t, noise, y)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        yield


def noise_like(config):
    """In place of a batch of data: noise (B,C,S,S) as the network takes it, and zeros (B,), int64."""
    C, S = config["network"]["in_channels"], config["network"]["img_size"]
    x = torch.randn(config["batch_size"], C, S, S, device=DEVICE)
    return x, torch.zeros(len(x), dtype=torch.long, device=DEVICE)


def training(flags, config):
    x, zeros = noise_like(config)
    batch = x, zeros, x, zeros, torch.ones_like(zeros)   # x0, t, noise, y, scale
    diffusion = Diffusion(target=config["target"], T=config["T"]).to(DEVICE)
    steps = functools.partial(our_steps, flags, config, diffusion, batch)

    def line(how, ours, other, baseline):                # at its end the networks of both leave the memory
        next(ours)
        compare(f"training {config['model']}, {how}", len(x), ours.__next__, other.__next__, baseline)

    if flags.compile:
        line("compiled", steps(True), steps(False), "eager")
    line("eager", steps(False), plain_steps(config, diffusion, batch), "plain")


# ---------------------------------------------------------------------------- sampling, autoencoder, metrics

def sampling(flags, config):
    """Heun's sampler with and without guidance. On a GPU, lines that compare precisions come first, in short runs
    of three evaluations of the network.
    """
    model = to_device(build_model(config), DEVICE).eval()
    z, y = noise_like(config)
    diffusion = Diffusion(target=config["target"], T=config["T"])
    if GPU:
        few = functools.partial(sampler, model, diffusion, z, y, 2, cfg=1.5)

        def exact():
            allow_tf32(False)
            few()
            allow_tf32(True)
        bfloat16 = torch.autocast("cuda", torch.bfloat16)(few)
        for name, call in (("TF32", few), ("bfloat16", bfloat16)):
            compare(f"{config['model']} {name}, 3 evaluations", len(z), call, exact, "float32")
    draw = functools.partial(sampler, model, diffusion, z, y, config["sample_steps"])
    guided = functools.partial(draw, cfg=1.5)
    interval = functools.partial(guided, interval=(0, 800))
    for name, call in (("guided", guided), ("guided in t 0 to 800", interval), ("not guided", draw)):
        compare(f"{config['model']} {name}", len(z), call, guided, "guided")


def autoencoder(flags, config):
    """On a GPU ours is as in vae.py: its weights are bfloat16, and the encoder is compiled. The baseline is float32,
    has the usual memory layout, NCHW, and leaves out the convolution of 1x1 between encoder or decoder and latents.
    """
    n = config["batch_size"]
    precision = torch.bfloat16 if GPU else torch.float32
    vae = VAE().to(DEVICE, precision)
    if GPU:
        vae.encoder.compile()
    other = VAE().to(DEVICE, memory_format=torch.contiguous_format)
    x = torch.randn(n, 3, SIDE, SIDE, device=DEVICE)
    z = torch.randn(n, 4, SIDE // 8, SIDE // 8, device=DEVICE)
    baseline = "NCHW, no 1x1 conv"
    compare(f"encode {SIDE} x {SIDE}", n, lambda: vae.moments(x.to(precision)), lambda: other.encoder(x), baseline)
    compare(f"decode {SIDE} x {SIDE}", n, lambda: vae.decode(z.to(precision)), lambda: other.decoder(z), baseline)


def features(flags, config):
    """FID's network, whose weights are in the layout NHWC."""
    n = config["batch_size"]
    images = torch.randint(256, (n, 3, SIDE, SIDE), dtype=torch.uint8, device=DEVICE)
    ours = Inception().to(DEVICE, memory_format=torch.channels_last)
    other = Inception().to(DEVICE)
    baseline = "weights in NCHW"
    compare(f"features of {SIDE} x {SIDE}", n, lambda: ours(images), lambda: other(images), baseline)


PARTS = dict(train=training, sample=sampling, vae=autoencoder, fid=features)


def main():
    parser = Parser(__doc__)
    parser.add_argument("part", choices=PARTS)
    args, words = parser.parse_known_args()
    sys.argv = ["train.py", "--dry-run", *words]         # which train.parse reads; a dry run needs no data
    flags, _ = train.parse()
    config = train.settle(flags, train.open_data(flags))
    allow_tf32(GPU)
    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, PyTorch {torch.__version__}")
    print(LINE.format("", "images", "images/s", "ms", "TFLOP/s", "MFU", "GiB", "first", "our time over that of"))
    PARTS[args.part](flags, config)


if __name__ == "__main__":
    run(main)
