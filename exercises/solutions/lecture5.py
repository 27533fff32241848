"""Lecture 5, solved: a vector of t and y is added to every patch."""
import torch
from torch import nn

from model_vit import sinusoids


def mlp(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Mixer(nn.Module):
    """model(x (B,C,S,S), t (B,) long, y (B,) long or None) -> (B,C,S,S), for any B. S is a multiple of 4.

    Labels are 0 .. num_classes - 1, and num_classes is the null label.
    """

    def __init__(self, img_size, in_channels, num_classes, width=64):
        super().__init__()
        self.img_size = img_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.side = img_size // 4                                            # in patches
        self.cut = nn.Conv2d(in_channels, width, 4, stride=4)
        self.width = width
        self.time = mlp(width)
        self.label = nn.Embedding(num_classes + 1, width)                    # last row: the null label
        self.across_patches = mlp(self.side ** 2)
        self.across_width = mlp(width)
        self.join = nn.ConvTranspose2d(width, in_channels, 4, stride=4)

    def forward(self, x, t, y=None):
        h = self.cut(x).flatten(2)                                           # (B,width,patches)
        if y is None:
            y = torch.full_like(t, self.num_classes)
        told = self.time(sinusoids(t, self.width, 10_000)) + self.label(y)   # (B,width)
        h = h + told[:, :, None]
        h = h + self.across_patches(h)
        h = h.transpose(1, 2)                                                # (B,patches,width)
        h = h + self.across_width(h)
        h = h.transpose(1, 2).unflatten(2, (self.side, self.side))           # (B,width,S/4,S/4)
        return self.join(h)
