"""Each result of the papers: the docs' table is what its commands resolve to, and a reduced copy runs."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from mlp import MLP
from test_train import TINY, launch, same

import train
from data import DATASETS, Images, class_names
from diffusion import Diffusion
from files import read
from sample import MODELS, build_model, draw, load_checkpoint
from train import PRESETS, preset

PAPER = [row[:3] for row in PRESETS if row[0] not in ("shapes", "folder")]


# ------------------------------------------------------------------------------------------------- the table

class Resolved(Exception):
    """Ends a command where it would build its network."""


def resolved(command, folder):
    """The config that a command line resolves to, without its data set and without building its network."""
    def stop(config):
        raise Resolved(config)
    with pytest.raises(Resolved) as found:
        launch(folder, f"{command} --dry-run", build_model=stop)
    return found.value.args[0]


def cells(line):
    return [cell.strip().strip("`") for cell in line.strip("| ").split("|")]


def table(heading):
    """Rows of the docs' table whose first column is `heading`, as dicts."""
    texts = [path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
    text = next(text for text in texts if f"| {heading} |" in text)
    lines = text[text.index(f"| {heading} |"):].split("\n\n")[0].splitlines()
    return [dict(zip(cells(lines[0]), cells(line))) for line in lines[2:]]


ROWS = table("result, FID")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["train.py ..."])
def test_the_docs_table_is_what_its_commands_resolve_to(row, tmp_path):
    config = resolved(row["train.py ..."], tmp_path)
    _, arguments = MODELS[config["model"]]                                   # the whole network's
    with torch.device("meta"):
        model = build_model({**config, "network": config["network"] | arguments})
    parameters = sum(p.numel() for p in model.parameters())
    weighting = config["weighting"]
    if weighting == "min_snr":
        weighting += f" {config['gamma']:g}"
    if config["timesteps"] == "clts":
        weighting += f", clts:0.3:{config['curriculum']}"
    sampling = f"Heun {config['sample_steps']}"
    if config["cfg"] != 1:
        sampling += f", cfg {config['cfg']:g}"
    found = dict(network=config["model"], predicts=config["target"], parameters=f"{parameters / 1e6:.1f}M",
                 weighting=weighting, steps=f"{config['steps']:,}", batch=f"{config['batch_size']:,}",
                 drop=f"{config['drop']:g}", sampling=sampling)
    assert found == {key: row[key] for key in found}


def test_every_preset_is_in_the_docs_table(tmp_path):
    shown = [resolved(row["train.py ..."], tmp_path) for row in ROWS]
    assert {(config["dataset"], config["model"], config["target"]) for config in shown} >= set(PAPER)


@pytest.mark.parametrize("dataset, model, target", PAPER)
def test_what_the_papers_share_and_where_they_differ(dataset, model, target):
    row = preset(dataset, model, target)
    curriculum = dataset in ("imagenet128", "cifar10")                       # the curriculum paper's
    betas, decay = [0.99, 0.99], 0.03
    if model.startswith("unet"):
        betas, decay = [0.9, 0.999], 0.0
    if curriculum:
        betas = [0.8, 0.999]
    expected = dict(lr=1e-4, warmup=0, decay=0.0, betas=betas, weight_decay=decay, ema=0.9999, T=1000,
                    schedule="cosine", weighting="min_snr", curriculum=50_000, classes=None)
    if curriculum:
        expected.update(weighting="snr")
    if dataset == "celeba64":
        expected.update(warmup=5_000)
    if dataset == "cifar10":
        expected.update(T=4000, classes=0)
    if dataset == "imagenet128":
        expected.update(schedule="linear", curriculum=300_000)
    assert {key: row[key] for key in expected} == expected


@pytest.mark.parametrize("asked, network, target", [
    (("imagenet64",), "vit-l", "eps"),
    (("imagenet256", "vit-xl"), "vit-xl", "x0"),
])
def test_the_default_of_a_data_set_is_its_first_row(asked, network, target):
    row = preset(*asked)
    assert (row["dataset"], row["model"], row["target"]) == (asked[0], network, target)


@pytest.mark.parametrize("gpu, network, target", [(True, "vit-s", "x0"), (False, "unet-tiny", "v")])
def test_your_own_images_get_a_network_that_suits_the_machine(gpu, network, target):
    row = preset("my photos", gpu=gpu)
    assert (row["dataset"], row["model"], row["target"]) == ("my photos", network, target)


def test_a_network_without_a_row_takes_betas_and_weight_decay_of_its_kind(monkeypatch):
    monkeypatch.setitem(MODELS, "mlp", (MLP, {}))
    for name, betas, decay in ("unet-b", [0.9, 0.999], 0.0), ("mlp", [0.99, 0.99], 0.03):
        row = preset("my photos", name)
        assert (row["betas"], row["weight_decay"]) == (betas, decay)


def test_a_network_without_a_row_takes_the_first_row_of_its_data_set():
    assert preset("cifar10", "vit-s")["steps"] == 500_000


# --------------------------------------------------------------------------------------------- a reduced copy

LESS = dict(channels=32, res_blocks=1, head_channels=32, context_dim=32, dim=48, depth=2, heads=2)


@pytest.fixture
def reduced(monkeypatch):
    """All networks at less width and depth."""
    for name, (network, arguments) in MODELS.items():
        small = {key: LESS[key] for key, value in arguments.items() if key in LESS and value is not None}
        monkeypatch.setitem(MODELS, name, (network, arguments | small))


def pack(folder, dataset, **meta):
    """A packed data set of 16 random images of the right shape, labels and names."""
    size, classes, _ = DATASETS.get(dataset, (8, 0, 0))
    rng = np.random.RandomState(0)
    usual = dict(dataset=dataset, split="train", count=16, size=size, classes=class_names(dataset))
    kind, arrays = "images", rng.randint(0, 256, (16, 3, size, size), np.uint8)
    if dataset == "imagenet256":
        kind, arrays = "latents", (rng.randn(16, 8, 32, 32) * 4).astype(np.float16)
        usual.update(scale=0.18215)
    folder.mkdir(parents=True)
    np.save(folder / f"{kind}.npy", arrays)
    np.save(folder / "labels.npy", rng.randint(0, max(classes, 1), 16))
    (folder / "meta.json").write_text(json.dumps(usual | meta))


@pytest.mark.slow
@pytest.mark.parametrize("dataset, network, target", PAPER)
def test_a_reduced_copy_takes_two_steps_and_samples(dataset, network, target, reduced, tmp_path):
    """What the checkpoint knows is all that sampling needs."""
    pack(tmp_path / "data" / dataset, dataset)
    launch(tmp_path, f"--dataset {dataset} --model {network} --target {target} --steps 2 --batch-size 2 "
           "--sample-steps 1 --out run", grid=lambda *_, **__: "no grid")
    model, config = load_checkpoint(tmp_path / "run")
    images = draw(model, config, range(2), steps=2, cfg=config["cfg"])
    assert images.shape == (2, model.in_channels, model.img_size, model.img_size)
    assert config["step"] == 2 and config["target"] == target
    assert model.num_classes == {"celeba64": 0, "cifar10": 0}.get(dataset, 1000)
    assert config["flip"] == (dataset != "imagenet256")


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dry_run_needs_no_data_and_writes_nothing(dataset, reduced, tmp_path):
    text = launch(tmp_path, f"--dataset {dataset} --batch-size 2 --accum 2 --dry-run")
    assert "images/s" in text and " days" in text
    assert not list(tmp_path.iterdir())


def test_flops_of_a_dry_run_by_hand(monkeypatch, tmp_path):
    """A ViT of one block on 256 patches of 16 numbers and 2 tokens: block, attention, patches in and out."""
    network, _ = MODELS["vit-b"]
    monkeypatch.setitem(MODELS, "vit-b", (network, dict(dim=768, depth=1, heads=12)))
    text = launch(tmp_path, "--dataset imagenet256 --batch-size 1 --dry-run")
    D, N = 768, 258
    flops = 2 * (N * 12 * D ** 2 + 2 * N ** 2 * D + 2 * 256 * 16 * D)
    assert f"{flops / 1e9:.1f} GFLOP an image forward, {3 * flops / 1e9:.1f} in training" in text


# ------------------------------------------------------------------------------------------- packed data

def with_data_in_memory(parse=train.parse):
    """parse() of train with --data-on-gpu, which a CPU refuses."""
    args, state = parse()
    args.data_on_gpu = True
    return args, state


def test_a_folder_of_yours_trains_in_memory_and_may_move(tmp_path):
    pack(tmp_path / "data/mine", "mine")
    command = f"{TINY} --dataset mine --model vit-tiny"
    launch(tmp_path, f"{command} --steps 2 --out straight")
    launch(tmp_path, f"{command} --steps 1 --out run", parse=with_data_in_memory)
    (tmp_path / "data/mine").rename(tmp_path / "moved")
    launch(tmp_path, "--resume --steps 2 --data moved --out run")
    same(read(tmp_path / "straight")["model"], read(tmp_path / "run")["model"])


def test_classes_0_trains_without_the_labels(tmp_path):
    launch(tmp_path, f"{TINY} --classes 0 --steps 1 --out run")
    model, config = load_checkpoint(tmp_path / "run")
    assert (model.num_classes, config["classes"], config["drop"], config["cfg"]) == (0, 0, 0, 1)
    assert config["class_counts"] == []


@pytest.mark.parametrize("network, table", [("vit-tiny", "class_embedding"), ("unet-tiny", "label_emb")])
@pytest.mark.parametrize("names", ["ab", "abcdefgh"])                        # as many, but others
def test_for_other_classes_their_table_alone_is_drawn_anew(network, table, names, reduced, tmp_path):
    pack(tmp_path / "data/mine", "mine", classes=list(names))                # 16 images of the first
    still = f"{TINY} --model {network} --target x0 --steps 1 --lr 1e-30"
    launch(tmp_path, f"{still} --seed 1 --out shapes")
    text = launch(tmp_path, f"{still} --dataset mine --init shapes --out run")
    assert f"the 8 classes of shapes are not the {len(names)} of the data" in text
    given, found = read(tmp_path / "shapes")["ema"], read(tmp_path / "run")
    given[f"{table}.weight"] = found["ema"][f"{table}.weight"]
    same(found["ema"], given, atol=1e-20)
    assert found["config"]["class_counts"] == [16] + [0] * (len(names) - 1)


def test_flip_mirrors(tmp_path):
    pack(tmp_path / "data/mine", "mine")
    weights = []
    for flip in ("--flip", "--no-flip"):
        launch(tmp_path, f"{TINY} --dataset mine --model vit-tiny --steps 1 {flip} --out {flip[2:]}")
        weights.append(read(tmp_path / flip[2:])["model"]["pos_embed"])
    assert not torch.equal(*weights)


def test_another_content_than_the_runs_is_refused(tmp_path):
    pack(tmp_path / "data/mine", "mine")
    pack(tmp_path / "other", "mine", source="elsewhere", split="val")
    launch(tmp_path, f"{TINY} --dataset mine --model vit-tiny --steps 1 --out run")
    assert "fingerprint" in launch(tmp_path, "--resume --steps 2 --data other --out run", code=2)


def test_another_size_than_the_packs_is_refused(tmp_path):
    pack(tmp_path / "data/celeba64", "celeba64")
    assert "--size: found 32" in launch(tmp_path, "--dataset celeba64 --size 32 --out run", code=2)


ODD = [
    ("--ema 0.999999", "averages over more steps"),
    ("--warmup 9", "a warm-up of 9 steps is longer than the run"),
    ("--classes 0", "no classes: drop 0.1 becomes 0, cfg 1.5 becomes 1"),
    ("--dataset celeba64 --data val", "celeba64 val: 16 images"),
    ("--dataset celeba64 --data val", "half of them mirrored"),
]


@pytest.mark.parametrize("words, said", ODD)
def test_what_is_odd_is_said(words, said, reduced, tmp_path):
    pack(tmp_path / "val", "celeba64", split="val")
    assert said in launch(tmp_path, f"{words} --batch-size 2 --steps 1 --sample-steps 1 --out run")


def test_flags_of_this_machine_reach_what_they_switch_on(monkeypatch, tmp_path):
    """They change no result, so that a run does not show whether they were heard."""
    seen, loss = [], Diffusion.loss

    def watched(self, net, x0, *rest):
        seen.append((len(x0), net.grad_ckpt))
        return loss(self, net, x0, *rest)
    monkeypatch.setattr(Diffusion, "loss", watched)
    monkeypatch.setattr(Images, "to", lambda self, device: seen.append(device.type))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: seen.append("compile"))
    launch(tmp_path, f"{TINY} --steps 1 --accum 2 --grad-ckpt --compile --out run", parse=with_data_in_memory)
    assert seen == ["compile", "compile", "cpu", (4, True), (4, True)]       # its two blocks


@pytest.mark.parametrize("name, parts", [("vit-tiny", "Block"), ("unet-tiny", "UNet"), ("mlp", "MLP")])
def test_blocks_that_are_alike_are_compiled_one_by_one(name, parts, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: seen.append(type(self).__name__))
    monkeypatch.setitem(MODELS, "mlp", (MLP, dict(width=16)))
    network, arguments = MODELS[name]
    more = dict(patch_size=4) if name == "vit-tiny" else {}
    train.compile_network(network(**arguments, img_size=16, in_channels=3, num_classes=2, **more))
    assert set(seen) == {parts}


@pytest.fixture
def parsed(monkeypatch):
    """parsed("--dataset mine", gpu=True) -> the flags of a command line on a machine with a GPU, or without one."""
    def call(words, gpu, bfloat16=True, processes=1):
        def is_bf16_supported(including_emulation):
            return including_emulation or bfloat16
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "set_device", lambda local: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
        args, _ = train.parse()
        return args
    return call


@pytest.mark.parametrize("words, gpu, compiled, graph", [
    ("--dataset shapes", True, False, True),
    ("--dataset shapes --grad-ckpt", True, False, False),
    ("--dataset shapes", False, False, False),
    ("--dataset mine", True, True, False),
    ("--dataset mine --no-compile --graph", True, False, True),
    ("--dataset mine --device cpu", True, False, False),
])
def test_a_gpu_compiles_or_runs_the_short_steps_of_the_shapes_as_a_graph(words, gpu, compiled, graph, parsed):
    args = parsed(words, gpu)
    assert (args.compile, args.graph) == (compiled, graph)


def test_several_processes_have_no_graph(parsed):
    assert not parsed("", gpu=True, processes=2).graph


@pytest.mark.parametrize("device, native, dtype", [
    ("cuda", True, "bfloat16"),
    ("cuda", False, "float32"),
    ("cpu", True, "float32"),
])
def test_bfloat16_is_the_default_of_cards_that_have_it(device, native, dtype, parsed):
    assert parsed(f"--device {device}", gpu=True, bfloat16=native).dtype == dtype


@pytest.mark.parametrize("flag, said", [
    ("--graph", "on cuda"),
    ("--data-on-gpu", "--data-on-gpu: the run is on a CPU"),
])
def test_what_is_for_a_gpu_is_refused_without_one(flag, said, tmp_path):
    assert said in launch(tmp_path, f"{TINY} {flag} --steps 1 --out run", code=2)


def test_a_run_with_a_graph_goes_on_without_one(tmp_path):
    launch(tmp_path, f"{TINY} --steps 1 --decay 0 --out run")
    state = torch.load(tmp_path / "run/ckpt.pt")
    [group] = state["optimizer"]["param_groups"]
    group.update(lr=torch.tensor(group["lr"]), capturable=True)              # as a graph leaves them
    torch.save(state, tmp_path / "run/ckpt.pt")
    launch(tmp_path, "--resume --steps 2 --out run")
    [group] = torch.load(tmp_path / "run/ckpt.pt")["optimizer"]["param_groups"]
    assert (type(group["lr"]), group["capturable"]) == (float, False)
