"""The paper's UNets in one file: ADM's, on pixels and latents, LDM's, and ADM's noisy classifier.

ADM is Dhariwal & Nichol 2021, code guided-diffusion; LDM is Rombach et al. 2022, code latent-diffusion. Their
weights depend on some facts. The time embedding is cosines, then sines. Every GroupNorm has 32 groups and eps
1e-5, in LDM's spatial transformer 1e-6. The rows of ADM's qkv are ordered by head, then q k v, then channel;
those of the classifier's attention pool, and of 64x64_diffusion.pt, by q k v, then head. The last layer of each
res-block, of each attention block and of the UNet starts at zero.
Parameter names are theirs: `input_blocks.N` is stage N of the encoder (class Stage), and its first layer is
`input_blocks.N.0`. Shapes are theirs too: ADM's attention has convolutions of kernel size 1, (out,in,1), applied
here as linear layers.
"""
import math
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def row(side, channels, channel_mult, res_blocks, attention_resolutions=(32, 16, 8), **more):
    """One network of SIZES, as the UNet's arguments. ADM attends at the sides 32, 16 and 8."""
    return dict(side=side, channels=channels, channel_mult=channel_mult, res_blocks=res_blocks,
                attention_resolutions=attention_resolutions, **more)


PLAIN = dict(resblock_updown=False)                      # a convolution halves or doubles the side, no res-block
LDM = dict(context_dim=512, scale_shift=False, **PLAIN)  # the class is a token for cross-attention
SIZES = {  # side, width, its multiples at the levels, res-blocks a level, sides with attention
    "unet-tiny":   row(16,  32,  (1, 2, 2),    1, (8,),    heads=2),           # ours, for the CPU
    "unet-cifar":  row(32,  128, (1, 2, 2, 2), 3, (16, 8), heads=4, **PLAIN),  # curriculum paper
    "unet-celeba": row(64,  128, (1, 2, 2, 2), 3,          head_channels=64),  # table 3; the paper gives no sizes
    "unet-adm":    row(64,  192, (1, 2, 3, 4), 3,          head_channels=64),  # appendix C
    "unet-adm128": row(128, 256, (1, 1, 2, 3, 4), 2,       heads=4),           # curriculum paper
    "unet-b":      row(32,  192, (1, 2, 2, 2), 3, (16, 8), heads=4),           # tables 1-2, appendix C.1
    "unet-ldm":    row(32,  256, (1, 2, 4),    2,          heads=1, **LDM),    # table 5, as LDM-8
}


# ------------------------------------------------------------------------------------------- layers

def conv(width_in, width, stride=1):
    return nn.Conv2d(width_in, width, 3, stride, padding=1)


def after_norm(width, *layers):
    """A group norm and SiLU, then these layers."""
    return nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), *layers)


def named(**layers):
    """nn.Sequential of layers with the names that they have in the public files."""
    return nn.Sequential(OrderedDict(layers))


def zero(layer):
    """The layer, its weight and bias set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Pointwise(nn.Conv1d):
    """By name and shape a convolution of kernel size 1, applied to tokens (B,N,C) as the linear layer that it is."""

    def __init__(self, dim, dim_out):
        super().__init__(dim, dim_out, 1)

    def forward(self, x):
        return F.linear(x, self.weight[:, :, 0], self.bias)


def attend(q, k, v):
    """In each of h heads every query attends to all keys: q (B,h,N,d), k and v (B,h,M,d) -> (B,N,h*d)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ResBlock(nn.Module):
    """x + conv(conv(x)), each conv behind a norm and SiLU. emb, the embedding of the time and the class, is added
    before the second norm, or with scale_shift scales and shifts what that norm returns. resample, where given,
    halves or doubles the side in both branches; then width must equal width_in.
    """

    def __init__(self, width_in, width, resample=None, *, emb_dim, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        resample = resample or nn.Identity()
        silu_resample = nn.Sequential(nn.SiLU(), resample)       # one layer: conv keeps its name in_layers.2
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width_in), silu_resample, conv(width_in, width))
        emb_width = 2 * width if scale_shift else width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, emb_width))
        no_dropout = nn.Identity()                               # for ADM's: conv keeps its name out_layers.3
        self.out_layers = after_norm(width, no_dropout, zero(conv(width, width)))
        self.skip_connection = resample
        if width != width_in:
            self.skip_connection = nn.Conv2d(width_in, width, 1)

    def forward(self, x, emb):                                               # (B,C,H,W), (B,E)
        norm, silu, _, last = self.out_layers
        h = self.in_layers(x)                                                # (B,C',H',W')
        emb = self.emb_layers(emb)[:, :, None, None]                         # (B,C' or 2C',1,1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)                     # shift + norm(h) (1 + scale)
        else:
            h = norm(h + emb)
        return self.skip_connection(x) + last(silu(h))


class Attention(nn.Module):
    """ADM: every pixel attends to every pixel."""

    def __init__(self, dim, head_channels):
        super().__init__()
        self.head_channels = head_channels
        self.norm = nn.GroupNorm(32, dim)
        self.qkv = Pointwise(dim, 3 * dim)
        self.proj_out = zero(Pointwise(dim, dim))

    def forward(self, x):                                                    # (B,C,H,W)
        tokens = self.norm(x).flatten(2).transpose(1, 2)                     # (B,N,C)
        qkv = self.qkv(tokens).unflatten(2, (-1, 3, self.head_channels))     # (B,N,h,3,d)
        update = self.proj_out(attend(*qkv.permute(3, 0, 2, 1, 4)))          # (B,N,C)
        return x + update.transpose(1, 2).unflatten(2, x.shape[2:])


class AttentionPool(nn.Module):
    """The classifier's last layer. The mean of all pixels is one more token, whose attention gives the logits."""

    def __init__(self, side, dim, head_channels, num_classes):
        super().__init__()
        self.head_channels = head_channels
        positions = torch.randn(dim, 1 + side ** 2) / dim ** 0.5
        self.positional_embedding = nn.Parameter(positions)
        self.qkv_proj = Pointwise(dim, 3 * dim)
        self.c_proj = Pointwise(dim, num_classes)

    def forward(self, x):                                                    # (B,C,H,W)
        x = x.flatten(2)                                                     # (B,C,N)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2)                   # (B,C,1+N)
        x = x + self.positional_embedding
        qkv = self.qkv_proj(x.transpose(1, 2))                               # (B,1+N,3C)
        qkv = qkv.unflatten(2, (3, -1, self.head_channels))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # each (B,h,1+N,d)
        return self.c_proj(attend(q[:, :, :1], k, v))[:, 0]                  # (B,classes)


class CrossAttention(nn.Module):
    def __init__(self, dim, context_dim, head_channels):
        super().__init__()
        self.head_channels = head_channels
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context):                                           # (B,N,C), (B,M,D)
        qkv = self.to_q(x), self.to_k(context), self.to_v(context)
        qkv = [z.unflatten(2, (-1, self.head_channels)) for z in qkv]        # each (B,N|M,h,d)
        qkv = [z.transpose(1, 2) for z in qkv]
        return self.to_out(attend(*qkv))


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, head_channels):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, dim, head_channels)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, head_channels)
        self.norm3 = nn.LayerNorm(dim)
        widen, narrow = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        # LDM's names are ff.net.0.proj and ff.net.2. Its activation, GEGLU, is computed in forward: half of the
        # outputs times GELU of the other half. Identity stands for its dropout.
        self.ff = named(net=nn.Sequential(named(proj=widen), nn.Identity(), narrow))

    def forward(self, x, context):                                           # (B,N,C), (B,M,D)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)   # softmax over one token is 1: to_q and to_k never learn
        widen, _, narrow = self.ff.net
        h, gate = widen(self.norm3(x)).chunk(2, dim=-1)                       # each (B,N,4C)
        return x + narrow(h * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """LDM, in place of Attention: self-attention, cross-attention to the class token, feed-forward."""

    def __init__(self, dim, context_dim, head_channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, head_channels)])
        self.proj_out = zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x, context):                                           # (B,C,H,W), (B,M,D)
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)            # (B,N,C)
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])                      # (B,C,H,W)
        return x + self.proj_out(h)


class Stage(nn.Sequential):
    """Layers that run one after another, between two skip connections. Each gets of emb and context what it uses."""

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
    """model(x (B,C,H,W), t (B,) long, y (B,) long or None) -> (B,C,H,W).

    A fresh one returns zeros, unless it is a classifier. H and W may be any multiples of 2^(levels - 1).
    channels is the base width and channel_mult its multiple at each level. The encoder has res_blocks res-blocks
    a level, the decoder one more. scale_shift: see ResBlock. resblock_updown: a res-block halves or doubles the
    side, otherwise a convolution. heads is the number of heads; head_channels, where given, is their width instead.
    attention_resolutions: a level attends if the side of its feature maps is one of these. It is counted for an
    image of side `side`, by default img_size, so that a network for another img_size attends at the same levels.
    The middle always attends.
    num_classes = 0 is unconditional; otherwise the null label of guidance is num_classes, and y = None means the
    null label. The embedding of the class is added to that of the time. With context_dim, LDM's spatial
    transformers take the place of the attention blocks, and the embedding of the class is their context, one
    token. Without classes this token is learned too.
    classifier = True is ADM's noisy classifier, model(x, t) -> (B,num_classes) logits of p(y | x_t): the encoder
    and an attention pool, for images of img_size alone.
    grad_ckpt = True keeps only the inputs of the stages and computes the rest again for the gradient.
    Raises ValueError for an img_size that the levels do not divide, and for heads that do not divide a width.
    """
    grad_ckpt = False

    def __init__(self, img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                 num_classes=0, heads=4, head_channels=None, scale_shift=True, resblock_updown=True,
                 context_dim=None, side=None, classifier=False):
        super().__init__()
        self.img_size, self.in_channels, self.num_classes = img_size, in_channels, num_classes
        self.channels, self.context_dim = channels, context_dim
        widths = [channels * mult for mult in channel_mult]
        factor = 2 ** (len(widths) - 1)                                      # image side / smallest side
        if img_size % factor:
            raise ValueError(f"img_size: found {img_size}, expected a multiple of {factor}")
        emb_dim = 4 * channels
        res = partial(ResBlock, emb_dim=emb_dim, scale_shift=scale_shift)

        def attention(width):
            divisor = head_channels or heads
            if width % divisor:
                raise ValueError(f"heads, head_channels: found {divisor}, no divisor of {width} channels")
            d = head_channels or width // heads
            return SpatialTransformer(width, context_dim, d) if context_dim else Attention(width, d)

        def stage(width_in, level):
            side_of_level = (side or img_size) // 2 ** level
            more = [attention(widths[level])] if side_of_level in attention_resolutions else []
            return Stage(res(width_in, widths[level]), *more)

        self.time_embed = nn.Sequential(nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        width = widths[0]                                                    # of the last stage so far
        self.input_blocks = nn.ModuleList([Stage(conv(in_channels, width))])
        skips = [width]                                                      # widths of the encoder's outputs
        for level in range(len(widths)):
            if level > 0:
                down = (res(width, width, nn.AvgPool2d(2)) if resblock_updown
                        else named(op=conv(width, width, stride=2)))
                self.input_blocks.append(Stage(down))
                skips.append(width)
            for _ in range(res_blocks):
                self.input_blocks.append(stage(width, level))
                width = widths[level]
                skips.append(width)
        self.middle_block = Stage(res(width, width), attention(width), res(width, width))
        self.label_emb = None
        if not classifier and (num_classes or context_dim):                  # last row: the null label
            self.label_emb = nn.Embedding(num_classes + 1, context_dim or emb_dim)
        self.output_blocks = nn.ModuleList()
        if classifier:
            pool = AttentionPool(img_size // factor, width, self.middle_block[1].head_channels, num_classes)
            self.out = after_norm(width, pool)
        else:
            self.build_decoder(widths, res_blocks, skips, stage, res if resblock_updown else None)

    def build_decoder(self, widths, res_blocks, skips, stage, res):
        """The encoder mirrored. Each stage takes one output of the encoder as a skip connection, the last output
        first; skips are the widths of these outputs. stage(width_in, level) makes a stage. res makes the
        res-block that doubles the side; if it is None, a convolution does.
        """
        width = widths[-1]
        for level in reversed(range(len(widths))):
            for _ in range(res_blocks + 1):
                self.output_blocks.append(stage(width + skips.pop(), level))
                width = widths[level]
            if level > 0:
                double = nn.Upsample(scale_factor=2)
                up = res(width, width, double) if res else named(nearest=double, conv=conv(width, width))
                self.output_blocks[-1].append(up)
        self.out = after_norm(width, zero(conv(width, self.in_channels)))

    @property
    def blocks(self):
        """The stages in the order in which they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x, t, y=None):
        i = torch.arange(self.channels // 2, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10_000) * i / len(i))
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)               # (B,channels)
        emb = self.time_embed(waves.to(x.dtype))                             # (B,E), E = 4 channels
        context = None
        if self.label_emb is not None:
            y = torch.full_like(t, self.num_classes) if y is None else y
            label = self.label_emb(y)                                        # (B,D) or (B,E)
            if self.context_dim:
                context = label[:, None]                                     # (B,1,D)
            else:
                emb = emb + label
        skips = []                                                           # the encoder's outputs
        for stage in self.input_blocks:
            x = self.run(stage, x, emb, context)
            skips.append(x)
        x = self.run(self.middle_block, x, emb, context)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.run(stage, x, emb, context)
        return self.out(x)                                                   # (B,C,H,W)

    def run(self, stage, *inputs):
        if self.grad_ckpt:
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


Classifier = partial(UNet, classifier=True)                                  # ADM's have head_channels=64


# ------------------------------------------------------------------------------------ public weights

PUBLIC = {  # number of parameters, which tells the files apart: the file's name, the UNet's arguments
    295_904_454: ("64x64_diffusion.pt", SIZES["unet-adm"]),
    421_529_606: ("128x128_diffusion.pt", SIZES["unet-adm128"]),
    65_438_568:  ("64x64_classifier.pt", row(64, 128, (1, 2, 3, 4), 4)),
    42_568_040:  ("128x128_classifier.pt", row(128, 128, (1, 1, 2, 3, 4), 2)),
}


def unet_part(state_dict):
    """The UNet's weights, under guided-diffusion's names, of a whole file of latent-diffusion or of a bare one."""
    state_dict = state_dict.get("state_dict", state_dict)
    prefix = "model.diffusion_model."
    part = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
    if not part:
        return dict(state_dict)
    return part | {"label_emb.weight": state_dict["cond_stage_model.embedding.weight"]}


def recognise(state_dict, architecture):
    """-> the file's name in PUBLIC, or None, and the network's arguments: those in PUBLIC, then `architecture`, then
    the widths that the weights show, and a later one replaces an earlier. Raises ValueError.
    """
    try:
        channels = state_dict["time_embed.0.weight"].shape[1]
        in_channels = state_dict["input_blocks.0.0.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"no weights of guided-diffusion or latent-diffusion: {error} is missing") from None
    parameters = sum(x.numel() for x in state_dict.values())
    name, known = PUBLIC.get(parameters, (None, {}))
    if known:
        known = dict(known, img_size=known["side"])
    return name, known | architecture | dict(channels=channels, in_channels=in_channels)


def load(network, state_dict, arguments):
    """network(**arguments) with these weights, strict. Raises ValueError."""
    try:
        model = network(**arguments)
        model.load_state_dict(state_dict)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"weights do not fit: {error!s:.300}") from None
    return model


def from_adm(state_dict, img_size=None, heads=None, head_channels=None, num_classes=None, **architecture):
    """State dict of guided-diffusion, the official repository or latent-diffusion -> UNet, strict.

    A file in PUBLIC is known by its number of parameters, and needs no arguments; those that are given replace
    its own (but not the heads of 64x64_diffusion.pt). For any other file give img_size, heads or head_channels,
    and as `architecture` channel_mult, res_blocks, attention_resolutions and what else of the UNet's arguments
    differs. ADM's 256x256_diffusion.pt has img_size=256, head_channels=64, channel_mult=(1, 1, 2, 2, 4, 4),
    res_blocks=2, attention_resolutions=(32, 16, 8).
    num_classes: unless given, a class table of 1,000 rows is taken to have no null label (ADM and LDM, on ImageNet),
    any other to end with it. A table without one gets a row of zeros, so that a null label exists, but the network
    never saw it: sample such a file with labels and cfg 1, or with a classifier.
    Of a whole file of latent-diffusion the UNet and the class table are taken.
    Where the output has 2C channels, the last C predict sigma, and are left out.

    The UNet gets an attribute `public`, what sampling needs to know of the file: dict(dataset, target, schedule,
    sample_steps, cfg, guidable). dataset is the file's name in PUBLIC, or None. target is "eps" where sigma was
    learned, else None, as weights do not show it. schedule is "linear" for 128x128_diffusion.pt, else "cosine",
    which is a guess for a file that is not in PUBLIC: 256x256_diffusion.pt was trained with "linear". guidable:
    the class table has a null label of its own.
    Raises ValueError, which names the arguments to give, or what does not fit.
    """
    state_dict = unet_part(state_dict)
    name, arguments = recognise(state_dict, architecture)
    if img_size:
        arguments["img_size"] = img_size
    if heads or head_channels:
        arguments.update(heads=heads, head_channels=head_channels)
    elif name is None:
        raise ValueError("weights of no known public file: give heads or head_channels, which no shape shows")

    C = arguments["in_channels"]
    learned_sigma = len(state_dict.get("out.2.weight", ())) == 2 * C
    for key, x in state_dict.items():
        if key.startswith("out.2."):
            state_dict[key] = x[:C]
        if ".qkv." in key and name == "64x64_diffusion.pt":                  # q k v, then head: put the head first
            by_head = x.unflatten(0, (3, -1, arguments["head_channels"])).transpose(0, 1)
            state_dict[key] = by_head.flatten(0, 2)
    rows = len(state_dict.get("label_emb.weight", ()))
    if num_classes is None:
        num_classes = rows if rows in (0, 1000) else rows - 1
    if rows and rows == num_classes:
        state_dict["label_emb.weight"] = F.pad(state_dict["label_emb.weight"], (0, 0, 0, 1))

    model = load(UNet, state_dict, arguments | dict(num_classes=num_classes))
    schedule = "linear" if name == "128x128_diffusion.pt" else "cosine"
    model.public = dict(dataset=name, target="eps" if learned_sigma else None, schedule=schedule,
                        sample_steps=50, cfg=1.0, guidable=rows > num_classes)
    return model


def classifier_from_adm(state_dict, head_channels=64, **architecture):
    """State dict of guided-diffusion's noisy classifiers (`64x64_classifier.pt`, ...) -> Classifier, strict.

    For files that are not in PUBLIC, `architecture` is img_size, channel_mult, res_blocks,
    attention_resolutions and what else of the UNet's arguments differs. Raises ValueError.
    """
    _, arguments = recognise(state_dict, architecture)
    arguments["num_classes"] = len(state_dict.get("out.2.c_proj.weight", ()))
    return load(Classifier, state_dict, arguments | dict(head_channels=head_channels))
