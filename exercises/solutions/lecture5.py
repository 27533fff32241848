"""Lecture 5: a third network, a small MLP-mixer.

The network below guesses from the noisy image alone: it is told neither the timestep t nor the class y.
Tell it both: make one vector of `width` numbers from t and y for each image, and add it to each of its
patches.
Read model_vit.py: `sinusoids` turns t into numbers that are alike for neighbouring t, and in `ViT` the class
is an embedding with one row more than there are classes, which is the null label and also stands for y =
None.
Check with `python -m pytest exercises -k lecture5`, which trains for 60 steps on the built-in shapes.
When it is green, copy it into a file beside sample.py, import it there, make it a row of `MODELS`, and train.py
trains it, in a few hundred steps.
"""
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
