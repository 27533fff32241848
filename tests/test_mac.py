"""A Mac's GPU, mps, where there is none: its tensors hold values on the CPU, and refuse what it refuses."""
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, relative
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sample
import train
from diffusion import Diffusion
from files import BadInput
from model_unet import UNet

MPS, META = torch.device("mps"), torch.device("meta")


class OnMac(torch.Tensor):
    """A tensor that is on mps for Python, and on meta for PyTorch's core, whose build for CPUs has no mps."""
    device, is_mps = MPS, True

    def __new__(cls, values):
        if values.dtype == torch.float64:
            raise TypeError("float64 on mps")
        return cls._make_wrapper_subclass(cls, values.shape, values.stride(), dtype=values.dtype, device=META)

    def __init__(self, values):
        self.values = values

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)

    __torch_dispatch__ = None                                                # the class Mac below has one


def on_meta(value):
    return META if isinstance(value, torch.device) and value == MPS else value


class Names(TorchFunctionMode):
    """What is asked for on mps is asked for on meta."""

    def __torch_function__(self, f, types, args=(), how=None):
        if f is torch.device:
            return f(*args)
        args = [on_meta(value) for value in args]
        how = {key: on_meta(value) for key, value in (how or {}).items()}
        if f is torch.tensor:                                                # it never comes to Mac
            return f(*args).to(how.get("device", "cpu"))
        return f(*args, **how)


class Mac(TorchDispatchMode):
    """Computes on the values. A tensor of another device is refused but for copies and single numbers."""

    def __torch_dispatch__(self, f, types, args=(), how=None):
        how = dict(how or {})
        tensors = [leaf for leaf in tree_leaves((args, how)) if isinstance(leaf, torch.Tensor)]
        ours = [isinstance(tensor, OnMac) for tensor in tensors]
        foreign = [tensor for tensor in tensors if not isinstance(tensor, OnMac) and tensor.dim()]
        if any(ours) and foreign and "copy" not in f.__name__:
            raise TypeError(f"{f} of mps and cpu")
        stays = any(ours)
        if how.get("device"):
            stays = how["device"] == META
            how["device"] = torch.device("cpu")
        args_of_values, how = tree_map_only(OnMac, lambda tensor: tensor.values, (args, how))
        found = f(*args_of_values, **how)
        if f._schema.is_mutable and found is not None:                       # in place
            return args[0]
        return tree_map_only(torch.Tensor, OnMac, found) if stays else found


UNET = dict(channels=32, channel_mult=(1, 1), res_blocks=1, attention_resolutions=(4,))
TRAIN = """train.py --steps 3 --batch-size 8 --size 8 --log-every 1 --grad-clip 1 --importance
--timesteps laplace --drop 0.5"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(device, "train.py --steps 3") runs a script in this process, on mps on the Mac."""
    def call(device, words):
        monkeypatch.setattr(sys, "argv", [*words.split(), "--device", device])
        main = sys.modules[words.partition(".")[0]].main
        if device == "cpu":
            return main()
        monkeypatch.setattr(torch.mps, "is_available", lambda: True)
        with Names(), Mac():
            main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sample.MODELS, "vit-tiny", SMALL)
    monkeypatch.setitem(sample.MODELS, "unet-tiny", (UNet, UNET))
    monkeypatch.setattr(train, "sanity", lambda *_: 0.0)
    return call


@pytest.mark.parametrize("network, target, solver", [
    ("vit-tiny", "x0", "heun"),
    ("vit-tiny", "eps", "euler"),
    ("unet-tiny", "v", "dpm++2m"),
])
def test_a_mac_trains_and_samples_as_a_cpu_does_without_float64(network, target, solver, run):
    for device in "cpu", "mps":
        run(device, f"{TRAIN} --model {network} --target {target} --sample-steps 2 --out {device}")
        run(device, f"sample.py --ckpt cpu --raw --n 4 --steps 5 --solver {solver} --cfg 2 --out {device}.png")
    cpu, mac = (np.genfromtxt(f"{device}/log.csv", delimiter=",", names=True) for device in ("cpu", "mps"))
    assert relative(mac["loss"], cpu["loss"]) < 1e-5
    cpu, mac = (np.asarray(Image.open(f"{device}.png")).astype(int) for device in ("cpu", "mps"))
    assert abs(mac - cpu).max() <= 1


def test_float64_is_refused_on_a_mac(run):
    with pytest.raises(BadInput, match="--dtype float64: --device mps has none"):
        run("mps", "train.py --dtype float64")


def test_several_processes_are_refused_on_a_mac(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="--device mps: is for one process"):
        run("mps", "train.py")


def test_tables_stay_away_from_a_mac():
    assert Diffusion().to("mps").weight.is_cpu
