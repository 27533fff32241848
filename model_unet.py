"""The paper's UNets in one file: ADM's, on pixels and latents, LDM's, and ADM's noisy classifier.

Dhariwal & Nichol 2021 (guided-diffusion) and Rombach et al. 2022 (latent-diffusion). Facts that their weights
depend on: the time embedding is cosines, then sines; every GroupNorm has 32 groups, eps 1e-5 (1e-6 in the
spatial transformer); rows of qkv are ordered head, then q k v, then channel (in the classifier's head q k v,
then head). The last layer of res-blocks, attention blocks and the UNet starts at zero. Parameter names are
theirs, so `input_blocks.N` is block N of the encoder and its first layer is `input_blocks.N.0`.
"""
import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def row(channels, channel_mult, res_blocks, attention_resolutions, **more):
    return dict(channels=channels, channel_mult=channel_mult, res_blocks=res_blocks,
                attention_resolutions=attention_resolutions, **more)


PLAIN = dict(resblock_updown=False)    # down- and upsampling by one convolution
SIZES = {  # width, its multiple per level, res-blocks, sides with attention; then # the image or latent side
    "unet-tiny":   row(32,  (1, 2, 2),       1, (8,),        heads=2),           # 16: ours, for the CPU
    "unet-cifar":  row(128, (1, 2, 2, 2),    3, (16, 8),     heads=4, **PLAIN),  # 32: curriculum paper
    "unet-celeba": row(128, (1, 2, 2, 2),    3, (32, 16, 8), head_channels=64),  # 64: table 3; inferred
    "unet-adm":    row(192, (1, 2, 3, 4),    3, (32, 16, 8), head_channels=64),  # 64: app. C, as ADM
    "unet-adm128": row(256, (1, 1, 2, 3, 4), 2, (32, 16, 8), heads=4),           # 128: as ADM
    "unet-b":      row(192, (1, 2, 2, 2),    3, (16, 8),     heads=4),           # 32: tables 1-2; inferred
    "unet-ldm":    row(256, (1, 2, 4),       2, (32, 16, 8), heads=1, context_dim=512,
                       scale_shift=False, **PLAIN),                              # 32: table 5, as LDM-8
}


# ------------------------------------------------------------------------------------------- layers

def same(x):
    return x


def half(x):                                                                 # (B,C,H,W) -> (B,C,H/2,W/2)
    return F.avg_pool2d(x, 2)


def double(x):                                                               # (B,C,H,W) -> (B,C,2H,2W)
    return F.interpolate(x, scale_factor=2, mode="nearest")


def zero(layer):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """x + conv(conv(x)), the time embedding added in between, or scaling and shifting the second norm.
    resample, where given, acts on both branches before the first convolution.
    """

    def __init__(self, width_in, width, emb_dim, scale_shift, resample=same):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        conv = nn.Conv2d(width_in, width, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width_in), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, (1 + scale_shift) * width))
        conv = zero(nn.Conv2d(width, width, 3, padding=1))                   # Identity: where dropout was
        self.out_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Identity(), conv)
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x, emb):                                               # (B,C,H,W), (B,E)
        (norm1, silu, conv1), (norm2, *_, conv2) = self.in_layers, self.out_layers
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
        self.heads, self.norm = heads, nn.GroupNorm(32, dim)
        self.qkv, self.proj_out = Pointwise(dim, 3 * dim), zero(Pointwise(dim, dim))

    def forward(self, x):                                                    # (B,C,H,W)
        tokens = self.norm(x).flatten(2).transpose(1, 2)                     # (B,N,C)
        q, k, v = self.qkv(tokens).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)   # each (B,h,N,d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)                # (B,N,C)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class AttentionPool(nn.Module):
    """The classifier's head: the mean of all pixels is one more token, and its attention gives the logits."""

    def __init__(self, side, dim, heads, num_classes):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(dim, 1 + side ** 2) / dim ** 0.5)
        self.qkv_proj, self.c_proj = Pointwise(dim, 3 * dim), Pointwise(dim, num_classes)

    def forward(self, x):                                                    # (B,C,H,W)
        x = x.flatten(2)                                                     # (B,C,N)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding        # (B,C,1+N)
        qkv = self.qkv_proj(x.transpose(1, 2))                               # (B,1+N,3C): q k v, then head
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)          # each (B,h,1+N,d)
        x = F.scaled_dot_product_attention(q[:, :, :1], k, v)                # (B,h,1,d)
        return self.c_proj(x.transpose(1, 2).flatten(2))[:, 0]               # (B,classes)


class CrossAttention(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads, self.to_q = heads, nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context):                                           # (B,N,C), (B,M,D)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))   # each (B,h,N|M,d)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), CrossAttention(dim, dim, heads)
        self.norm2, self.attn2 = nn.LayerNorm(dim), CrossAttention(dim, context_dim, heads)
        self.norm3, self.ff = nn.LayerNorm(dim), nn.Sequential()
        self.ff.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x, context):                                           # (B,N,C), (B,M,D)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)   # one token: softmax is 1, to_q and to_k get no gradient
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """LDM, in place of Attention: self-attention, cross-attention to the class token, feed-forward."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(32, dim, eps=1e-6), nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, heads)])
        self.proj_out = zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x, context):                                           # (B,C,H,W), (B,M,D)
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)            # (B,N,C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


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

class Encoder(nn.Module):
    """What UNet and Classifier share: time embedding, encoder, middle. Set grad_ckpt = True to keep only the
    stages' inputs for the backward pass and compute the rest again: less memory, the same gradients.
    """
    grad_ckpt = False

    def __init__(self, img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                 num_classes, heads, head_channels, scale_shift, resblock_updown, context_dim):
        super().__init__()
        widths = [round(channels * mult) for mult in channel_mult]
        self.factor = 2 ** (len(widths) - 1)                                 # image side / smallest side
        if img_size % self.factor:
            raise ValueError(f"img_size: found {img_size}, not a multiple of {self.factor}")
        if channels % 2 or any(width % 32 for width in widths):
            raise ValueError(f"channels: found {channels} x {tuple(channel_mult)}, expected multiples of 32")
        self.img_size, self.in_channels, self.num_classes = img_size, in_channels, num_classes
        self.channels, self.heads, self.head_channels = channels, heads, head_channels
        self.scale_shift, self.resblock_updown, self.context_dim = scale_shift, resblock_updown, context_dim
        self.attention_levels = [k for k in range(len(widths)) if img_size >> k in attention_resolutions]
        self.time_embed = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(),
                                        nn.Linear(4 * channels, 4 * channels))
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, widths[0], 3, padding=1))])
        self.skips = [widths[0]]                                             # width of every stage's output
        for level, width in enumerate(widths):
            for _ in range(res_blocks):
                self.input_blocks.append(Stage(*self.layers(self.skips[-1], width, level)))
                self.skips.append(width)
            if level + 1 < len(widths):
                self.input_blocks.append(Stage(self.resampler(width, half)))
                self.skips.append(width)
        self.middle_block = Stage(self.res(width, width), self.attention(width), self.res(width, width))

    def res(self, width_in, width, resample=same):
        return ResBlock(width_in, width, 4 * self.channels, self.scale_shift, resample)

    def attention(self, width):
        heads = width // self.head_channels if self.head_channels else self.heads
        if heads < 1 or width % heads or self.head_channels and width % self.head_channels:
            raise ValueError(f"heads: found {self.heads} heads or {self.head_channels} channels a head, "
                             f"which does not divide {width} channels")
        if self.context_dim:
            return SpatialTransformer(width, self.context_dim, heads)
        return Attention(width, heads)

    def layers(self, width_in, width, level):
        attention = [self.attention(width)] if level in self.attention_levels else []
        return [self.res(width_in, width), *attention]

    def resampler(self, width, resample):
        """Half or double the side: a res-block, or a strided convolution, or nearest neighbours and one."""
        if self.resblock_updown:
            return self.res(width, width, resample)
        layer = nn.Sequential()                                              # named as in the public files
        if resample is half:
            layer.op = nn.Conv2d(width, width, 3, stride=2, padding=1)
        else:
            layer.nearest, layer.conv = nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)
        return layer

    def embed(self, x, t):
        """Sinusoids of t through two layers, (B,4*channels); refuses an x that the levels do not divide."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or any(side % self.factor for side in x.shape[2:]):
            raise ValueError(f"x: found {tuple(x.shape)}, expected (B, {self.in_channels}, H, W) "
                             f"with H and W multiples of {self.factor}")
        i = torch.arange(self.channels // 2, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * i / len(i))
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))

    def run(self, stage, *args):
        if self.grad_ckpt:
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)


class UNet(Encoder):
    """model(x (B,C,H,W), t (B,) long, y (B,) long or None) -> (B,C,H,W); fresh, it returns zeros.

    attention_resolutions are sides of feature maps for an input of side img_size; H and W may be any
    multiples of 2^(levels - 1). heads is the number of heads, or head_channels their width. num_classes = 0
    is unconditional; otherwise the null label of guidance is num_classes, and y = None means the null label.
    With context_dim, LDM's spatial transformers stand in place of the attention blocks, and the class
    embedding is their one context token instead of being added to the time embedding.
    """

    def __init__(self, img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                 num_classes=0, heads=4, head_channels=None, scale_shift=True, resblock_updown=True,
                 context_dim=None):
        super().__init__(img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                         num_classes, heads, head_channels, scale_shift, resblock_updown, context_dim)
        if num_classes:
            self.label_emb = nn.Embedding(num_classes + 1, context_dim or 4 * channels)   # last: null label
        self.output_blocks, skips = nn.ModuleList(), list(self.skips)
        width_in = skips[-1]
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks + 1):
                width = round(channels * mult)
                layers = self.layers(width_in + skips.pop(), width, level)
                if level and i == res_blocks:
                    layers.append(self.resampler(width, double))
                self.output_blocks.append(Stage(*layers))
                width_in = width
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(),
                                 zero(nn.Conv2d(width, in_channels, 3, padding=1)))

    def forward(self, x, t, y=None):
        emb, skips = self.embed(x, t), []                                    # (B,E)
        label = emb.new_zeros(len(x), self.context_dim or 1)                 # without classes
        if self.num_classes:
            label = self.label_emb(torch.full_like(t, self.num_classes) if y is None else y)
        emb, context = (emb, label[:, None]) if self.context_dim else (emb + label, None)     # (B,1,D)
        for stage in self.input_blocks:                                      # encoder: ever smaller, wider,
            x = self.run(stage, x, emb, context)
            skips.append(x)                                                  # and every output is kept
        x = self.run(self.middle_block, x, emb, context)
        for stage in self.output_blocks:                                     # decoder: the way back,
            x = torch.cat([x, skips.pop()], dim=1)                           # beside the latest output kept
            x = self.run(stage, x, emb, context)
        return self.out(x)                                                   # (B,C,H,W)


class Classifier(Encoder):
    """ADM's noisy classifier, model(x (B,C,S,S), t (B,) long) -> (B,num_classes) logits of p(y | x_t)."""

    def __init__(self, img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                 num_classes, head_channels=64):
        super().__init__(img_size, in_channels, channels, channel_mult, res_blocks, attention_resolutions,
                         num_classes, None, head_channels, True, True, None)
        width = self.skips[-1]
        pool = AttentionPool(img_size // self.factor, width, width // head_channels, num_classes)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), pool)

    def forward(self, x, t):
        emb = self.embed(x, t)
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"x: found {tuple(x.shape)}, expected sides of {self.img_size}")
        for stage in [*self.input_blocks, self.middle_block]:
            x = self.run(stage, x, emb, None)
        return self.out(x)                                                   # (B,num_classes)


# ------------------------------------------------------------------------------------ public weights

def read(state_dict):
    """Names and shapes -> the arguments of a UNet or Classifier that they show, with the levels of attention.

    An encoder has levels * (res_blocks + 1) blocks. A level begins at block 1 + a multiple of that period:
    surely where the width changes or attention begins. In a decoder it ends where there is an upsampler.
    """
    shapes = {name: value.shape for name, value in state_dict.items()}
    total = len({name.split(".")[1] for name in shapes if name.startswith("input_blocks.")})
    attends = [f"input_blocks.{i}.1.norm.weight" in shapes for i in range(total)]
    starts = [i for i in range(1, total) if f"input_blocks.{i}.0.skip_connection.weight" in shapes
              or attends[i] and not attends[i - 1]]
    ends = [i + 1 for i in range(total) for layer in (1, 2) for name in ("in_layers.0", "conv")
            if f"output_blocks.{i}.{layer}.{name}.weight" in shapes]
    period = math.gcd(total, *(i - 1 for i in starts), *ends)
    firsts = range(1, total, period)                                         # first block of every level
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts]
    channels = shapes["time_embed.0.weight"][1]
    return dict(
        in_channels=shapes["input_blocks.0.0.weight"][1], channels=channels, res_blocks=period - 1,
        channel_mult=[width / channels for width in widths],
        levels=[level for level, i in enumerate(firsts) if attends[i]],
        scale_shift=shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * widths[-1],
        resblock_updown=f"input_blocks.{period}.0.op.weight" not in shapes,
        context_dim=shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, None))[1])


def public_heads(channels, channel_mult, in_channels, context_dim, **_):
    """heads or head_channels, which no shape shows, as the public files of that width have it."""
    if context_dim:
        known = {192: dict(heads=1), 256: dict(head_channels=32)}            # LDM's cin256-v2 and cin256
    elif in_channels == 4 or len(channel_mult) == 5:
        known = {192: dict(heads=4), 256: dict(heads=4)}                     # unet-b; 128x128_diffusion.pt
    else:
        known = {width: dict(head_channels=64) for width in (128, 192, 256)}
    if channels not in known:
        raise ValueError(f"heads: heads or head_channels must be given, since width {channels} is in no "
                         f"public file")
    return known[channels]


def load(build, state_dict, kind):
    """build() with these weights; without memory until all names and shapes are right. Raises ValueError."""
    try:
        with torch.device("meta"):
            model = build()
        copy.deepcopy(model).load_state_dict(state_dict, assign=True)
        model = model.to_empty(device=torch.get_default_device())
        model.load_state_dict(state_dict)
    except Exception as error:                                           # whatever damage makes them raise
        raise ValueError(f"not a state dict of {kind}: {' '.join(str(error).split())[:300]}") from None
    return model


def unet_part(state_dict):
    """A whole file of latent-diffusion, or a bare state dict -> a new dict with guided-diffusion's names."""
    state_dict = dict(state_dict.get("state_dict", state_dict))
    table, ldm = state_dict.pop("cond_stage_model.embedding.weight", None), "model.diffusion_model."
    if any(name.startswith(ldm) for name in state_dict):
        state_dict = {name[len(ldm):]: x for name, x in state_dict.items() if name.startswith(ldm)}
    return state_dict if table is None else {**state_dict, "label_emb.weight": table}


def from_adm(state_dict, img_size=None, heads=None, head_channels=None, num_classes=None,
             new_attention_order=None):
    """A state dict of guided-diffusion, the official repository or latent-diffusion -> UNet, strict.

    The architecture is read off names and shapes. What they do not show:
    img_size: unless given, the side at which the smallest feature map is 8 wide, as in ADM's and LDM's files;
    unet-b and unet-cifar have 32.
    heads, head_channels: unless given, by width as in the public files (`public_heads`; the preset unet-ldm
    has one head, LDM's own file of that width 32 channels a head).
    num_classes: a class table of 1,000 rows is taken to have no null label (ADM and LDM, ImageNet), any other
    to end with it, unless given. To a table without one a row of zeros is added, so that labels mean the same
    everywhere, but the network never saw it: sample such a file with labels and cfg 1, or with a classifier.
    new_attention_order: rows of qkv ordered q k v, then head, as in `64x64_diffusion.pt` alone, which is the
    default for its width, learned sigma and 1,000 classes; they are put in the usual order.
    An output of 2C channels (learned sigma) keeps its first C. Beside `model.diffusion_model.*` the class
    table is `cond_stage_model.embedding.weight`; autoencoder, schedule and averages are left aside. Raises
    ValueError for what is not such a file.
    """
    kind = "a guided-diffusion or latent-diffusion UNet"
    try:
        state_dict = unet_part(state_dict)
        found = read(state_dict)
        C, rows = found["in_channels"], len(state_dict.get("label_emb.weight", ()))
        learned_sigma = len(state_dict["out.2.weight"]) == 2 * C
        if learned_sigma:
            state_dict.update({name: state_dict[name][:C] for name in ("out.2.weight", "out.2.bias")})
    except Exception as error:                                           # whatever damage makes them raise
        raise ValueError(f"not a state dict of {kind}: {' '.join(str(error).split())}") from None
    if found["context_dim"] and not rows:
        raise ValueError(f"not a state dict of {kind}: no class table, cond_stage_model.embedding.weight")
    if num_classes is None:
        num_classes = rows if rows == 1000 else max(rows - 1, 0)
    if num_classes and num_classes == rows:
        table = state_dict["label_emb.weight"]
        state_dict["label_emb.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    split = dict(heads=heads, head_channels=head_channels)
    if not heads and not head_channels:
        split = public_heads(**found)
    img_size = img_size or 8 * 2 ** (len(found["channel_mult"]) - 1)
    sides = [img_size >> level for level in found.pop("levels")]
    if new_attention_order is None:
        new_attention_order = learned_sigma and rows == 1000 and found["channels"] == 192
    more = dict(attention_resolutions=sides, num_classes=num_classes, **found, **split)
    model = load(lambda: UNet(img_size, **more), state_dict, kind)
    for layer in model.modules():
        if new_attention_order and isinstance(layer, Attention):
            for x in (layer.qkv.weight.data, layer.qkv.bias.data):           # (3*h*d, ...) -> (h*3*d, ...)
                x.copy_(x.unflatten(0, (3, layer.heads, -1)).transpose(0, 1).flatten(0, 2))
    return model


def classifier_from_adm(state_dict, head_channels=64):
    """guided-diffusion's noisy classifiers (`64x64_classifier.pt`, ...) -> Classifier, strict.

    All but the width of the heads is read off names and shapes. Raises ValueError for what is no such file.
    """
    kind = "a guided-diffusion classifier"
    try:
        found, num_classes = read(state_dict), len(state_dict["out.2.c_proj.weight"])
        side = math.isqrt(state_dict["out.2.positional_embedding"].shape[1] - 1)
    except Exception as error:
        raise ValueError(f"not a state dict of {kind}: {' '.join(str(error).split())}") from None
    img_size = side * 2 ** (len(found["channel_mult"]) - 1)
    sides = [img_size >> level for level in found["levels"]]
    build = lambda: Classifier(img_size, found["in_channels"], found["channels"], found["channel_mult"],
                               found["res_blocks"], sides, num_classes, head_channels)
    return load(build, state_dict, kind)
