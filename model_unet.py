"""The paper's UNets in one file: ADM's, on pixels and latents, LDM's, and ADM's noisy classifier.

Dhariwal & Nichol 2021 (guided-diffusion) and Rombach et al. 2022 (latent-diffusion). Facts that their weights
depend on: the time embedding is cosines, then sines; every GroupNorm has 32 groups, eps 1e-5 (1e-6 in the
spatial transformer); rows of qkv are ordered head, then q k v, then channel (in the classifier's head q k v,
then head). The last layer of res-blocks, attention blocks and the UNet starts at zero. Parameter names are
theirs, so `input_blocks.N` is block N of the encoder and its first layer is `input_blocks.N.0`.
"""
import math
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def row(side, channels, channel_mult, res_blocks, attention_resolutions=(32, 16, 8), **more):
    return dict(side=side, channels=channels, channel_mult=channel_mult, res_blocks=res_blocks,
                attention_resolutions=attention_resolutions, **more)


ADM = {  # ADM's widths per level, as multiples of `channels`, by the side of the images
    64:  (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
PLAIN = dict(resblock_updown=False)                      # one convolution halves or doubles the side
LDM = dict(context_dim=512, scale_shift=False, **PLAIN)  # the class is a token for cross-attention
SIZES = {  # side, width, its multiple per level, res-blocks per level, sides with attention
    "unet-tiny":   row(16,  32,  (1, 2, 2),    1, (8,),    heads=2),           # ours, for the CPU
    "unet-cifar":  row(32,  128, (1, 2, 2, 2), 3, (16, 8), heads=4, **PLAIN),  # curriculum paper
    "unet-celeba": row(64,  128, (1, 2, 2, 2), 3,          head_channels=64),  # table 3; inferred
    "unet-adm":    row(64,  192, ADM[64],      3,          head_channels=64),  # appendix C
    "unet-adm128": row(128, 256, ADM[128],     2,          heads=4),           # curriculum paper
    "unet-b":      row(32,  192, (1, 2, 2, 2), 3, (16, 8), heads=4),           # tables 1-2; inferred
    "unet-ldm":    row(32,  256, (1, 2, 4),    2,          heads=1, **LDM),    # table 5, as LDM-8
}


# ------------------------------------------------------------------------------------------- layers

def conv(width_in, width):
    return nn.Conv2d(width_in, width, 3, padding=1)


def after_norm(width, *layers):
    """These layers behind a group norm and SiLU."""
    return nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), *layers)


def named(**layers):
    """nn.Sequential of layers with the names that they have in the public files."""
    return nn.Sequential(OrderedDict(layers))


def zero(layer):
    """The layer, its weight and bias set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def attend(q, k, v):
    """Every query looks at all keys, head by head: (B,N,h,d), (B,M,h,d), (B,M,h,d) -> (B,N,h*d)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)        # each (B,h,N|M,d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ResBlock(nn.Module):
    """x + conv(conv(x)). In between, the time embedding is added, or scales and shifts the second norm.
    resample, where given, halves or doubles the side on both branches before the first convolution.
    """

    def __init__(self, width_in, width, emb_dim, scale_shift, resample=None):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = after_norm(width_in, conv(width_in, width))
        emb_width = 2 * width if scale_shift else width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, emb_width))
        dropout = nn.Identity()                                              # it has a place in the names
        self.out_layers = after_norm(width, dropout, zero(conv(width, width)))
        self.skip_connection = nn.Identity()
        if width != width_in:
            self.skip_connection = nn.Conv2d(width_in, width, 1)

    def forward(self, x, emb):                                               # (B,C,H,W), (B,E)
        norm1, silu, conv1 = self.in_layers
        norm2, *_, conv2 = self.out_layers
        h = conv1(self.resample(silu(norm1(x))))                             # (B,C',H',W')
        emb = self.emb_layers(emb)[:, :, None, None]                         # (B,C' or 2C',1,1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        else:
            h = norm2(h + emb)
        return self.skip_connection(self.resample(x)) + conv2(silu(h))


class Pointwise(nn.Conv1d):
    """A convolution of width 1 by name and shape, applied to tokens (B,N,C) as the linear layer it is."""

    def __init__(self, dim, dim_out):
        super().__init__(dim, dim_out, 1)

    def forward(self, x):
        return F.linear(x, self.weight[:, :, 0], self.bias)


class Attention(nn.Module):
    """ADM: every pixel attends to every pixel."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, dim)
        self.qkv = Pointwise(dim, 3 * dim)
        self.proj_out = zero(Pointwise(dim, dim))

    def forward(self, x):                                                    # (B,C,H,W)
        tokens = self.norm(x).flatten(2).transpose(1, 2)                     # (B,N,C)
        qkv = self.qkv(tokens).unflatten(2, (self.heads, 3, -1))             # (B,N,h,3,d)
        h = self.proj_out(attend(*qkv.unbind(3)))                            # (B,N,C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class AttentionPool(nn.Module):
    """The classifier's head: the mean of all pixels is one more token, and its attention gives the logits."""

    def __init__(self, side, dim, heads, num_classes):
        super().__init__()
        self.heads = heads
        positions = torch.randn(dim, 1 + side ** 2) / dim ** 0.5
        self.positional_embedding = nn.Parameter(positions)
        self.qkv_proj = Pointwise(dim, 3 * dim)
        self.c_proj = Pointwise(dim, num_classes)

    def forward(self, x):                                                    # (B,C,H,W)
        x = x.flatten(2)                                                     # (B,C,N)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2)                   # (B,C,1+N)
        x = x + self.positional_embedding
        qkv = self.qkv_proj(x.transpose(1, 2))                               # (B,1+N,3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)            # each (B,1+N,h,d)
        return self.c_proj(attend(q[:, :1], k, v))[:, 0]                     # (B,classes)


class CrossAttention(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context):                                           # (B,N,C), (B,M,D)
        qkv = self.to_q(x), self.to_k(context), self.to_v(context)
        qkv = [z.unflatten(2, (self.heads, -1)) for z in qkv]                # each (B,N|M,h,d)
        return self.to_out(attend(*qkv))


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        proj = named(proj=nn.Linear(dim, 8 * dim))
        out = nn.Linear(4 * dim, dim)
        self.ff = named(net=nn.Sequential(proj, nn.Identity(), out))         # feed-forward with GEGLU

    def forward(self, x, context):                                           # (B,N,C), (B,M,D)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)   # one token: softmax is 1, to_q and to_k get no gradient
        proj, _, out = self.ff.net
        h, gate = proj(self.norm3(x)).chunk(2, dim=-1)                       # each (B,N,4C)
        return x + out(h * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """LDM, in place of Attention: self-attention, cross-attention to the class token, feed-forward."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, heads)])
        self.proj_out = zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x, context):                                           # (B,C,H,W), (B,M,D)
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)            # (B,N,C)
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])                      # (B,C,H,W)
        return x + self.proj_out(h)


class Stage(nn.Sequential):
    """Layers between two skips; each gets what it conditions on."""

    def forward(self, x, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


# ----------------------------------------------------------------------------------------- networks

class UNet(nn.Module):
    """model(x (B,C,H,W), t (B,) long, y (B,) long or None) -> (B,C,H,W); fresh, it returns zeros.

    attention_resolutions are the sides of feature maps that attend where the input has this `side`, which is
    img_size unless given; at another img_size the same levels attend. H and W may be any multiples of
    2^(levels - 1). heads is the number of heads, or head_channels their width. num_classes = 0 is
    unconditional; otherwise the null label of guidance is num_classes, and y = None means the null label.
    With context_dim, LDM's spatial transformers stand in place of the attention blocks, and the class
    embedding is their one context token instead of being added to the time embedding.
    grad_ckpt = True keeps only the inputs of the blocks for the backward pass and computes the rest again:
    less memory, the same gradients. Raises ValueError for an img_size or heads that do not divide.
    """
    grad_ckpt = False

    def __init__(self, img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                 num_classes=0, heads=4, head_channels=None, scale_shift=True, resblock_updown=True,
                 context_dim=None, side=None):
        super().__init__()
        self.img_size = img_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.channels = channels
        self.res_blocks = res_blocks
        self.heads = heads
        self.head_channels = head_channels
        self.resblock_updown = resblock_updown
        self.context_dim = context_dim
        self.widths = [round(channels * mult) for mult in channel_mult]
        levels = range(len(self.widths))
        self.factor = 2 ** levels[-1]                                        # image side / smallest side
        if img_size % self.factor:
            raise ValueError(f"img_size: found {img_size}, expected a multiple of {self.factor}")
        side = side or img_size
        self.attends = [side >> level in attention_resolutions for level in levels]
        emb_dim = 4 * channels
        self.res = partial(ResBlock, emb_dim=emb_dim, scale_shift=scale_shift)
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.build_encoder()
        self.build_output()

    def attention(self, width):
        if width % (self.head_channels or self.heads):
            raise ValueError(f"{width} channels: found {self.heads} heads or {self.head_channels} channels a "
                             f"head, which do not divide them")
        heads = width // self.head_channels if self.head_channels else self.heads
        if self.context_dim:
            return SpatialTransformer(width, self.context_dim, heads)
        return Attention(width, heads)

    def stage(self, width_in, level):
        width = self.widths[level]
        attention = [self.attention(width)] if self.attends[level] else []
        return Stage(self.res(width_in, width), *attention)

    def down(self, width):
        if self.resblock_updown:
            return self.res(width, width, resample=nn.AvgPool2d(2))
        return named(op=nn.Conv2d(width, width, 3, stride=2, padding=1))

    def up(self, width):
        if self.resblock_updown:
            return self.res(width, width, resample=nn.Upsample(scale_factor=2))
        return named(nearest=nn.Upsample(scale_factor=2), conv=conv(width, width))

    def build_encoder(self):
        below = self.widths[0]                                               # width of the stage before
        self.input_blocks = nn.ModuleList([Stage(conv(self.in_channels, below))])
        for level, width in enumerate(self.widths):
            if level:
                self.input_blocks.append(Stage(self.down(below)))
            for _ in range(self.res_blocks):
                self.input_blocks.append(self.stage(below, level))
                below = width
        self.middle_block = Stage(
            self.res(width, width), self.attention(width), self.res(width, width))

    def build_output(self):
        """The class table, the decoder and the last layer."""
        if self.num_classes:                                                 # last row: the null label
            dim = self.context_dim or 4 * self.channels
            self.label_emb = nn.Embedding(self.num_classes + 1, dim)
        self.output_blocks = nn.ModuleList()
        below = self.widths[-1]
        for level, width in reversed(list(enumerate(self.widths))):
            larger = self.widths[max(level - 1, 0)]                          # of the first skip of this side
            for skip in [width] * self.res_blocks + [larger]:
                self.output_blocks.append(self.stage(below + skip, level))
                below = width
            if level:
                self.output_blocks[-1].append(self.up(width))
        self.out = after_norm(width, zero(conv(width, self.in_channels)))

    @property
    def blocks(self):
        """The stages in the order in which they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def embed(self, t, dtype):
        """Cosines and sines of t through two layers: (B,) -> (B,4*channels)."""
        i = torch.arange(self.channels // 2, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10_000) * i / len(i))
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)               # (B,channels)
        return self.time_embed(waves.to(dtype))

    def run(self, stage, *inputs):
        if self.grad_ckpt:
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)

    def forward(self, x, t, y=None):
        emb = self.embed(t, x.dtype)                                         # (B,E)
        label = emb.new_zeros(len(x), self.context_dim or 1)                 # without classes
        if self.num_classes:
            y = torch.full_like(t, self.num_classes) if y is None else y
            label = self.label_emb(y)                                        # (B,D) or (B,E)
        if self.context_dim:
            context = label[:, None]                                         # (B,1,D)
        else:
            context = None
            emb = emb + label
        skips = []
        for stage in self.input_blocks:                                      # encoder: ever smaller, wider,
            x = self.run(stage, x, emb, context)
            skips.append(x)                                                  # and every output is kept
        x = self.run(self.middle_block, x, emb, context)
        for stage in self.output_blocks:                                     # decoder: the way back,
            x = torch.cat([x, skips.pop()], dim=1)                           # beside the latest output kept
            x = self.run(stage, x, emb, context)
        return self.out(x)                                                   # (B,C,H,W)


class Classifier(UNet):
    """ADM's noisy classifier: model(x (B,C,S,S), t (B,) long) -> (B,num_classes) logits of p(y | x_t).

    The encoder of a UNet, then an attention pool, which has positions for S = img_size alone. The arguments
    are the UNet's; ADM's classifiers have head_channels=64.
    """

    def build_output(self):
        width = self.widths[-1]
        heads = self.middle_block[1].heads
        side = self.img_size // self.factor
        self.out = after_norm(width, AttentionPool(side, width, heads, self.num_classes))
        self.output_blocks = []

    def forward(self, x, t):
        emb = self.embed(t, x.dtype)
        for stage in self.blocks:
            x = self.run(stage, x, emb, None)
        return self.out(x)                                                   # (B,num_classes)


# ------------------------------------------------------------------------------------ public weights

ADM_256 = row(256, 256, ADM[256], 2, head_channels=64)
PUBLIC = {  # the number of parameters of a file, which tells the files apart: its name, the arguments
    295_904_454: ("64x64_diffusion.pt", SIZES["unet-adm"] | dict(new_attention_order=True)),
    421_529_606: ("128x128_diffusion.pt", SIZES["unet-adm128"]),
    553_838_086: ("256x256_diffusion.pt", ADM_256),
    552_814_086: ("256x256_diffusion_uncond.pt", ADM_256),                   # lsun_*.pt are the same network
    558_997_638: ("512x512_diffusion.pt", row(512, 256, ADM[512], 2, head_channels=64)),
    65_438_568:  ("64x64_classifier.pt", row(64, 128, ADM[64], 4)),
    42_568_040:  ("128x128_classifier.pt", row(128, 128, ADM[128], 2)),
    54_096_360:  ("256x256_classifier.pt", row(256, 128, ADM[256], 2)),
    54_448_360:  ("512x512_classifier.pt", row(512, 128, ADM[512], 2)),
    395_496_708: ("unet-ldm", SIZES["unet-ldm"]),                            # our presets, of 1,000 classes
    129_146_692: ("unet-b", SIZES["unet-b"]),
    52_542_979:  ("unet-cifar", SIZES["unet-cifar"]),                        # of none
}


def unet_part(state_dict):
    """A whole file of latent-diffusion, or a bare state dict -> a new dict with guided-diffusion's names."""
    state_dict = dict(state_dict.get("state_dict", state_dict))
    prefix, table = "model.diffusion_model.", "cond_stage_model.embedding.weight"
    part = {name[len(prefix):]: x for name, x in state_dict.items() if name.startswith(prefix)}
    if part and table in state_dict:
        part["label_emb.weight"] = state_dict[table]
    return part or state_dict


def recognise(state_dict, head, architecture):
    """-> the file's name in PUBLIC or None, the network's arguments, the outputs of the layer `head`."""
    try:
        channels = state_dict["time_embed.0.weight"].shape[1]
        in_channels = state_dict["input_blocks.0.0.weight"].shape[1]
        outputs = len(state_dict[head])
    except KeyError as error:
        raise ValueError(f"no weights of guided-diffusion or latent-diffusion: {error} is missing") from None
    parameters = sum(x.numel() for x in state_dict.values())
    name, known = PUBLIC.get(parameters, (None, {}))
    given = architecture or known
    shown = dict(img_size=given.get("side"), channels=channels, in_channels=in_channels)
    return name, shown | given, outputs


def load(network, state_dict, arguments):
    """network(**arguments) with these weights, strict. Raises ValueError."""
    needed = ["img_size", "channel_mult", "res_blocks", "attention_resolutions"]
    if not arguments.get("head_channels"):
        needed.append("heads")
    missing = [name for name in needed if arguments.get(name) is None]
    if missing:
        raise ValueError(f"weights of no known public file: give {', '.join(missing)}")
    model = network(**arguments)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    return model


def usual_order(model):
    """Rows of qkv ordered q k v, then head, become head, then q k v."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            for x in (layer.qkv.weight.data, layer.qkv.bias.data):
                x.copy_(x.unflatten(0, (3, layer.heads, -1)).transpose(0, 1).flatten(0, 2))


def from_adm(state_dict, img_size=None, heads=None, head_channels=None, num_classes=None, **architecture):
    """A state dict of guided-diffusion, the official repository or latent-diffusion -> UNet, strict.

    The files in PUBLIC are known by their number of parameters; img_size and heads or head_channels replace
    their own. For any other file `architecture` is the UNet's other arguments (channel_mult, res_blocks,
    attention_resolutions, ...), and img_size and heads or head_channels must be given too.
    new_attention_order=True says that rows of qkv are ordered q k v, then head.
    num_classes: unless given, a class table of 1,000 rows is taken to have no null label (ADM and LDM,
    ImageNet), any other to end with it. A table without one gets a row of zeros, so that labels mean the same
    everywhere, but the network never saw it: sample such a file with labels and cfg 1, or with a classifier.
    An output of 2C channels (learned sigma) keeps its first C. Of a whole file of latent-diffusion the
    autoencoder, the schedule and averages are left aside.

    The UNet gets an attribute `public`, what sampling needs to know of the file: dict(dataset, target,
    schedule, sample_steps, cfg, guidable). dataset is the name of its row in PUBLIC or None; target is "eps"
    where sigma was learned, else None, as weights do not show it; guidable says that the class table has its
    own null label.
    Raises ValueError, which names the arguments to give, or what does not fit.
    """
    state_dict = unet_part(state_dict)
    name, arguments, outputs = recognise(state_dict, "out.2.weight", architecture)
    if img_size:
        arguments["img_size"] = img_size
    if heads or head_channels:
        arguments.update(heads=heads, head_channels=head_channels)
    new_attention_order = arguments.pop("new_attention_order", False)

    rows = len(state_dict.get("label_emb.weight", ()))
    if num_classes is None:
        num_classes = rows if rows == 1000 else max(rows - 1, 0)
    if rows and rows == num_classes:
        state_dict["label_emb.weight"] = F.pad(state_dict["label_emb.weight"], (0, 0, 0, 1))
    learned_sigma = outputs == 2 * arguments["in_channels"]
    if learned_sigma:
        for part in ("out.2.weight", "out.2.bias"):
            state_dict[part] = state_dict[part][:outputs // 2]

    model = load(UNet, state_dict, arguments | dict(num_classes=num_classes))
    if new_attention_order:
        usual_order(model)
    schedule = "cosine"
    if learned_sigma and arguments.get("side", model.img_size) >= 128:       # ADM's
        schedule = "linear"
    model.public = dict(dataset=name, target="eps" if learned_sigma else None, schedule=schedule,
                        sample_steps=50, cfg=1.0, guidable=rows > num_classes)
    return model


def classifier_from_adm(state_dict, head_channels=64, **architecture):
    """guided-diffusion's noisy classifiers (`64x64_classifier.pt`, ...) -> Classifier, strict.

    For files that are not in PUBLIC, `architecture` is img_size, channel_mult, res_blocks,
    attention_resolutions and what else of the UNet's arguments differs. Raises ValueError.
    """
    _, arguments, num_classes = recognise(state_dict, "out.2.c_proj.weight", architecture)
    arguments |= dict(num_classes=num_classes, head_channels=head_channels)
    return load(Classifier, state_dict, arguments)
