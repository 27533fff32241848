"""Train a DCGAN (Radford, Metz & Chintala 2015), the GAN whose training stability.py sets beside diffusion's.

    python -m experiments.dcgan --out out/gan                          # the built-in images, 16 x 16
    python -m experiments.dcgan --out out/gan32 --data data/cifar10    # a packed folder

A run takes minutes and writes one checkpoint, at its end. A shorter run with the same seed is a longer one's
early past, on a CPU to the bit.
"""
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import softplus

from data import Packed, built_in, generator
from files import BadInput, Parser, at_least, processes, progress, read, replace, run

LATENT = 100                                     # numbers that an image is made from
SIZES = (8, 16, 32, 64, 128)                     # image sides
WIDTHS = (3, 64, 128, 256, 512, 1024)            # channels, counted from the image
_, _, DEVICE = processes()


class DCGAN(nn.Module):
    """.generator maps z (B,100,1,1) to images (B,3,S,S) in [-1,1], .discriminator images to logits (B,1,1,1).

    S = 4 * 2^n takes n layers of stride 2 in each network. They are 64, 128, 256, ... channels wide, counted
    from the image. As in its authors' code no convolution has a bias, and no norm is beside the image.
    """

    def __init__(self, size):
        super().__init__()
        widths = WIDTHS[:SIZES.index(size) + 2]
        up, down = [nn.Tanh()], []
        for inner, outer in zip(widths, widths[1:]):                         # up is built from its end
            grow = nn.ConvTranspose2d(outer, inner, 4, 2, 1, bias=False)
            shrink = nn.Conv2d(inner, outer, 4, 2, 1, bias=False)
            up = [nn.BatchNorm2d(outer), nn.ReLU(), grow, *up]
            down += [shrink, nn.BatchNorm2d(outer), nn.LeakyReLU(0.2)]
        del down[1]                                                          # the norm beside the image
        first = nn.ConvTranspose2d(LATENT, outer, 4, bias=False)
        last = nn.Conv2d(outer, 1, 4, bias=False)
        self.generator = nn.Sequential(first, *up)
        self.discriminator = nn.Sequential(*down, last)
        for p in self.parameters():
            if p.ndim > 1:                                                   # norms begin with 1 and 0
                nn.init.normal_(p, 0, 0.02)


def generator_loss(D, fake):
    """-log D(G(z)), the form that does not saturate (Goodfellow et al. 2014); D returns logits."""
    return softplus(-D(fake)).mean()


def discriminator_loss(D, real, fake):
    """-log D(x) - log(1 - D(G(z))); the real and the fake batch each have their own batch statistics."""
    return softplus(-D(real)).mean() + softplus(D(fake)).mean()


def open_data(dir, sizes=SIZES):
    """The packed folder dir, or the built-in images, 16 x 16, where it is None. Raises BadInput."""
    data = Packed(dir) if dir else built_in(16)
    if data.latents or data.size not in sizes:
        raise BadInput(f"--data {dir}: expected images, not latents, of a side in {sizes}")
    return data


def batch(data, purpose, seed, k, n=64):
    """Images (n,3,S,S) and z (n,100,1,1) of batch number k; they depend on (purpose, seed, k, n) alone."""
    g = generator(purpose, seed, k)
    indices = torch.randint(len(data), (n,), generator=g)
    x, _ = data.batch(indices, g)
    z = torch.randn(n, LATENT, 1, 1, generator=g)
    return x.to(DEVICE), z.to(DEVICE)


def load(path):
    """-> (DCGAN in training mode on the device, the checkpoint's dict)."""
    state = read(path)
    model = DCGAN(state["size"])
    model.load_state_dict(state["gan"])
    return model.to(DEVICE), state


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default="out/gan", help="folder of the run")
    add("--data", help="packed folder in place of the built-in images")
    add("--steps", type=at_least(1), default=3000, help="number of steps")
    add("--seed", type=at_least(0), default=0, help="of the first weights and of the batches")
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

        # the discriminator moves first; Adam leaves alone what has no gradient
        discriminator_loss(D, x, fake.detach()).backward()
        adam.step()
        adam.zero_grad()

        # the generator moves against the new discriminator
        generator_loss(D, fake).backward(inputs=list(G.parameters()))
        adam.step()
        adam.zero_grad()
        progress("steps", step + 1, args.steps, since)
    state = dict(gan=model.state_dict(), size=data.size, data=args.data)
    replace(ckpt, lambda file: torch.save(state, file))


if __name__ == "__main__":
    run(main)
