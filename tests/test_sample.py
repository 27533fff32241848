"""Sampling: image k depends on the checkpoint, the seed and k; what lies on disk; what is refused."""
import json
import math
import os
import signal
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model_unet
import model_vit
import sample
from data import tile
from diffusion import Diffusion, sampler, sampling_timesteps, steps_run, trajectory
from files import BadInput, NotFinite
from model_vit import SIZES, ViT
from sample import load_checkpoint, parse_classes, start, to_uint8

NETWORK = dict(img_size=8, patch_size=2, in_channels=3, num_classes=5, dim=48, depth=2, heads=4, T=200)
CONFIG = dict(
    dataset="toy",
    model="vit-tiny",
    network=NETWORK,
    class_names=list("abcde"),
    schedule="linear",
    T=200,
    target="v",
    drop=0.1,
    ema=0.9,
    cfg=1.5,
    sample_steps=4,
)
SETTINGS = dict(steps=4, cfg=1.5)
MODEL = ViT(**NETWORK)
MODEL.class_counts = [1, 0, 3, 2, 4]


def save(**change):
    """Write ckpt.pt, whose EMA weights differ from the others; both answer loudly."""
    state = dict(step=3, config={**CONFIG, **change})
    for seed, part in enumerate(["model", "ema"]):
        torch.manual_seed(seed)
        model = ViT(**state["config"]["network"])
        torch.nn.init.normal_(model.linear_projection.weight, std=0.1)
        state[part] = model.state_dict()
    torch.save(state, "ckpt.pt")
    return state


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """The state in ckpt.pt, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return save()


@pytest.fixture
def main(script, monkeypatch, capsys):
    """main("--n 3") runs sample.py, as a script where `how` is given, and returns what it printed."""
    def call(flags, ckpt="ckpt.pt", **how):
        words = ["sample.py", "--ckpt", ckpt, *flags.split()]
        if how:
            return script(*words, **how)
        monkeypatch.setattr(sys, "argv", words)
        sample.main()
        return capsys.readouterr().out
    return call


@pytest.fixture
def refused(main):
    """refused("--n 0") is the one line that sample.py ends with."""
    return partial(main, code=2)


def read_json(path):
    return json.loads(Path(path).read_text())


def pictures(path):
    """uint8 (N,S,S,3) of a folder or an npz."""
    if path.endswith(".npz"):
        return np.load(path)["arr_0"]
    files = sorted(Path(path).glob("*.png"))
    return np.stack([Image.open(file) for file in files])


near = partial(np.allclose, rtol=0, atol=1)      # equal but for the rounding of other batches


def by_hand(model, n, labels, diffusion=Diffusion("linear", 200, "v"), seed=0, **how):
    """Images 0 .. n-1 in one batch, uint8 (n,S,S,C)."""
    y, z = zip(*[start(seed, k, labels, model) for k in range(n)])
    x = sampler(model, diffusion, torch.stack(z), torch.tensor(y), **how)
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------------------------- images

def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-9, 0.4, 0.6, 127.4, 999]) / 127.5 - 1
    assert to_uint8(x).tolist() == [0, 0, 1, 127, 255]


def test_noise_is_unit_normal_and_labels_are_uniform():
    y, z = zip(*[start(3, k, "random", MODEL) for k in range(2000)])
    z = torch.stack(z)
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert np.bincount(y).min() > 340


@pytest.mark.parametrize("rule, expected", [("balanced", 2), ([4, 1, 0], 1), ("data", 2)])
def test_the_label_follows_the_rule_and_the_noise_does_not(rule, expected):
    label, noise = start(3, 7, rule, MODEL)
    _, same = start(3, 7, "random", MODEL)
    assert label == expected
    assert torch.equal(noise, same)


def test_labels_are_drawn_as_often_as_the_data_have_them(main):
    save(class_counts=[1, 0, 3, 2, 4])
    main("--labels data --n 9 --out a.npz")
    model, _ = load_checkpoint("ckpt.pt")
    drawn = [start(0, k, "data", model)[0] for k in range(2000)]
    assert np.load("a.npz")["arr_1"].tolist() == drawn[:9]
    assert np.bincount(drawn) / 2000 == pytest.approx([0.1, 0, 0.3, 0.2, 0.4], abs=0.03)


def test_image_k_depends_on_the_seed_and_k(main):
    for size in (1, 3, 8):
        main(f"--seed 5 --n 8 --batch-size {size} --out by{size}")
    main("--seed 5 --count 8 --out two.npz", processes=2)
    expected = pictures("by8")
    for name in ("by1", "by3", "two.npz"):
        assert near(pictures(name), expected)
    main("--seed 6 --n 8 --out other")
    images = np.concatenate([expected, pictures("other")])
    assert len(np.unique(images, axis=0)) == 16


FLAGS = "--raw --classes e,1 --steps 3 --cfg 3 --interval 20 90 --solver dpm++2m"
CHOSEN = dict(steps=3, cfg=3, interval=(20, 90), solver="dpm++2m")


@pytest.mark.parametrize("flags, part, labels, how", [
    ("", "ema", "random", SETTINGS),
    ("--clip", "ema", "random", dict(SETTINGS, clip=True)),
    (FLAGS, "model", [4, 1], CHOSEN),
])
def test_the_checkpoint_and_the_flags_say_how_images_are_drawn(main, state, flags, part, labels, how):
    main(f"--n 6 --seed 9 --out a.npz {flags}", ckpt=".")                    # a run's folder
    model = ViT(**NETWORK)
    model.load_state_dict(state[part])
    assert np.array_equal(pictures("a.npz"), by_hand(model, 6, labels, seed=9, **how))


def test_only_the_checkpoint_is_needed_for_a_grid(main):
    main("--batch-size 16")
    model, _ = load_checkpoint("ckpt.pt")
    images = by_hand(model, 40, "balanced", **SETTINGS)
    expected = tile(images.transpose(0, 3, 1, 2), 5)                         # a class to a column
    assert near(Image.open("samples.png").reduce(8), expected)               # small images are shown larger


def test_fewer_steps_than_asked_are_said_and_stored(main):
    text = main("--n 1 --steps 150 --out folder")
    run, evaluations = steps_run(Diffusion("linear", 200), 150)
    expected = dict(steps=150, steps_run=run, evaluations=evaluations)
    assert read_json("folder/protocol.json").items() >= expected.items()
    assert f"warning: 150 steps asked for, {run} run" in text
    assert "asked for" not in main("--n 1 --steps 4 --out other")


@pytest.mark.parametrize("ema, share", [(.99, "97%"), (.1, None)])
def test_an_average_that_holds_its_start_is_warned_of(main, ema, share):
    save(ema=ema)
    text = main("--n 1")
    assert f"warning: {share} of the EMA" in text if share else "of the EMA" not in text


def test_bfloat16_draws_nearly_the_same_images_and_is_in_the_protocol(main):
    main("--n 4 --out plain.npz")
    main("--n 4 --dtype bfloat16 --out short.npz")
    difference = np.abs(pictures("plain.npz").astype(int) - pictures("short.npz"))
    assert 0 < difference.mean() < 3
    assert read_json("short.protocol.json")["dtype"] == "bfloat16"


def test_a_grid_of_few_images_has_no_empty_places(main):
    main("--n 2 --out few.png")
    assert Image.open("few.png").size == (2 * 64, 64)


def test_a_strip_goes_from_the_noise_over_the_estimates_to_the_image(main):
    main("--strip --n 2")
    model, _ = load_checkpoint("ckpt.pt")
    y, z = start(0, 1, "balanced", model)                                    # of the second row
    path = trajectory(model, Diffusion("linear", 200, "v"), z[None], torch.tensor([y]), **SETTINGS)
    images = to_uint8(torch.cat([z[None], *[x0 for _, x0 in path]]))
    found = Image.open("strip.png").crop((0, 21 + 64, 5 * 64, 21 + 2 * 64))  # the titles are 21 high
    assert near(found.reduce(8), tile(images.numpy(), 5))


def test_a_long_strip_shows_twelve_steps_evenly_chosen(main):
    diffusion = Diffusion("linear", 200)
    ts = sampling_timesteps(diffusion, 23).tolist()
    assert len(ts) == 23
    assert sample.steps_of_strip(diffusion, 23) == ts[::2]
    assert "x0 estimates of 12 of 23 steps" in main("--strip --n 1 --steps 23")


# ------------------------------------------------------------------------------------------------ on disk

def test_folder_and_npz_hold_the_same_images_and_protocol(main, refused):
    main("--n 7 --seed 7 --out folder")
    main("--n 7 --seed 7 --out a.npz")
    file = np.load("a.npz")
    assert np.array_equal(file["arr_0"], pictures("folder"))
    assert file["arr_0"].dtype == np.uint8
    assert file["arr_1"].tolist() == [start(7, k, "random", MODEL)[0] for k in range(7)]
    assert read_json("folder/protocol.json") == read_json("a.protocol.json")
    assert not Path("a.npz.parts").exists()
    assert "exists already" in refused("--n 7 --out a.npz")


@pytest.mark.parametrize("device, dtype", [("cuda", "tf32"), ("cpu", "float32"), ("mps", "float32")])
def test_the_default_dtype_is_tf32_on_a_gpu_of_nvidia_alone(device, dtype, main, monkeypatch):
    """No network is moved there."""
    monkeypatch.setattr(sample, "processes", lambda kind: (0, 1, torch.device(kind)))
    monkeypatch.setattr(sample, "to_device", lambda model, device: model)
    assert f"labels balanced, {dtype}\n" in main(f"--n 1 --device {device}")


def test_a_folder_says_the_label_of_each_image(main):
    main("--n 2 --out folder")
    main("--n 3 --out folder")
    expected = [[f"{k:06d}.png", start(0, k, "random", MODEL)[0]] for k in range(3)]
    assert read_json("folder/dataset.json") == {"labels": expected}


def test_the_first_process_waits_for_the_others(main, monkeypatch):
    """Here sleep stands for process 1, which comes with its image late."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    white = Image.new("RGB", (8, 8), "white")
    monkeypatch.setattr(sample.time, "sleep", lambda _: white.save("a.npz.parts/000001.png"))
    main("--n 2 --out a.npz")
    assert pictures("a.npz")[1].min() == 255


def test_an_npz_is_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_image", lambda path: Image.new("RGB", (256, 256), int(path.stem)))
    tracemalloc.start()
    sample.save_npz("a.npz", tmp_path, 250, [0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    images = np.load("a.npz")["arr_0"]
    assert peak < images.nbytes / 2                                          # 16 MiB at a time
    assert images[:, 9, 9, 0].tolist() == list(range(250))


def die_at(name, last):
    """Kill this process where a function of sample.py comes to the file `last`."""
    whole = getattr(sample, name)

    def call(path, *more):
        if path.name == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, *more)
    setattr(sample, name, call)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
@pytest.mark.parametrize("out, name, last", [
    ("out", "replace", "000006.png"),                                        # within the second batch
    ("a.npz", "load_image", "000003.png"),                                   # within the npz
])
def test_a_killed_run_is_finished_to_the_same_bytes(main, out, name, last):
    flags = "--n 11 --batch-size 4 --out"
    main(f"{flags} whole/{out}")
    main(f"{flags} {out}", code=9, change=partial(die_at, name, last))
    main(f"{flags} {out}")
    for file in Path("whole").rglob("*.*"):
        assert Path(*file.parts[1:]).read_bytes() == file.read_bytes(), file


def test_a_batch_that_is_not_whole_is_drawn_anew(tmp_path, monkeypatch):
    """Of process 1 of 2. The images that are there are left alone."""
    asked = []

    def images_of(ks):
        asked.append(list(ks))
        return torch.full((len(ks), 3, 4, 4), len(asked), dtype=torch.uint8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sample.save_folder(tmp_path, 10, 2, images_of)
    Path("000005.png").unlink()
    sample.save_folder(tmp_path, 10, 2, images_of)
    assert asked == [[1, 3], [5, 7], [9], [5, 7]]
    assert pictures(".")[:, 0, 0, 0].tolist() == [1, 1, 4, 2, 3]             # the call that drew 1, 3, 5, ...


def test_a_folder_grows_and_never_shrinks_and_what_is_there_is_left_alone(main):
    main("--n 6 --out whole")
    main("--n 4 --out folder")
    Image.new("RGB", (8, 8), "white").save("folder/000000.png")
    main("--n 6 --out folder", processes=2)
    assert near(pictures("folder")[1:], pictures("whole")[1:])
    assert pictures("folder")[0].min() == 255
    assert "images 0 to 1 are there; folder is to hold 6" in main("--n 2 --out folder")
    assert read_json("folder/protocol.json") == read_json("whole/protocol.json")


def test_a_growth_that_is_stopped_leaves_a_whole_folder_of_the_old_n(main, monkeypatch):
    main("--n 4 --out folder")
    monkeypatch.delattr(sample, "draw")
    with pytest.raises(NameError):
        main("--n 6 --out folder")
    assert read_json("folder/protocol.json")["n"] == 4


def test_an_npz_that_was_stopped_may_get_more_images(main, monkeypatch):
    main("--n 3 --out whole.npz")
    with monkeypatch.context() as patch:
        patch.delattr(sample, "save_npz")
        with pytest.raises(NameError):
            main("--n 1 --out a.npz")
    main("--n 3 --out a.npz")
    assert near(pictures("a.npz"), pictures("whole.npz"))
    assert read_json("a.protocol.json") == read_json("whole.protocol.json")


@pytest.mark.parametrize("key, flags", [
    ("clip", "--clip"),
    ("dtype", "--dtype tf32"),
    ("seed", "--seed 1"),
    ("steps", "--steps 2"),
    ("cfg", "--cfg 2"),
    ("interval", "--interval 0 90"),
    ("solver", "--solver euler"),
    ("labels", "--classes a"),
    ("weights", "--raw"),
])
def test_a_folder_of_another_protocol_is_refused(main, refused, key, flags):
    main("--n 1 --out folder")
    assert f"folder: holds samples with {key} " in refused(f"--n 1 --out folder {flags}")


def test_a_folder_of_another_checkpoint_is_refused(main, refused):
    main("--n 1 --out folder")
    save(lr=3)
    assert "holds samples with checkpoint " in refused("--n 1 --out folder")


def test_a_data_set_is_no_place_for_samples(refused):
    Path("folder").mkdir()
    Path("folder/dataset.json").write_text("mine")
    assert "holds files but no protocol.json" in refused("--n 1 --out folder")
    assert Path("folder/dataset.json").read_text() == "mine"


# --------------------------------------------------------------------------------------------- not finite

def test_weights_that_are_not_finite_are_refused_by_name(main, state):
    state["ema"]["pos_embed"][0, 0, 0] = math.nan
    torch.save(state, "ckpt.pt")
    with pytest.raises(NotFinite, match="ckpt.pt: pos_embed is not finite"):
        main("--n 1 --out folder")
    assert not Path("folder").exists()


def test_samples_that_are_not_finite_become_no_file_and_those_before_stay(main, monkeypatch):
    batches = (torch.full((1, 3, 8, 8), value) for value in (0.0, math.inf))
    monkeypatch.setattr(sample, "sampler", lambda *_, **how: next(batches))
    with pytest.raises(NotFinite, match="images 1 to 1 are not finite"):
        main("--n 2 --batch-size 1 --out a.npz")
    assert len(pictures("a.npz.parts")) == 1
    assert not Path("a.npz").exists()


# ------------------------------------------------------------------------------------- flags and refusals

NAMES = ["tench, Tinca tinca", "Glass", "2", "crane", "crane, bird"]
NUMBERS = ["01", "02", "10"]


@pytest.mark.parametrize("text, names, expected", [
    ("tinca TINCA, glass,bird,3", NAMES, [0, 1, 4, 3]),
    ("1,02,010", NUMBERS, [0, 1, 2]),                                        # numbers are names
])
def test_classes_by_name_and_number(text, names, expected):
    assert parse_classes(text, names, len(names)) == expected


def test_chosen_classes_are_said_by_name(main):
    assert "classes: ['b', 'e']\n" in main("--n 1 --classes B,4 --out folder")


@pytest.mark.parametrize("text, names, found", [
    ("tenc", NAMES, []),
    ("5", NAMES, []),
    ("9" * 30, NAMES, []),
    ("crane", NAMES, [3, 4]),
    ("0", NUMBERS, []),
])
def test_unknown_and_ambiguous_classes_are_refused(text, names, found):
    with pytest.raises(BadInput) as error:
        parse_classes(text, names, len(names))
    assert f"fits classes {found}" in str(error.value)


def test_classes_of_a_network_without_any_are_refused():
    with pytest.raises(BadInput, match="without classes"):
        parse_classes("dog", [], 0)


@pytest.mark.parametrize("flags", [
    "--n 0",
    "--steps 10001",
    "--batch-size 0",
    "--seed -1",
    "--cfg nan",
    "--classifier-scale nan",
    "--target eps",
    "--classes z",
    "--labels data",
    "--vae none.pt",
    "--interval 90 0",
    "--interval 0 200",
    "--interval -1 9",
    "--interval 0 9 --cfg 1",
    "--strip --out a.npz",
])
def test_a_bad_flag_is_one_line_that_names_it(refused, flags):
    assert flags.split()[0] in refused(flags)


@pytest.mark.parametrize("classes", [0, 5])
def test_cfg_needs_classes_and_label_drop(main, refused, classes):
    save(cfg=1.0, drop=0.0, network={**NETWORK, "num_classes": classes})
    assert "--cfg 2.0: " in refused("--cfg 2")
    main("--n 1")


@pytest.mark.parametrize("change", [dict(model="vit-huge"), dict(network={**NETWORK, "depth": 1})])
def test_a_config_of_other_weights_is_refused(state, refused, change):
    state["config"].update(change)
    torch.save(state, "ckpt.pt")
    assert "ckpt.pt: weights and config disagree" in refused("")


@pytest.mark.parametrize("part", ["ema", "step", "config"])
def test_a_checkpoint_without_a_part_is_refused(state, refused, part):
    del state[part]
    torch.save(state, "ckpt.pt")
    assert "ckpt.pt: " in refused("")


def test_a_snapshot_samples_and_has_no_raw_weights(main, refused, state):
    del state["model"]
    torch.save(state, "ckpt.pt")
    main("--n 1")
    assert "ckpt.pt is a snapshot, which holds the EMA alone" in refused("--raw")


# ------------------------------------------------------------------------------- latents, public weights

class Decoder(torch.nn.Module):
    def decode_latent(self, z):
        return z[:, :3]


def test_latents_are_decoded_by_the_vae_of_the_data(main, monkeypatch):
    save(network={**NETWORK, "in_channels": 4}, vae="another", vae_file="vae.pt")
    Path("vae.pt").write_text("weights")
    monkeypatch.setattr(sample, "load_vae", {"vae.pt": Decoder()}.get)
    assert "warning: vae.pt is not the file" in main("--n 3 --out a.npz")
    model, _ = load_checkpoint("ckpt.pt")
    assert near(pictures("a.npz"), by_hand(model, 3, "random", **SETTINGS)[..., :3])
    assert "vae" in read_json("a.protocol.json")
    main("--strip --n 1 --labels random")
    image = Image.open("strip.png").crop((4 * 64, 21, 5 * 64, 21 + 64))
    assert near(image.reduce(8), pictures("a.npz")[0])


def test_a_latent_model_asks_for_its_vae(refused):
    save(network={**NETWORK, "in_channels": 4})
    assert "--vae FILE" in refused("")
    assert "ckpt.pt: not Stable" in refused("--vae ckpt.pt")
    assert "--clip: the network draws latents" in refused("--clip")


@pytest.fixture
def public(golden, monkeypatch):
    """Files like the public ones, of networks so small that their loaders are told the architecture."""
    toy = dict(img_size=16, channel_mult=(1, 2), res_blocks=1, attention_resolutions=(8,))
    for module, name, known in [
        (model_vit, "from_official", dict(heads=6)),
        (model_unet, "from_adm", dict(heads=2, **toy)),
        (model_unet, "classifier_from_adm", dict(head_channels=16, **toy)),
    ]:
        loader = partial(getattr(module, name), **known)
        monkeypatch.setattr(module, name, loader)
    for name in ("vit_uncond", "unet_adm", "classifier"):
        torch.save(golden(name)[1], f"{name}.pt")
    adm = torch.load("unet_adm.pt")
    for name in ("out.2.weight", "out.2.bias"):                              # ADM's learned sigma
        adm[name] = torch.cat([adm[name], adm[name] + 1])
    torch.save(adm, "adm.pt")


def test_weights_of_the_official_vit(public, main):
    main("--target x0 --steps 3 --n 9 --out a.npz", ckpt="vit_uncond.pt")
    model = model_vit.from_official(torch.load("vit_uncond.pt"))
    expected = by_hand(model, 9, "random", Diffusion("cosine", 1000, "x0"), steps=3)
    assert np.array_equal(pictures("a.npz"), expected)


GUIDED = "--classifier classifier.pt --classifier-scale 3"


@pytest.mark.parametrize("flags, scale", [("", 0), (GUIDED, 3)])
def test_weights_of_adm_and_its_classifier(public, main, flags, scale):
    main(f"--steps 2 --cfg 1 --classes 1,7 --n 3 --out a.npz {flags}", ckpt="adm.pt")
    model = model_unet.from_adm(torch.load("unet_adm.pt"))
    guide = model_unet.classifier_from_adm(torch.load("classifier.pt"))
    how = dict(steps=2, classifier=guide, classifier_scale=scale)
    expected = by_hand(model, 3, [1, 7], Diffusion("cosine", 1000, "eps"), **how)
    assert np.array_equal(pictures("a.npz"), expected)
    assert bool(read_json("a.protocol.json")["classifier"]) == bool(flags)


def test_the_classifier_is_part_of_the_protocol(public, main, refused):
    main("--cfg 1 --n 1 --steps 1 --out folder", ckpt="adm.pt")
    flags = f"--cfg 1 --n 1 --steps 1 --out folder {GUIDED}"
    assert "folder: holds samples with classifier" in refused(flags, ckpt="adm.pt")


def test_public_weights_that_do_not_fit_are_refused(public, refused):
    assert "give --target" in refused("", ckpt="unet_adm.pt")
    assert "adm.pt was trained with eps" in refused("--target x0", ckpt="adm.pt")
    assert "--classifier unet_adm.pt" in refused("--classifier unet_adm.pt")
    save(network={**NETWORK, "img_size": 16})
    assert "side 16 and 10 classes, the network for 16 and 5" in refused("--classifier classifier.pt")


def test_released_weights_of_1000_classes_know_imagenets_names():
    with torch.device("meta"):
        model = ViT(32, 2, 4, 1000, **SIZES["vit-xl"])
        _, config = sample.load_released("file.pt", model.state_dict())
    assert config["class_names"][1].startswith("goldfish")
