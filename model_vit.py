"""The paper's vanilla ViT: time and class are learned tokens before the patches (section 4.1, appendix C.1).

The released weights depend on some facts of the official code. There is no norm between the last block and the
output layer. Norms have eps 1e-6, and GELU is exact. q and v have a bias and k has none. A head is dim // heads
wide, even where heads does not divide dim (ViT-S: 6 heads of 85 in a width of 512). Parameter names are the official
ones.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SIZES = {  # appendix C.1, table 6; vit-tiny is ours, for the built-in images on a CPU
    "vit-tiny": dict(dim=192,  depth=4,  heads=3, short_run=True),
    "vit-s":    dict(dim=512,  depth=13, heads=6),
    "vit-b":    dict(dim=768,  depth=12, heads=12),
    "vit-l":    dict(dim=1024, depth=21, heads=16),
    "vit-xl":   dict(dim=1152, depth=28, heads=16),
}


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        inner = dim // heads * heads                                         # of all heads: 510 of 512 in ViT-S
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))   # none for k: softmax would ignore it
        self.proj = nn.Linear(inner, dim)

    def forward(self, x):                                                    # (B,N,D)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                             # (B,N,3*H*d)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                          # (B,N,3,H,d)
        qkv = qkv.permute(2, 0, 3, 1, 4)                                     # (3,B,H,N,d), no copy
        x = F.scaled_dot_product_attention(*qkv)                             # (B,H,N,d)
        return self.proj(x.transpose(1, 2).flatten(2))                       # (B,N,D)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()               # filled by name, as the released files name its layers
        self.mlp.fc1 = nn.Linear(dim, 4 * dim)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):                                                    # (B,N,D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sinusoids(positions, dim, base):
    """Positions (...) -> (...,dim): dim / 2 cosines, then as many sines. Cosine i and sine i, for i = 0 .. dim/2 - 1,
    have the wavelength 2 pi base^(2 i / dim) (Vaswani et al. 2017).
    """
    i = torch.arange(dim // 2)
    angles = positions[..., None] * torch.exp(-math.log(base) * i / len(i))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ViT(nn.Module):
    """model(x (B,C,S,S), t (B,) long, y (B,) long or None) -> (B,C,S,S), whatever the prediction target.

    num_classes = 0 is unconditional. Otherwise labels are 0 .. num_classes - 1, the null label of guidance is
    num_classes, and y = None means the null label. short_run: see `init_weights`. grad_ckpt = True keeps only the
    inputs of the blocks and computes the rest again for the gradient.
    Raises ValueError for an img_size S that patch_size does not divide.
    """
    grad_ckpt = False

    def __init__(self, img_size, patch_size, in_channels, num_classes, dim, depth, heads, T=1000,
                 short_run=False):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size: found {img_size}, not a multiple of the patch size {patch_size}")
        self.side = img_size // patch_size                                   # in patches
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.time_embedding = nn.Embedding(T, dim)
        if num_classes:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)        # last row: the null label
        tokens = self.side ** 2 + (2 if num_classes else 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.linear_projection = nn.Linear(dim, patch_size ** 2 * in_channels)
        self.init_weights(short_run)

    @torch.no_grad()
    def init_weights(self, short_run):
        """The official initialisation. Linear weights have a standard deviation of 0.02. In block 1, 2, ... the last
        layers of attention and of the MLP are divided by sqrt(2 block). The output layer is multiplied by 0.001, so
        that a fresh network returns nearly 0. The time and class tables keep PyTorch's N(0,1).

        short_run is for narrow networks and a few thousand steps. The 0.02 of linear layers becomes 1 / sqrt(dim).
        The time table starts as sinusoids of 1000 t / T. The positions of patches start as sinusoids of the row in
        one half of the width, and of the column in the other. So neighbours begin alike. Both tables are learned.
        """
        T, dim = self.time_embedding.weight.shape
        std = dim ** -0.5 if short_run else 0.02
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer, block in enumerate(self.blocks, 1):
            block.attn.proj.weight /= math.sqrt(2 * layer)
            block.mlp.fc2.weight /= math.sqrt(2 * layer)
        self.linear_projection.weight *= 0.001
        if short_run:
            self.time_embedding.weight[:] = sinusoids(1000 * torch.arange(T) / T, dim, 10_000)
            place = torch.arange(self.side)
            patches = torch.cartesian_prod(place, place)                     # (side*side,2): row, column
            self.pos_embed[0, -len(patches):] = sinusoids(patches, dim // 2, 100).flatten(1)

    def forward(self, x, t, y=None):
        first = [self.time_embedding(t)[:, None]]                            # (B,1,D)
        if self.num_classes:
            y = torch.full_like(t, self.num_classes) if y is None else y
            first.append(self.class_embedding(y)[:, None])                   # (B,1,D)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)             # (B,side*side,D)
        h = torch.cat([*first, patches], dim=1) + self.pos_embed             # (B,N,D), N = len(first) + side*side
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.grad_ckpt else block(h)
        h = self.linear_projection(h[:, len(first):])                        # (B,side*side,p*p*C)
        h = h.unflatten(2, (self.patch_size, self.patch_size, -1))
        h = h.unflatten(1, (self.side, self.side))                           # (B,row,col,p,p,C)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)                  # (B,C,row,p,col,p) -> (B,C,S,S)


RELEASED = {  # (width, channels): the paper's file, what it predicts, and how the samples of its FID were drawn
    (1152, 4): dict(dataset="ema_0.9999_xl.pt", target="x0", sample_steps=50, cfg=1.5),       # FID 2.06
    (1024, 3): dict(dataset="ema_0.9999_large.pt", target="eps", sample_steps=20, cfg=1.5),   # FID 2.28
}


def from_official(state_dict, heads=None):
    """State dict of a released `.pt` file (`ema_0.9999_xl.pt`, ...) -> ViT, every name and shape checked.

    The shapes show the architecture, but not the number of heads: unless given, it is that of SIZES for this width.
    The official time table has 4,000 rows, of which the first 1,000 are in use.

    The ViT gets an attribute `public`, what sampling needs to know of the file: dict(dataset, target, schedule,
    sample_steps, cfg, guidable). dataset names where the samples come from: for weights alone, the name of their
    file. dataset and target are None for a file that is not in RELEASED. guidable: whether the network has a
    null label, which it has if it has classes. Raises ValueError for weights that do not fit.
    """
    class_table = state_dict.get("class_embedding.weight", ())
    num_classes = max(len(class_table) - 1, 0)                               # the last row is the null label
    depth = len([name for name in state_dict if name.endswith(".q_bias")])   # one in every block
    heads_of_width = {size["dim"]: size["heads"] for size in SIZES.values()}
    try:
        T, dim = state_dict["time_embedding.weight"].shape
        _, in_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
        tokens = state_dict["pos_embed"].shape[1]
        patches = tokens - (2 if num_classes else 1)                         # without the time and the class
        img_size = patch_size * math.isqrt(patches)
        heads = heads or heads_of_width.get(dim)
        if not heads:
            raise ValueError(f"heads: must be given, since width {dim} is not one of the paper's")
        model = ViT(img_size, patch_size, in_channels, num_classes, dim, depth, heads, T)
        model.load_state_dict(state_dict)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"no weights of the official ViT: {error!s:.300}") from None
    model.public = dict(dataset=None, target=None, schedule="cosine", sample_steps=50, cfg=1.0,
                        guidable=num_classes > 0)
    model.public |= RELEASED.get((dim, in_channels), {})
    return model
