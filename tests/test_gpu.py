"""What only a GPU shows: `python -m pytest -m gpu -s`, whose -s prints the distances that were found."""
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, formula, free_port, relative
from test_train import TINY, in_step, launch, log_of, terminate
from test_unet import KINDS
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sample
from diffusion import TARGETS, Diffusion, trajectory
from fid import load_inception
from files import allow_tf32, leave_group, read
from model_unet import from_adm
from model_vit import SIZES, ViT, from_official
from sample import draw, load_checkpoint, to_device
from train import backward, compile_network, learning_rate
from vae import load_vae

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU, or hidden from all but pytest -m gpu"),
]


@pytest.fixture(autouse=True)
def exact():
    """Products of float32 are exact at first: a run in bfloat16 and sample.py change that for the process."""
    allow_tf32(False)


def flat(tensors):
    """All numbers of some tensors, in one row on the CPU."""
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])


def small():
    """A small ViT for images of 8 x 8 and 8 classes."""
    torch.manual_seed(0)
    network, arguments = SMALL
    return to_device(network(8, 4, 3, 8, **arguments), DEVICE)


# ----------------------------------------------------------------------------------------------- precision

HEADS = {"vit_cond": 4, "vit_uncond": 6}
AUTOENCODER = {  # method: input, output
    "moments": ("x", "compvis_moments"),
    "decode": ("z", "compvis_decoded"),
}


def golden_case(name, golden):
    """-> a network on the GPU, or a method of it, with its golden inputs and output."""
    if name == "inception":
        values = np.load(ROOT / "tests/golden/fid.npz")
        model = load_inception(formula(values["keys"], values["shapes"]))
        inputs = [torch.from_numpy(values["images_64"]).permute(0, 3, 1, 2)]
        return to_device(model, DEVICE), inputs, values["features_64"]
    if name in AUTOENCODER:
        values = np.load(ROOT / "tests/golden/vae.npz")
        model = load_vae(formula(values["compvis_keys"], values["compvis_shapes"]))
        given, expected = (values[key] for key in AUTOENCODER[name])
        return getattr(to_device(model, DEVICE), name), [torch.from_numpy(given)], expected
    values, weights = golden(name)
    if name == "unet_ldm":
        weights["label_emb.weight"] = values["label_emb"].float()            # LDM keeps it elsewhere
    model = from_official(weights, HEADS[name]) if name in HEADS else from_adm(weights, **KINDS[name])
    return to_device(model, DEVICE), [values[key] for key in "xty" if key in values], values["out"]


@pytest.mark.parametrize("name", [*HEADS, "unet_adm", "unet_plain", "unet_ldm", *AUTOENCODER, "inception"])
def test_a_network_is_golden_in_float32_and_near_that_in_tf32_and_bfloat16(name, golden):
    network, inputs, expected = golden_case(name, golden)
    inputs = [x.to(DEVICE) for x in inputs]
    found = {}
    for mode in ("float32", "tf32", "bfloat16"):
        allow_tf32(mode == "tf32")
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=mode == "bfloat16"):
            found[mode] = relative(network(*inputs).cpu(), expected)
    print(name, found)
    assert found["float32"] < 1e-4
    assert found["tf32"] < 5e-3
    assert 1e-3 < found["bfloat16"] < 5e-2


@pytest.mark.parametrize("product, shape, other", [
    (torch.matmul, (512, 512), (512, 512)),
    (F.conv2d, (4, 64, 16, 16), (64, 64, 3, 3)),
])
def test_products_are_shortened_where_tf32_is_allowed_and_nowhere_else(product, shape, other):
    factors = torch.randn(shape), torch.randn(other)
    expected = product(*(factor.double() for factor in factors))
    found = []
    for allowed in (False, True):
        allow_tf32(allowed)
        output = product(*(factor.to(DEVICE) for factor in factors))
        found.append(relative(output.cpu(), expected))
    print(found)
    assert found[0] < 3e-5 < found[1]


def test_the_state_of_the_sampler_is_float64_under_autocast():
    z = torch.randn(2, 3, 8, 8, device=DEVICE)
    y = torch.zeros(2, dtype=torch.long, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for _, x0 in trajectory(small(), Diffusion(), z, y, steps=3, cfg=1.5):
            assert x0.dtype == torch.float64


@pytest.mark.parametrize("name", ["vit-tiny", "unet-tiny"])
def test_images_in_bfloat16_are_those_in_float32_but_for_a_few_grey_levels(name, tmp_path):
    launch(tmp_path, f"{TINY} --size 16 --model {name} --lr 1e-3 --steps 40 --dtype float32 --out run")
    model, config = load_checkpoint(tmp_path / "run", raw=True)
    model = to_device(model, DEVICE)
    images = [draw(model, config, range(256), dtype=dtype, steps=5, cfg=1.5).float()
              for dtype in ("float32", "bfloat16")]
    difference = (images[0] - images[1]).abs().mean().item()
    print(name, difference)
    assert 0 < difference < 3


# -------------------------------------------------------------------------------------------------- training

def test_a_stopped_and_resumed_run_is_the_straight_run(tmp_path):
    """To rounding, as a GPU may add numbers up in any order. Without AdamW's moments the distance is 5e-3."""
    command = f"{TINY} --steps 10 --dtype float32 --out"
    launch(tmp_path, f"{command} whole")
    launch(tmp_path, f"{command} parts", code=143, learning_rate=in_step(4, terminate))
    launch(tmp_path, "--resume --out parts")
    whole, parts = (flat(read(tmp_path / name)["model"].values()) for name in ("whole", "parts"))
    distance = (parts - whole).norm() / whole.norm()
    print("distance", distance, "equal to the bit:", torch.equal(parts, whole))
    assert distance < 1e-4


@pytest.fixture
def watched():
    """A learning_rate() of train, for ten steps, the last of which is logged. From step 5 to step 8 it is an error
    if the host waits for the GPU.
    """
    def watching(config, step):
        if step == 5:
            torch.cuda.set_sync_debug_mode("error")
        if step == 8:
            with pytest.raises(RuntimeError, match="synchronizing"):         # it was watched until now
                torch.ones((), device=DEVICE).item()
            torch.cuda.set_sync_debug_mode("default")
        return learning_rate(config, step)
    yield watching
    torch.cuda.set_sync_debug_mode("default")


HOWS = ["--graph --data-on-gpu --flip", *(f"--no-graph --target {target}" for target in TARGETS)]


@pytest.mark.parametrize("how", HOWS)
def test_no_step_between_two_log_lines_waits_for_the_gpu(how, watched, tmp_path):
    command = f"{TINY} {how} --accum 2 --grad-clip 1 --importance --steps 10 --out run"
    launch(tmp_path, command, learning_rate=watched)


def test_gradient_checkpointing_saves_memory_and_changes_no_gradient():
    model = ViT(64, 4, 3, 0, **SIZES["vit-s"]).to(DEVICE)
    x = torch.randn(16, 3, 64, 64, device=DEVICE)
    t = torch.arange(16, device=DEVICE)
    peaks, gradients = [], []
    for model.grad_ckpt in (False, True):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x, t).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append(flat(p.grad for p in model.parameters()))
    print("bytes", peaks)
    assert peaks[1] < 0.5 * peaks[0]
    assert relative(gradients[1], gradients[0]) < 1e-5


# ------------------------------------------------------------------------------------------------- processes

@pytest.fixture
def nccl():
    """A process group of this process alone, as train.py makes one."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1)
    yield
    leave_group()


def test_gradients_that_nccl_exchanges_are_the_plain_ones(nccl):
    model, diffusion = small(), Diffusion().to(DEVICE)
    config = dict(batch_size=8, dtype="float32", T=1000)
    x = torch.randn(8, 3, 8, 8, device=DEVICE)
    t = torch.arange(8, device=DEVICE)
    batch = x, 100 * t, x.flip(0), t, torch.ones_like(t)                     # x0, t, noise, y, scale
    tally = torch.zeros(10, 4, dtype=torch.float64, device=DEVICE)
    backward(model, diffusion, batch, tally, config, accum=2)
    plain = flat(p.grad for p in model.parameters())
    model.zero_grad()
    net = DistributedDataParallel(model)
    backward(net, diffusion, batch, tally, config, accum=2, world=2)         # twice that: two would share
    assert relative(flat(p.grad for p in model.parameters()), 2 * plain) < 1e-5


def test_torchrun_with_one_process(start_script):
    alone = ("--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    process = start_script("train.py", *f"{TINY} --steps 2 --out run".split(), torchrun=alone)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"on {DEVICE.type}" in text, text


# --------------------------------------------------------------------------------------------- the compiler

def compile_or_fail(model):
    """compile_network, but what cannot be compiled is an error and does not run as it was."""
    compile_network(model)
    torch._dynamo.config.suppress_errors = False


def test_a_compiled_runs_checkpoint_is_a_plain_one_and_samples(tmp_path):
    launch(tmp_path, f"{TINY} --steps 2 --compile --out run", compile_network=compile_or_fail)
    assert read(tmp_path / "run")["model"].keys() == small().state_dict().keys()
    launch(tmp_path, "--ckpt run --raw --n 2 --steps 1 --out grid.png", main=sample.main)
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("dtype, how, tolerance", [
    ("float32", "--data-on-gpu", 1e-5),
    ("float32", "--graph", 1e-5),
    ("float32", "--graph --accum 2", 1e-4),
    ("bfloat16", "--graph --compile --data-on-gpu", 2e-3),
    ("float32", "--compile", 1e-5),
    ("bfloat16", "--compile", 2e-3),
])
def test_how_a_run_is_computed_changes_its_losses_by_rounding_alone(dtype, how, tolerance, tmp_path):
    """A graph begins in step 3."""
    command = f"{TINY} --dtype {dtype} --no-graph --steps 8 --log-every 1"
    launch(tmp_path, f"{command} --out plain")
    launch(tmp_path, f"{command} {how} --out run", compile_network=compile_or_fail)
    plain, run = (np.array(log_of(tmp_path / name)[1:], float)[:, 1] for name in ("plain", "run"))
    print(dtype, how, "relative differences of the losses:", run / plain - 1)
    assert run == pytest.approx(plain, rel=tolerance)
