"""The autoencoder against golden values in both namings, its containers, and what is refused."""
import importlib.util
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, formula, relative

import vae
from files import read
from vae import FILES, VAE, diffusers_name, load_vae, mean_std


@pytest.fixture(scope="module")
def values():
    file = np.load(ROOT / "tests/golden/vae.npz")
    return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def weights(values):
    return formula(values["compvis_keys"], values["compvis_shapes"])


@pytest.fixture(scope="module")
def model(weights):
    return load_vae(weights)


@pytest.fixture(scope="module")
def tiny():
    """Names and shapes right, no memory: each tensor is one number, expanded."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in VAE().state_dict().items()}
    return {name: torch.tensor(zlib.crc32(name.encode()) / 2 ** 32).expand(shape) for name, shape in shapes.items()}


def to_diffusers(state, old=False, dims=2):
    """The writer that the product has no use for: names, and the attention's weights with fewer dimensions."""
    return {diffusers_name(name, old): value.flatten(dims - 1) if ".attn_1." in name and value.dim() == 4 else value
            for name, value in state.items()}


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def refusal(given):
    with pytest.raises(ValueError) as error:
        load_vae(given)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and len(text) < 400, text
    return text


# ------------------------------------------------------------------------------------------------ the network

def test_size_and_names(values, model):
    own = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 83_653_863 and len(own) == 248
    assert sum(p.numel() for p in model.encoder.parameters()) == 34_163_592
    assert sum(p.numel() for p in model.decoder.parameters()) == 49_490_179
    expected = dict(zip(map(str, values["compvis_keys"]), map(str, values["compvis_shapes"])))
    assert {name: str(tuple(value.shape)) for name, value in own.items()} == expected
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}   # 1e-5 hides below the tolerance
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("naming", ["compvis", "diffusers"])
def test_golden(values, naming):
    model = load_vae(formula(values[f"{naming}_keys"], values[f"{naming}_shapes"]))
    x, z = torch.from_numpy(values["x"]), torch.from_numpy(values["z"])
    assert relative(model.moments(x), values[f"{naming}_moments"]) < 1e-4
    assert relative(model.decode(z), values[f"{naming}_decoded"]) < 1e-4


def test_latents_of_a_batch_in_closed_form(model):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 24, 40, generator=g) * 2 - 1                        # odd multiples of 8, not square
    noise = torch.randn(3, 4, 3, 5, generator=g)
    moments = model.moments(x)
    assert moments.shape == (3, 8, 3, 5) and moments.is_contiguous() and not moments.requires_grad
    mean, logvar = moments[:, :4], moments[:, 4:]
    expected = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * 0.18215
    assert relative(model.encode_latent(x, noise), expected) < 1e-6
    assert relative(model.encode_latent(x, 0 * noise), mean * 0.18215) < 1e-6
    image = model.decode_latent(expected)
    assert image.shape == x.shape and relative(image, model.decode(expected / 0.18215)) < 1e-5
    for i in range(3):
        assert relative(model.moments(x[i:i + 1])[0], moments[i]) < 1e-5
        assert relative(model.decode_latent(expected[i:i + 1])[0], image[i]) < 1e-5
    assert (moments[0] - moments[1]).abs().max() > 1e-3
    assert torch.equal(model.moments(x.contiguous(memory_format=torch.channels_last)), moments)


def test_standard_deviation_is_clamped_and_moments_are_not(model, weights):
    logvar = torch.tensor([-1000.0, -30, 0, 20, 1000]).view(1, 1, 1, 5).expand(1, 4, 1, 5)
    mean, std = mean_std(torch.cat([torch.full_like(logvar, 7.0), logvar], 1))
    assert mean.eq(7).all() and relative(std[0, 0, 0].log(), torch.tensor([-15.0, -15, 0, 10, 10])) < 1e-6
    loud = load_vae({**weights, "quant_conv.bias": torch.tensor([0.0] * 4 + [500.0] * 4)})
    assert loud.moments(torch.zeros(1, 3, 8, 8))[:, 4:].min() > 100


def test_upsampling_is_nearest_then_convolution():
    up, x = vae.Upsample(6).double(), torch.randn(2, 6, 5, 3, dtype=torch.float64)
    assert relative(up(x), up.conv(torch.nn.functional.interpolate(x, scale_factor=2.0))) < 1e-12
    down = vae.Downsample(6).double()
    assert relative(down(x[:, :, :4, :2]), down.conv(torch.nn.functional.pad(x[:, :, :4, :2], (0, 1, 0, 1)))) < 1e-12


def test_a_large_batch_goes_in_parts(model, monkeypatch):
    """Every image once and in order, whatever the parts: 2 of 256 x 256 at a time on a CPU, 1 of a larger one."""
    for module in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
        monkeypatch.setattr(getattr(model, module), "forward", lambda part: sizes.append(len(part)) or part)
    for side, parts in ((256, [2, 2, 1]), (512, [1] * 5), (64, [5])):
        sizes, x, z = [], torch.randn(5, 3, side, side), torch.randn(5, 4, side // 8, side // 8)
        assert torch.equal(model.moments(x), x) and torch.equal(model.decode(z), z)
        assert sizes[::2] == sizes[1::2] == parts * 2


@pytest.mark.parametrize("shape", [(1, 3, 20, 16), (1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16)])
def test_wrong_sizes_are_refused(model, shape):
    with pytest.raises(ValueError, match="^x: found .* multiples of 8$"):
        model.moments(torch.zeros(shape))


def test_wrong_latents_are_refused(model):
    for shape in ((1, 8, 2, 2), (4, 2, 2)):
        with pytest.raises(ValueError, match="^z: found"):
            model.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="^noise: found"):
        model.encode_latent(torch.zeros(2, 3, 8, 8), torch.zeros(1, 4, 1, 1))


def test_file_stands_alone(tmp_path):
    (tmp_path / "vae.py").write_bytes((ROOT / "vae.py").read_bytes())
    subprocess.run([sys.executable, "-c", "import vae, sys; assert 'safetensors' not in sys.modules"], cwd=tmp_path, check=True)


# ------------------------------------------------------------------------------------------------- the weights

def test_names_round_trip(values, weights):
    found = {name: str(tuple(value.shape)) for name, value in to_diffusers(weights).items()}
    assert found == dict(zip(map(str, values["diffusers_keys"]), map(str, values["diffusers_shapes"])))
    old = to_diffusers(weights, old=True)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old and not any(".to_" in name for name in old)
    assert "encoder.mid_block.attentions.0.query.weight" in old and len(old) == 248
    for state in (to_diffusers(weights), old):
        assert same(load_vae(state), weights)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_attention_weights_of_any_dimension(tiny, dims):
    for old in (False, True):
        state = to_diffusers(tiny, old, dims)
        assert sum(value.dim() == dims for name, value in state.items() if "attentions.0" in name) == 8
        assert same(load_vae(state), tiny)


def test_wrapped_checkpoints(tiny):
    extra = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(1),
             "loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.weight": torch.zeros(3)}
    assert same(load_vae({**tiny, **extra}), tiny)
    assert same(load_vae({"state_dict": {**tiny, **extra}, "epoch": 3}), tiny)
    whole = {f"first_stage_model.{name}": value for name, value in {**tiny, **extra}.items()}
    whole |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1), **extra}
    assert same(load_vae({"state_dict": whole}), tiny) and same(load_vae(whole), tiny)
    half = {name: value.half() for name, value in tiny.items()}
    assert load_vae(half).quant_conv.weight.dtype == torch.float32


def test_containers(weights, tmp_path):
    """Each container at its full size, one naming each; the old torch format too."""
    extra = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(1, dtype=torch.int32)}
    torch.save({"state_dict": {**weights, **extra}}, tmp_path / "a.ckpt")
    torch.save(weights, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    torch.save(to_diffusers(weights, old=True), tmp_path / "a.bin")
    for name in ("a.ckpt", "a.pt", "a.bin"):
        assert same(load_vae(tmp_path / name), weights), name
        (tmp_path / name).unlink()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({**weights, **extra}, tmp_path / "a.safetensors", {"format": "pt"})
    assert same(load_vae(tmp_path / "a.safetensors"), weights)


class Foreign:
    """What a Lightning checkpoint holds beside its tensors; unpickling it would leave a mark."""
    unpickled = 0

    def __setstate__(self, state):
        Foreign.unpickled += 1


def test_foreign_and_damaged_files_are_refused(tmp_path, monkeypatch):
    few, object = {"quant_conv.bias": torch.zeros(8)}, Foreign()
    object.mark = 1
    torch.save(few, tmp_path / "few.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"state_dict": few, "callbacks": object}, tmp_path / "objects.ckpt")
    torch.save({"callbacks": object}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(dict(few, big=torch.zeros(9999)), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-9])
    (tmp_path / "cut.safetensors").write_bytes(b"\x40" + bytes(7) + b'{"quant_conv.bias"')
    packaged = ["safetensors"] if importlib.util.find_spec("safetensors") else []
    for suffix in ("pt", "ckpt", "bin", *packaged):
        (tmp_path / f"text.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:c6a5\nsize 9\n")
        (tmp_path / f"page.{suffix}").write_text("<!DOCTYPE html>\n<html>Not found</html>\n")
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
        for name in ("text", "page", "empty"):
            text = refusal(tmp_path / f"{name}.{suffix}")
            assert f"{name}.{suffix}" in text and "cannot be loaded" in text, text
    for name, said in (("few.pt", "found 1 tensors, expected the 248"), ("list.pt", "found list"), ("objects.ckpt", "foreign object"),
                       ("old.ckpt", "cannot be loaded"), ("cut.pt", "cannot be loaded"), ("none.pt", "no such file")):
        text = refusal(tmp_path / name)
        assert said in text and name in text, text
    if packaged:
        assert "cannot be loaded" in refusal(tmp_path / "cut.safetensors")
    assert Foreign.unpickled == 0 and read(tmp_path / "whole.pt")["big"].shape == (9999,)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(tmp_path / "cut.safetensors")


def test_names_and_shapes_are_strict(tiny):
    for state in (tiny, to_diffusers(tiny), to_diffusers(tiny, old=True)):
        name = next(name for name in state if name.endswith("conv1.weight"))
        lacks = {key: value for key, value in state.items() if key != name}
        assert f"missing ['{name}']" in refusal(lacks)
        assert "unexpected ['extra']" in refusal({**state, "extra": torch.zeros(1)})
        assert f"{name}: found shape (1, 2)" in refusal({**state, name: torch.zeros(1, 2)})
        assert "quant_conv.weight: found shape (8, 8)" in refusal({**state, "quant_conv.weight": torch.zeros(8, 8)})
        assert "quant_conv.weight: found shape ('str',)" in refusal({**state, "quant_conv.weight": "no tensor"})
    assert "found shape (512,)" in refusal({**tiny, "encoder.mid.attn_1.q.weight": torch.zeros(512)})
    mixed = {**to_diffusers(tiny), **{name: value for name, value in tiny.items() if name.startswith("encoder")}}
    assert "unexpected" in refusal(mixed)
    for other in ({}, {1: 2}, {"state_dict": 3}, {"first_stage_model.x": 1}):
        assert "expected" in refusal(other)


def test_published_files_are_known():
    assert FILES.get("735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75") == "sd-vae-ft-mse-original .safetensors"
    assert FILES.get("0" * 64) is None and len(vae.FILES) == 4 and all(len(digest) == 64 for digest in vae.FILES)
