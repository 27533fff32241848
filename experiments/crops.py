"""Random crops of eight colour photographs, as a packed data set. The class of a crop is its photograph.

    pip install scikit-image             # has the photographs among its files; its code is not used
    python -m experiments.crops
    python train.py --dataset crops
"""
import importlib.util
from pathlib import Path

import numpy as np
import torch

from data import begin, contact_sheet, fill, generator, load_image
from files import BadInput, Parser, at_least, hash_file, run, say

PHOTOGRAPHS = ("astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png "
               "retina.jpg rocket.jpg").split()


def crop(photograph, size, rng):
    """uint8 (3,size,size) from a random place of a photograph (H,W,3)."""
    height, width, _ = photograph.shape
    top = torch.randint(height - size + 1, (), generator=rng)
    left = torch.randint(width - size + 1, (), generator=rng)
    return photograph[top:top + size, left:left + size].transpose(2, 0, 1)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/crops"), help="packed folder to write")
    add("--count", type=at_least(8), default=50_000, help="number of crops, taken in turn from the photographs")
    add("--size", type=at_least(8, 256), default=32, help="side in pixels")
    add("--seed", type=at_least(0), default=0, help="of the crops' places")
    args = parser.parse_args()
    package = importlib.util.find_spec("skimage")                            # finds it and does not import it
    if not package:
        raise BadInput("the photographs come with a package: pip install scikit-image")
    files = [Path(package.submodule_search_locations[0], "data", name) for name in PHOTOGRAPHS]
    photographs = [np.asarray(load_image(file)) for file in files]
    labels = np.arange(args.count) % len(files)
    meta = dict(dataset="crops", split="train", count=args.count, size=args.size,
                classes=[file.stem for file in files], crop=f"random, seed {args.seed}",
                photographs=[hash_file(file) for file in files])

    def make(rows):
        crops = []
        for row in rows:
            rng = generator("crop", args.seed, int(row))
            crops.append(crop(photographs[labels[row]], args.size, rng))
        return np.array(crops)

    begin(args.out, meta, rank=0)
    fill(args.out, meta, labels, make, rank=0, world=1)
    contact_sheet(args.out)                      # comes last, as min_snr.sh takes sheet.png for a finished pack
    say(f"{args.out}: {args.count:,} crops of {len(files)} photographs")


if __name__ == "__main__":
    run(main)
