"""Files of strangers: nothing in them is executed, waited for or allocated unchecked, and a refusal is one line."""
import copy
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT
from PIL import Image

import data
import fid
import sample
import train
from data import BadInput
from model_unet import Classifier, UNet, classifier_from_adm, from_adm
from model_vit import ViT, from_official
from vae import load_vae

NETWORK = dict(img_size=4, patch_size=2, in_channels=3, num_classes=2, dim=16, depth=1, heads=2, T=10)
CONFIG = dict(dataset="x", schedule="cosine", target="x0", T=10, sample_steps=2, classes=["a", "b"], ema=0.9, drop=0.1, cfg=1.0,
              interval=None, network=NETWORK)
META = dict(dataset="x", split="train", count=4, size=8, classes=["a", "b"], listing="0", crop="c", filter="f")


# ------------------------------------------------------------------------- the loaders, what they return used once

def checkpoint(path):
    model, config = sample.load_checkpoint(path)
    images = sample.draw(model, config, [0], steps=1, cfg=1.0)
    assert images.dtype == torch.uint8 and images.shape == (1, 3, config["network"]["img_size"], config["network"]["img_size"])


def resumed(path):
    state = train.checkpoint(path, path.with_name("none"))
    assert type(state["config"]) is dict and type(state["step"]) is int and len(json.dumps(state["config"])) < 1e8


def weights(build):
    def load(path):
        model = build(data.read(path))
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    return load


def tensors(path):
    assert all(type(value) in (str, int, float, bool, dict, list, tuple, torch.Tensor, type(None)) for value in data.read(path).values())


def image(path):
    picture = data.load_image(path)
    assert picture.mode == "RGB" and 0 < picture.width * picture.height <= 1 << 26


def batch(path):
    rows, labels = data.read_batch(path)
    assert rows.dtype == np.uint8 and rows.ndim == 4 and rows.shape[1] == 3 and labels.shape == (len(rows),) and labels.dtype == np.int64


def listed(path):
    paths, labels, names = data.list_images(path)
    assert len(paths) == len(labels) and labels.max() < max(1, len(names)) and not any(".." in path.parts for path in paths)
    data.load_image(paths[0])
    assert sum(len(part) for part in names) < 1e6


def packed(path):
    pack = data.Packed(path.parent)
    x, y = pack.batch([0, len(pack) - 1])
    assert len(pack) == pack.meta["count"] and x.shape == (2, 3, pack.size, pack.size) and 0 <= int(y.max()) < max(1, len(pack.classes))


def statistics(path):
    found = fid.stored(path)
    assert found is None or found[0]["sigma"].shape == (len(found[0]["mu"]),) * 2 and found[0]["mu"].dtype == torch.float64


def samples(path):
    source = fid.Source(path if path.suffix == ".npz" else path.parent)
    first = next(source.batches(0, min(2, source.count), 2))
    assert first.shape[1:] == (3, source.size, source.size) and first.dtype == torch.uint8


def journal(path):
    data.begin(path.parent, "images", (3, 8, 8), np.uint8, META)


def claimed(path):
    sample.claim(path.parent, dict(n=2))


LOADERS = dict(checkpoint=checkpoint, resumed=resumed, tensors=tensors, image=image, batch=batch, listed=listed, packed=packed,
               statistics=statistics, samples=samples, journal=journal, claimed=claimed, vae=load_vae, inception=fid.load_inception,
               official=weights(lambda state: from_official(state, 2)), adm=weights(lambda state: from_adm(state, 8, heads=1)),
               classifier=weights(lambda state: classifier_from_adm(state, 32)))


# ---------------------------------------------------------------------------------------- small files, all right

def saved(state, **how):
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


def zipped(members, how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(form="PNG", **how):
    file = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 256, (3, 3, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(file, form, **how)
    return file.getvalue()


def state(**change):
    torch.manual_seed(0)
    ema = ViT(**NETWORK).state_dict()
    return dict(model=ema, ema=ema, optimizer={}, step=3, tally=torch.zeros(10, 4), config=copy.deepcopy({**CONFIG, **change}))


def safetensors(header, content=bytes(16)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content


def seeds():
    """[(group, loader, file name, content, what lies beside it)]"""
    torch.manual_seed(0)
    rows, labels = np.random.RandomState(0).randint(0, 256, (4, 12), np.uint8), [0, 1, 2, 3]
    vit, old = ViT(**NETWORK).state_dict(), dict(_use_new_zipfile_serialization=False)
    small = dict(img_size=8, in_channels=3, channels=32, channel_mult=[1], res_blocks=1, attention_resolutions=[])
    images = dict(cat={f"cat/{i}.png": picture() for i in range(2)}, dog={"dog/x.jpg": picture("JPEG")})
    members = {**images["cat"], **images["dog"]}
    mu, sigma = np.arange(3.0), np.eye(3)
    beside = {"images.npy": npy(np.zeros((4, 3, 8, 8), np.uint8)), "labels.npy": npy(np.array([0, 1, 0, 1])), "meta.json": json.dumps(META).encode()}
    begun = {"images.npy": beside["images.npy"], "done.npy": npy(np.zeros(1, np.uint8))}
    npz = lambda **arrays: zipped({f"{name}.npy": npy(np.array(value)) for name, value in arrays.items()})
    pixels, few = np.zeros((2, 4, 4, 3), np.uint8), {"quant_conv.bias": torch.zeros(8), "quant_conv.weight": torch.ones(8, 8, 1, 1)}
    found = [("checkpoints", "checkpoint", "ckpt.pt", saved(state()), {}), ("checkpoints", "resumed", "ckpt.pt", saved(state()), {}),
             ("weights .pt", "official", "a.pt", saved(vit), {}), ("weights .pt", "adm", "a.pt", saved(UNet(**small, heads=1).state_dict()), {}),
             ("weights .pt", "classifier", "a.pt", saved(Classifier(**small, num_classes=3, head_channels=32).state_dict()), {}),
             ("weights .bin .ckpt", "tensors", "a.bin", saved(few), {}), ("weights .bin .ckpt", "vae", "a.bin", saved(few), {}),
             ("weights .bin .ckpt", "tensors", "old.ckpt", saved(dict(state_dict=few, step=1), **old), {}),
             ("weights .bin .ckpt", "inception", "old.pth", saved(few, **old), {}), ("weights .bin .ckpt", "checkpoint", "old.pt", saved(state(), **old), {}),
             ("safetensors", "tensors", "a.safetensors", safetensors({"w": dict(dtype="F32", shape=[2, 2], data_offsets=[0, 16])}), {}),
             ("pickled batches", "batch", "data_batch_1", pickle.dumps(dict(data=rows, labels=labels), 2), {}),
             ("pickled batches", "batch", "data_batch_2", pickle.dumps(dict(data=rows, labels=labels), 4), {}),
             ("npz", "batch", "train_data_batch_1.npz", npz(data=rows, labels=labels), {}), ("npz", "samples", "a.npz", npz(arr_0=pixels), {}),
             ("npz", "statistics", "a.npz", npz(mu=mu, sigma=sigma, meta="{}"), {}),
             *(("packs: npy, json", "packed", name, content, beside) for name, content in beside.items()),
             ("packs: npy, json", "journal", "packing.json", json.dumps(META).encode(), begun),
             ("packs: npy, json", "journal", "done.npy", begun["done.npy"], {**begun, "packing.json": json.dumps(META).encode()}),
             ("protocol.json", "samples", "protocol.json", b'{"n": 1, "size": 12}', {"a.png": picture()}),
             ("protocol.json", "claimed", "protocol.json", b'{"n": 2}', {}),
             ("archives", "listed", "a.zip", zipped(members), {}), ("archives", "listed", "b.zip", zipped(members, zipfile.ZIP_DEFLATED), {}),
             ("archives", "listed", "a.tar", tarred(members), {}), ("archives", "listed", "a.tar.gz", tarred(members, "w:gz"), {})]
    forms = dict(png="PNG", jpg="JPEG", gif="GIF", webp="WEBP", bmp="BMP", ppm="PPM", tif="TIFF")
    found += [("images", "image", f"a.{end}", picture(form), {}) for end, form in forms.items()]
    return found + [("images", "image", "b.tif", picture("TIFF", compression="tiff_lzw"), {}), ("images", "image", "b.jpg", picture("JPEG", progressive=True), {})]


# ----------------------------------------------------------------------------------------------------- mutations

OPCODES = [vars(pickle)[name][0] for name in dir(pickle) if name.isupper() and isinstance(vars(pickle)[name], bytes) and len(vars(pickle)[name]) == 1]
HUGE = [2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 33, 2 ** 40, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1, 50_000, 0]
KINDS = ("bits", "cut", "insert", "lengths", "swap", "opcodes")


def mutate(kind, content, others, rng):
    content, place = bytearray(content), rng.randrange(len(content))
    if kind == "bits":
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:place + rng.choice((1, 9, 10 ** 9))]
    elif kind == "insert":
        content[place:place] = rng.choice((rng.randbytes(rng.randrange(1, 40)), bytes(5000), content[:place][-30:]))
    elif kind == "lengths":
        numbers = [i for i in range(len(content)) if chr(content[i]).isdigit()]
        if content[:1] in b"{\x93" and numbers:                              # numbers are text here
            place = rng.choice(numbers)
            content[place:place + 1] = rng.choice((b"99999999999999999999", b"1e999", b"-1", b"NaN", b"9" * 5000, b"0", b"[" * 2000))
        else:
            size = rng.choice((1, 2, 4, 8))
            content[place:place + size] = (rng.choice(HUGE) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    elif kind == "swap":
        other = rng.choice(others)
        start, size = rng.randrange(len(other)), rng.choice((4, 64, 10 ** 9))
        content[place:place + rng.choice((0, size))] = other[start:start + size]
    else:
        for _ in range(rng.choice((1, 2, 5))):
            content[rng.randrange(len(content))] = rng.choice(OPCODES)
    return bytes(content)


def mutation(kind, content, others, rng):
    """Half of those of an archive lie in a member, under a checksum that is right."""
    if content[:4] != b"PK\3\4" or rng.random() < 0.5:
        return mutate(kind, content, others, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = [name for name in members if name.endswith(".pkl")] if rng.random() < 0.7 else []
    name = rng.choice(pickled or [name for name in members if members[name]])
    members[name] = mutate(kind, members[name], others, rng)
    return zipped(members)


# ----------------------------------------------------------------------------------- a process with limits judges

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DEEDS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class", "os.remove", "os.rename")


def work(jobs, out):
    """In a process of its own: load every file of `jobs`, (key, loader, path, content or None, beside), and write what came of it."""
    deeds, armed = [], [False]

    def audit(event, args):
        if armed[0] and (event in DEEDS or event == "open" and isinstance(args[2], int) and args[2] & WRITES and "r+" not in str(args[1])):
            deeds.append(f"{event} {args[:1]}")
    tempfile.gettempdir()                                                    # which is tried out with a file, once
    sys.addaudithook(audit)
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    errors = os.open(f"{out}.err", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    warnings.simplefilter("always")
    held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10 if os.path.exists("/proc") else 0
    if held:
        resource.setrlimit(resource.RLIMIT_DATA, (held + (2 << 30),) * 2)
    with open(out, "w") as file:
        for key, loader, path, content in jobs:
            if content is not None:
                path.write_bytes(content)
            print(json.dumps([key, str(path)]), end=" ", file=file, flush=True)
            since, deeds[:], armed[0], said = time.monotonic(), [], True, os.fstat(2).st_size
            signal.alarm(30)                                                 # ends this process, whatever it does
            try:
                LOADERS[loader](path)
                found, text = "loaded", ""
            except ValueError as error:
                text = str(error)
                found = "refused" if len(text.splitlines()) == 1 and (text.isprintable() or type(error) is not BadInput) else "many lines"
            except BaseException as error:
                found, text = type(error).__name__, str(error)
            signal.alarm(0)
            armed[0], spent = False, time.monotonic() - since
            said = os.fstat(2).st_size - said                                # libtiff says what it finds, and stops
            deeds += [f"{said} bytes on stderr"] * (said > (2000 if path.suffix == ".tif" else 0))
            file.write(json.dumps([found, text, spent, train.peak_rss() / 2 ** 20, deeds]) + "\n")


def judge(jobs, folder):
    """-> [(found, text, seconds, peak MB, deeds)] of [(loader, path)] or [(key, loader, path, content)], in a process with limits."""
    jobs = [job if len(job) == 4 else ("", *job, None) for job in jobs]
    process, out = FORKS.Process(target=work, args=(jobs, folder / "judged.txt")), folder / "judged.txt"
    process.start()
    process.join(280)
    process.kill()
    process.join()
    lines = out.read_text().splitlines()
    assert process.exitcode == 0, f"exit {process.exitcode} at {lines[-1]}"
    return [json.loads(line[json.JSONDecoder().raw_decode(line)[1]:]) for line in lines]


def refused(jobs, folder, says="", seconds=10, megabytes=2048):
    """Every job is refused in one line that says so, at once, in little memory, and nothing is done on the way."""
    for job, (found, text, spent, peak, deeds) in zip(jobs, judge(jobs, folder)):
        assert found == "refused" and says in text and spent < seconds and peak < megabytes and not deeds, (job[:2], found, text, spent, peak, deeds)


# ---------------------------------------------------------------------------------------------------- the fuzzer

def fuzz(count, folder):
    """(group, jobs) of every seed: the file as it is, then `count` mutations of it."""
    files = seeds()
    others = [content for _, _, _, content, _ in files]
    for number, (group, loader, name, content, beside) in enumerate(files):
        (place := folder / str(number)).mkdir()
        for other, kept in beside.items():
            (place / other).write_bytes(kept)
        rng, kinds = random.Random(number), [KINDS[i % len(KINDS)] for i in range(count)]
        yield group, [("whole", loader, place / name, content),
                      *((kind, loader, place / name, mutation(kind, content, others, rng)) for kind in kinds)]


def examine(jobs, results):
    """Every outcome is one of the two that are allowed, within the limits; a whole file is loaded."""
    for (kind, loader, path, content), (found, text, spent, peak, deeds) in zip(jobs, results):
        case = f"{loader} {path.name} {kind}: {found} {text[:300]!r} {spent:.2f} s {peak:.0f} MB {deeds}"
        fine = found in ("refused", "loaded") and spent < 10 and peak < 2048 and not deeds
        if not fine:
            (Path("/tmp") / f"hostile-{path.name}").write_bytes(content)
        assert fine and (found == "loaded" or kind != "whole" or loader in ("vae", "inception")), case


def test_mutated_files_are_refused_in_one_line_or_load_right(tmp_path):
    jobs = [job for _, part in fuzz(12, tmp_path) for job in part]
    examine(jobs, judge(jobs, tmp_path))


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path, capsys):
    """The table of the README: by loaders and by kind of mutation."""
    rows, since = {}, time.monotonic()
    for group, jobs in fuzz(290, tmp_path):
        results = judge(jobs, tmp_path)
        examine(jobs, results)
        for (kind, *_), (found, _, spent, peak, _) in zip(jobs[1:], results[1:]):
            for key in (group, kind, "all"):
                tried, lost, worst, most = rows.get(key, (0, 0, 0, 0))
                rows[key] = tried + 1, lost + (found == "refused"), max(worst, spent), max(most, peak)
    with capsys.disabled():
        print(f"\n| files | tried | refused | loaded | slowest | peak memory |  ({time.monotonic() - since:.0f} s)\n|---|---|---|---|---|---|")
        for key, (tried, lost, worst, most) in rows.items():
            print(f"| {key} | {tried:,} | {lost:,} | {tried - lost:,} | {worst:.2f} s | {most:,.0f} MB |")
    assert rows["all"][0] >= 10_000 and all(lost < tried for tried, lost, *_ in rows.values())
