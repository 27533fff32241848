"""Train a DCGAN (Radford, Metz & Chintala 2015), the GAN whose training stability.py sets beside diffusion's.

    python -m experiments.dcgan --out out/gan                 # the built-in images, 16 x 16
    python -m experiments.dcgan --out out/gan --steps 6000    # the same run, longer

A run that was stopped goes on with the same command. On a CPU it ends in the same weights to the bit as a run
that was not stopped.
"""
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import softplus

from data import Packed, built_in, generator
from files import BadInput, Parser, at_least, progress, read, replace, run

BATCH = 64                                       # images a step
LATENT = 100                                     # numbers that an image is made from
SAVE_EVERY = 100                                 # steps
SIZES = (8, 16, 32, 64, 128)                     # image sides
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class DCGAN(nn.Module):
    """.generator maps z (B,100,1,1) to images (B,3,S,S) in [-1,1], .discriminator images to logits (B,1,1,1).

    S = 4 * 2^n takes n layers of stride 2 in each network. They are 64, 128, 256, ... channels wide, counted
    from the image.
    """

    def __init__(self, size):
        super().__init__()
        self.num_classes, self.in_channels, self.img_size = 0, LATENT, 1     # of z, as sample.start() asks
        widths = [3, *(64 * 2 ** i for i in range(SIZES.index(size) + 1))]
        layers = list(zip(widths, widths[1:]))                               # no norms beside the image

        up = [nn.ConvTranspose2d(LATENT, widths[-1], 4, bias=False)]         # (B,widths[-1],4,4)
        for a, b in reversed(layers):
            up += [nn.BatchNorm2d(b), nn.ReLU()]
            up.append(nn.ConvTranspose2d(b, a, 4, 2, 1, bias=a == 3))        # (B,a,2 side,2 side)
        self.generator = nn.Sequential(*up, nn.Tanh())                       # (B,3,S,S)

        down = []
        for a, b in layers:
            down.append(nn.Conv2d(a, b, 4, 2, 1, bias=a == 3))               # (B,b,side/2,side/2)
            if a > 3:
                down.append(nn.BatchNorm2d(b))
            down.append(nn.LeakyReLU(0.2))
        self.discriminator = nn.Sequential(*down, nn.Conv2d(b, 1, 4))        # (B,1,1,1)

        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 1:                                                # the scale of a norm
                nn.init.normal_(p, 1, 0.02)
            else:
                nn.init.normal_(p, 0, 0.02)


def generator_loss(D, fake):
    """-log D(G(z)), the form that does not saturate (Goodfellow et al. 2014); D returns logits."""
    return softplus(-D(fake)).mean()


def discriminator_loss(D, real, fake):
    """-log D(x) - log(1 - D(G(z))); the real and the fake batch each have their own batch statistics."""
    return softplus(-D(real)).mean() + softplus(D(fake)).mean()


def open_data(dir, size):
    """The packed folder dir, or the built-in images where it is None. Raises BadInput for another shape."""
    data = Packed(dir) if dir else built_in(size)
    if (data.channels, data.size) != (3, size):
        raise BadInput(f"--data {dir}: found {data.channels} channels, side {data.size}, expected 3, {size}")
    return data


def batch(data, purpose, seed, k, n=BATCH):
    """Images (n,3,S,S) and z (n,100,1,1) of batch number k; they depend on (purpose, seed, k, n) alone."""
    g = generator(purpose, seed, k)
    indices = torch.randint(len(data), (n,), generator=g)
    x, _ = data.batch(indices.numpy(), g)
    z = torch.randn(n, LATENT, 1, 1, generator=g)
    return x.to(DEVICE), z.to(DEVICE)


def load(path):
    """-> (DCGAN in eval mode on the device, config) of a checkpoint that this script wrote."""
    state = read(path)
    model = DCGAN(state["config"]["size"])
    model.load_state_dict(state["model"])
    return model.to(DEVICE).eval(), state["config"]


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default="out/gan", help="folder of the run")
    add("--data", help="packed folder in place of the built-in images")
    add("--size", type=int, choices=SIZES, default=16, help="image side")
    add("--steps", type=at_least(1), default=3000, help="total number of steps")
    add("--seed", type=at_least(0), default=0, help="of the first weights and of the batches")
    args = parser.parse_args()
    data = open_data(args.data, args.size)
    config = dict(model="dcgan", data=args.data, size=args.size, seed=args.seed)

    # the networks, and where they are now
    torch.manual_seed(args.seed)
    model = DCGAN(args.size).to(DEVICE)
    G, D = model.generator, model.discriminator
    adam_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    adam_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    parts = dict(model=model, adam_G=adam_G, adam_D=adam_D)
    first, ckpt = 0, args.out / "ckpt.pt"
    if ckpt.exists():
        state = read(ckpt)
        if state.get("config") != config:
            raise BadInput(f"--out {args.out}: holds another run, {state.get('config')}; expected {config}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    args.out.mkdir(parents=True, exist_ok=True)

    since = time.monotonic()
    for step in range(first, args.steps):
        x, z = batch(data, "gan", args.seed, step)
        fake = G(z)

        # the discriminator moves first
        adam_D.zero_grad()
        discriminator_loss(D, x, fake.detach()).backward()
        adam_D.step()

        # the generator moves against the new discriminator
        adam_G.zero_grad()
        generator_loss(D, fake).backward()
        adam_G.step()

        done = step + 1
        if done % SAVE_EVERY == 0 or done == args.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(step=done, config=config)
            replace(ckpt, lambda file: torch.save(state, file))
            progress("steps", done, args.steps, since, first)


if __name__ == "__main__":
    run(main)
