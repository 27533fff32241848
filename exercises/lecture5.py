"""Lecture 5: a third network, a small MLP-mixer.

The network below guesses from the noisy image alone: it is told neither the timestep t nor the class y.
Tell it both: make one vector of `width` numbers from t and y for each image, and add it to each of its
patches.
Read model_vit.py. `sinusoids` turns t into numbers that are alike for neighbouring t. In `ViT` the class is an
embedding. It has one row more than there are classes: the null label, also used where y is None.
Check with `python -m pytest exercises -k lecture5`, which trains for 60 steps on the built-in shapes.
When it is green, copy `Mixer` into a file beside sample.py, import it there, and make it a row of `MODELS`:
train.py then trains it.
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
        self.across_patches = mlp(self.side ** 2)
        self.across_width = mlp(width)
        self.join = nn.ConvTranspose2d(width, in_channels, 4, stride=4)

    def forward(self, x, t, y=None):
        h = self.cut(x).flatten(2)                                           # (B,width,patches)
        h = h + self.across_patches(h)
        h = h.transpose(1, 2)                                                # (B,patches,width)
        h = h + self.across_width(h)
        h = h.transpose(1, 2).unflatten(2, (self.side, self.side))           # (B,width,S/4,S/4)
        return self.join(h)
