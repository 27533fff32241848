"""Checkpoint -> images. `python sample.py --ckpt out/shapes/ckpt.pt` draws a grid and needs nothing else.

    python sample.py --ckpt CKPT --n 50000 --out DIR          # PNG files, for FID; or --out FILE.npz
    torchrun --nproc-per-node 8 sample.py --ckpt CKPT --count 50000 --out DIR   # the same images, sooner
    python sample.py --ckpt ema_0.9999_large.pt               # the paper's released weights, known by shape

Image k depends on (checkpoint, seed, k) alone: not on the batch size, the number of processes, or having been
stopped. The same command finishes what a killed one began.
"""
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import generator, imagenet, load_image, tile
from diffusion import SOLVERS, TARGETS, Diffusion, sampler
from files import BadInput, Parser, hash_file, lock, progress, read, read_json, replace, run
from model_unet import UNet, classifier_from_adm, from_adm, load
from model_vit import ViT, from_official
from vae import load_vae


# ------------------------------------------------------------------------------------------- checkpoints

RELEASED = {  # channels, classes, width, depth (ViT) or side (UNet): the published weights of that shape
    (4, 1000, 1152, 28): ("ema_0.9999_xl.pt", dict(target="x0", sample_steps=50, cfg=1.5)),       # FID 2.06
    (3, 1000, 1024, 21): ("ema_0.9999_large.pt", dict(target="eps", sample_steps=20, cfg=1.5)),   # FID 2.28
    (3, 1000, 192, 64):  ("ADM's 64x64_diffusion.pt", dict(target="eps", sample_steps=50, cfg=1.0)),
}


def build_model(config):
    """The network that a run's config describes, freshly initialised."""
    network = config["network"]
    return UNet(**network) if "channels" in network else ViT(**network)


def to_device(model, device, dtype=None):
    """The network there, its weights in channels_last, whose layout convolutions pass on; but not on a CPU,
    whose group norm is slow in it (a training step of the UNets takes 1.02 to 1.31 times as long).
    """
    layout = torch.preserve_format if device.type == "cpu" else torch.channels_last
    return model.to(device, dtype, memory_format=layout)


ENTRIES = dict(dataset=str, schedule=str, target=str, T=int, step=int, sample_steps=int, classes=list,
               ema=(int, float), drop=(int, float), cfg=(int, float))
OPTIONAL = dict(interval=list, vae=dict, vae_file=str)


def check(config, tensors):
    """ValueError for a config that train.py never wrote, before anything of its sizes takes memory or time: a
    network has no more blocks than tensors.
    """
    for key, kind in {**ENTRIES, **OPTIONAL}.items():
        value = config[key] if key in ENTRIES else config.get(key)
        if not isinstance(value, kind) and (key in ENTRIES or value is not None):
            raise ValueError(f"{key} is {type(value).__name__}")
    net, names, span = config["network"], config["classes"], config.get("interval") or [0, 0]
    blocks = net["depth"] if "depth" in net else net["res_blocks"] * len(net["channel_mult"])
    if not (blocks <= tensors and 1 <= net["img_size"] <= 2048 and net["in_channels"] in (3, 4)):
        raise ValueError(f"{blocks} blocks, {net['in_channels']} channels, side {net['img_size']}")
    if not (1 <= config["T"] == net.get("T", config["T"]) <= 1e6 and 1 <= config["sample_steps"] <= 1e4):
        raise ValueError(f"T is {config['T']}, sample_steps {config['sample_steps']}")
    if len(names) != net["num_classes"] or any(type(name) is not str for name in names):
        raise ValueError(f"{len(names)} class names for {net['num_classes']} classes")
    if len(span) != 2 or any(type(t) is not int for t in span):
        raise ValueError("interval is not of two timesteps")
    Diffusion(config["schedule"], config["T"], config["target"])
    if (net.get("heads") or 1) < 1 or any(type(net.get(key, True)) is not bool
                                      for key in ("scale_shift", "resblock_updown", "short_run")):
        raise ValueError(f"heads {net.get('heads')}, or a switch that is neither on nor off")


def load_checkpoint(path, raw=False, target=None, schedule=None, heads=None, head_channels=None, size=None):
    """-> (network in eval mode, config). Our checkpoints, EMA weights unless raw, or weights alone: the
    paper's released files and guided-diffusion's or latent-diffusion's, for which `target` says what they
    predict (a file with learned sigma predicts eps), and the last four what else they do not show. Raises
    BadInput for anything else.
    """
    state = read(path)
    if not {"model", "ema", "config"} & state.keys():
        try:
            model = from_official(state, heads) if "pos_embed" in state else \
                from_adm(state, size, heads, head_channels)
            latents = getattr(model, "context_dim", None)                # of latent-diffusion
            if model.in_channels not in (3, 4) or model.in_channels == 3 and latents:
                raise ValueError(f"{model.in_channels} channels that are neither RGB nor this autoencoder's")
            rows, classes = (len(state.get(name, ())) for name in ("out.2.weight", "label_emb.weight"))
        except Exception as error:                                       # whatever damage makes them raise
            raise BadInput(f"{path}: no checkpoint of this project, and {error}") from None
        learned_sigma = rows == 2 * model.in_channels                        # ADM's, of eps
        linear = learned_sigma and model.img_size >= 128                     # its schedule from that side on
        usual = dict(target="eps" if learned_sigma else None, sample_steps=50, cfg=1.0)
        shape = (model.pos_embed.shape[2], len(model.blocks)) if "pos_embed" in state else \
            (model.time_embed[0].in_features, model.img_size)
        known = RELEASED.get((model.in_channels, model.num_classes, *shape), (None, usual))
        name, usual = known if learned_sigma or "pos_embed" in state else (None, usual)
        target = target or usual["target"]
        if target is None:
            raise BadInput(f"{path}: weights alone do not say what they predict; give --target")
        network = dict(img_size=model.img_size, in_channels=model.in_channels, num_classes=model.num_classes)
        null = classes != model.num_classes                              # has a row of the null label
        names = list(imagenet())[2] if model.num_classes == 1000 else []
        config = dict(dataset=name or "official", network=network, schedule="linear" if linear else "cosine",
                      T=1000, step=None, ema=None, drop=0.15 * null, classes=list(names)) | usual
        return model.eval(), config | dict(target=target, schedule=schedule or config["schedule"])
    if missing := {"model", "ema", "step", "config"} - state.keys():
        raise BadInput(f"{path}: not a checkpoint of this project ({', '.join(sorted(missing))} missing)")
    try:
        config, weights = {**state["config"], "step": state["step"]}, state["model" if raw else "ema"]
        check(config, len(weights))
        model = load(lambda: build_model(config), weights, "the network in config")
    except Exception as error:                                           # whatever damage makes them raise
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: weights and config disagree ({why})") from None
    for key, value in (("target", target), ("schedule", schedule)):
        if value not in (None, config[key]):
            raise BadInput(f"--{key} {value}: {path} was trained with {config[key]}")
    for key, value in (("heads", heads), ("head-channels", head_channels), ("size", size)):
        if value is not None:
            raise BadInput(f"--{key} {value}: {path} is a checkpoint of this project, which says it itself")
    return model.eval(), config


# ------------------------------------------------------------------------------------------------ images

def to_uint8(x):
    """[-1, 1] -> 0 .. 255, rounded half up and clipped: the one place where images become bytes."""
    return (127.5 * x + 128).clamp(0, 255).floor().to(torch.uint8)


def start(seed, k, labels, network):
    """Label and unit normal noise (C,S,S) that image k begins with. labels: "random" draws the label,
    "balanced" is k modulo the number of classes, a list is gone through in turn.
    """
    g, count = generator("image", seed, k), max(network["num_classes"], 1)
    drawn = int(torch.randint(count, (), generator=g))                   # always drawn: the noise is the same
    label = drawn if labels == "random" else k % count if labels == "balanced" else labels[k % len(labels)]
    return label, torch.randn(network["in_channels"], network["img_size"], network["img_size"], generator=g)


def find_vae(config, device, path=None):
    """The autoencoder (float32) that turns the network's samples into images, None where they are images:
    the file `path`, else the one the checkpoint's data were encoded with. Raises BadInput.
    """
    if config["network"]["in_channels"] == 3 and path:
        raise BadInput(f"--vae {path}: the network draws images, not latents")
    if config["network"]["in_channels"] == 3:
        return None
    known = (config.get("vae") or {}).get("sha256")
    path = path or config.get("vae_file")
    if not path:
        raise BadInput("the network draws latents: give the autoencoder's weights with --vae FILE")
    try:
        vae = load_vae(path)
    except ValueError as error:
        raise BadInput(f"--vae: {error}") from None
    vae.sha256 = hash_file(path)
    if known not in (None, vae.sha256):
        print(f"warning: {path} is not the file that the training data were encoded with")
    return vae.to(device)


def find_classifier(path, config):
    """The noisy classifier in `path`, which guides this network; for one without classes the labels are the
    classifier's. Raises BadInput.
    """
    try:
        classifier = classifier_from_adm(read(path)).eval().requires_grad_(False)
    except ValueError as error:
        raise BadInput(f"--classifier {path}: {error}") from None
    network = config["network"]
    for key in ("img_size", "in_channels", "num_classes"):
        found, expected = getattr(classifier, key), network[key]
        if found != expected and not (key == "num_classes" and expected == 0):
            raise BadInput(f"--classifier {path}: {key} is {found}, the network's is {expected}")
    network["num_classes"] = classifier.num_classes
    return classifier


def draw(model, config, ks, seed=0, labels="balanced", vae=None, **how):
    """The images of numbers ks, uint8 (N,3,S,S); `how` is what `sampler` takes: steps, cfg, solver, ..."""
    y, z = zip(*(start(seed, k, labels, config["network"]) for k in ks))
    weight = next(model.parameters())                                        # its device and dtype are used
    y = torch.tensor(y, device=weight.device) if config["network"]["num_classes"] else None
    diffusion = Diffusion(config["schedule"], config["T"], config["target"])
    x = sampler(model, diffusion, torch.stack(z).to(weight), y, **how)
    return to_uint8(x if vae is None else vae.decode_latent(x.float())).cpu()


def grid(model, config, path, n=None, **how):
    """Draw n images (8 a class by default) into one PNG, one class to a column where they fit."""
    num_classes = config["network"]["num_classes"]
    columns = num_classes if 2 <= num_classes <= 16 else 8
    n = n or 8 * columns
    parts = [range(i, min(i + 64, n)) for i in range(0, n, 64)]
    images = torch.cat([draw(model, config, ks, **how) for ks in parts]).numpy()
    sheet = tile(images, columns)
    scale = max(1, 64 // images.shape[-1])                                   # small images are shown larger
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda f: sheet.save(f, "PNG"))
    return path


def save_npz(path, folder, n, size, labels):
    """PNG files 0 .. n-1 -> npz with arr_0 uint8 (n,S,S,3) and arr_1 labels, never all in memory."""
    def write(out):
        with zipfile.ZipFile(out, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = dict(descr="|u1", fortran_order=False, shape=(n, size, size, 3))
                np.lib.format.write_array_header_1_0(member, header)
                for k in range(n):
                    file = folder / f"{k:06d}.png"
                    image = load_image(file)
                    if image.size != (size, size):
                        raise BadInput(f"{file}: found {image.size}, expected {size, size}")
                    member.write(image.tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(labels, dtype=np.int64))
    replace(path, write)


def claim(folder, protocol):
    """Make `folder` the place of this protocol; one that holds other samples is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    file, used = folder / "protocol.json", any(folder.glob("*.png"))     # in this order: others may start
    if file.exists():
        try:
            before = read_json(file)
        except BadInput:
            raise BadInput(f"{file}: damaged, expected the protocol of the samples beside it") from None
        if other := [key for key in {**before, **protocol} if before.get(key) != protocol.get(key)]:
            key = other[0]
            found = before.get(key)
            raise BadInput(f"--out {folder}: holds samples with {key} {found!r}, not {protocol.get(key)!r}")
    elif used:
        raise BadInput(f"--out {folder}: holds images without protocol.json; choose a new folder")
    else:
        replace(file, lambda f: f.write(json.dumps(protocol, indent=1).encode()))


def parse_classes(text, config):
    """"3,glass" -> [3, 5]: class names of the checkpoint, one of several in a name, or numbers."""
    names, count, labels = config.get("classes", []), config["network"]["num_classes"], []
    for part in (part.strip() for part in text.split(",")):
        found = [k for k, name in enumerate(names) if part == name] or \
            [k for k, name in enumerate(names) if part.lower() in name.lower().split(", ")] or \
            [int(part) if part.isdecimal() and len(part) < 10 else -1]
        if len(found) > 1:
            numbers = " and ".join(map(str, found))
            raise BadInput(f"--classes {part}: classes {numbers} have this name; give the number")
        labels += found
    if not all(0 <= label < count for label in labels):
        raise BadInput(f"--classes {text}: expected names or numbers of the {count} classes {names[:10]}")
    return labels


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint, run folder, or a released .pt of the paper")
    add("--out", help="grid .png (default: samples.png beside the checkpoint), folder of PNGs, or .npz")
    add("--n", "--count", type=int, help="number of images (default: 8 a class in a grid, else 64);\n"
                                         "--count under torchrun, whose own parser stumbles over --n")
    add("--cfg", type=float, help="guidance scale, 1 = none (default: the preset's)")
    add("--steps", type=int, help="sampling steps (default: the preset's)")
    add("--solver", choices=SOLVERS, default="heun")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"), help="guide only for LO <= t <= HI")
    add("--classes", help="comma-separated class names or numbers, gone through in turn")
    add("--labels", choices=("random", "balanced"), help="default: balanced in a grid, else random")
    add("--seed", type=int, default=0)
    add("--raw", action="store_true", help="the weights themselves instead of their EMA")
    add("--batch-size", type=int, default=64, help="images at a time in each process")
    add("--vae", help="autoencoder of a latent model (default: the one its data were encoded with)")
    add("--classifier", help="ADM's noisy classifier, 64x64_classifier.pt: guide by its gradient")
    add("--classifier-scale", type=float, help="factor of that gradient (default: 1)")
    add("--target", choices=TARGETS, help="what released weights predict, where their shape does not tell")
    add("--schedule", choices=("cosine", "linear"), help="of released weights (default: linear for ADM's of\n"
                                                         "side 128 and more, else cosine)")
    add("--heads", type=int, help="attention heads of released weights, where the width does not tell")
    add("--head-channels", type=int, help="or their width, of a UNet")
    add("--size", type=int, help="side that a released UNet draws, if not 8 x 2^(levels - 1)")
    return parser.parse_args()


def settle(args, config, ckpt):
    """Flags and checkpoint -> keyword arguments for `draw`. Raises BadInput where they contradict."""
    net, cfg = config["network"], config["cfg"] if args.cfg is None else args.cfg
    if cfg != 1 and not (net["num_classes"] and config["drop"]):
        lack = "label drop" if net["num_classes"] else "classes"
        raise BadInput(f"--cfg {cfg}: {ckpt} was trained without {lack}, expected 1")
    if not 0 <= cfg < math.inf:
        raise BadInput(f"--cfg: found {cfg}, expected a number >= 0")
    if args.classes is not None and args.labels:
        raise BadInput("--classes and --labels: give one of the two")
    for flag, value in (("n", args.n), ("steps", args.steps), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise BadInput(f"--{flag}: found {value}, expected at least 1")
    if args.classifier_scale is not None and not (args.classifier and 0 <= args.classifier_scale < math.inf):
        raise BadInput(f"--classifier-scale {args.classifier_scale}: expected a number >= 0 and --classifier")
    if args.interval and cfg == 1 and not args.classifier:
        raise BadInput(f"--interval {args.interval}: there is no guidance at --cfg 1")
    interval = args.interval or (config.get("interval") if cfg != 1 else None)
    if interval and not 0 <= interval[0] <= interval[1] < config["T"]:
        raise BadInput(f"--interval {interval}: expected 0 <= LO <= HI < {config['T']}")
    labels = args.labels or ("balanced" if args.out.suffix == ".png" else "random")
    labels = labels if args.classes is None else parse_classes(args.classes, config)
    return dict(steps=args.steps or config["sample_steps"], cfg=cfg, interval=interval,
                solver=args.solver, seed=args.seed, labels=labels)


def main():
    args = parse()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))   # no process group is needed
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    model, config = load_checkpoint(args.ckpt, args.raw, args.target, args.schedule, args.heads,
                                    args.head_channels, args.size)
    ckpt = Path(args.ckpt) / "ckpt.pt" if Path(args.ckpt).is_dir() else Path(args.ckpt)
    args.out = Path(args.out or ckpt.parent / "samples.png")
    if args.out.suffix not in ("", ".png", ".npz") and not args.out.is_dir():
        raise BadInput(f"--out {args.out}: expected a .png grid, an .npz, or a folder for PNGs")
    classifier = find_classifier(args.classifier, config) if args.classifier else None
    how = settle(args, config, ckpt)
    weights = "raw" if args.raw else f"EMA {config['ema']}" if config["ema"] else "as released"
    if rank == 0:
        print(f"{ckpt}: {config['target']} prediction, weights: {weights} @ step {config['step']}; "
              f"{how['solver']} {how['steps']} steps, cfg {how['cfg']}", flush=True)
    to_device(model, device)
    torch.backends.cudnn.allow_tf32 = False                                  # float32 means float32
    vae = find_vae(config, device, args.vae)
    scale = 1.0 if args.classifier_scale is None else args.classifier_scale
    tools = dict(vae=vae, classifier=classifier and to_device(classifier, device), classifier_scale=scale)
    if args.out.suffix == ".png":
        if rank == 0:
            print(grid(model, config, args.out, args.n, **tools, **how).resolve())
        return

    network = config["network"]
    size = network["img_size"] * (8 if vae else 1)
    # images into a folder, each under its number, those that are there already left alone
    n, npz = args.n or 64, args.out.suffix == ".npz"
    folder = args.out.with_name(args.out.name + ".parts") if npz else args.out
    if npz and args.out.exists():                                        # written last, before the clean-up
        if rank == 0 and not folder.exists():
            raise BadInput(f"--out {args.out}: exists already")
        return shutil.rmtree(folder, ignore_errors=True) if rank == 0 else None
    guide = dict(vae=vae.sha256) if vae else {}
    guide |= dict(classifier=hash_file(args.classifier), classifier_scale=scale) if classifier else {}
    protocol = dict(checkpoint=hash_file(ckpt), step=config["step"], weights=weights, n=n, dtype="float32",
                    **how, **guide, target=config["target"], dataset=config["dataset"], size=size)
    claim(folder, protocol)
    path = lambda k: folder / f"{k:06d}.png"
    mine = range(rank, n, world)                                         # a batch that is not whole is drawn
    parts = [mine[i:i + args.batch_size] for i in range(0, len(mine), args.batch_size)]  # anew: the same bits
    todo, since = [ks for ks in parts if not all(path(k).exists() for k in ks)], time.monotonic()
    for i, ks in enumerate(todo, 1):
        for k, image in zip(ks, draw(model, config, ks, **tools, **how).permute(0, 2, 3, 1).numpy()):
            if not path(k).exists():
                replace(path(k), lambda f: Image.fromarray(image).save(f, "PNG", compress_level=1))
        if rank == 0:
            progress("images", sum(map(len, todo[:i])), sum(map(len, todo)), since)
    if rank:
        return
    while missing := sum(not path(k).exists() for k in range(n)):            # the other processes' share
        if not folder.exists():
            raise BadInput(f"--out {folder}: was removed")
        print(f"\rwaiting for {missing:,} images of other processes   ", end="", flush=True)
        time.sleep(1)
    if npz:
        labels = [start(args.seed, k, how["labels"], network)[0] for k in range(n)]
        text = json.dumps(protocol, indent=1).encode()
        replace(args.out.with_suffix(".protocol.json"), lambda f: f.write(text))
        save_npz(args.out, folder, n, size, labels)
        shutil.rmtree(folder, ignore_errors=True)
    print(args.out.resolve())


if __name__ == "__main__":
    run(main)
