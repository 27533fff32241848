"""The paper's vanilla ViT: time and class are learned tokens before the patches (section 4.1, appendix C.1).

Facts of the official code that the released weights depend on: no final norm before the head, norm eps 1e-6,
exact GELU, q and v have a bias and k has none, and head width is dim // heads even where that does not divide
dim (ViT-Small: 6 heads of 85 in a width of 512). Parameter names are the official ones.
"""
import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SIZES = {  # appendix C.1, table 6; tiny is ours, for the built-in images on a CPU
    "vit-tiny": dict(dim=192,  depth=4,  heads=3, short_run=True),
    "vit-s":    dict(dim=512,  depth=13, heads=6),
    "vit-b":    dict(dim=768,  depth=12, heads=12),
    "vit-l":    dict(dim=1024, depth=21, heads=16),
    "vit-xl":   dict(dim=1152, depth=28, heads=16),
}


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, inner = heads, dim // heads * heads
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))   # on k it would add the same to all logits of a row
        self.proj = nn.Linear(inner, dim)

    def forward(self, x):                                                    # (B,N,D)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                             # (B,N,3*H*d)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # each (B,H,N,d), no copy
        x = F.scaled_dot_product_attention(q, k, v)                          # (B,H,N,d)
        return self.proj(x.transpose(1, 2).flatten(2))                       # (B,N,D)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()                                           # named as in the released files
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):                                                    # (B,N,D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sinusoids(positions, dim, longest):
    """(N,) -> (N,dim): cosines and sines of wavelengths from 2 pi to 2 pi longest (Vaswani et al. 2017)."""
    angles = positions[:, None] * torch.exp(-math.log(longest) * torch.arange((dim + 1) // 2) / (dim / 2))
    return torch.cat([angles.cos(), angles.sin()], 1)[:, :dim]


class ViT(nn.Module):
    """model(x (B,C,S,S), t (B,) long, y (B,) long or None) -> (B,C,S,S), whatever the prediction target.

    num_classes = 0 is unconditional; otherwise labels are 0 .. num_classes - 1, the null label of guidance is
    num_classes, and y = None means the null label. img_size must be a multiple of patch_size.
    grad_ckpt = True keeps the blocks' inputs alone and computes the rest again for the gradient.
    short_run is for narrow networks and a few thousand steps: the time and position tables, still learned,
    start from sinusoids, so that neighbours begin alike, and linear layers from 1 / sqrt(dim), not 0.02.
    """

    grad_ckpt = False

    def __init__(self, img_size, patch_size, in_channels, num_classes, dim, depth, heads, T=1000,
                 short_run=False):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size: found {img_size}, not a multiple of the patch size {patch_size}")
        self.img_size, self.patch_size = img_size, patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.tokens = 2 if num_classes else 1                                # in front of the patches
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.time_embedding = nn.Embedding(T, dim)
        if num_classes:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)        # last row: the null label
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens + (img_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.linear_projection = nn.Linear(dim, patch_size ** 2 * in_channels)
        self.init_weights(short_run)

    def init_weights(self, short_run):
        """The official initialisation, in which the time and class tables keep PyTorch's N(0,1)."""
        T, dim = self.time_embedding.weight.shape
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=dim ** -0.5 if short_run else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        with torch.no_grad():
            for layer, block in enumerate(self.blocks, 1):
                block.attn.proj.weight /= math.sqrt(2 * layer)
                block.mlp.fc2.weight /= math.sqrt(2 * layer)
            self.linear_projection.weight *= 0.001
            if short_run:
                self.time_embedding.weight.copy_(sinusoids(1000 * torch.arange(T) / T, dim, 10_000))
                side = torch.arange(self.img_size // self.patch_size)
                row, col = sinusoids(side, dim // 2, 100), sinusoids(side, dim - dim // 2, 100)
                grid = torch.cat([row[:, None].expand(-1, len(side), -1), col.expand(len(side), -1, -1)], 2)
                self.pos_embed[0, self.tokens:] = grid.flatten(0, 1)

    def forward(self, x, t, y=None):
        p, side = self.patch_size, self.img_size // self.patch_size
        if x.shape[1:] != (shape := (self.in_channels, self.img_size, self.img_size)):
            raise ValueError(f"x: found {tuple(x.shape)}, expected (B, *{shape})")
        tokens = [self.time_embedding(t)[:, None]]                           # (B,1,D)
        if self.num_classes:
            y = torch.full_like(t, self.num_classes) if y is None else y
            tokens.append(self.class_embedding(y)[:, None])                  # (B,1,D)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)             # (B,side*side,D)
        x = torch.cat([*tokens, patches], dim=1) + self.pos_embed            # (B,N,D)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_ckpt else block(x)
        x = self.linear_projection(x[:, self.tokens:])                       # (B,side*side,p*p*C)
        x = x.view(-1, side, side, p, p, self.in_channels)                   # (B,row,col,p,p,C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, side * p, side * p)


def from_official(state_dict, heads=None):
    """The paper's released `.pt` files (`ema_0.9999_xl.pt`, ...) -> ViT, every name and shape checked.

    The architecture is read off the shapes; heads, which no shape shows, off the width (512, 768, 1024, 1152
    -> 6, 12, 16, 16) unless given. Of the official time table's 4,000 rows 1,000 are used; the class table's
    last row is the null label. Raises ValueError for what is not such a file.
    """
    try:
        dim, in_channels, patch, _ = state_dict["patch_embed.proj.weight"].shape
        tokens, (rows, _) = state_dict["pos_embed"].shape[1], state_dict["time_embedding.weight"].shape
        depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
        num_classes = len(state_dict.get("class_embedding.weight", [0])) - 1
    except Exception as error:                                           # whatever damage makes them raise
        raise ValueError(f"not a state dict of the official ViT: {' '.join(str(error).split())}") from None
    heads = heads or {size["dim"]: size["heads"] for size in SIZES.values() if size["dim"] >= 512}.get(dim)
    if heads is None or heads < 1:
        raise ValueError(f"heads: must be given, since width {dim} is not one of the paper's")
    side = math.isqrt(tokens - (2 if num_classes else 1))
    T = min(rows, 1000)
    state_dict = {**state_dict, "time_embedding.weight": state_dict["time_embedding.weight"][:T]}
    try:
        if not side * T:
            raise ValueError("found no patches, or no times")
        with torch.device("meta"):                                       # no memory until shapes are right
            model = ViT(side * patch, patch, in_channels, num_classes, dim, depth, heads, T)
        copy.deepcopy(model).load_state_dict(state_dict, assign=True)
        model = model.to_empty(device=torch.get_default_device())
        model.load_state_dict(state_dict)
    except Exception as error:
        raise ValueError(f"not a state dict of the official ViT: {' '.join(str(error).split())}") from None
    return model
