"""A small classifier of a data set: do samples look like its images, and do they show their labels?"""
import functools

import torch
from torch import nn

from data import built_in, generator
from fid import frechet_distance
from files import say

IMAGES = 12_000                                  # that the classifier sees; it learns from all but a sixth


def seen(data):
    """Images float32 (n,3,S,S) in [-1,1] and labels (n,): of the shapes some that no run trains on, of a
    packed folder a random choice.
    """
    if data.meta.get("dataset") == "shapes":
        first = 1_000_000                        # training draws the first 100,000
        return built_in(data.size, first + IMAGES).batch(range(first, first + IMAGES))
    order = torch.randperm(len(data), generator=generator("judge", 0, 0))
    return data.batch(order[:IMAGES].numpy())


@functools.cache
def judge(data):
    """The classifier of an Images of pixels, trained here on the CPU in seconds, the same every time: images
    (B,3,S,S) in [-1,1] -> logits (B,classes). It says how many of the images that it did not learn from it
    recognises: of the shapes of 16 x 16 more than 98 %.
    """
    x, y = seen(data)
    held = len(x) // 6
    with torch.random.fork_rng(devices=[]):      # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(0)
        net = trained(x[held:], y[held:], len(data.classes))
    share = float((net(x[:held]).argmax(1) == y[:held]).float().mean())
    say(f"judge: recognises {share:.1%} of {held:,} real images that it did not learn from")
    drawn_clearly = data.meta.get("dataset") == "shapes" and data.size >= 16
    assert share > 0.98 or not drawn_clearly
    return net


def trained(x, y, classes):
    """A network of two convolutions that names the images x: 64 features, then the logits."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),                                           # (B,32,S/2,S/2)
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),                                          # (B,64,S/4,S/4)
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),                                             # of 16 x 16: no change
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.requires_grad_(False)


def recognised(data, images, labels):
    """The share of uint8 images (N,3,S,S) that the classifier of the data set gives their labels (N,)."""
    found = judge(data)(images / 127.5 - 1).argmax(1)
    return float((found == labels).float().mean())


def fd_judge(data, images, real):
    """Frechet distance of the 64 features before the last layer: two sets of uint8 images (N,3,S,S)."""
    network = judge(data)[:-1]
    moments = []
    for part in (images, real):
        features = network(torch.as_tensor(part) / 127.5 - 1).double()
        moments += [features.mean(0), features.T.cov()]
    return frechet_distance(*moments)
