"""Train a diffusion model with the Min-SNR weighting.

    python train.py                                             # built-in images, CPU, minutes; then a grid
    torchrun --nproc-per-node 8 train.py --dataset imagenet64   # a preset of the paper, on data/imagenet64
    python train.py --resume                                    # go on where out/shapes was stopped
    python train.py --init out/shapes --out out/tuned           # a new run that starts from another's weights

The result depends on the flags and --seed. The number of processes, --accum, --compile and --graph change it by
rounding alone. A stop and --resume do not change it on a CPU. A GPU changes the defaults of --dtype, --compile and
--graph, and the preset of your own images.
"""
import argparse
import contextlib
import copy
import functools
import inspect
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import model_unet
from data import DATASETS, Images, Packed, built_in, class_names, fingerprint, generator, shapes
from diffusion import TARGETS, WEIGHTINGS, Diffusion
from fid import fd_pixels
from files import (BadInput, Parser, at_least, between, hash_file, leave_group, positive, processes, read,
                   replace, run, say, write_json)
from sample import MODELS, build_model, draw, find_vae, grid, load_checkpoint, to_device

# ------------------------------------------------------------------------------------------------ presets
# One row per result of the papers. The first row of a data set is its default. Where the values are from:
# - the paper (section 4.1, appendix C): steps, batch, learning rate, warm-up, betas, EMA, schedule; the targets of
#   ImageNet-256; label drop and cfg of vit-l; Heun steps of vit-l and of ImageNet-256
# - the official scripts: weight decay, the target of vit-l, label drop of ImageNet-256, cfg of vit-xl
# - inferred: targets and Heun steps of CelebA; cfg of all other rows; label drop and Heun steps of ImageNet-64's
#   other rows (figure 8 samples with DPM-Solver, guided by ADM's classifier)
# - the curriculum paper: imagenet128 and cifar10. It samples with 250 evaluations; our 125 Heun steps take 243 and
#   247, as steps that round to the same t are taken once
# - ours: "shapes", and "folder", which is any data set of yours: with a GPU its first row, without one its second

DEMO = dict(lr=4e-3, warmup=100, betas=[.90, .99], ema=.99, decay=1.0, curriculum=240, flip=False)
LAPTOP = dict(lr=2e-3, warmup=100, ema=.995, decay=1.0, flip=False)    # your images of 32 x 32 on a CPU
CURRICULUM_PAPER = dict(weighting="snr", betas=[.8, .999])   # its plain eps loss; its density is --timesteps clts
IMAGENET128 = CURRICULUM_PAPER | dict(schedule="linear", curriculum=300_000)
CIFAR10 = CURRICULUM_PAPER | dict(T=4000, classes=0)
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
    ("imagenet128", "unet-adm128", "eps", 4_000_000,  256, .00, 1.0, 125, IMAGENET128),
    ("cifar10",     "unet-cifar",  "eps",   500_000,  128, .00, 1.0, 125, CIFAR10),
    ("folder",      "vit-s",       "x0",    100_000,  128, .10, 1.5,  30, dict(warmup=1_000)),
    ("folder",      "unet-tiny",   "v",       3_600,   16, .10, 1.5,  18, LAPTOP),
]
COLUMNS = "dataset model target steps batch_size drop cfg sample_steps other".split()
DEFAULT = dict(weighting="min_snr", curriculum=50_000, schedule="cosine", T=1000, classes=None, lr=1e-4,
               warmup=0, decay=0.0, ema=.9999, flip=True)


def preset(dataset, model=None, target=None, gpu=False):
    """The row of a data set, network and target, as a dict of flags.

    A data set of yours has the rows "folder". Without a row of this network, any network's row will do; after
    that, without a row of this target, any target's. Of several rows the first is taken. Betas and weight decay
    are those of the network's kind (ViT or UNet) unless the row sets them.
    """
    name = dataset if dataset in DATASETS else "folder"
    rows = [dict(zip(COLUMNS, row)) for row in PRESETS if row[0] == name]
    if name == "folder" and not gpu:
        rows.reverse()
    model = model or rows[0]["model"]
    rows = [row for row in rows if row["model"] == model] or rows
    rows = [row for row in rows if row["target"] == target] or rows
    kind = dict(betas=[.99, .99], weight_decay=0.03)
    if MODELS[model][0] is model_unet.UNet:
        kind = dict(betas=[.9, .999], weight_decay=0.0)
    other = rows[0].pop("other")
    return DEFAULT | kind | rows[0] | other | dict(dataset=dataset, model=model)


# ------------------------------------------------------------------------------------ flags and config
# The config of a run is its flags without MACHINE, and what `settle` and `initialise` add. The checkpoint holds it.
# On --resume all of it becomes defaults of the flags.

# where and how a run is computed: free at every start
MACHINE = "out resume device accum compile graph grad_ckpt data_on_gpu dry_run".split()
# in the config, but a resumed run may change it. class_counts only repeats the labels, which have a fingerprint;
# older checkpoints lack it
FREE = "steps cfg sample_steps data vae_file log_every save_every sample_every keep_every class_counts".split()


def name_or_table(text):
    """An argparse type for --weighting: a name, or the column `weight` of a table FILE.csv as a list. Its rows are
    t = 0, 1, ..., and a column `t`, if there is one, must say so.
    """
    if not text.endswith(".csv"):
        return text
    try:
        table = np.genfromtxt(text, delimiter=",", names=True, ndmin=1)
        weight = table["weight"]
        t = table["t"] if "t" in table.dtype.names else np.arange(len(weight))
        if not (weight >= 0).all() or weight.sum() == 0:                     # an empty cell is nan: not >= 0
            raise ValueError
        if (t != np.arange(len(weight))).any():
            raise ValueError
    except (IndexError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: expected a column `weight` of numbers of 0 or more, not all 0, in "
                                         "the order of t = 0, 1, ...") from None
    return weight.tolist()


def flags():
    """The parser of all flags. A flag without a default here gets it in `parse`."""
    parser = Parser(__doc__)
    add = parser.add_argument
    count, switch = at_least(1), argparse.BooleanOptionalAction
    share = between(0, 1 - 1e-9, expected="a number from 0 to below 1")
    # the run
    add("--dataset", default="shapes", help=f"{', '.join(DATASETS)}, or any packed data/NAME")
    add("--model", choices=MODELS, help="network")
    add("--target", choices=TARGETS, help="what the network predicts")
    add("--weighting", type=name_or_table, help="of the loss over t, defined on x0: "
        f"{', '.join(WEIGHTINGS)}, or a table FILE.csv whose column `weight` has T rows, which the run remembers")
    add("--out", type=Path, help="folder of the run (default: out/DATASET)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--init", help="fine-tune: the weights of a run, checkpoint, snapshot or released file to start from")
    # the data
    add("--data", help="packed folder (default: data/DATASET)")
    add("--size", type=at_least(1, 1024), help="image side, free for the built-in shapes alone (default: 16)")
    add("--classes", type=int, choices=[0], help="train without the labels")
    add("--flip", action=switch, help="mirror half of the images, but not latents")
    # the paper
    add("--patch", type=count, help="patch side, of a ViT (default: 4 pixels, 2 of latents)")
    add("--gamma", type=positive, default=5.0, help="of min_snr, max_snr and soft_min_snr, a value of SNR")
    add("--timesteps", default="uniform", help="density of t: uniform, clts, laplace, logit_normal, "
        "cosine_scaled, or with parameters clts:SHARE:STEP (its peak as a share of T, the curriculum's last step), "
        "laplace:CENTRE:WIDTH (of log SNR)")
    add("--curriculum", type=count, help="last step of clts's curriculum")
    add("--importance", action=switch, default=False,
        help="importance sampling: divide the loss by q T, where q is the density of t, so that the density "
        "changes the loss's variance and not the objective")
    add("--schedule", choices=("cosine", "linear"), help="noise schedule")
    add("--T", type=at_least(1, 1_000_000), help="timesteps")
    # optimisation
    add("--steps", type=count, help="total optimizer steps, those before a --resume included; with --decay "
        "another total is another learning rate, not the same run prolonged")
    add("--batch-size", type=at_least(1, 10 ** 6), help="images per optimizer step, over all processes")
    add("--lr", type=positive, help="peak learning rate of AdamW")
    add("--warmup", type=at_least(0), help="steps of linear warm-up")
    add("--decay", type=between(0, 1), help="share of the run, its end, in which the rate falls to 0")
    add("--betas", type=share, nargs=2, help="of AdamW")
    add("--weight-decay", type=between(0, 1000), help="of AdamW")
    add("--grad-clip", type=positive, help="largest norm of the whole gradient; a longer one is scaled down to it")
    add("--drop", type=share, help="how often a label becomes the null label, for guidance")
    add("--ema", type=share, help="rate of the exponential moving average of the weights")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="bfloat16: the network runs "
        "under autocast, and its weights stay float32")
    add("--seed", type=at_least(0), default=0, help="of everything random")
    # sample grids
    add("--cfg", type=between(0, 1000), help="guidance scale, 1 = none")
    add("--sample-steps", type=at_least(1, 10_000), help="Heun steps")
    # this machine and its output: none of these changes the weights but by rounding
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu; a Mac's mps is "
        "untested")
    add("--accum", type=count, default=1, help="micro-batches per step and process, for small memories")
    add("--compile", action=switch, help="torch.compile the network; by itself on a GPU, but not for the built-in "
        "shapes, whose run is short")
    add("--graph", action=switch, help="run a step as one CUDA graph, which is faster for small networks; by itself "
        "on a GPU, for the built-in shapes")
    add("--grad-ckpt", action="store_true", help="keep the blocks' inputs and compute the rest again for the "
        "gradient: less memory, more time")
    add("--data-on-gpu", action="store_true", help="hold the whole data set in the GPU's memory")
    add("--log-every", type=count, default=100, help="steps between log lines")
    add("--save-every", type=count, default=1000, help="steps between checkpoints; the last is always saved")
    add("--sample-every", type=at_least(0), default=0, help="steps between sample grids; 0: only at the end")
    add("--keep-every", type=at_least(0), default=0, help="steps between snapshots of the EMA; 0: none")
    add("--dry-run", action="store_true", help="print configuration, FLOPs, speed and days, no more")
    return parser


def parse():
    """-> the flags, and the state of the run to resume, None for a new one.

    What the command line leaves out takes the preset's value, on --resume the run's own. Raises BadInput.
    """
    parser = flags()
    # A first reading tells which preset or run, and which device, the defaults are from.
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    asked = parser.parse_args(words)
    out = asked.out or Path("out") / asked.dataset
    _, world, device = processes(asked.device)
    gpu = device.type == "cuda"
    state, defaults = None, preset(asked.dataset, asked.model, asked.target, gpu)
    if asked.resume:
        state = read(out)
        if "optimizer" not in state:
            raise BadInput(f"{out}: its ckpt.pt is no checkpoint to resume from")
        defaults = state["config"]

    demo = defaults["dataset"] == "shapes"       # too short for a compiler, and its network small enough for a graph
    can_graph = gpu and world == 1 and not asked.grad_ckpt
    has_bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    parser.set_defaults(dtype="bfloat16" if has_bfloat16 else "float32", compile=gpu and not demo,
                        graph=can_graph and demo)
    parser.set_defaults(**defaults)
    args = parser.parse_args()                                               # or show the help, with these defaults
    if state and args.model != defaults["model"]:        # said first, as it decides what other flags mean
        raise BadInput(f"--model: found {args.model}, the run in {out} has {defaults['model']}")
    args.out = out.resolve()
    if args.graph and not can_graph:
        raise BadInput("--graph: is for one process, on cuda, without --grad-ckpt")
    if args.data_on_gpu and device.type == "cpu":
        raise BadInput("--data-on-gpu: the run is on a CPU")
    if device.type == "mps" and world > 1:
        raise BadInput("--device mps: is for one process")
    if device.type == "mps" and args.dtype == "float64":
        raise BadInput("--dtype float64: --device mps has none")
    return args, state


# ------------------------------------------------------------------------------------------------ the data

def stand_in(dataset):
    """One black image of the shape that a data set's name promises, and the names of its classes."""
    size, _, _ = DATASETS[dataset]
    shape = (1, 3, size, size)
    if dataset == "imagenet256":                 # latents: mean and standard deviation of 4 channels
        shape = (1, 8, size // 8, size // 8)
    meta = dict(dataset=dataset, classes=class_names(dataset))
    return Images(np.zeros(shape, np.uint8), np.zeros(1, np.int64), meta)


def probe(data):
    """Images spread over the data set, a batch (N,C,S,S): 256, or fewer where they are large."""
    count = min(256, max(16, 2 ** 20 // data.size ** 2))
    some = np.linspace(0, len(data) - 1, count).astype(int)
    return data.batch(some, generator("probe", 0, 0))[0]


def open_data(args):
    """The data set that the flags name. Raises BadInput where it is not what they promise."""
    folder = Path(args.data or f"data/{args.dataset}")
    if args.dataset == "shapes":
        if args.data:
            raise BadInput(f"--data {args.data}: shapes are built in; name the data set with --dataset")
        data = built_in(args.size or 16)
    elif args.dry_run and args.dataset in DATASETS and not folder.exists():
        say(f"{folder} is not here: only the speed is measured")
        data = stand_in(args.dataset)
    else:
        data = Packed(folder)
        check_pack(data, args.dataset, folder)
    if args.size not in (None, data.size):
        raise BadInput(f"--size: found {args.size}, {folder} has {data.size}")
    if args.classes == 0:
        data.classes = []
    data.flip = args.flip and not data.latents
    return data


def check_pack(data, dataset, folder):
    """Say what is unusual about a packed folder. Raises BadInput where it holds images in the place of latents, or
    latents in that of images.
    """
    if dataset in DATASETS:
        expected = stand_in(dataset)
        found, shape = data.images.shape[1:], expected.images.shape[1:]
        if found[0] != shape[0]:
            raise BadInput(f"{folder}: found images of shape {found}, {dataset} has {shape}")
        if found != shape:
            say(f"warning: {folder} has images of shape {found}, {dataset} has {shape}")
        if data.classes != expected.classes:
            say(f"warning: the {len(data.classes)} classes of {folder} are not those of {dataset}")
    if data.latents:
        std = probe(data).std()
        if not 0.7 <= std <= 1.3:
            say(f"warning: {folder}: scaled latents have a standard deviation of {std:.3f}, expected 0.7 to 1.3: "
                "another autoencoder, or a damaged file")


def settle(args, data):
    """-> config: the flags, and what follows from them and the data. It has JSON's types alone, no
    tuples, because it is compared with a saved one. Raises BadInput for flags that contradict the network.
    """
    config = {key: value for key, value in vars(args).items() if key not in MACHINE}
    network, arguments = MODELS[args.model]
    takes = inspect.signature(network).parameters
    if args.patch and "patch_size" not in takes:
        raise BadInput(f"--patch {args.patch}: {args.model} has no patches")
    patch = args.patch or (2 if data.latents else 4)
    classes = len(data.classes)                  # the config holds their number; the flag is None, or 0 for none
    shape = dict(img_size=data.size, in_channels=data.channels, num_classes=classes, patch_size=patch, T=args.T)
    shape = {key: value for key, value in shape.items() if key in takes}     # what the network's class asks for
    class_counts = np.bincount(data.labels, minlength=classes)[:classes]     # none without classes
    if not classes:
        if args.drop or args.cfg != 1:
            say(f"no classes: drop {args.drop:g} becomes 0, cfg {args.cfg:g} becomes 1")
        config.update(drop=0.0, cfg=1.0)
    if config["cfg"] != 1 and not config["drop"]:
        raise BadInput(f"--cfg {args.cfg}: a model trained with --drop 0 cannot be guided; add --cfg 1")
    config.update(class_counts=class_counts.tolist(), size=data.size, patch=shape.get("patch_size"),
                  flip=data.flip, network=arguments | shape, classes=classes,
                  class_names=data.classes, fingerprint=fingerprint(data.meta), vae=data.meta.get("vae"),
                  vae_file=data.meta.get("vae_file"))
    return json.loads(json.dumps(config))


def compare(config, saved, out):
    """Raise BadInput where a flag or the data contradict the run that is resumed. FREE flags may change. So may
    the weighting, if the new one is a table, as UGD (experiments/pareto.py) computes weights during training.
    """
    free = [*FREE, "weighting"] if isinstance(config["weighting"], list) else FREE
    for key, value in config.items():
        if value == saved.get(key) or key in free:
            continue
        if key in ("class_names", "network", "fingerprint", "vae"):
            raise BadInput(f"--data: not the data, or not the network, of the run in {out} ({key} differs)")
        hint = f"; to fine-tune it otherwise, begin another with --init {out}"
        if key in "model target schedule T patch".split():                   # --init refuses these, too
            hint = ""
        raise BadInput(f"--{key.replace('_', '-')}: found {value!s:.80}, the run in {out} has "
                       f"{saved.get(key)!s:.80}{hint}")
    if config["weighting"] != saved["weighting"]:
        say("the weighting is another one from here on")
    if config["steps"] != saved["steps"] and config["decay"]:
        say(f"warning: --steps was {saved['steps']}: the past was not that of a {config['steps']}-step run")


# --------------------------------------------------------------------------- everything random in one step

def draw_step(data, config, diffusion, step, rows):
    """-> x0, t, noise, y, scale: everything random in one step, drawn for the whole global batch and then cut to
    this process's rows, so that the number of processes changes nothing. scale multiplies the loss: 1, or
    1 / (q T) with --importance.
    """
    B, N, seed = config["batch_size"], len(data), config["seed"]
    g = generator("step", seed, step)
    places = range(step * B, (step + 1) * B)                                 # counted on from epoch to epoch
    indices = [epoch_order(N, seed, place // N)[place % N] for place in places]
    x0, y = data.batch(indices, g, rows)
    t, ratio = diffusion.draw(B, g, step)
    noise = torch.randn(B, *x0.shape[1:], generator=g)
    dropped = torch.rand(B, generator=g) < config["drop"]
    y = torch.where(dropped[rows], len(data.classes), y)                     # the null label
    scale = ratio if config["importance"] else torch.ones_like(ratio)
    return x0, t[rows], noise[rows], y, scale[rows]


@functools.lru_cache(maxsize=2)
def epoch_order(N, seed, epoch):
    """Permutation of 0 .. N-1 for one epoch, a numpy array (N,). Two are kept, as a batch may end one epoch and
    begin the next.
    """
    return torch.randperm(N, generator=generator("epoch", seed, epoch)).numpy()


def ahead(make, first, last, threads=1):
    """Yield make(first), ..., make(last - 1). Threads prepare each during the `threads` steps before it; the few
    beyond the last are made in vain.
    """
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(make, first + i) for i in range(threads)]
        for step in range(first, last):
            jobs.append(pool.submit(make, step + threads))
            yield jobs.pop(0).result()


# ---------------------------------------------------------------------------------------------- one step

def backward(net, diffusion, batch, tally, config, accum=1, world=1):
    """Loss and gradients of this process's batch (x0, t, noise, y, scale), in `accum` micro-batches. Adds what a log
    line averages to tally (10,4), see `metrics_of`.
    """
    half = config["dtype"] == "bfloat16"
    micro_batches = zip(*(part.chunk(accum) for part in batch))
    for i, (x0, t, noise, y, scale) in enumerate(micro_batches):
        waits = world > 1 and i + 1 < accum      # DDP exchanges gradients once a step, after the last micro-batch
        with net.no_sync() if waits else contextlib.nullcontext():
            # without autocast's cache, as PyTorch demands it under CUDA graphs (torch.cuda.make_graphed_callables)
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
                loss, mse = diffusion.loss(net, x0, t, noise, y)
            loss = loss * scale
            (loss.sum() * (world / config["batch_size"])).backward()         # the global mean: DDP divides by world
        with torch.no_grad():
            loss, mse, t = (part.to(tally.device) for part in (loss, mse, t))    # on a Mac the tally is on the CPU
            x0_mse = mse / diffusion.factor[t]
            terms = torch.stack([loss, mse, x0_mse, torch.ones_like(mse)], 1).double()
            terms = torch.where(terms.isfinite().all(1, keepdim=True), terms, 0)     # leave out inf and nan
            tally.index_add_(0, t * 10 // config["T"], terms)


def learning_rate(config, step):
    """Linear warm-up, constant, and over the last `decay` of the run linearly to 0."""
    rise = min(1, (step + 1) / max(config["warmup"], 1))
    fall = min(1, (1 - step / config["steps"]) / max(config["decay"], 1e-12))
    return config["lr"] * rise * fall


def set_rate(optimizer, rate):
    """Set the learning rate: a number, or under a CUDA graph a tensor, which the graph reads anew in every step."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def update(model, ema, optimizer, config):
    """Do one step of AdamW and one of the moving average of the weights, or neither where the norm of the gradient
    is not finite. -> whether they were left out, a bool tensor () on the device: Python need not wait for a GPU.
    """
    weights, averages = list(model.parameters()), list(ema.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    bad = ~norm.isfinite()
    if config["grad_clip"]:
        torch.nn.utils.clip_grads_with_norm_(weights, config["grad_clip"], norm)
    optimizer.found_inf = bad.float()                                        # fused AdamW does nothing where it is 1
    optimizer.step()
    optimizer.zero_grad()
    share = (1 - config["ema"]) * (~bad).to(weights[0].dtype)                # of the new weights, in the average
    torch._foreach_lerp_(averages, weights, [share] * len(weights))
    return bad


# ------------------------------------------------------------------------------------------------- the log

def metrics_of(step, tally):
    """The means of a log line. tally (10,4) has a row for each tenth of the timesteps, and sums over the images
    whose t fell into it: loss, mse, mse of x0, and their number. A tenth without images is nan.
    """
    loss, mse, _, images = tally.sum(0).tolist()
    images = images or np.nan                                                # no finite loss: the means are nan
    bins = (tally[:, 2] / tally[:, 3]).tolist()
    return dict(step=step, loss=loss / images, mse=mse / images, **{f"x0_mse_{i}": bins[i] for i in range(10)})


def mean_square(diffusion, s):
    """The mse of a network whose output is 0: the mean square of the target, under the density of t at step 0. s is
    the mean square of the data.
    """
    alpha2 = diffusion.density() @ diffusion.alphas_cumprod.cpu()
    return float({"x0": s, "eps": 1, "v": alpha2 + (1 - alpha2) * s}[diffusion.target])


def diverged(mse_sum, images, mse_of_zero):
    """Whether the mean mse of some images is above twice what output 0 would get. mse_sum is the sum over them. 32
    images of error 0 are counted in, because the mean of a few images may be far from the truth.
    """
    return mse_sum > 2 * mse_of_zero * (images + 32)


def log(metrics, config, out):
    """Print the metrics and add a line to log.csv: the place for wandb, TensorBoard or your own."""
    images_left = (config["steps"] - metrics["step"]) * config["batch_size"]
    say(f"step {metrics['step']:,} / {config['steps']:,}   loss {metrics['loss']:.4f}   {config['target']} mse "
        f"{metrics['mse']:.4f}   {metrics['images_per_s']:,.0f} images/s   data {metrics['data_share']:.1%}   "
        f"{metrics['skipped']} steps skipped   {images_left / metrics['images_per_s'] / 60:.1f} min left")
    with open(out / "log.csv", "a") as file:
        if file.tell() == 0:
            print(*metrics, sep=",", file=file)
        print(*metrics.values(), sep=",", file=file)


def sanity(model, config):
    """FD-pixels between 256 samples and 2,048 of the built-in images."""
    drawn = draw(model, config, range(256), steps=config["sample_steps"], cfg=config["cfg"])
    return fd_pixels(drawn, shapes(range(2048), config["size"])[0])


def picture(ema, config, out, step, device):
    """Draw a grid of samples of the moving average -> its path, or why there is none."""
    try:
        vae = find_vae(config, device)
        return grid(ema, config, out / f"samples_{step:06d}.png", steps=config["sample_steps"],
                    cfg=config["cfg"], vae=vae)
    except BadInput as error:
        return f"no grid: {error}"


# ------------------------------------------------------------------------------------------------- dry run

def dry_run(config, model, ema, optimizer, diffusion, micro, world):
    """Print the configuration, the FLOPs, and how long the run would take here. The speed is measured on random
    numbers: `micro` images, on a CPU only as many as need 100 GFLOP forward.
    """
    for key, value in config.items():
        print(f"  {key:<13} {value!s:.90}")
    C, S = model.in_channels, model.img_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        t = torch.zeros(1, dtype=torch.long)
        build_model(config)(torch.empty(1, C, S, S), t, t)
    gflop = counter.get_total_flops() / 1e9
    print(f"{gflop:,.1f} GFLOP an image forward, {3 * gflop:,.1f} in training; measuring", flush=True)
    weight = next(model.parameters())
    n = micro
    if weight.device.type == "cpu":
        n = max(1, min(micro, int(100 / gflop)))
    x = torch.randn(n, C, S, S).to(weight)
    t = torch.zeros(n, dtype=torch.long, device=weight.device)
    tally = torch.zeros(10, 4, dtype=torch.float64, device=diffusion.factor.device)
    batch = x, t, x, t, torch.ones_like(t)       # x is the noise, too, and t = 0 the labels
    for _ in range(2):                                                       # the first is not warm
        since = time.monotonic()
        backward(model, diffusion, batch, tally, config)
        update(model, ema, optimizer, config).item()                         # waits for the device
        rate = n * world / (time.monotonic() - since)
    seconds = config["batch_size"] / rate
    days = config["steps"] * seconds / 86_400
    print(f"dry run: {rate:,.2f} images/s, {seconds * 1e3:,.0f} ms a step, {rate * 3 * gflop / 1e3:,.2f} "
          f"TFLOP/s; measured with {n} images at a time, without data, communication and --graph")
    print(f"{config['steps']:,} steps: {24 * days:,.1f} hours, {days:,.1f} days")


# ------------------------------------------------------------------------------------- what a run consists of

def make_diffusion(config):
    """The schedule, weights and density of a run. Raises ValueError for what they do not know."""
    weighting, timesteps = config["weighting"], config["timesteps"]
    if isinstance(weighting, list) and len(weighting) != config["T"]:
        raise ValueError(f"--weighting: found {len(weighting)} rows, expected T = {config['T']}")
    if timesteps == "clts":
        timesteps = "clts:0.3"
    if timesteps.startswith("clts:") and timesteps.count(":") == 1:
        timesteps += f":{config['curriculum']}"
    return Diffusion(config["schedule"], config["T"], config["target"], weighting, config["gamma"], timesteps)


def initialise(model, config):
    """Copy the weights of --init into a fresh network; of a checkpoint they are the moving average. Note the file's
    SHA-256 in the config. Where the classes differ, the network keeps its own random class embedding. Raises BadInput
    for another target, schedule or T, and for weights that do not fit.
    """
    path = Path(config["init"])
    source, trained = load_checkpoint(path, target=config["target"])
    for key in ("schedule", "T"):
        if trained[key] != config[key]:
            raise BadInput(f"--{key} {config[key]}: {path} was trained with {trained[key]}")
    weights, drawn = source.state_dict(), model.state_dict()
    if "time_embedding.weight" in weights:                                   # released files have 4,000 rows
        weights["time_embedding.weight"] = weights["time_embedding.weight"][:config["T"]]
    theirs, ours = source.num_classes, model.num_classes
    if bool(theirs) != bool(ours):
        raise BadInput(f"--init {path}: was trained with {theirs} classes, the data have {ours}: expected both with "
                       "classes, or both without")
    others = trained["class_names"] not in ([], config["class_names"])         # []: a released file without names
    if theirs != ours or others:
        say(f"warning: the {theirs} classes of {path} are not the {ours} of the data: their table is drawn anew")
        for name in ("class_embedding.weight", "label_emb.weight"):          # of a ViT, of a UNet
            if name in drawn:
                weights[name] = drawn[name]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"--init {path}: not the weights of this {config['model']}: {error!s:.300}") from None
    config["init_sha256"] = hash_file(path / "ckpt.pt" if path.is_dir() else path)
    say(f"starts from {path}, weights: {trained['weights']} @ step {trained['step']}")


def make_networks(args, config, device, state=None):
    """-> model, its moving average, optimizer: fresh, from --init, or as in a checkpoint's state, which is emptied.
    Raises BadInput for weights that do not fit, and the network's ValueError for a config that it does not know.
    """
    torch.manual_seed(config["seed"])
    dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
    model = to_device(build_model(config), device, dtype)
    if config["init"] is not None and not state:
        initialise(model, config)
    model.grad_ckpt = args.grad_ckpt
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config["lr"], config["betas"],
                                  weight_decay=config["weight_decay"], fused=True)
    if state:
        try:
            model.load_state_dict(state.pop("model"))                        # pop, as its memory is needed
            ema.load_state_dict(state.pop("ema"))
            optimizer.load_state_dict(state.pop("optimizer"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"{args.out}: weights and config disagree ({error!r:.200})") from None
        for group in optimizer.param_groups:                                 # undoes what `as_graph` sets
            group["lr"], group["capturable"] = float(group["lr"]), False
    return model, ema, optimizer


def compile_network(model):
    """torch.compile in place, so that the names of the weights stay plain. Blocks that are alike, as a ViT's, are
    compiled once for all; any other network as a whole. Without a compiler PyTorch warns and runs the network as
    it is.
    """
    torch._dynamo.config.suppress_errors = True
    parts = getattr(model, "blocks", [])
    kinds = {str(part) for part in parts}        # its layers and their widths
    if len(kinds) != 1:
        parts = [model]
    for part in parts:
        part.compile()


def as_graph(step, optimizer):
    """step(batch) -> the same function as a CUDA graph, so that Python launches one thing a step instead of hundreds.

    The fourth call is recorded, and from then on the GPU replays its kernels. They read the batch from the same
    tensors every time, so each new batch is copied there. The first three calls are not recorded: they load
    libraries and make the optimizer's state. They run on a side stream, because PyTorch wants such a warm-up there.
    """
    side_stream, graph, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0
    inputs = output = None
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device="cuda", dtype=torch.float32)      # read anew in every replay

    def run_step(batch):
        nonlocal calls, inputs, output
        calls += 1
        if calls <= 3:
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                output = step(batch)
            torch.cuda.current_stream().wait_stream(side_stream)
            return output
        if calls == 4:
            inputs = [part.clone() for part in batch]
            for group in optimizer.param_groups:
                group["capturable"] = True
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):     # other threads may use the GPU
                output = step(inputs)
        for recorded, part in zip(inputs, batch, strict=True):
            recorded.copy_(part)
        graph.replay()
        return output
    return run_step


# ------------------------------------------------------------------------------------------------- the run

def introduce(args, config, model, diffusion, data, micro, world, device):
    """Say what will be trained, and what is odd about it."""
    params = sum(p.numel() for p in model.parameters())
    say(f"{config['model']}: {params / 1e6:.1f}M parameters, {config['target']} prediction, "
        f"{config['weighting']!s:.20} weighting, gamma {config['gamma']:g}, {diffusion.timesteps} t, "
        f"{config['dtype']} on {device.type}")
    flips = "half of them mirrored, " if data.flip else ""
    say(f"{config['dataset']} {data.meta.get('split', 'train')}: {len(data):,} images {data.size} x "
        f"{data.size}, {flips}{len(data.classes)} classes, drop {config['drop']:g}; global batch "
        f"{config['batch_size']} = {micro} x {world} processes x {args.accum} accumulation")
    if config["gamma"] != 5 and config["weighting"] not in ("min_snr", "max_snr", "soft_min_snr"):
        say("warning: --gamma changes nothing under this weighting")
    if config["warmup"] > config["steps"]:
        say(f"warning: a warm-up of {config['warmup']} steps is longer than the run: the rate never gets to --lr")
    if config["ema"] > 1 - 1 / config["steps"]:
        say(f"warning: an EMA of {config['ema']} averages over more steps than the run's {config['steps']}")


def catch_signals():
    """-> a list, which gets the number of a signal to stop (Ctrl-C, kill). A second one ends the process at once."""
    caught = []

    def remember(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, remember)
    signal.signal(signal.SIGTERM, remember)
    return caught


def due(every, done):
    """Whether `done` is a multiple of `every`. every = 0 means never."""
    return every > 0 and done % every == 0


def time_of(ckpt):
    """When the checkpoint was written, or None. Where this run did not write it then, another run did."""
    return ckpt.stat().st_mtime_ns if ckpt.exists() else None


def train(args, config, data, diffusion, model, ema, optimizer, tally, first):
    """The training loop, from step `first` on.

    -> how many steps are done, the signal that stopped them or 0, and why nothing was saved at the end, or "".
    """
    rank, world, device = processes(args.device)
    ckpt = args.out / "ckpt.pt"
    steps, B = config["steps"], config["batch_size"]
    rows = slice(rank * B // world, (rank + 1) * B // world)                 # of the global batch, for this process
    dtype = next(model.parameters()).dtype
    net = model
    gpu = device.type == "cuda"
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        net = DistributedDataParallel(model)

    def make_batch(step):
        x0, t, noise, y, scale = draw_step(data, config, diffusion, step, rows)
        parts = x0.to(dtype), t, noise.to(dtype), y, scale.to(dtype)
        return [part.pin_memory() if gpu and part.is_cpu else part for part in parts]

    def one_step(batch):
        backward(net, diffusion, batch, tally, config, args.accum, world)
        return update(model, ema, optimizer, config)
    if args.graph:
        one_step = as_graph(one_step, optimizer)
    signals = catch_signals()
    mse_of_zero = mean_square(diffusion, probe(data).square().mean())
    written = time_of(ckpt)
    done, stop, trouble = first, 0, ""
    # since the last log line: its step and time, seconds of waiting for data, steps without an update
    logged, since, waited, skipped = first, time.monotonic(), 0.0, torch.zeros((), device=device)

    batches = ahead(make_batch, first, steps, threads=4 if gpu else 1)
    for step in range(first, steps):
        # data: a thread has prepared this process's rows
        now = time.monotonic()
        batch = [part.to(device, non_blocking=True) for part in next(batches)]
        waited += time.monotonic() - now

        # loss and gradients, then update of weights and EMA
        set_rate(optimizer, learning_rate(config, step))
        skipped += one_step(batch)
        done = step + 1
        last = done == steps

        # stop signal of any process
        stop = max(signals, default=0)
        if world > 1:
            flag = torch.tensor([stop])
            dist.all_reduce(flag, dist.ReduceOp.MAX)                         # on the CPU: no wait for the GPU
            stop = int(flag)

        # a grid of samples
        if rank == 0 and due(config["sample_every"], done) and not last:
            say(picture(ema, config, args.out, done, device))
        logs = last or due(config["log_every"], done)
        saves = last or stop or due(config["save_every"], done)
        keeps = due(config["keep_every"], done)
        if not (logs or saves or keeps):
            continue                                                         # as most steps do

        # trouble: stop where most losses since the last log line are not finite; one step alone may be chance
        total = tally.clone()
        if world > 1:
            dist.all_reduce(total)
        _, mse_sum, _, images = total.sum(0).tolist()                        # since the last log line
        new_steps = done - logged
        if new_steps > 1 and images < new_steps * B / 2:
            trouble = trouble or f"most losses of steps {logged + 1:,} to {done:,} are not finite"
            break
        # a diverged run goes on, so that log.csv shows how
        if diverged(mse_sum, images, mse_of_zero) and not trouble:
            trouble = (f"diverged since step {logged + 1:,}: {config['target']} mse {mse_sum / images:.4g}, "
                       f"output 0 would get {mse_of_zero:.4g}")
            say(f"warning: {trouble}; nothing is saved from here on")

        # log
        if logs and rank == 0:
            took = time.monotonic() - since
            speed = dict(images_per_s=new_steps * B / took, data_share=waited / took, skipped=int(skipped))
            log(metrics_of(done, total) | speed, config, args.out)
        if logs and images:                      # one step without a finite loss is judged with the next line's
            logged, since, waited = done, time.monotonic(), 0.0
            for sums in (skipped, tally, total):                             # total: what is saved counts from here
                sums.zero_()

        # save
        if rank == 0 and not trouble:
            if time_of(ckpt) != written:
                raise BadInput(f"--out {args.out}: another run is writing there")
            state = dict(ema=ema.state_dict(), step=done, config=config)
            if keeps:
                replace(args.out / f"snapshot_{done:06d}.pt", lambda file: torch.save(state, file))
            if saves:
                state.update(model=model.state_dict(), optimizer=optimizer.state_dict(), tally=total.cpu(),
                             log=(args.out / "log.csv").stat().st_size)
                replace(ckpt, lambda file: torch.save(state, file))
                written = time_of(ckpt)
        if stop:
            break

    signal.signal(signal.SIGINT, signal.default_int_handler)                 # undoes catch_signals
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if world > 1:
        leave_group()
    return done, stop, trouble


def conclude(args, config, ema, done, stop, trouble):
    """Draw the last grid of samples, and for the built-in shapes say FD-pixels. After trouble or a stop do neither:
    say why, and end with exit code 3, or 128 + the signal's number.
    """
    rank, _, device = processes(args.device)
    ckpt = args.out / "ckpt.pt"
    if trouble:
        left = f"the checkpoint from before: {ckpt}" if ckpt.exists() else "there is no checkpoint from before"
        say(f"{trouble}; {left}; try a smaller --lr, or --grad-clip 1")
        sys.exit(3)
    if stop:
        say(f"stopped; checkpoint of step {done}: {ckpt}; go on with --resume")
        sys.exit(128 + stop)
    if rank > 0:
        return
    if config["dataset"] == "shapes":
        say(f"FD-pixels {sanity(ema, config):.3f} of 256 samples")
    say(picture(ema, config, args.out, done, device))


def main():
    args, state = parse()
    rank, world, device = processes(args.device)
    if (args.out / "ckpt.pt").exists() and not (args.resume or args.dry_run):
        raise BadInput(f"--out {args.out}: holds a run already; go on with --resume or choose another folder")
    micro, rest = divmod(args.batch_size, world * args.accum)
    if rest:
        raise BadInput(f"--batch-size {args.batch_size}: must divide by {world} processes x --accum {args.accum}")
    data = open_data(args)
    config = settle(args, data)
    if state:
        compare(config, state["config"], args.out)
        if state["step"] > config["steps"]:
            raise BadInput(f"--steps {config['steps']}: the run in {args.out} has done {state['step']}")
    if config["dtype"] == "bfloat16":
        torch.set_float32_matmul_precision("high")                           # TF32 beside autocast
    try:
        diffusion = make_diffusion(config).to(device)
        model, ema, optimizer = make_networks(args, config, device, state)
    except BadInput:
        raise
    except ValueError as error:                  # a flag that the network or Diffusion refuses
        raise BadInput(str(error)) from None
    introduce(args, config, model, diffusion, data, micro, world, device)
    if args.compile:
        say("the first step compiles the network; --no-compile is without it")
        compile_network(model)
    if args.dry_run:
        if rank == 0:
            dry_run(config, model, ema, optimizer, diffusion, micro, world)
        return

    state = state or dict(step=0, log=0, tally=torch.zeros(10, 4, dtype=torch.float64))
    tally = state["tally"].to(diffusion.factor.device)                       # sums since the last log line
    if rank > 0:
        tally.zero_()
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "config.json", config)
        with open(args.out / "log.csv", "ab") as file:   # lines after the checkpoint will be written again
            file.truncate(min(state["log"], file.tell()))
    say(f"writing to {args.out}")
    if args.data_on_gpu:
        data.to(device)
    done, stop, trouble = train(args, config, data, diffusion, model, ema, optimizer, tally, state["step"])
    conclude(args, config, ema, done, stop, trouble)


if __name__ == "__main__":
    run(main)
