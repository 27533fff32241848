"""Checkpoint -> images. `python sample.py --ckpt out/shapes` draws a grid and needs nothing else.

    python sample.py --ckpt CKPT --count 50000 --out DIR      # PNG files, for FID; or --out FILE.npz
    torchrun --nproc-per-node 8 sample.py --ckpt CKPT --count 50000 --out DIR   # the same images, sooner
    python sample.py --ckpt ema_0.9999_large.pt               # released weights, which are recognised
    python sample.py --ckpt out/shapes --strip                # the way from noise to image, step by step

Image k = 0, 1, ... depends on k and on what protocol.json, a file beside the images, says of the checkpoint, the
labels, the seed and the sampler. The batch size and the number of processes change it by rounding at most. The
same command finishes what a killed one began, to the same bits, and with a larger --count it adds images to a
folder.
"""
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

import model_unet
import model_vit
from data import class_names, generator, load_image, tile
from diffusion import SOLVERS, TARGETS, Diffusion, sampler, sampling_timesteps, steps_run, trajectory
from files import (BadInput, NotFinite, Parser, allow_tf32, at_least, between, env, hash_file, processes,
                   progress, read, read_json, replace, run, say, write_json)
from vae import load_vae


# ----------------------------------------------------------------------------------------------- networks

MODELS = {  # name: (class, its arguments). To add your network, import it above and give it a row here
    **{name: (model_vit.ViT, size) for name, size in model_vit.SIZES.items()},
    **{name: (model_unet.UNet, size) for name, size in model_unet.SIZES.items()},
}


def build_model(config):
    """The network of a run's config, freshly initialised."""
    network, _ = MODELS[config["model"]]
    return network(**config["network"])


def to_device(model, device, dtype=None):
    """Move the network, on a GPU into the layout channels_last, in which convolutions are faster there. On a CPU
    group norms are slower in it, and a training step of the UNets would take 1.02 to 1.31 times as long.
    """
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return model.to(device, dtype, memory_format=layout)


def load_checkpoint(path, raw=False, target=None):
    """-> (network in eval mode, config) of a checkpoint, a run folder, or released weights.

    Of a checkpoint the EMA weights are taken, unless raw. Released weights are the paper's or guided-diffusion's;
    `target` says what they predict if their shapes do not. Beside the flags of the run, config has step, weights
    (a word for people) and guidable, which says whether the network knows the null label.
    Raises BadInput, and NotFinite where a weight is inf or nan.
    """
    state = read(path)
    if "config" not in state:
        model, config = load_released(path, state, target)
    elif raw and "model" not in state:
        raise BadInput(f"--raw: {path} is a snapshot, which holds the EMA alone")
    else:
        try:
            config = dict(state["config"], step=state["step"])
            config["weights"] = "raw" if raw else f"EMA {config.get('ema')}"
            config["guidable"] = config.get("drop", 0) > 0
            model = build_model(config)
            model.load_state_dict(state["model" if raw else "ema"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"{path}: weights and config disagree ({error!r:.200})") from None
    if target not in (None, config["target"]):
        raise BadInput(f"--target {target}: {path} was trained with {config['target']}")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise NotFinite(f"{path}: {name} is not finite")
    model.class_counts = config.get("class_counts")                          # `start` draws labels from them
    return model.eval(), config


def load_released(path, state, target=None):
    """-> (network, config) of a file that holds weights alone. config has what sampling needs."""
    try:
        model = model_vit.from_official(state) if "pos_embed" in state else model_unet.from_adm(state)
    except ValueError as error:
        raise BadInput(f"{path}: no checkpoint of this project, and {error}") from None
    config = dict(model.public, T=1000, step=None, weights="as released")
    config["target"] = config["target"] or target
    if config["target"] is None:
        raise BadInput(f"{path}: weights do not say what they predict; give --target")
    config["network"] = dict(in_channels=model.in_channels)
    config["class_names"] = class_names("imagenet64") if model.num_classes == 1000 else []
    return model, config


def find_vae(config, device, path=None):
    """The autoencoder (float32) that turns the network's latents into images, None where the network draws images.
    It is the file `path`, by default the one that the training data were encoded with. Raises BadInput.
    """
    if config["network"]["in_channels"] == 3:
        if path:
            raise BadInput(f"--vae {path}: the network draws images, not latents")
        return None
    path = path or config.get("vae_file")
    if not path:
        raise BadInput("the network draws latents: give the autoencoder's weights with --vae FILE")
    vae = load_vae(path)
    vae.sha256 = hash_file(path)
    if config.get("vae") not in (None, vae.sha256):
        say(f"warning: {path} is not the file that the training data were encoded with")
    return vae.to(device)


def find_classifier(path, model):
    """ADM's noisy classifier in the file `path`. Raises BadInput where it is not for this network's images."""
    try:
        classifier = model_unet.classifier_from_adm(read(path)).requires_grad_(False)
    except ValueError as error:
        raise BadInput(f"--classifier {path}: {error}") from None
    if (classifier.img_size, classifier.num_classes) != (model.img_size, model.num_classes):
        raise BadInput(f"--classifier {path}: is for side {classifier.img_size} and {classifier.num_classes} "
                       f"classes, the network for {model.img_size} and {model.num_classes}")
    return classifier


# ------------------------------------------------------------------------------------------------- images

def to_uint8(x):
    """[-1, 1] -> 0 .. 255, rounded and clipped: the one place where images become bytes."""
    return (127.5 * x + 128).clamp(0, 255).floor().to(torch.uint8)


def start(seed, k, labels, model):
    """The label, an int, and the unit normal noise (C,S,S) that image k of a network begins with.

    labels: "random" draws every class with the same probability, "data" with the class's share of the training data
    (model.class_counts). A list of labels is taken in turn, and "balanced" is the list of all classes.
    """
    g = generator("image", seed, k)
    count = max(model.num_classes, 1)
    drawn = int(torch.randint(count, (), generator=g))   # whatever `labels` is, so that the noise is the same
    noise = torch.randn(model.in_channels, model.img_size, model.img_size, generator=g)
    if labels == "random":
        return drawn, noise
    if labels == "data":
        counts = torch.tensor(model.class_counts).double()
        return int(counts.multinomial(1, generator=g)), noise
    if labels == "balanced":
        labels = range(count)
    return labels[k % len(labels)], noise


def draw(model, config, ks, seed=0, labels="balanced", vae=None, dtype="float32", shown=(), **how):
    """The images of numbers ks, uint8 (N,3,S,S). `how` is what `sampler` takes: steps, cfg, solver, ...

    `shown` are some of the sampler's t. With them the result is (N (1 + len(shown)),3,S,S): for each number its
    noise, then its x0 estimates at these t. dtype "bfloat16" runs the network under autocast; TF32 is set by
    `allow_tf32`, not here. Raises NotFinite.
    """
    y, z = zip(*[start(seed, k, labels, model) for k in ks])
    weight = next(model.parameters())
    z = torch.stack(z).to(weight)                                            # its device and dtype
    y = torch.tensor(y, device=weight.device) if model.num_classes else None
    diffusion = Diffusion(config["schedule"], config["T"], config["target"])
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        if shown:
            estimates = dict(trajectory(model, diffusion, z, y, **how))      # t: x0 estimate
            x = torch.stack([z, *[estimates[t] for t in shown]], dim=1).flatten(0, 1)
        else:
            x = sampler(model, diffusion, z, y, **how)
    if vae:
        x = vae.decode_latent(x.float())
    if not x.isfinite().all():
        raise NotFinite(f"images {ks[0]} to {ks[-1]} are not finite")
    return to_uint8(x).cpu()


def batches_of(ks, size):
    """Cut a range or list into parts of `size`; the last may be shorter."""
    return [ks[i:i + size] for i in range(0, len(ks), size)]


def steps_of_strip(diffusion, steps):
    """The t of at most 12 sampling steps, from the first to the last, evenly chosen."""
    ts = sampling_timesteps(diffusion, steps)
    places = torch.linspace(0, len(ts) - 1, min(12, len(ts)))
    say(f"columns: the noise, then the x0 estimates of {len(places)} of {len(ts)} steps")
    return ts[places.long()].tolist()


def save_sheet(path, images, columns, titles=(), side=64):
    """Images uint8 (N,3,S,S) -> one PNG, `columns` to a row. Small images are enlarged to at most `side` pixels.
    titles, if any, stand above the columns. All have as many lines as the first, and letters are a quarter of an
    image high.
    """
    sheet = tile(images.numpy(), columns)
    scale = max(1, side // images.shape[-1])
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)
    width = sheet.width // columns
    if titles:
        lines = len(titles[0].splitlines())
        top = lines * width // 3
        sheet = ImageOps.expand(sheet, (0, top, 0, 0), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((column * width, 0), title, "black", font_size=width // 4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: sheet.save(file, "PNG"))


def grid(model, config, path, n=None, batch_size=64, shown=(), **how):
    """Draw n images (by default 8 rows) into one PNG, with as many columns as there are classes if these are 2 to 16:
    so under "balanced" each column is one class. With `shown` the PNG is a strip: each image (by default 4) has
    a row of its noise and its x0 estimates at these t.
    """
    columns = model.num_classes if 2 <= model.num_classes <= 16 else 8
    n = n or (4 if shown else 8 * columns)
    batches = batches_of(range(n), batch_size)
    images = torch.cat([draw(model, config, ks, shown=shown, **how) for ks in batches])
    if shown:
        titles = ["noise", *[f"t {t}" for t in shown]]
        save_sheet(path, images, len(titles), titles)
    else:
        save_sheet(path, images, min(columns, n))
    return path


def png(folder, k):
    return folder / f"{k:06d}.png"


def save_folder(folder, n, batch_size, images_of):
    """Images 0 .. n-1 as PNG files, each process its share. Files that are there are left alone. images_of(ks)
    draws a batch, uint8 (N,3,S,S).

    A batch with a missing image is drawn again as a whole: in another batch that image could differ by rounding.
    """
    rank, world = env("RANK"), env("WORLD_SIZE", 1)
    batches = batches_of(range(rank, n, world), batch_size)
    todo = [ks for ks in batches if not all(png(folder, k).exists() for k in ks)]
    total = sum(len(ks) for ks in todo)
    done = 0
    since = time.monotonic()
    for ks in todo:
        for k, image in zip(ks, images_of(ks).permute(0, 2, 3, 1).numpy()):
            if not png(folder, k).exists():
                picture = Image.fromarray(image)
                replace(png(folder, k), lambda file: picture.save(file, "PNG", compress_level=1))
        done += len(ks)
        progress("images", done, total, since)


def save_npz(path, folder, n, labels):
    """PNG files 0 .. n-1 -> npz with arr_0 uint8 (n,S,S,3) and arr_1 labels, the form of ADM's files. An array on
    disk is between, so that the images need not fit into memory.
    """
    side = load_image(png(folder, 0)).width
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, side, side, 3))
    for k in range(n):
        images[k] = load_image(png(folder, k))
    replace(path, lambda file: np.savez(file, arr_0=images, arr_1=np.array(labels)))


def claim(folder, protocol):
    """Write protocol.json into a new folder, or check that the one there says the same but for n, the number of
    images. -> the n in protocol.json. Raises BadInput where the folder holds anything else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "protocol.json"
    # The folder is read before the file is looked for, as another process may begin to write in between.
    files = [path for path in folder.iterdir() if path.suffix != ".part"]
    if files and not file.exists():
        raise BadInput(f"--out {folder}: holds files but no protocol.json; choose a new folder")
    if not file.exists():
        write_json(file, protocol)
    before = read_json(file)
    for key, value in protocol.items():
        found = before.get(key)
        if found != value and key != "n":
            raise BadInput(f"--out {folder}: holds samples with {key} {found!r}, not {value!r}")
    return before["n"]


def save_images(out, protocol, batch_size, model, config, how):
    """Draw the images of a protocol into the folder `out`, or by way of a folder into the .npz `out`."""
    n = protocol["n"]
    npz = out.suffix == ".npz"
    folder = out.with_name(out.name + ".parts") if npz else out
    rank = env("RANK")
    if npz and out.exists():
        if rank > 0:                             # a late process finds what rank 0 has just finished
            return
        raise BadInput(f"--out {out}: exists already")
    before = claim(folder, protocol)
    save_folder(folder, n, batch_size, lambda ks: draw(model, config, ks, **how))
    if rank > 0:
        return
    while not all(png(folder, k).exists() for k in range(n)):                # the other processes draw them
        time.sleep(1)
    labels = [start(how["seed"], k, how["labels"], model)[0] for k in range(n)]
    if npz:
        write_json(out.with_suffix(".protocol.json"), protocol)
        save_npz(out, folder, n, labels)
        shutil.rmtree(folder, ignore_errors=True)
    elif n < before:
        say(f"images 0 to {n - 1:,} are there; {folder} is to hold {before:,}, as --count {before} makes it")
    else:                # written last, so that a folder whose growth is stopped still says how many it had
        table = [[png(folder, k).name, labels[k]] for k in range(n)] if model.num_classes else None
        write_json(folder / "dataset.json", dict(labels=table))              # EDM's form, which data.py reads
        write_json(folder / "protocol.json", protocol)


# ------------------------------------------------------------------------------------------- command line

def parse_classes(text, names, count):
    """"3,glass" -> [3, 5]. A part is a class name, one of a name's synonyms (tench of "tench, Tinca tinca"), or
    the number of a class. Where all names are numbers, a number is a name: 1 is the class 01. Raises BadInput.
    """
    if not count:
        raise BadInput(f"--classes {text}: the network was trained without classes")
    numbers = range(count)
    if names and all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
    labels = []
    for part in text.lower().split(","):
        part = part.strip()
        found = [k for k, name in enumerate(names) if part in name.lower().split(", ")]
        if not found and part.isdecimal():
            found = [k for k, number in enumerate(numbers) if number == int(part)]
        if len(found) != 1:
            raise BadInput(f"--classes {part}: fits classes {found}, expected one of {count}, a number or "
                           f"{names[:10]}")
        labels += found
    return labels


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint, run folder, or released weights")
    add("--out", type=Path, help="grid .png (default: samples.png beside --ckpt), .npz, or folder of PNGs")
    add("--strip", action="store_true", help="draw a .png (default: strip.png beside --ckpt) with a row for "
        "each image: the noise, then the x0 estimates of at most 12 steps, the last of which is the image")
    add("--n", "--count", type=at_least(1), help="number of images (default: 8 rows in a grid, 4 in a strip, "
        "else 64); --count under torchrun, whose own parser stumbles over --n")
    add("--cfg", type=between(0, 1000), help="guidance scale, 1 = none (default: the checkpoint's)")
    add("--steps", type=at_least(1, 10_000), help="sampling steps (default: the checkpoint's)")
    add("--solver", choices=SOLVERS, default="heun",
        help="heun evaluates the network 2 STEPS - 1 times, the others STEPS times")
    add("--interval", type=at_least(0), nargs=2, metavar=("LO", "HI"), help="guide only for LO <= t <= HI")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--classes", help="comma-separated class names or numbers, gone through in turn; "
        "a number is a name where all names are numbers")
    either.add_argument("--labels", choices=("random", "balanced", "data"), help="random: drawn for each "
        "image; balanced: k modulo the number of classes; data: drawn as often as the training data have them "
        "(default: balanced in a .png, else random)")
    add("--clip", action="store_true", help="clamp x0 estimates to [-1, 1] at every step; for pixels alone")
    add("--device", choices=("cuda", "cpu", "mps"),
        help="default: cuda where there is one, else cpu; mps is untested")
    add("--dtype", choices=("float32", "tf32", "bfloat16"), help="of the network; tf32 is float32 with shorter "
        "factors in products, which a GPU does faster (default: tf32 on cuda, else float32)")
    add("--seed", type=at_least(0), default=0, help="of labels and noise")
    add("--raw", action="store_true", help="the weights themselves instead of their EMA")
    add("--batch-size", type=at_least(1), default=64, help="images at a time in each process")
    add("--vae", help="autoencoder of a latent model (default: the one its data were encoded with)")
    add("--classifier", help="ADM's noisy classifier, 64x64_classifier.pt: guide by its gradient")
    add("--classifier-scale", type=between(0, 1000), default=1.0, help="factor of that gradient")
    add("--target", choices=TARGETS, help="what released weights predict, where their shapes do not tell")
    args = parser.parse_args()
    if args.ckpt.is_dir():
        args.ckpt = args.ckpt / "ckpt.pt"
    args.out = args.out or args.ckpt.parent / ("strip.png" if args.strip else "samples.png")
    if args.strip and args.out.suffix != ".png":
        raise BadInput(f"--strip: found --out {args.out}, expected a .png")
    if args.out.suffix not in ("", ".png", ".npz") and not args.out.is_dir():
        raise BadInput(f"--out {args.out}: expected a .png grid, an .npz, or a folder for PNGs")
    return args


def settle(args, model, config):
    """Flags and checkpoint -> the keyword arguments of `draw` that are numbers and words. Raises BadInput."""
    cfg = config["cfg"] if args.cfg is None else args.cfg
    interval = args.interval
    if cfg != 1 and not config["guidable"]:
        raise BadInput(f"--cfg {cfg}: {args.ckpt} was trained without classes or label drop, expected 1")
    if interval and cfg == 1 and not args.classifier:
        raise BadInput(f"--interval {interval}: there is no guidance at --cfg 1")
    if interval and not interval[0] <= interval[1] < config["T"]:
        raise BadInput(f"--interval {interval}: expected LO <= HI < {config['T']}")
    if args.clip and model.in_channels != 3:
        raise BadInput("--clip: the network draws latents, expected pixels")
    labels = args.labels or ("balanced" if args.out.suffix == ".png" else "random")
    if args.classes is not None:
        names = config["class_names"]
        labels = parse_classes(args.classes, names, model.num_classes)
        drawn = [names[k] for k in labels] if names else labels
        say(f"classes: {drawn!s:.100}")
    if labels == "data" and not model.class_counts:
        raise BadInput(f"--labels data: {args.ckpt} does not say how often the training data have each class")
    steps = args.steps or config["sample_steps"]
    return dict(steps=steps, cfg=cfg, interval=interval, solver=args.solver, clip=args.clip, seed=args.seed,
                labels=labels, dtype=args.dtype)


def main():
    args = parse()
    rank, _, device = processes(args.device)
    args.dtype = args.dtype or ("tf32" if device.type == "cuda" else "float32")
    model, config = load_checkpoint(args.ckpt, args.raw, args.target)
    how = settle(args, model, config)
    steps = how["steps"]
    diffusion = Diffusion(config["schedule"], config["T"])
    actual, evaluations = steps_run(diffusion, steps, how["solver"])
    say(f"{args.ckpt}: {config['target']} prediction, weights: {config['weights']} @ step {config['step']}; "
        f"{how['solver']} {steps} steps, {actual} run, {evaluations} evaluations an image, cfg {how['cfg']}, "
        f"labels {how['labels']!s:.40}, {args.dtype}")
    if "ema" in config and not args.raw:                                     # released weights do not say theirs
        untrained = config["ema"] ** config["step"]
        if untrained > 0.01:
            say(f"warning: {untrained:.0%} of the EMA are the weights before training; --raw of a checkpoint is "
                "without it")
    if actual < steps:
        say(f"warning: {steps} steps asked for, {actual} run: "
            "noise levels that round to the same timestep are taken once")
    protocol = dict(how, steps_run=actual, evaluations=evaluations, step=config["step"],
                    weights=config["weights"], target=config["target"], dataset=config["dataset"],
                    n=args.n or 64, vae=None, classifier=None, classifier_scale=args.classifier_scale)

    allow_tf32(args.dtype == "tf32")
    model = to_device(model, device)
    vae = find_vae(config, device, args.vae)
    if vae:
        how["vae"] = vae
        protocol["vae"] = vae.sha256
    if args.classifier:
        how["classifier"] = to_device(find_classifier(args.classifier, model), device)
        how["classifier_scale"] = args.classifier_scale
        protocol["classifier"] = hash_file(args.classifier)
    if args.strip:
        how["shown"] = steps_of_strip(diffusion, steps)
    if args.out.suffix != ".png":
        protocol["checkpoint"] = hash_file(args.ckpt)
        save_images(args.out, protocol, args.batch_size, model, config, how)
    elif rank == 0:
        grid(model, config, args.out, args.n, args.batch_size, **how)
    say(args.out.resolve())


if __name__ == "__main__":
    run(main)
