"""Train a DCGAN (Radford, Metz & Chintala 2015), the GAN that stability.py compares with diffusion models.

    python -m experiments.dcgan --out out/gan                          # the built-in images, 16 x 16
    python -m experiments.dcgan --out out/gan32 --data data/cifar10    # a packed folder

A run takes minutes and writes one checkpoint, at its end. With the same --seed, a run of fewer --steps is the
beginning of a longer one, on a CPU to the bit.
"""
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import softplus

from data import Packed, built_in, generator
from files import BadInput, Parser, at_least, processes, progress, read, replace, run

LATENT = 100                                     # length of z, from which an image is made
SIZES = (8, 16, 32, 64, 128)                     # sides of an image for 1, 2, ... layers of stride 2
WIDTHS = (3, 64, 128, 256, 512, 1024)            # channels of an image, and of these layers
_, _, DEVICE = processes()


class DCGAN(nn.Module):
    """.generator maps z (B,100,1,1) to images (B,3,S,S) in [-1,1], .discriminator images to logits (B,1,1,1).

    Each network has n layers of stride 2 between images of S = 4 * 2^n and features of 4 x 4. The layer at the image
    is 64 channels wide, the next 128, and so on. As in its authors' code no convolution has a bias, and the layer at
    the image has no batch norm.
    """

    def __init__(self, size):
        super().__init__()
        layers = SIZES.index(size) + 1
        widths = WIDTHS[:layers + 1]
        up, down = [nn.Tanh()], []                       # of the generator, and of the discriminator
        for near, far in zip(widths, widths[1:]):        # nearer to the image, and farther: `up` grows at its front
            grow = nn.ConvTranspose2d(far, near, 4, 2, 1, bias=False)
            shrink = nn.Conv2d(near, far, 4, 2, 1, bias=False)
            up = [nn.BatchNorm2d(far), nn.ReLU(), grow, *up]
            down += [shrink, nn.BatchNorm2d(far), nn.LeakyReLU(0.2)]
        del down[1]                                      # the batch norm at the image
        first = nn.ConvTranspose2d(LATENT, widths[-1], 4, bias=False)
        last = nn.Conv2d(widths[-1], 1, 4, bias=False)
        self.generator = nn.Sequential(first, *up)
        self.discriminator = nn.Sequential(*down, last)
        for p in self.parameters():
            if p.ndim > 1:                               # a convolution's; batch norms stay at 1 and 0
                nn.init.normal_(p, 0, 0.02)


def generator_loss(D, fake):
    """-log D(G(z)), whose gradient does not vanish where D is sure (Goodfellow et al. 2014). D returns logits, of
    which softplus(-x) is -log sigmoid(x).
    """
    return softplus(-D(fake)).mean()


def discriminator_loss(D, real, fake):
    """-log D(x) - log(1 - D(G(z))). D sees the two batches one after the other, so that its batch norms normalise
    each by itself.
    """
    return softplus(-D(real)).mean() + softplus(D(fake)).mean()


def open_data(dir, sizes=SIZES):
    """The packed folder `dir`, or for None the built-in images, 16 x 16. Raises BadInput for other sizes."""
    data = Packed(dir) if dir else built_in(16)
    if data.latents or data.size not in sizes:
        raise BadInput(f"--data {dir}: expected images, not latents, of a side in {sizes}")
    return data


def batch(data, purpose, seed, k, n=64):
    """Batch number k of a purpose: images (n,3,S,S) and z (n,100,1,1). It depends on the arguments alone."""
    g = generator(purpose, seed, k)
    indices = torch.randint(len(data), (n,), generator=g)
    x, _ = data.batch(indices, g)
    z = torch.randn(n, LATENT, 1, 1, generator=g)
    return x.to(DEVICE), z.to(DEVICE)


def load(path):
    """The DCGAN of a checkpoint, in training mode and on the device, and the checkpoint's dict."""
    state = read(path)
    model = DCGAN(state["size"])
    model.load_state_dict(state["gan"])
    return model.to(DEVICE), state


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default="out/gan", help="folder of the run")
    add("--data", help="packed folder (default: the built-in images)")
    add("--steps", type=at_least(1), default=3000, help="number of steps")
    add("--seed", type=at_least(0), default=0, help="of the initial weights and of the batches")
    args = parser.parse_args()
    ckpt = args.out / "ckpt.pt"
    if ckpt.exists():
        raise BadInput(f"--out {args.out}: holds a run already; choose another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    data = open_data(args.data)
    torch.manual_seed(args.seed)
    model = DCGAN(data.size).to(DEVICE)
    G, D = model.generator, model.discriminator
    adam = torch.optim.Adam(model.parameters(), 2e-4, (0.5, 0.999))
    since = time.monotonic()
    for step in range(args.steps):
        x, z = batch(data, "gan", args.seed, step)
        fake = G(z)

        # a step of the discriminator; the generator has no gradient, so Adam leaves it as it is
        discriminator_loss(D, x, fake.detach()).backward()
        adam.step()
        adam.zero_grad()

        # a step of the generator against the new discriminator, which gets no gradient
        generator_loss(D, fake).backward(inputs=list(G.parameters()))
        adam.step()
        adam.zero_grad()
        progress("steps", step + 1, args.steps, since)
    state = dict(gan=model.state_dict(), size=data.size, data=args.data)
    replace(ckpt, lambda file: torch.save(state, file))


if __name__ == "__main__":
    run(main)
