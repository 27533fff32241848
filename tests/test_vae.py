"""The autoencoder against golden values, its weights in every naming and container, and packing as latents."""
import functools
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, formula, relative
from PIL import Image
from test_data import WNIDS, contents, dies
from torch.nn import functional as F

import vae
from data import Packed, shapes
from vae import DIFFUSERS, OLD, SCALE, VAE, diffusers_name, load_vae, mean_std


@pytest.fixture(scope="session")
def values():
    file = np.load(ROOT / "tests/golden/vae.npz")
    return {key: file[key] for key in file.files}


@pytest.fixture(scope="session")
def weights(values):
    return formula(values["compvis_keys"], values["compvis_shapes"])


@pytest.fixture(scope="session")
def model(weights):
    return load_vae(weights)


@pytest.fixture(scope="session")
def tiny():
    """Names and shapes right, no memory: each tensor is one number, expanded."""
    with torch.device("meta"):
        own = VAE().state_dict()
    numbers = {name: torch.tensor(zlib.crc32(name.encode()) / 2 ** 32) for name in own}
    return {name: number.expand(own[name].shape) for name, number in numbers.items()}


def to_diffusers(state, words=DIFFUSERS, dims=2):
    """Diffusers' names, and the attention's weights with fewer dimensions."""
    renamed = {}
    for name, value in state.items():
        if ".attn_1." in name and value.dim() == 4:
            value = value.flatten(dims - 1)
        renamed[diffusers_name(name, words)] = value
    return renamed


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


# ------------------------------------------------------------------------------------------------ the network

def test_size_and_names(values, model):
    expected = dict(zip(map(str, values["compvis_keys"]), map(str, values["compvis_shapes"])))
    assert {name: str(tuple(value.shape)) for name, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {module.eps for module in norms} == {1e-6}                        # 1e-5 hides below the tolerance
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
    mean, logvar = moments.chunk(2, 1)
    expected = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * 0.18215
    assert relative(model.encode_latent(x, noise), expected) < 1e-6
    image = model.decode_latent(expected)
    assert relative(image, model.decode(expected / 0.18215)) < 1e-5
    for i in range(3):
        assert relative(model.moments(x[i:i + 1])[0], moments[i]) < 1e-5
        assert relative(model.decode_latent(expected[i:i + 1])[0], image[i]) < 1e-5


def test_standard_deviation_is_clamped():
    logvar = torch.tensor([-1000.0, -30, 0, 20, 1000]).expand(1, 4, 1, 5)
    mean, std = mean_std(torch.cat([torch.full_like(logvar, 7.0), logvar], 1))
    assert mean.eq(7).all()
    assert relative(std[0, 0, 0].log(), [-15.0, -15, 0, 10, 10]) < 1e-6


def test_upsampling_is_nearest_then_convolution():
    up, x = vae.Upsample(6).double(), torch.randn(2, 6, 5, 3, dtype=torch.float64)
    assert relative(up(x), up.conv(F.interpolate(x, scale_factor=2.0))) < 1e-12


def test_downsampling_pads_right_and_below():
    down, x = vae.Downsample(6).double(), torch.randn(2, 6, 4, 2, dtype=torch.float64)
    padded = torch.zeros(2, 6, 5, 3, dtype=torch.float64)
    padded[:, :, :4, :2] = x
    assert relative(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2)) < 1e-12


@pytest.mark.parametrize("side, parts", [(256, [2, 2, 1]), (512, [1] * 5), (64, [5])])
def test_a_large_batch_goes_in_parts(model, monkeypatch, side, parts):
    sizes = []
    for module in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
        monkeypatch.setattr(getattr(model, module), "forward", lambda part: sizes.append(len(part)) or part)
    x, z = torch.randn(5, 3, side, side), torch.randn(5, 4, side // 8, side // 8)
    assert torch.equal(model.moments(x), x) and torch.equal(model.decode(z), z)
    assert sizes[::2] == sizes[1::2] == parts * 2


@pytest.mark.parametrize("height, width", [(20, 16), (16, 20)])
def test_sides_that_are_no_multiple_of_8_are_refused(model, height, width):
    with pytest.raises(ValueError, match=f"^x: found {height} x {width} pixels, expected multiples of 8$"):
        model.moments(torch.zeros(1, 3, height, width))


def test_the_file_stands_alone(tmp_path):
    shutil.copy(ROOT / "vae.py", tmp_path)
    code = "import torch, vae; torch.set_default_device('meta'); print(len(vae.VAE().state_dict()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env={"PATH": ""})
    assert found.stdout.split() == [b"248"], found.stderr


# ------------------------------------------------------------------------------------------------- the weights

def test_names_are_those_of_diffusers(values, tiny):
    found = {name: str(tuple(value.shape)) for name, value in to_diffusers(tiny).items()}
    assert found == dict(zip(map(str, values["diffusers_keys"]), map(str, values["diffusers_shapes"])))
    old = to_diffusers(tiny, DIFFUSERS | OLD)                                # as in the published file
    assert "encoder.mid_block.attentions.0.query.weight" in old
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old


@pytest.mark.parametrize("words, dims", [(DIFFUSERS, 2), (DIFFUSERS, 3), (DIFFUSERS | OLD, 2), (DIFFUSERS | OLD, 4)])
def test_every_spelling_loads(tiny, words, dims):
    assert same(load_vae(to_diffusers(tiny, words, dims)), tiny)


EXTRA = {"model_ema.decay": torch.tensor(0.99), "loss.logvar": torch.zeros(()), "loss.lin0.weight": torch.zeros(3)}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_whole_checkpoints_load(tiny, prefix, wrapped):
    state = {prefix + name: value.half() for name, value in (tiny | EXTRA).items()}
    if prefix:
        state |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)} | EXTRA
    model = load_vae({"state_dict": state, "epoch": 3} if wrapped else state)
    assert same(model, {name: value.half().float() for name, value in tiny.items()})


@pytest.mark.parametrize("name, zipped", [("a.ckpt", True), ("a.pt", False), ("a.bin", True)])
def test_torch_files_load(tiny, tmp_path, name, zipped):
    torch.save({"state_dict": tiny | EXTRA}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(load_vae(tmp_path / name), tiny)


def test_safetensors_load(tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    whole = {name: value.contiguous() for name, value in to_diffusers(tiny).items()}
    safetensors.save_file(whole, tmp_path / "a.safetensors", {"format": "pt"})
    assert same(load_vae(tmp_path / "a.safetensors"), tiny)


@pytest.mark.parametrize("change, named", [
    ({"quant_conv.bias": None}, "quant_conv.bias"), ({"extra": torch.zeros(1)}, "extra"),
    ({"quant_conv.weight": torch.zeros(8, 8)}, "quant_conv.weight"), ({"quant_conv.weight": "no tensor"}, "quant_conv.weight"),
    ({"encoder.mid.attn_1.q.weight": torch.zeros(512)}, "512")])
def test_names_and_shapes_are_strict(tiny, change, named):
    state = {name: value for name, value in (tiny | change).items() if value is not None}
    with pytest.raises(ValueError, match=named) as error:
        load_vae(state)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize("state", [{}, {1: 2}, {"state_dict": 3}, {"first_stage_model.x": 1}])
def test_other_checkpoints_are_refused(state):
    with pytest.raises(ValueError, match="not Stable Diffusion's autoencoder"):
        load_vae(state)


# -------------------------------------------------------------------------------------------- images -> latents

def test_encoding_is_the_same_on_any_number_of_threads(model):
    images = shapes(range(3), 32)[0]
    encode = [vae.encoder(model, torch.device("cpu"), "float32", threads) for threads in (1, 2)]
    found, again = (function(images) for function in encode)
    x = torch.from_numpy(images) / 127.5 - 1
    assert found.dtype == np.float16 and found.tobytes() == again.tobytes()
    assert relative(found, torch.cat(mean_std(model.moments(x)), 1)) < 1e-3
    half = vae.encoder(model, torch.device("cpu"), "bfloat16", 2)(images)
    assert 1e-4 < relative(half, found) < 0.05


class Toy(torch.nn.Module):
    """In place of the autoencoder, whose 84M weights take seconds to read."""

    def moments(self, x):
        grey = F.avg_pool2d(x, 8).mean(1, keepdim=True)
        return grey * torch.linspace(-1, 1, 8)[:, None, None]


def toy(moment=0):
    """Toy, and the process dies before its `moment`-th renaming."""
    vae.load_vae = lambda path: Toy()
    dies(moment)


@pytest.fixture
def folder(tmp_path):
    """300 images, and a file in place of weights."""
    (tmp_path / "src").mkdir()
    for k, image in enumerate(shapes(range(300), 16)[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"src/{k:03d}.png")
    (tmp_path / "vae.pt").write_bytes(b"weights")
    return tmp_path


WORDS = ("vae.py", "--src", "src", "--vae", "vae.pt", "--size", 16, "--mirror", "--out")


@pytest.mark.skipif(sys.platform == "win32", reason="kills")
def test_killed_and_restarted_and_shared_latents_have_the_same_bytes(folder, script):
    """600 rows make 3 files; the processes are 1, 2 and 3, and one is killed at three moments."""
    script(*WORDS, "whole/pack", change=toy)
    for moment, processes in ((2, 2), (4, 3), (6, 1)):
        out = folder / f"killed{moment}/pack"
        script(*WORDS, out, code=9, change=functools.partial(toy, moment))
        assert not (out / "meta.json").exists()
        script(*WORDS, out, change=toy, processes=processes)
        assert contents(out) == contents(folder / "whole/pack")


def test_latents_are_those_of_the_images_and_their_mirrors(folder, script):
    script(*WORDS, "pack", change=toy)
    pack, x = Packed(folder / "pack"), torch.from_numpy(shapes([129], 16)[0]) / 127.5 - 1
    expected = [torch.cat(mean_std(Toy().moments(image)), 1)[0] for image in (x, x.flip(3))]
    assert relative(pack.images[[258, 259]], torch.stack(expected)) < 1e-3
    assert len(pack) == 600 and pack.latents and pack.size == 2 and pack.meta["scale"] == SCALE
    assert "no contact sheet" in script("data.py", "--check", "pack")


@pytest.mark.parametrize("words, named", [("--size 20", "--size"), ("--workers 0", "--workers"), ("--vae text.ckpt", "text.ckpt"),
                                          ("--vae none.pt", "none.pt")])
def test_mistakes_are_one_line(folder, script, words, named):
    (folder / "text.ckpt").write_text("<html>not found</html>")
    assert named in script(*WORDS, "x", *words.split(), code=2)
    assert not (folder / "x").exists()


@pytest.mark.slow
def test_from_jpegs_to_samples(weights, script, tmp_path):
    """ImageNet in 1,000 folders -> latents at unit scale -> a trained ViT -> images."""
    x = torch.from_numpy(shapes(range(16), 16)[0]) / 127.5 - 1
    state = dict(weights)
    scale = load_vae(state).moments(x)[:, :4].std() * SCALE
    state["quant_conv.weight"] = torch.cat([weights["quant_conv.weight"][:4] / scale, weights["quant_conv.weight"][4:] / 10])
    state["quant_conv.bias"] = torch.tensor([0.0] * 4 + [-3, -2.5, -2, -1.5])
    torch.save(dict(state_dict=state), tmp_path / "vae.pt")
    for k, wnid in enumerate(WNIDS):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        Image.fromarray(shapes([k], 24)[0][0].transpose(1, 2, 0)).save(tmp_path / f"train/{wnid}/{k}.JPEG")
    script("vae.py", "--src", "train", "--vae", "vae.pt", "--size", 16, "--out", "data/imagenet256", timeout=900)
    pack, model = Packed(tmp_path / "data/imagenet256"), load_vae(tmp_path / "vae.pt")
    image = Image.open(tmp_path / f"train/{WNIDS[600]}/600.JPEG").resize((16, 16), Image.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    assert relative(pack.images[[600]], torch.cat(mean_std(model.moments(x)), 1)) < 1e-3
    script("train.py", "--dataset", "imagenet256", "--model", "vit-tiny", "--batch-size", 8, "--sample-steps", 1, "--steps", 4)
    script("sample.py", "--ckpt", "out/imagenet256", "--steps", 2, "--n", 3, "--out", "drawn")
    drawn = np.array([np.asarray(Image.open(tmp_path / f"drawn/{k:06d}.png")) for k in range(3)])
    assert drawn.shape == (3, 16, 16, 3) and drawn.std() > 5
