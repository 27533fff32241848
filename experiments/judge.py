"""The judge, a small classifier of a data set: do samples look like its images, and do they show their labels?"""
import functools

import torch
from torch import nn

from data import built_in, generator
from fid import frechet_distance
from files import say

IMAGES = 12_000                                  # for the judge: five sixths to learn from, the rest to be tested on


def seen(data):
    """Images float32 (n,3,S,S) in [-1,1] and labels (n,): of the shapes some that no run trains on, of a packed
    folder a random choice.
    """
    if data.meta.get("dataset") == "shapes":
        first = 1_000_000                        # training draws the first 100,000
        return built_in(data.size, first + IMAGES).batch(range(first, first + IMAGES))
    order = torch.randperm(len(data), generator=generator("judge", 0, 0))
    return data.batch(order[:IMAGES].numpy())


def trained(x, y, classes):
    """A network that names the images x: two convolutions, 64 features, one logit for each class."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),                                           # (B,32,S/2,S/2)
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),                                          # (B,64,S/4,S/4)
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),                                             # (B,64,4,4) for every S
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),                                                           # (B,64), the features
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


def share_right(net, x, y):
    """The share of images x in [-1,1] that the network gives their labels y."""
    return float((net(x).argmax(1) == y).float().mean())


@functools.cache
def judge(data):
    """The judge of a data set of pixels with classes, a network: images (B,3,S,S) in [-1,1] -> logits (B,classes).

    It is trained here on the CPU, the same every time, for the shapes in seconds. It prints which share it recognises
    of images that it did not learn from, with a warning below 90 %; of the shapes of 16 x 16 it is more than 98 %.
    """
    x, y = seen(data)
    held = len(x) // 6
    with torch.random.fork_rng(devices=[]):      # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(0)
        net = trained(x[held:], y[held:], len(data.classes))
    share = share_right(net, x[:held], y[:held])
    say(f"judge: recognises {share:.1%} of {held:,} real images that it did not learn from")
    if share < 0.9:
        say("warning: the judge knows these data badly, so its recognised and fd_judge say little of samples")
    return net


def recognised(data, images, labels):
    """The share of uint8 images (N,3,S,S) that the judge of the data set gives their labels (N,)."""
    return share_right(judge(data), images / 127.5 - 1, labels)


def fd_judge(data, images, real):
    """Frechet distance of the judge's 64 features, its last layer's input: two sets of uint8 images (N,3,S,S)."""
    network = judge(data)[:-1]
    moments = []
    for part in (images, real):
        features = network(torch.as_tensor(part) / 127.5 - 1).double()
        moments += [features.mean(0), features.T.cov()]
    return frechet_distance(*moments)
