"""The autoencoder against golden values, its weights in every naming, and packing as latents."""
import copy
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
    state = {}
    for name, value in own.items():
        number = zlib.crc32(name.encode()) / 2 ** 32
        state[name] = torch.tensor(number).expand(value.shape)
    return state


def to_diffusers(state, words=DIFFUSERS, dims=2):
    """Diffusers' names, and the attention's weights as matrices or as convolutions."""
    renamed = {}
    for name, value in state.items():
        if ".attn_1." in name and value.dim() == 4:
            value = value.flatten(dims - 1)
        renamed[diffusers_name(name, words)] = value
    return renamed


def same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    return all(torch.equal(own[name], state[name]) for name in own)


# ------------------------------------------------------------------------------------------------ the network

def test_norms_have_eps_1e_6(model):
    """The golden values' tolerance hides 1e-5."""
    norms = [module for module in model.modules() if hasattr(module, "num_groups")]
    assert {(module.num_groups, module.eps) for module in norms} == {(32, 1e-6)}


@pytest.mark.parametrize("naming", ["compvis", "diffusers"])
def test_latents_and_images_are_golden(values, model, naming):
    if naming == "diffusers":
        model = load_vae(formula(values["diffusers_keys"], values["diffusers_shapes"]))
    x = torch.from_numpy(values["x"])
    z = torch.from_numpy(values["z"])
    assert relative(model.moments(x), values[f"{naming}_moments"]) < 1e-4
    assert relative(model.decode(z), values[f"{naming}_decoded"]) < 1e-4


def test_latents_of_a_batch_in_closed_form(model):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 24, 40, generator=g) * 2 - 1                        # odd multiples of 8, not square
    noise = torch.randn(3, 4, 3, 5, generator=g)
    mean, logvar = model.moments(x).chunk(2, 1)
    std = (logvar.clamp(-30, 20) / 2).exp()
    expected = (mean + std * noise) * 0.18215
    assert relative(model.encode_latent(x, noise), expected) < 1e-6
    image = model.decode_latent(expected)
    assert relative(image, model.decode(expected / 0.18215)) < 1e-5


def test_an_image_does_not_depend_on_its_batch(model):
    x = torch.rand(3, 3, 16, 24) * 2 - 1
    moments = model.moments(x)
    image = model.decode(moments[:, :4])
    assert relative(model.moments(x[1:2])[0], moments[1]) < 1e-5
    assert relative(model.decode(moments[1:2, :4])[0], image[1]) < 1e-5


def test_standard_deviation_is_clamped():
    logvar = torch.tensor([-1000.0, -30, 0, 20, 1000]).expand(1, 4, 1, 5)
    moments = torch.cat([torch.full_like(logvar, 7.0), logvar], 1)
    mean, std = mean_std(moments)
    assert mean.eq(7).all()
    assert relative(std[0, 0, 0].log(), [-15.0, -15, 0, 10, 10]) < 1e-6


@pytest.mark.parametrize("side, parts", [(256, [2, 2, 1]), (512, [1] * 5), (64, [5])])
def test_a_large_batch_goes_in_parts(model, monkeypatch, side, parts):
    sizes = []

    def forward(part):
        sizes.append(len(part))
        return part
    for module in (model.encoder, model.quant_conv):
        monkeypatch.setattr(module, "forward", forward)
    x = torch.randn(5, 3, side, side)
    assert torch.equal(model.moments(x), x)
    assert sizes[::2] == sizes[1::2] == parts


@pytest.mark.parametrize("height, width", [(20, 16), (16, 20)])
def test_sides_that_are_no_multiple_of_8_are_refused(model, height, width):
    with pytest.raises(ValueError, match=f"^x: found {height} x {width} pixels, expected multiples of 8$"):
        model.moments(torch.zeros(1, 3, height, width))


def test_the_file_stands_alone(tmp_path):
    shutil.copy(ROOT / "vae.py", tmp_path)
    code = "import torch, vae; torch.set_default_device('meta'); print(len(vae.VAE().state_dict()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env={"PATH": ""})
    assert found.stdout.split() == [b"248"], found.stderr


# ------------------------------------------------------------------------------------------------ the weights

def test_old_names_are_those_of_the_published_file(tiny):
    old = to_diffusers(tiny, DIFFUSERS | OLD)
    assert "encoder.mid_block.attentions.0.query.weight" in old
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old


@pytest.mark.parametrize("words", [DIFFUSERS, DIFFUSERS | OLD], ids=["new", "old"])
@pytest.mark.parametrize("dims", [2, 4])
def test_every_spelling_loads(tiny, words, dims):
    assert same(load_vae(to_diffusers(tiny, words, dims)), tiny)


EXTRA = {"model_ema.decay": torch.tensor(0.99), "loss.logvar": torch.zeros(())}
OTHERS = {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_whole_checkpoints_load(tiny, prefix, wrapped):
    half = {name: value.half() for name, value in tiny.items()}
    state = {prefix + name: value for name, value in (half | EXTRA).items()}
    if prefix:
        state |= OTHERS | EXTRA
    if wrapped:
        state = {"state_dict": state, "epoch": 3}
    assert same(load_vae(state), {name: value.float() for name, value in half.items()})


def test_safetensors_load(tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = to_diffusers(tiny)
    whole = {name: value.contiguous() for name, value in state.items()}
    safetensors.save_file(whole, tmp_path / "a.safetensors", {"format": "pt"})
    assert same(load_vae(tmp_path / "a.safetensors"), tiny)


@pytest.mark.parametrize("change, named", [
    ({"quant_conv.bias": None}, "quant_conv.bias"),
    ({"encoder.extra": torch.zeros(1)}, "encoder.extra"),
    ({"quant_conv.weight": torch.zeros(8, 4)}, "quant_conv.weight"),
    ({"encoder.mid.attn_1.q.weight": torch.zeros(512)}, "512"),
])
def test_names_and_shapes_are_strict(tiny, change, named):
    state = {name: value for name, value in (tiny | change).items() if value is not None}
    with pytest.raises(ValueError, match=named) as error:
        load_vae(state)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 400


@pytest.mark.parametrize("state", [{}, {"x": 1}, {"state_dict": {"x": 1}}, {"first_stage_model.x": 1}])
def test_other_checkpoints_are_refused(state):
    with pytest.raises(ValueError, match="not Stable Diffusion's autoencoder"):
        load_vae(state)


# ------------------------------------------------------------------------------------------ images -> latents

def test_encoding_is_the_same_on_any_number_of_cores(model):
    images = shapes(range(3), 32)[0]
    encode = vae.make_encode(model, torch.device("cpu"), torch.float32)
    one = encode(images)
    torch.set_num_threads(2)
    two = encode(images)
    assert one.dtype == np.float16
    assert one.tobytes() == two.tobytes()
    assert torch.get_num_threads() == 1


def test_encoding_is_mean_and_std(model):
    images, cpu = shapes(range(2), 16)[0], torch.device("cpu")
    x = torch.from_numpy(images) / 127.5 - 1
    expected = torch.cat(mean_std(model.moments(x)), 1)
    found = vae.make_encode(model, cpu, torch.float32)(images)
    half = vae.make_encode(copy.deepcopy(model).bfloat16(), cpu, torch.bfloat16)(images)
    assert relative(found, expected) < 1e-3
    assert 1e-3 < relative(half, expected) < 0.05


class Toy(torch.nn.Module):
    """In place of the autoencoder, whose 84M weights take seconds to read."""

    def moments(self, x):
        grey = F.avg_pool2d(x, 8).mean(1, keepdim=True)
        return grey * torch.linspace(-1, 1, 8)[:, None, None]


def toy(moment=0):
    """Toy, and the process dies before its `moment`-th call of os.fsync."""
    vae.load_vae = lambda path: Toy()
    dies("fsync", moment)


@pytest.fixture
def folder(tmp_path):
    """300 images, and a file in place of weights."""
    (tmp_path / "src").mkdir()
    for k, image in enumerate(shapes(range(300), 16)[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"src/{k:03d}.png")
    (tmp_path / "vae.pt").write_bytes(b"weights")
    return tmp_path


WORDS = ("vae.py", "--src", "src", "--vae", "vae.pt", "--size", 16, "--out")


@pytest.mark.skipif(sys.platform == "win32", reason="kills")
def test_killed_and_restarted_and_shared_latents_have_the_same_bytes(folder, script):
    """300 rows make 10 chunks; one process is killed within them, and three go on."""
    script(*WORDS, "whole/pack", change=toy)
    script(*WORDS, "killed/pack", code=9, change=functools.partial(toy, 8))
    script(*WORDS, "killed/pack", change=toy, processes=3)
    assert contents(folder / "killed/pack") == contents(folder / "whole/pack")


def test_latents_are_those_of_the_images(folder, script):
    script(*WORDS, "pack", change=toy)
    pack = Packed(folder / "pack")
    x = torch.from_numpy(shapes([129], 16)[0]) / 127.5 - 1
    expected = torch.cat(mean_std(Toy().moments(x)), 1)
    assert relative(pack.images[[129]], expected) < 1e-3
    assert pack.images.shape == (300, 8, 2, 2)
    assert pack.meta["scale"] == SCALE


def test_a_process_names_its_broken_images_and_stops_no_other(folder, script):
    (folder / "src/040.png").write_bytes(b"broken")                          # of the second chunk
    said = script(*WORDS, "pack", change=toy, processes=2)
    assert "040.png: cannot be read" in said
    assert "pack: 300 images" not in said
    assert np.sum(np.load(folder / "pack/labels.npy") < 0) == 1


def test_skip_broken_and_classes_of_latents(folder, script):
    (folder / "src/cat").mkdir()
    (folder / "src/cat/1.png").write_bytes(b"broken")                        # beside images without a class
    script(*WORDS, "pack", "--skip-broken", "--classes", 0, change=toy, processes=2)
    assert Packed(folder / "pack").meta["broken"] == dict(count=1, names=["cat/1.png"])


@pytest.mark.parametrize("words, named", [
    ("--size 20", "--size"),
    ("--vae text.ckpt", "text.ckpt"),
    ("--vae none.pt", "none.pt"),
])
def test_mistakes_are_one_line(folder, script, words, named):
    (folder / "text.ckpt").write_text("<html>not found</html>")
    assert named in script(*WORDS, "x", *words.split(), code=2)
    assert not (folder / "x").exists()


@pytest.mark.slow
def test_imagenet_becomes_latents_a_trained_vit_and_images(weights, script, tmp_path):
    """Each file is found by the next script where its default says."""
    torch.save(weights, tmp_path / "vae.pt")
    for k, wnid in enumerate(WNIDS):
        image = shapes([k], 16)[0][0].transpose(1, 2, 0)
        (tmp_path / "src" / wnid).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / f"src/{wnid}/{k}.JPEG")
    script(*WORDS, "data/imagenet256", timeout=900)
    script("train.py", "--dataset", "imagenet256", "--model", "vit-tiny", "--batch-size", 8,
           "--steps", 4, "--sample-steps", 1)
    script("sample.py", "--ckpt", "out/imagenet256", "--steps", 2, "--n", 3, "--out", "drawn.npz")
    drawn = np.load(tmp_path / "drawn.npz")["arr_0"]
    assert drawn.shape == (3, 16, 16, 3)
    assert drawn.std() > 5
