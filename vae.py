"""The Stable Diffusion autoencoder (KL-f8, 83,653,863 parameters): images <-> latents of 1/8 the side.

    python vae.py --src imagenet/train --vae vae.safetensors --out data/imagenet256   # restartable
    torchrun --nproc-per-node 8 vae.py --src ... --vae ... --out ...                  # the same bytes, sooner

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022. Section 4.1 of the
Min-SNR paper calls it VQ-VAE; it is the KL autoencoder. The parameters have the names of CompVis, the authors'
code. The published weights want GroupNorm of 32 groups and eps 1e-6, downsamplers that pad on the right and at
the bottom only, and attention of one head in the middle.

The network needs PyTorch alone: what reads files imports the project's other files where it needs them.
"""
import contextlib
import os
import re
import threading

import torch
from torch import nn
from torch.nn import functional as F

SCALE = 0.18215      # the authors' factor, which gives latents about unit variance; defined here alone


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(channels, out, stride=1, padding=1):
    return nn.Conv2d(channels, out, 3, stride, padding)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice; then the input is added. Where the width changes, the input first passes a
    1 x 1 convolution.
    """

    def __init__(self, channels, out):
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = conv3(channels, out)
        self.norm2 = norm(out)
        self.conv2 = conv3(out, out)
        self.nin_shortcut = nn.Identity()
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x):                                                    # (B,C,H,W) -> (B,out,H,W)
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.nin_shortcut(x))


class Attention(nn.Module):
    """Self-attention of one head among the pixels, and the input added."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):                                                    # (B,C,H,W)
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))     # (B,1,HW,C)
        h = F.scaled_dot_product_attention(q, k, v)
        h = h[:, 0].mT.unflatten(2, x.shape[2:])                             # (B,C,H,W)
        return self.proj_out(h).add_(x)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = conv3(channels, channels, stride=2, padding=0)

    def forward(self, x):                                                    # (B,C,H,W) -> (B,C,H/2,W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x):                                                    # (B,C,H,W) -> (B,C,2H,2W)
        return self.conv(F.interpolate(x, scale_factor=2))


def chain(*blocks, **modules):
    """Modules that run in the order given: blocks, which are named 0, 1, ..., then those of other names.

    Chains within chains give the parameters CompVis's names, such as decoder.up.3.block.0.conv1.weight.
    """
    chained = nn.Sequential(*blocks)
    for name, module in modules.items():
        chained.add_module(name, module)
    return chained


def level(channels, out, blocks, **resize):
    """The blocks of one resolution, then the named layer that leads to the next."""
    others = (ResBlock(out, out) for _ in range(blocks - 1))
    return chain(block=chain(ResBlock(channels, out), *others), **resize)


def middle(channels):
    """The blocks of the lowest resolution."""
    return chain(block_1=ResBlock(channels, channels), attn_1=Attention(channels),
                 block_2=ResBlock(channels, channels))


class VAE(nn.Module):
    """Images (B,3,H,W) in [-1,1] <-> latents (B,4,H/8,W/8). Raises ValueError unless 8 divides H and W.

    Diffusion works on latents scaled by SCALE, which encode_latent returns and decode_latent takes; those of
    moments and decode are unscaled. Training does not call encode_latent: `python vae.py` stores mean and
    standard deviation once, and `Images.batch` draws from them. A large batch passes the network a few images
    at a time, which bounds the memory.
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
            norm_out=norm(512),
            silu=nn.SiLU(inplace=True),
            conv_out=conv3(512, 8))
        up = {"3": level(512, 512, 3, upsample=Upsample(512)),               # numbered as in down: 0 runs last
              "2": level(512, 512, 3, upsample=Upsample(512)),
              "1": level(512, 256, 3, upsample=Upsample(256)),
              "0": level(256, 128, 3)}
        self.decoder = chain(
            conv_in=conv3(4, 512),
            mid=middle(512),
            up=chain(**up),
            norm_out=norm(128),
            silu=nn.SiLU(inplace=True),
            conv_out=conv3(128, 3))
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)      # faster

    @torch.no_grad()
    def in_parts(self, first, second, x, pixels):
        """second(first(x)), a few images at a time. `pixels` is the number of pixels of one image, also where x is
        latents.
        """
        at_once = 2 ** 20 if x.is_cuda else 2 ** 17                          # 16 or 2 images of 256 x 256
        x = x.contiguous(memory_format=torch.channels_last)
        parts = x.split(max(1, at_once // pixels))
        return torch.cat([second(first(part)) for part in parts]).contiguous()

    def moments(self, x):
        """x (B,3,H,W) in [-1,1] -> mean and log variance of its latents, (B,8,H/8,W/8), unscaled."""
        height, width = x.shape[2:]
        if height % 8 or width % 8:
            raise ValueError(f"x: found {height} x {width} pixels, expected multiples of 8")
        return self.in_parts(self.encoder, self.quant_conv, x, height * width)

    def decode(self, z):
        """z (B,4,h,w), unscaled -> images (B,3,8h,8w), about [-1,1] and not clipped."""
        return self.in_parts(self.post_quant_conv, self.decoder, z, 64 * z.shape[2] * z.shape[3])

    def encode_latent(self, x, noise):
        """x (B,3,H,W) in [-1,1], unit normal noise (B,4,H/8,W/8) -> z = (mean + std noise) SCALE."""
        mean, std = mean_std(self.moments(x))
        assert noise.shape == mean.shape, noise.shape
        return (mean + std * noise) * SCALE

    def decode_latent(self, z):
        """z (B,4,h,w) as encode_latent makes it -> images (B,3,8h,8w), about [-1,1] and not clipped."""
        return self.decode(z / SCALE)


def mean_std(moments):
    """Mean and log variance (B,8,h,w) -> mean and std, each (B,4,h,w), unscaled; clipped as in CompVis."""
    mean, logvar = moments.chunk(2, 1)
    return mean, (logvar.clamp(-30, 20) / 2).exp()


# ------------------------------------------------------------------------------------------------ the weights

DIFFUSERS = {  # a word of CompVis's names: what the package diffusers has in its place
    "down": "down_blocks", "up": "up_blocks", "mid": "mid_block", "block": "resnets", "block_1": "resnets.0",
    "block_2": "resnets.1", "attn_1": "attentions.0", "norm": "group_norm", "nin_shortcut": "conv_shortcut",
    "downsample": "downsamplers.0", "upsample": "upsamplers.0", "norm_out": "conv_norm_out",
    "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}   # diffusers' words in published files
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def diffusers_name(name, words):
    """CompVis's name of a tensor -> diffusers', which numbers the levels of the decoder from the smallest."""
    name = re.sub(r"\bup\.(\d)", lambda match: f"up.{3 - int(match[1])}", name)
    return ".".join(words.get(word, word) for word in name.split("."))


def load_vae(path_or_state_dict):
    """A published autoencoder or a whole Stable Diffusion checkpoint -> VAE, every name and shape checked.

    Names are CompVis's or diffusers', old or new. They may lie in a `state_dict`, begin with
    `first_stage_model.`, and the attention's weights may be matrices. What is no part of the autoencoder is
    dropped, such as `loss.*`, `model_ema.*` and the rest of a whole checkpoint. Raises BadInput, a ValueError.
    """
    from files import BadInput, read
    state, where = path_or_state_dict, "state dict"
    if not isinstance(state, dict):
        where = state
        state = read(where)
    with torch.device("meta"):                                               # draws no weights
        model = VAE()
    model = model.to_empty(device="cpu")
    ours = {}                                                                # diffusers' name: our name
    for words in (DIFFUSERS, DIFFUSERS | OLD):
        ours |= {diffusers_name(name, words): name for name in model.state_dict()}
    found = {}
    for name, value in state.get("state_dict", state).items():
        name = name.removeprefix("first_stage_model.")
        if name.startswith(PARTS):
            if value.dim() == 2:                                             # a matrix is a 1 x 1 convolution
                value = value[..., None, None]
            found[ours.get(name, name)] = value
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise BadInput(f"{where}: not Stable Diffusion's autoencoder: {lines[:300]}") from None
    return model


# ---------------------------------------------------------------------------- command line: images -> latents

def make_encode(vae, device, dtype):
    """-> encode(images uint8 (n,3,S,S)): mean and std of their latents, float16 (n,8,S/8,S/8), unscaled.

    The autoencoder's weights are on this device and of this dtype, float32 or bfloat16. Several threads may
    call encode. A GPU then takes one call after the other, which bounds its memory. On a CPU the calls run
    side by side, each on one core, because a convolution rounds differently on another number of cores.
    """
    turn = threading.Lock() if device.type == "cuda" else contextlib.nullcontext()

    def encode(images):
        torch.set_num_threads(1)                                             # in this thread and later ones
        x = torch.from_numpy(images).float().div_(127.5).sub_(1)
        with turn:
            moments = vae.moments(x.to(device, dtype)).float()
        return torch.cat(mean_std(moments), 1).half().cpu().numpy()
    return encode


def main():
    from data import IMAGENETS, pack, pack_flags
    from files import BadInput, Parser, at_least, hash_file, processes
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--src", required=True, help="folder or .zip of images; its dataset.json or sub-folders give the classes")
    add("--vae", required=True, help="the autoencoder's weights (.ckpt .pt .bin .safetensors)")
    add("--out", required=True, help="packed folder to write: data/imagenet256, or data/NAME for your images")
    add("--size", type=at_least(8, 4096), default=256, help="side of the cropped images, a multiple of 8")
    pack_flags(add)
    add("--dataset", choices=IMAGENETS, help="read --src as ImageNet (default: if --out ends in that)")
    args = parser.parse_args()
    if args.size % 8:
        raise BadInput(f"--size: found {args.size}, expected a multiple of 8")
    rank, world, device = processes()
    dtype, vae = torch.float32, load_vae(args.vae)
    if device.type == "cuda":
        dtype = torch.bfloat16
        torch._dynamo.config.suppress_errors = True                          # without a compiler it runs as it is
        vae.encoder.compile()
    encode = make_encode(vae.to(device, dtype), device, dtype)
    pack(args.src, args.size, args.out, args.split, args.dataset, encode, rank, world,
         labelled=args.classes is None, skip_broken=args.skip_broken,
         vae=hash_file(args.vae), vae_file=os.path.abspath(args.vae), scale=SCALE,
         dtype=str(dtype).removeprefix("torch."), content="posterior mean, std of images in [-1, 1], unscaled")


if __name__ == "__main__":
    from files import run
    run(main)
