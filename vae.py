"""The Stable Diffusion autoencoder (KL-f8, 83,653,863 parameters): images <-> latents of 1/8 the side.

    python vae.py --src imagenet/train --vae vae.safetensors --out data/imagenet256   # restartable
    torchrun --nproc-per-node 8 vae.py --src ... --vae ... --out ...                  # the same bytes, sooner

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022. Parameter names are
CompVis's. Facts that the published weights depend on: GroupNorm has 32 groups and eps 1e-6, the downsamplers
pad on the right and at the bottom only, the attention in the middle has one head.
"""
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

SCALE = 0.18215      # 1 / std of the latents that the authors trained on first; nowhere else in the project


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(channels, out, stride=1, padding=1):
    return nn.Conv2d(channels, out, 3, stride, padding)


class ResBlock(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), conv3(channels, out)
        self.norm2, self.conv2 = norm(out), conv3(out, out)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):                                                    # (B,C,H,W) -> (B,out,H,W)
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.nin_shortcut(x))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):                                                    # (B,C,H,W)
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))   # (B,1,HW,C), one head
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])   # (B,C,H,W)
        return self.proj_out(h).add_(x)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = conv3(channels, channels, stride=2, padding=0)

    def forward(self, x):                                                    # (B,C,H,W) -> (B,C,H/2,W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest x 2, then conv 3 x 3: together a transposed 4 x 4 of stride 2, at 4/9 of the products."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x):                                                    # (B,C,H,W) -> (B,C,2H,2W)
        sums = F.avg_pool2d(F.pad(self.conv.weight, (1, 1, 1, 1)), 2, 1, divisor_override=1)
        weight = sums.flip(2, 3).transpose(0, 1)                         # (in,out,4,4)
        return F.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)


def chain(*blocks, **modules):
    """Modules that run in the order given; blocks are named 0, 1, ... Nested, they spell CompVis's names."""
    chained = nn.Sequential(*blocks)
    for name, module in modules.items():
        chained.add_module(name, module)
    return chained


def level(channels, out, blocks, **resize):
    widths = [channels, *[out] * blocks]
    return chain(block=chain(*map(ResBlock, widths, widths[1:])), **resize)


def middle(channels):
    return chain(block_1=ResBlock(channels, channels), attn_1=Attention(channels),
                 block_2=ResBlock(channels, channels))


class VAE(nn.Module):
    """Images (B,3,H,W) in [-1,1] <-> latents (B,4,H/8,W/8); H and W multiples of 8, else ValueError.

    moments and decode are unscaled; encode_latent and decode_latent, which diffusion works with, own SCALE.
    A large batch passes the network in parts, which bounds the memory; each image's result is its own.
    """

    def __init__(self):
        super().__init__()
        self.encoder = chain(
            conv_in=conv3(3, 128),
            down=chain(level(128, 128, 2, downsample=Downsample(128)),
                       level(128, 256, 2, downsample=Downsample(256)),
                       level(256, 512, 2, downsample=Downsample(512)),
                       level(512, 512, 2)),
            mid=middle(512),
            norm_out=norm(512), silu=nn.SiLU(inplace=True), conv_out=conv3(512, 8))
        self.decoder = chain(
            conv_in=conv3(4, 512),
            mid=middle(512),
            up=chain(**{"3": level(512, 512, 3, upsample=Upsample(512)),     # counted as in down
                        "2": level(512, 512, 3, upsample=Upsample(512)),
                        "1": level(512, 256, 3, upsample=Upsample(256)),
                        "0": level(256, 128, 3)}),
            norm_out=norm(128), silu=nn.SiLU(inplace=True), conv_out=conv3(128, 3))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)      # faster

    @torch.no_grad()
    def run(self, first, then, x, pixels):
        images = max(1, 2 ** (20 if x.is_cuda else 17) // max(1, pixels))    # at 256 x 256: 16 or 2 at a time
        parts = x.contiguous(memory_format=torch.channels_last).split(images)
        return torch.cat([then(first(part)) for part in parts]).contiguous()

    def moments(self, x):
        """x (B,3,H,W) in [-1,1] -> (B,8,H/8,W/8): mean and logvar of the latent, unscaled."""
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"x: found {tuple(x.shape)}, expected (B,3,H,W) with H and W multiples of 8")
        return self.run(self.encoder, self.quant_conv, x, x.shape[2] * x.shape[3])

    def decode(self, z):
        """z (B,4,h,w), unscaled -> images (B,3,8h,8w), about [-1,1] and not clipped."""
        if z.dim() != 4 or z.shape[1] != 4:
            raise ValueError(f"z: found {tuple(z.shape)}, expected (B,4,h,w)")
        return self.run(self.post_quant_conv, self.decoder, z, 64 * z.shape[2] * z.shape[3])

    def encode_latent(self, x, noise):
        """x (B,3,H,W) in [-1,1], unit normal noise (B,4,H/8,W/8) -> (mean + std noise) SCALE."""
        mean, std = mean_std(self.moments(x))
        if noise.shape != mean.shape:
            raise ValueError(f"noise: found {tuple(noise.shape)}, expected {tuple(mean.shape)}")
        return (mean + std * noise) * SCALE

    def decode_latent(self, z):
        return self.decode(z / SCALE)


def mean_std(moments):
    """(B,8,h,w) mean and logvar -> mean and std, each (B,4,h,w), unscaled; logvar clipped as in CompVis."""
    mean, logvar = moments.chunk(2, 1)
    return mean, (logvar.clamp(-30, 20) / 2).exp()


# ------------------------------------------------------------------------------------------- the weights

FILES = {  # SHA-256: repository of stabilityai on huggingface.co, container
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": "sd-vae-ft-mse-original .ckpt",
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": "sd-vae-ft-mse-original .safetensors",
    "1b4889b6b1d4ce7ae320a02dedaeff1780ad77d415ea0d744b476155c6377ddc": "sd-vae-ft-mse .bin",
    "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815": "sd-vae-ft-mse .safetensors",
}

DIFFUSERS = {  # word of a CompVis name: diffusers' words
    "down": "down_blocks", "up": "up_blocks", "mid": "mid_block", "block": "resnets", "block_1": "resnets.0",
    "block_2": "resnets.1", "attn_1": "attentions.0", "norm": "group_norm", "nin_shortcut": "conv_shortcut",
    "downsample": "downsamplers.0", "upsample": "upsamplers.0", "norm_out": "conv_norm_out",
    "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}   # in the published files


def diffusers_name(name, old=False):
    """CompVis's name of a tensor -> diffusers', where up_blocks.0 is the smallest resolution."""
    name = re.sub(r"\bup\.(\d)", lambda match: f"up.{3 - int(match[1])}", name)
    words = {**DIFFUSERS, **OLD} if old else DIFFUSERS
    return ".".join(words.get(word, word) for word in name.split("."))


def load_vae(path_or_state_dict):
    """A published autoencoder or a whole Stable Diffusion checkpoint -> VAE, every name and shape checked.

    Names are CompVis's or diffusers' in either spelling, in a `state_dict` or not, after `first_stage_model.`
    or not; `loss.*` and `model_ema.*` are dropped, and attention weights may lack their trailing dimensions.
    Raises ValueError of one line.
    """
    where, state = "state dict", path_or_state_dict
    if not isinstance(state, dict):
        from files import read
        where, state = state, read(state)
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    prefix = "first_stage_model." if any(str(name).startswith("first_stage_model.") for name in state) else ""
    state = {str(name)[len(prefix):]: value for name, value in state.items() if str(name).startswith(prefix)}
    state = {name: value for name, value in state.items() if not name.startswith(("loss.", "model_ema."))}
    with torch.device("meta"):                                       # shapes alone, until all are right
        model = VAE()
    own = model.state_dict()
    spellings = [{name: name for name in own}] + [{diffusers_name(name, old): name for name in own}
                                                  for old in (False, True)]
    names = max(spellings, key=lambda names: len(names.keys() & state.keys()))
    missing, foreign = ([name for name in a if name not in b] for a, b in ((names, state), (state, names)))
    if missing or foreign:
        raise ValueError(f"{where}: found {len(state)} tensors, expected the {len(own)} of Stable "
                         f"Diffusion's autoencoder; missing {missing[:2] or 'none'}, "
                         f"unexpected {foreign[:2] or 'none'}")
    for name, ours in names.items():
        value, shape = state[name], tuple(own[ours].shape)
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else (type(value).__name__,)
        ones = (1,) * (len(shape) - len(found)) if ".attn_1." in ours else ()
        if found + ones != shape:
            raise ValueError(f"{where}: {name}: found shape {found}, expected {shape}")
    model = model.to_empty(device="cpu")
    model.load_state_dict({ours: state[name].reshape(own[ours].shape) for name, ours in names.items()})
    return model


# --------------------------------------------------------------------------- command line: images -> latents

def main():
    from data import CHUNK, begin, crop_chunk, finish, in_workers, plan
    from files import BadInput, Parser, hash_file, progress
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--src", required=True, help="folder or .zip of images; its sub-folders are the classes")
    add("--vae", required=True, help="the autoencoder's weights (.ckpt .pt .bin .safetensors)")
    add("--dataset", choices=("imagenet64", "imagenet128", "imagenet256"),
        help="read --src as ImageNet (default: if that is the last part of --out)")
    add("--out", required=True, help="packed folder to write, such as data/imagenet256")
    add("--size", type=int, default=256, help="side of the cropped images, a multiple of 8 (default: 256)")
    add("--mirror", action="store_true", help="every image twice, as it is and mirrored")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 (autocast) on a GPU")
    add("--split", default="train", help="recorded in meta.json")
    add("--classes", type=int, help="refuse a source with another number of class folders")
    add("--workers", type=int, help="processes that decode and crop (default: one a core)")
    args = parser.parse_args()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    share = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = share if args.workers is None else args.workers
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.backends.cudnn.allow_tf32 = False                                  # float32 means float32
    if args.size < 8 or args.size % 8 or workers < 1:
        raise BadInput(f"--size {args.size}, --workers {workers}: expected a multiple of 8 and at least 1")

    try:
        vae = load_vae(args.vae).to(device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    digest = hash_file(args.vae)
    known = dict(sha256=digest, name=FILES.get(digest))
    out = Path(args.out)
    kind = args.split, args.classes, args.dataset
    paths, labels, meta = plan(args.src, out, args.size, *kind, repeat=1 + args.mirror, mirror=args.mirror,
                               vae=known, vae_file=os.path.abspath(args.vae), scale=SCALE,
                               content="posterior mean, std of images in [-1, 1], unscaled", dtype=dtype)
    if rank == 0:
        names = meta["classes"] or ["no classes"]
        print(f"{args.src}: {len(paths) // (1 + args.mirror):,} images, {len(meta['classes']):,} classes, "
              f"{names[0]!r} .. {names[-1]!r}; {known['name'] or 'unknown autoencoder'}, {dtype}", flush=True)
    if (out / "meta.json").exists():
        return print(f"{out}: already packed, {len(paths):,} latents") if rank == 0 else None

    # chunk i holds the same images whoever encodes it: the bytes depend on neither processes nor restarts
    if world > 1:
        dist.init_process_group("gloo")                                  # for the two barriers alone
    shape = (8, args.size // 8, args.size // 8)
    for turn in (0, 1):                                                  # rank 0 makes the files for all
        if (rank > 0) == turn:
            rows, done = begin(out, "latents", shape, "float16", meta)
        if world > 1:
            dist.barrier()
    todo = [i for i in range(rank, len(done), world) if not done[i]]
    since, start = time.monotonic(), int(done.sum()) * CHUNK
    jobs = [(paths[i * CHUNK:(i + 1) * CHUNK], args.size, meta["dataset"], args.mirror) for i in todo]

    def encode(images):                                                  # uint8 (n,3,S,S) -> (n,8,S/8,S/8)
        x = torch.from_numpy(images).to(device).float().div_(127.5).sub_(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return torch.cat(mean_std(vae.moments(x).float()), 1).half().cpu()

    # on a CPU every image has one thread: a convolution rounds differently on another number of them
    pool = ThreadPoolExecutor(share if device.type == "cpu" else 1, None, torch.set_num_threads, (1,))
    for images, i in zip(in_workers(crop_chunk, jobs, workers), todo):
        parts = np.split(images, len(images)) if device.type == "cpu" else [images]
        if not (out / "done.npy").exists():
            raise BadInput(f"--out {out}: was removed")
        rows[i * CHUNK:(i + 1) * CHUNK] = torch.cat(list(pool.map(encode, parts))).numpy()
        rows.flush()
        done[i] = 1
        if rank == 0:
            progress("encoded", min(int(done.sum()) * CHUNK, len(paths)), len(paths), since, start)
    if world > 1:
        dist.barrier()
        time.sleep(0.2)                                                  # see the end of train.py
        dist.destroy_process_group()
    if rank == 0:
        finish(out, labels, meta)


if __name__ == "__main__":
    from files import run
    run(main)
