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

import model_unet
import model_vit
from data import CLASSES, BadInput, Packed, Parser, built_in, facts, generator, read, replace, run, shapes
from diffusion import TARGETS, WEIGHTINGS, Diffusion
from fid import fd_pixels
from sample import build_model, draw, find_vae, grid

# One row per result of the paper, the default network of a data set first: section 4.1, appendix C; the
# targets of ImageNet, label drop and weight decay: the official scripts. FID: table 3 (CelebA 2.14, UNet
# 1.60), table 4 (vit-l 2.28), appendix C (unet-adm 2.11), table 5 (vit-xl 2.06, unet-ldm 2.81). "shapes" is
# the built-in images, "folder" any other packed data set: their rows are ours.
#    data set       network        target steps   batch lr   warmup betas       drop ema    decay cfg heun
PRESETS = [
    ("shapes",      "vit-tiny",    "x0",    2_400,   64, 4e-3,   100, (.90, .99), .10, .99,   1., 1.5, 18),
    ("shapes",      "unet-tiny",   "x0",    1_500,   64, 2e-3,   100, (.90, .99), .10, .99,   1., 1.5, 18),
    ("celeba64",    "vit-s",       "x0",  500_000,  128, 1e-4, 5_000, (.99, .99), .00, .9999, 0., 1.0, 30),
    ("celeba64",    "unet-celeba", "eps", 500_000,  128, 1e-4, 5_000, (.9, .999), .00, .9999, 0., 1.0, 30),
    ("imagenet64",  "vit-l",       "eps", 800_000, 1024, 1e-4,     0, (.99, .99), .15, .9999, 0., 1.5, 20),
    ("imagenet64",  "unet-adm",    "eps", 900_000, 1024, 1e-4,     0, (.9, .999), .15, .9999, 0., 1.5, 20),
    ("imagenet256", "vit-b",       "x0", 1_000_000, 256, 1e-4,     0, (.99, .99), .15, .9999, 0., 1.5, 30),
    ("imagenet256", "vit-xl",      "x0", 7_000_000, 256, 1e-4,     0, (.99, .99), .15, .9999, 0., 1.5, 50),
    ("imagenet256", "unet-b",      "x0", 1_000_000, 256, 1e-4,     0, (.9, .999), .15, .9999, 0., 1.5, 30),
    ("imagenet256", "unet-ldm",    "eps", 1_400_000, 256, 1e-4,    0, (.9, .999), .15, .9999, 0., 1.5, 50),
    ("folder",      "vit-s",       "x0",  100_000,  128, 1e-4, 1_000, (.99, .99), .10, .9999, 0., 1.5, 30),
]
COLUMNS = "dataset model target steps batch_size lr warmup betas drop ema decay cfg sample_steps".split()
SIZES = {**model_vit.SIZES, **model_unet.SIZES}
FREE = "steps cfg sample_steps data log_every save_every sample_every".split()       # may change on --resume
MANY, BELOW_1 = 2 ** 62, 1 - 1e-9
RANGES = dict(steps=(1, MANY), batch_size=(1, 1e6), lr=(1e-12, 1e3), warmup=(0, MANY), decay=(0, 1),
              drop=(0, 0.999), betas=(0, BELOW_1), ema=(0, BELOW_1), weight_decay=(0, 1e3),
              gamma=(1e-12, 1e12), T=(1, 1e6), patch=(1, 1e4), size=(1, 1e4), seed=(0, MANY),
              cfg=(0, 1e3), sample_steps=(1, 1e4), accum=(1, 1e6), log_every=(1, MANY),
              save_every=(1, MANY), sample_every=(0, MANY), ugd_every=(1, MANY))


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    # what: a flag left out takes the preset's value, or on --resume the run's own
    add("--dataset", help="shapes (default), celeba64, imagenet64, imagenet256, or any packed data/NAME")
    add("--data", help="packed folder (default: data/DATASET)")
    add("--size", type=int, help="image side, free for the built-in shapes alone (default: 16)")
    add("--model", choices=SIZES, help="network")
    add("--patch", type=int, help="patch side (default: 4 pixels, 2 of latents)")
    # the paper
    add("--target", choices=TARGETS, help="what the network predicts")
    add("--weighting", choices=[*WEIGHTINGS, "ugd"], help="of the loss over t, defined on x0 (default:\n"
                                                          "min_snr); ugd: solved from gradients, pareto.py")
    add("--ugd-every", type=int, help="steps between its solutions (default: 500)")
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
    add("--dry-run", action="store_true", help="print parameters, speed, memory and time, write nothing")
    return parser.parse_args()


def preset(dataset, model=None):
    """The row of a data set and network as a dict; a network without one takes the data set's first row, and
    a UNet there the betas of UNets.
    """
    rows = [dict(zip(COLUMNS, row)) for row in PRESETS]
    rows = [row for row in rows if row["dataset"] == dataset] or [{**rows[-1], "dataset": dataset}]
    other = {**rows[0], "model": model or rows[0]["model"]}
    row = next((row for row in rows if row["model"] == model), other)
    if row["model"] in model_unet.SIZES and row["betas"] == (.99, .99):
        row["betas"] = (.9, .999)
    return {**row, "betas": list(row["betas"])}


def configure(args, device, saved=None):
    """-> (data, config): the preset's row, or on --resume the saved config, under the flags given."""
    name = args.dataset or (saved or {}).get("dataset", "shapes")
    model = args.model or (saved or {}).get("model")
    config = dict(preset(name, model), data=f"data/{name}", weighting="min_snr", gamma=5.0, schedule="cosine",
                  T=1000, weight_decay=0.0 if model in model_unet.SIZES else 0.03, seed=0, patch=None,
                  flip=None, dtype="bfloat16" if device.type == "cuda" else "float32",
                  log_every=100, save_every=1000, sample_every=0)
    if (args.weighting or (saved or config).get("weighting")) == "ugd":
        config.update(ugd_every=500)
    elif args.ugd_every is not None:
        raise BadInput(f"--ugd-every {args.ugd_every}: needs --weighting ugd")
    given = {key: value for key, value in vars(args).items() if value is not None and key in config}
    if saved is not None:
        if missing := sorted({*config, "size", "classes"} - saved.keys()):
            raise BadInput(f"{args.out}/ckpt.pt: its config lacks {', '.join(missing)}")
        for key, value in given.items():
            if key not in FREE and value != saved[key]:
                flag = key.replace("_", "-")
                raise BadInput(f"--{flag}: found {value}, the run in {args.out} has {saved[key]}")
        config = saved
    config = {**config, **given}
    for key, (low, high) in RANGES.items():
        value = config.get(key, getattr(args, key, None))
        parts = value if key == "betas" else [] if value is None else [value]
        if not all(low <= part <= high for part in parts):
            raise BadInput(f"--{key.replace('_', '-')}: found {value}, expected {low:g} to {high:g}")

    if name == "shapes" and args.data:
        raise BadInput(f"--data {args.data}: shapes are built in; name the data set with --dataset")
    if name == "shapes":
        data = built_in(config.get("size", args.size or 16))
    else:
        data = Packed(config["data"])
    pixels, vit = name != "shapes" and not data.latents, config["model"] in model_vit.SIZES
    config.update(patch=config["patch"] or (2 if data.latents else 4) if vit else None,
                  flip=pixels if config["flip"] is None else config["flip"])
    data.flip = config["flip"]
    if data.latents and data.flip:
        raise BadInput("--flip: latents cannot be mirrored; vae.py --mirror encodes both")
    if data.latents:
        probe = data.batch(np.linspace(0, len(data) - 1, 256).astype(int), generator("probe", 0, 0))[0].std()
        if not 0.7 <= probe <= 1.3:
            raise BadInput(f"{config['data']}: scaled latents have a standard deviation of {probe:.3f}, "
                           "expected 0.7 to 1.3: another autoencoder, or a damaged file")
    for what, found, expected in (("--size", data.size, args.size), ("size", data.size, config.get("size")),
                                  ("number of classes", len(data.classes), CLASSES.get(name)),
                                  ("classes", data.classes, config.get("classes")),
                                  ("data", facts(data.meta), config.get("facts"))):
        if expected is not None and found != expected:
            raise BadInput(f"{what}: {config['data']} has {found}, expected {expected}")
    if vit and data.size % config["patch"]:
        raise BadInput(f"--patch: found {config['patch']}, expected a divisor of the image side {data.size}")
    if args.patch and not vit:
        raise BadInput(f"--patch {args.patch}: {config['model']} has no patches")
    if not data.classes:
        if args.drop or (args.cfg or 1) != 1:
            raise BadInput(f"--drop, --cfg: {config['data']} has no classes, expected 0 and 1")
        config.update(drop=0.0, cfg=1.0)
    if config["cfg"] != 1 and not config["drop"]:
        raise BadInput(f"--cfg {config['cfg']}: a model trained with --drop 0 cannot be guided, expected 1")
    network = dict(img_size=data.size, in_channels=data.channels, num_classes=len(data.classes),
                   **json.loads(json.dumps(SIZES[config["model"]])))         # as in config.json: no tuples
    if vit:
        network.update(patch_size=config["patch"], T=config["T"], short_run=config["model"] == "vit-tiny")
    return data, {**config, "size": data.size, "classes": data.classes, "network": network,
                  "facts": facts(data.meta), **{key: data.meta.get(key) for key in ("vae", "vae_file")}}


def draw_step(data, config, step, rows):
    """Everything random in one step, drawn for the whole global batch and cut to this process's rows."""
    B, N, seed = config["batch_size"], len(data), config["seed"]
    g = generator("step", seed, step)
    places = torch.arange(step * B, (step + 1) * B)                      # in an endless sequence of epochs
    indices = torch.cat([epoch_order(N, seed, epoch)[places[places // N == epoch] % N]
                         for epoch in (places // N).unique().tolist()])
    x0, y = data.batch(indices.numpy(), g, rows)
    t = torch.randint(config["T"], (B,), generator=g)[rows]
    noise = torch.randn(B, *x0.shape[1:], generator=g)[rows]
    dropped = torch.rand(B, generator=g)[rows] < config["drop"]
    return x0, t, noise, torch.where(dropped, len(data.classes), y)


@functools.lru_cache(maxsize=2)
def epoch_order(N, seed, epoch):
    """Permutation of 0 .. N-1 for one epoch."""
    return torch.randperm(N, generator=generator("epoch", seed, epoch))


def ahead(make, first, last):
    """make(first), ..., make(last - 1), each prepared in a thread while the step before it runs."""
    with ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(make, first)]
        for step in range(first, last):
            if step + 1 < last:
                jobs.append(pool.submit(make, step + 1))
            yield jobs.pop(0).result()


def learning_rate(config, step):
    """Linear warm-up, constant, and over the last `decay` of the run linearly to 0."""
    rise = min(1, (step + 1) / max(config["warmup"], 1))
    fall = min(1, (1 - step / config["steps"]) / config["decay"]) if config["decay"] else 1
    return config["lr"] * rise * fall


HEADER = "step,loss,mse," + ",".join(f"x0_mse_{i}" for i in range(10))    # bin i: t in [i T/10, (i+1) T/10)


def log_row(step, tally):
    """tally (10,4), sums of loss, mse, x0-space mse and 1 in ten bins of t -> one line of log.csv."""
    loss, mse, _, count = tally.sum(0).tolist()
    bins = (tally[:, 2] / tally[:, 3]).tolist()                              # nan where no t fell into a bin
    return f"{step},{loss / count:.9g},{mse / count:.9g}," + ",".join(f"{value:.9g}" for value in bins)


def sanity(model, config, data, n=256):
    """FD-pixels to 2,048 of the data's images, of n samples and of n real images that were not trained on."""
    how = dict(steps=config["sample_steps"], cfg=config["cfg"])
    drawn = torch.cat([draw(model, config, range(k, k + 64), **how) for k in range(0, n, 64)])
    real, unseen = (shapes(ks, config["size"])[0] for ks in (range(2048), range(len(data), len(data) + n)))
    return fd_pixels(drawn, real), fd_pixels(unseen, real)


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
    ckpt, log_file = args.out / "ckpt.pt", args.out / "log.csv"
    if ckpt.exists() and not (args.resume or args.dry_run):
        raise BadInput(f"--out {args.out}: holds a run already; go on with --resume or choose another folder")
    state = read(ckpt) if args.resume else None
    for part, kind in (("model", dict), ("ema", dict), ("optimizer", dict), ("config", dict), ("step", int),
                       ("tally", torch.Tensor)) if state else ():
        if not isinstance(state.get(part), kind):
            raise BadInput(f"{ckpt}: not a checkpoint to resume from ({part} missing or damaged)")
    data, config = configure(args, device, state and state["config"])
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
        keys, ugd = ("schedule", "T", "target", "weighting", "gamma"), config["weighting"] == "ugd"
        table = {**config, "weighting": "const"} if ugd else config          # until its first solution
        diffusion = Diffusion(*(table[key] for key in keys)).to(device)
        model = build_model(config).to(device, dtype)
    except ValueError as error:
        raise BadInput(str(error)) from None
    model.grad_ckpt = args.grad_ckpt
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config["lr"], config["betas"],
                                  weight_decay=config["weight_decay"], fused=True)
    first, tally, log = 0, torch.zeros(10, 4, dtype=torch.float64, device=device), []
    if state:
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            for p, moments in optimizer.state.items():
                if not p.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                    raise ValueError("optimizer moments of another shape")
            tally += state["tally"].to(tally) * (rank == 0)              # the sums since the last log line
            if ugd:
                diffusion.weight.copy_(state["weight"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
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
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")                         # for the stop signal, off the GPU
        net = torch.nn.parallel.DistributedDataParallel(model, [local] if device.type == "cuda" else None)

    def save(step, total):
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     step=step, config=config, tally=total.cpu(),
                     **({"weight": diffusion.weight.cpu()} if ugd else {}))
        replace(ckpt, lambda f: torch.save(state, f))

    def picture(step):
        path = args.out / f"samples_{step:06d}.png"
        try:
            vae = find_vae(config, device)
        except BadInput as error:
            return f"{ckpt}: no grid ({error})"
        return grid(ema, config, path, steps=config["sample_steps"], cfg=config["cfg"], vae=vae)

    params = sum(p.numel() for p in model.parameters())
    say(f"{config['model']}: {params / 1e6:.1f}M parameters, {config['target']} prediction, "
        f"{config['weighting']} weighting, gamma {config['gamma']:g}, {config['dtype']} on {device.type}")
    say(f"{config['dataset']}: {len(data):,} images {data.size} x {data.size}, {len(data.classes)} classes; "
        f"global batch {B} = {micro} x {world} processes x {args.accum} accumulation")
    if 1 / (1 - min(config["ema"], 1 - 1e-9)) > steps:
        say(f"warning: an EMA of {config['ema']} averages over more steps than the run's {steps}")
    if rank == 0 and not args.dry_run:
        args.out.mkdir(parents=True, exist_ok=True)
        replace(args.out / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
        print(f"writing to {args.out}", flush=True)

    # -------------------------------------------------------------------------------------- training loop
    stop, signals, finite, tens = 0, [], True, torch.arange(10, device=device)[:, None]
    for name in (signal.SIGINT, signal.SIGTERM):                         # a second Ctrl-C interrupts at once
        signal.signal(name, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))
    if args.data_on_gpu:
        try:
            data.to(device)
        except torch.OutOfMemoryError:
            raise BadInput(f"--data-on-gpu: {config['data']} does not fit into {device}'s memory") from None
    pin = lambda part: part.pin_memory() if device.type == "cuda" and part.device.type == "cpu" else part
    batches = ahead(lambda step: [pin(part) for part in draw_step(data, config, step, rows)], first, steps)
    since, waited, solving, mark, done = time.time(), 0.0, 0.0, first, first
    for step in range(first, steps):
        # UGD: the weights of the loss, solved anew from fresh gradients, one table for all processes
        if ugd and step % config["ugd_every"] == 0:
            from pareto import ugd_table
            now = time.time()
            x0_weight = ugd_table(model, diffusion, data, seed=f"{config['seed']} {step}").to(device)
            if world > 1:
                dist.broadcast(x0_weight, 0)
            diffusion.weight = x0_weight / diffusion.factor
            took = time.time() - now
            solving += took
            say(f"step {step:,}: UGD weights solved in {took:.1f} s, {solving:.1f} s so far", flush=True)

        # data: prepared by a thread, already cut to this process
        now = time.time()
        x0, t, noise, y = (part.to(device, non_blocking=True) for part in next(batches))
        x0, noise = x0.to(dtype), noise.to(dtype)
        waited += time.time() - now

        # loss and gradients, micro-batch by micro-batch; DDP exchanges gradients in the last one only
        for i in range(args.accum):
            part = slice(i * micro, (i + 1) * micro)
            quiet = net.no_sync() if world > 1 and i + 1 < args.accum else contextlib.nullcontext()
            with quiet:
                with torch.autocast(device.type, torch.bfloat16, enabled=config["dtype"] == "bfloat16"):
                    loss, mse = diffusion.loss(net, x0[part], t[part], noise[part], y[part])
                (loss.sum() * (world / B)).backward()                        # DDP divides by world
            with torch.no_grad():
                x0_mse = mse / diffusion.factor[t[part]]
                sums = torch.stack([loss, mse, x0_mse, torch.ones_like(mse)], 1).double()
                tally += (t[part] * 10 // config["T"] == tens).double() @ sums       # (10,B) @ (B,4)

        # update of weights and EMA
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - config["ema"])

        # stop signal, agreed on by all processes
        done, stop = step + 1, max(signals, default=0)
        if world > 1:
            flag = torch.tensor([stop])
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=control)
            stop = int(flag)
        if args.dry_run:
            if done == first + 3 < steps:
                wait(device)
                since, mark = time.time(), done
            if done == min(first + 10, steps) or stop:
                wait(device)
                break
            continue

        # log, save, sample
        last = done == steps
        logs, saves = last or done % log_every == 0, last or stop or done % save_every == 0
        if logs or saves:
            total = tally.clone()
            if world > 1:
                dist.all_reduce(total)
            finite = math.isfinite(total[:, 0].sum()) and all(p.isfinite().all() for p in model.parameters())
            if not finite:
                break
        if logs:
            log.append(log_row(done, total))
            seconds, since = time.time() - since, time.time()
            loss, mse, _, count = total.sum(0).tolist()
            say(f"step {done:,} / {steps:,}   loss {loss / count:.4f}   {config['target']} mse "
                f"{mse / count:.4f}   {(done - mark) * B / seconds:,.0f} images/s   "
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
        if rank == 0 and sample_every and done % sample_every == 0 and not last:
            print(picture(done), flush=True)

    # ------------------------------------------------------------------------------------------------ end
    if world > 1:
        time.sleep(0.2)                      # gloo's threads need the GIL to drop their last tensors, and are
        dist.destroy_process_group()         # joined with the GIL held: without the pause 1 exit in 6 hung
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if args.dry_run and not stop:
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()
        each = (time.time() - since) / max(done - mark, 1)
        say(f"dry run: {B / each:,.0f} images/s, {each * 1e3:,.0f} ms a step, peak memory {peak / 2**30:.2f} "
            f"GiB per process, {(steps - first) * each / 3600:,.2f} hours for {steps - first:,} steps")
    elif not finite:
        say(f"step {done}: loss or weights are not finite; an earlier checkpoint was left as it is: {ckpt}")
        sys.exit(3)
    elif stop:
        say("stopped" if args.dry_run else f"stopped; checkpoint of step {done}: {ckpt}; go on with --resume")
        sys.exit(128 + stop)
    elif rank == 0:
        if config["dataset"] == "shapes":
            found, floor = sanity(ema, config, data)
            print(f"FD-pixels {found:.3f} of 256 samples (256 other real images: {floor:.3f})", flush=True)
        print(picture(steps))


if __name__ == "__main__":
    run(main)
