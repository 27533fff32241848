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

import numpy as np
import pytest
import torch
from conftest import FORKS
from PIL import Image

import data
import fid
import files
import sample
import train
from files import BadInput
from model_unet import Classifier, UNet, classifier_from_adm, from_adm
from model_vit import ViT, from_official
from vae import load_vae

NETWORK = dict(img_size=4, patch_size=2, in_channels=3, num_classes=2, dim=16, depth=1, heads=2, T=10)
CONFIG = dict(dataset="x", schedule="cosine", target="x0", T=10, sample_steps=2, classes=["a", "b"], ema=0.9,
    drop=0.1, cfg=1.0,
              interval=None, network=NETWORK)
META = dict(dataset="x", split="train", count=4, size=8, classes=["a", "b"], listing="0", crop="c", filter="f")


# ------------------------------------------------------------------------- the loaders, what they return used once

def checkpoint(path):
    model, config = sample.load_checkpoint(path)
    images = sample.draw(model, config, [0], steps=1, cfg=1.0)
    assert images.dtype == torch.uint8 and images.shape == (1, 3, config["network"]["img_size"],
        config["network"]["img_size"])


def resumed(path):
    state = train.checkpoint(path, path.with_name("none"))
    assert type(state["config"]) is dict and type(state["step"]) is int and len(json.dumps(state["config"])) < 1e8


def weights(build):
    def load(path):
        model = build(files.read(path))
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    return load


def tensors(path):
    assert all(type(value) in (str, int, float, bool, dict, list, tuple, torch.Tensor,
        type(None)) for value in files.read(path).values())


def image(path):
    picture = data.load_image(path)
    assert picture.mode == "RGB" and 0 < picture.width * picture.height <= 1 << 26


def batch(path):
    rows, labels = data.read_batch(path)
    assert rows.dtype == np.uint8 and rows.ndim == 4 and rows.shape[1] == 3 and labels.dtype == np.int64
    assert labels.shape == (len(rows),)


def listed(path):
    files.open_archive.cache_clear()                                               # of the mutation before
    paths, labels, names = data.list_images(path)
    assert len(paths) == len(labels) and labels.max() < max(1,
        len(names)) and not any(".." in path.parts for path in paths)
    for place in paths[:3]:
        data.load_image(place)
    assert sum(len(part) for part in names) < 1e6


def packed(path):
    pack = data.Packed(path.parent)
    x, y = pack.batch([0, len(pack) - 1])
    assert len(pack) == pack.meta["count"] and x.shape == (2, 3, pack.size, pack.size) and 0 <= int(y.max()) < max(1,
        len(pack.classes))


def statistics(path):
    found = fid.stored(path)
    mu, sigma = (found[0]["mu"], found[0]["sigma"]) if found else (torch.zeros(0), torch.zeros(0, 0))
    assert sigma.shape == (len(mu),) * 2 and mu.dtype in (torch.float64, torch.float32)


def samples(path):
    source = fid.Source(path if path.suffix == ".npz" else path.parent)
    first = next(source.batches(0, min(2, source.count), 2))
    assert first.shape[1:] == (3, source.size, source.size) and first.dtype == torch.uint8


def journal(path):
    data.begin(path.parent, "images", (3, 8, 8), np.uint8, META)


def claimed(path):
    sample.claim(path.parent, dict(n=2))


LOADERS = dict(checkpoint=checkpoint, resumed=resumed, tensors=tensors, image=image, batch=batch, listed=listed,
    packed=packed,
               statistics=statistics, samples=samples, journal=journal, claimed=claimed, vae=load_vae,
               inception=fid.load_inception,
               official=weights(lambda state: from_official(state, 2)), adm=weights(lambda state: from_adm(state, 8,
               heads=1)),
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
    return dict(model=ema, ema=ema, optimizer={}, step=3, tally=torch.zeros(10, 4), config=copy.deepcopy({**CONFIG,
        **change}))


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
    beside = {"images.npy": npy(np.zeros((4, 3, 8, 8), np.uint8)), "labels.npy": npy(np.array([0, 1, 0, 1])),
        "meta.json": json.dumps(META).encode()}
    begun = {"images.npy": beside["images.npy"], "done.npy": npy(np.zeros(1, np.uint8))}
    npz = lambda **arrays: zipped({f"{name}.npy": npy(np.array(value)) for name, value in arrays.items()})
    pixels, few = np.zeros((2, 4, 4, 3), np.uint8), {"quant_conv.bias": torch.zeros(8),
        "quant_conv.weight": torch.ones(8, 8, 1, 1)}
    found = [("checkpoints", "checkpoint", "ckpt.pt", saved(state()), {}), ("checkpoints", "resumed", "ckpt.pt",
        saved(state()), {}),
             ("weights .pt", "official", "a.pt", saved(vit), {}), ("weights .pt", "adm", "a.pt", saved(UNet(**small,
             heads=1).state_dict()), {}),
             ("weights .pt", "classifier", "a.pt", saved(Classifier(**small, num_classes=3,
             head_channels=32).state_dict()), {}),
             ("weights .bin .ckpt", "tensors", "a.bin", saved(few), {}), ("weights .bin .ckpt", "vae", "a.bin",
             saved(few), {}),
             ("weights .bin .ckpt", "tensors", "old.ckpt", saved(dict(state_dict=few, step=1), **old), {}),
             ("weights .bin .ckpt", "inception", "old.pth", saved(few, **old), {}), ("weights .bin .ckpt",
             "checkpoint", "old.pt", saved(state(), **old), {}),
             ("safetensors", "tensors", "a.safetensors", safetensors({"w": dict(dtype="F32", shape=[2, 2],
             data_offsets=[0, 16])}), {}),
             ("pickled batches", "batch", "data_batch_1", pickle.dumps(dict(data=rows, labels=labels), 2), {}),
             ("pickled batches", "batch", "data_batch_2", pickle.dumps(dict(data=rows, labels=labels), 4), {}),
             ("npz", "batch", "train_data_batch_1.npz", npz(data=rows, labels=labels), {}), ("npz", "samples",
             "a.npz", npz(arr_0=pixels), {}),
             ("npz", "statistics", "a.npz", npz(mu=mu, sigma=sigma, meta="{}"), {}),
             *(("packs: npy, json", "packed", name, content, beside) for name, content in beside.items()),
             ("packs: npy, json", "journal", "packing.json", json.dumps(META).encode(), begun),
             ("packs: npy, json", "journal", "done.npy", begun["done.npy"], {**begun,
             "packing.json": json.dumps(META).encode()}),
             ("protocol.json", "samples", "protocol.json", b'{"n": 1, "size": 12}', {"a.png": picture()}),
             ("protocol.json", "claimed", "protocol.json", b'{"n": 2}', {}),
             ("archives", "listed", "a.zip", zipped(members), {}), ("archives", "listed", "b.zip", zipped(members,
             zipfile.ZIP_DEFLATED), {}),
             ("archives", "listed", "a.tar", tarred(members), {}), ("archives", "listed", "a.tar.gz", tarred(members,
             "w:gz"), {})]
    forms = dict(png="PNG", jpg="JPEG", gif="GIF", webp="WEBP", bmp="BMP", ppm="PPM", tif="TIFF")
    found += [("images", "image", f"a.{end}", picture(form), {}) for end, form in forms.items()]
    return found + [("images", "image", "b.tif", picture("TIFF", compression="tiff_lzw"), {}), ("images", "image",
        "b.jpg", picture("JPEG", progressive=True), {})]


# ----------------------------------------------------------------------------------------------------- mutations

OPCODES = [vars(pickle)[name][0] for name in dir(pickle) if name.isupper() and isinstance(vars(pickle)[name],
    bytes) and len(vars(pickle)[name]) == 1]
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
            content[place:place + 1] = rng.choice((b"99999999999999999999", b"1e999", b"-1", b"NaN", b"9" * 5000,
                b"0", b"[" * 2000))
        else:
            size = rng.choice((1, 2, 4, 8))
            content[place:place + size] = (rng.choice(HUGE) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little",
                "big")))
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
DEEDS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "pickle.find_class", "os.remove", "os.rename")


def work(jobs, out):
    """In a process of its own: load every file of `jobs`, (key, loader, path, content or None), and write what came."""
    deeds, armed = [], [False]

    def audit(event, args):
        if armed[0] and (event in DEEDS or event == "open" and isinstance(args[2],
                int) and args[2] & WRITES and "r+" not in str(args[1])):
            deeds.append(f"{event} {args[:1]}")
    tempfile.gettempdir()                                                    # which is tried out with a file, once
    sys.addaudithook(audit)
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    errors = os.open(f"{out}.err", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    warnings.simplefilter("always")
    warnings.simplefilter("ignore", ResourceWarning)
    held = int(next(line for line in open("/proc/self/status")
        if line.startswith("VmData")).split()[1]) << 10 if os.path.exists("/proc") else 0
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
                found = "refused" if len(text.splitlines()) == 1 and (text == files.shown(text)
                    or type(error) is not BadInput) else "many lines"
            except BaseException as error:
                found, text = type(error).__name__, str(error)
            signal.alarm(0)
            armed[0], spent = False, time.monotonic() - since
            said = os.fstat(2).st_size - said                                # libtiff says what it finds, and stops
            deeds += [f"{said} bytes on stderr"] * (said > (2000 if path.suffix == ".tif" else 0))
            file.write(json.dumps([found, text, spent, train.peak_rss() / 2 ** 20, deeds]) + "\n")


def judge(jobs, folder):
    """[(loader, path)] or [(key, loader, path, content)] -> [(found, text, seconds, peak MB, deeds)], under limits."""
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
        assert found == "refused" and says in text and spent < seconds and peak < megabytes and not deeds, (job[:2],
            found, text, spent, peak, deeds)


# ------------------------------------------------------------------------------------------------- named attacks

class Planted:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def written(folder, files):
    """{name: content} -> their paths."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def pickled(code, how="pt"):
    """A checkpoint, in torch's archive or the legacy format, whose pickle is `code`."""
    if how == "pt":
        return zipped({"a/data.pkl": code, "a/version": b"3\n", "a/byteorder": b"little"})
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    return b"".join(pickle.dumps(part, 2) for part in head) + code + pickle.dumps([], 2)


def test_foreign_names_are_not_looked_up(tmp_path):
    """In every container and protocol, by every opcode that names something."""
    calls = [Planted(os.system, f"touch {tmp_path}/planted"), Planted(eval, "1"), Planted(exec, "1"), Planted(np.load,
        "x"),
             Planted(torch.load, "x"), Planted(torch.hub.load, "x"), Planted(torch.jit.load, "x"), Planted(getattr, 1,
             "real")]
    codes = [pickle.dumps(dict(data=call, labels=[1]), i % 6) for i, call in enumerate(calls[:1] * 6 + calls[1:])]
    codes += [b"(S'touch planted'\nios\nsystem\n.", b"(cos\nsystem\nS'touch planted'\no.", b"cos\nsystem\n)\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
              b"ctorch.serialization\nload\n.", b"ctorch\nload\n.", b"ctorch._utils\n_import_dotted_name\n.",
              b"ctorch.storage\n_load_from_bytes\n.",
              b"cbuiltins\nbytearray\n(L9999999999L\ntR.", b"ctorch\nTensor\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftR.",
              b"c_codecs\ndecode\n.", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n.", b"cnumpy\nload\n.",
              b"ccopyreg\n_reconstructor\n."]
    jobs = []
    for i, code in enumerate(codes):
        paths = written(tmp_path / str(i), {"a.pt": pickled(code), "a.bin": pickled(code, "old"),
            "a.ckpt": pickled(code), "data_batch_1": code})
        jobs += zip(("tensors", "vae", "checkpoint", "batch"), paths)
    refused(jobs, tmp_path, "foreign object")
    assert not list(tmp_path.glob("**/planted"))


def test_pickles_that_allocate(tmp_path):
    """Lengths without content, virtual arrays, and structures that are small on disk alone."""
    length = lambda op, form, n=2 ** 40: op + struct.pack(form, n) + b"x."
    nested, key = [0], (0,)
    for _ in range(40):
        nested, key = [nested] * 9, (key, key)
    codes = [length(b"\x80\x04\x8e", "<Q"), length(b"\x80\x04\x8d", "<Q"), length(b"\x80\x05\x96", "<Q", 2 ** 33),
        length(b"\x8b", "<i", 2 ** 31 - 1),
             length(b"B", "<I", 2 ** 32 - 1), length(b"X", "<I", 2 ** 32 - 1), length(b"\x80\x04\x95", "<Q"),
             b"\x80\x02]r\xff\xff\xff\xff.",
             b"I" + b"9" * 10 ** 6 + b"\n.", b"(" * 20_000 + b".", b"]" * 20_000 + b"a" * 19_999 + b"."]
    codes += [pickle.dumps(dict(data=value, labels=[1]), protocol) for value, protocol in ((nested, 2), (nested, 4),
        ([9 ** 9999], 2))]
    codes += [pickle.dumps(dict(data=np.zeros((2, 12), np.uint8), labels=nested), 2)]
    codes += [b"}" + pickle.dumps(key, 2)[2:-1] + b"K\x01s."]                # hashed for 2^40 steps
    codes += [pickle.dumps(dict(data=Planted(np.ndarray, (10 ** 8, 12), "u1"), labels=Planted(np.ndarray, (10 ** 8,),
        "i8", b"12345678", 0, (0,))), 2)]
    jobs = []
    for i, code in enumerate(codes):
        jobs += zip(("tensors", "tensors", "batch"), written(tmp_path / str(i), {"a.pt": pickled(code),
            "b.pt": pickled(code, "old"), "data_batch_1": code}))
    views = {"wide": torch.zeros(1).expand(10 ** 5, 10 ** 5), "meta": torch.empty(10 ** 9, device="meta"),
             "many": [torch.zeros(10 ** 5)[None].expand(2, -1)] * 99, "sparse": torch.zeros(9, 9).to_sparse()}
    jobs += [("tensors", path) for path in written(tmp_path, {
        f"{name}{form}.pt": saved(dict(x=value), _use_new_zipfile_serialization=form)
        for name, value in views.items() for form in (True, False)})]
    refused(jobs, tmp_path)
    both = pickled(b"cbuiltins\nbytearray\n(L1073741823L\ntR.", "old") + zipped({"x": b""})     # a zip at its end alone
    refused([("tensors", path) for path in written(tmp_path, {"both.pt": both})], tmp_path, "foreign", megabytes=600)


def test_pickles_that_copy_their_parts_again_and_again(tmp_path):
    """A part named by two bytes costs what it holds, each time that an object is called with it or takes it as state."""
    text = pickle.BINUNICODE + struct.pack("<I", 500_000) + 500_000 * b"x" + b"q\0"
    pairs = b"]q\0(" + b"".join(b"]q\1(K\1K\2e" for _ in range(20_000)) + b"e"
    state = b"}q\0(" + b"".join(b"J" + struct.pack("<i", i) + b"K\1" for i in range(20_000)) + b"u"
    again = lambda part, name, how: part + b"0c" + name + b"\nq\5" + b"0" + 3000 * (b"h\5" + how + b"0")
    jobs = []
    for k, content in enumerate((again(text, b"_codecs\nencode", b"h\0h\0\x86R"),
                                 again(pairs, b"collections\nOrderedDict", b"h\0\x85R"),
                                 again(state, b"collections\nOrderedDict", b")Rh\0b"))):
        content = b"\x80\2" + content + b"]."
        (tmp_path / f"{k}.pt").write_bytes(zipped({"archive/data.pkl": content, "archive/version": b"3\n"}))
        (tmp_path / f"data_batch_{k}").write_bytes(content)
        jobs += [("tensors", tmp_path / f"{k}.pt"), ("batch", tmp_path / f"data_batch_{k}")]
    for found, text, seconds, peak, deeds in judge(jobs, tmp_path):
        assert found == "refused" and "copies its parts too often" in text, (found, text)
        assert seconds < 10 and peak < 700, (seconds, peak)


def test_what_is_no_tensor_number_or_name_is_left_out(tmp_path):
    shared = torch.ones(3)
    torch.save(dict(model=shared, ema=shared[1:], third=shared, a={1, 2}, b={None: 3, "x": 1}, c=2 ** 99, d=b"x", e=[None, 2],
                    f=torch.float16, g=torch.device("cpu")), tmp_path / "a.pt")
    found = files.read(tmp_path / "a.pt")
    assert all(torch.equal(found.pop(key), value) for key, value in dict(model=shared, ema=shared[1:], third=shared).items())
    assert found == dict(a=None, b={"x": 1}, c=None, d=None, e=[None, 2], f=None, g=None)
    torch.save(dict(row=torch.ones(5)[:, None].expand(-1, 7)), tmp_path / "c.pt")
    assert files.read(tmp_path / "c.pt")["row"].sum() == 35
    torch.save(dict(names=[str(i) for i in range(150_000)]), tmp_path / "b.pt")              # identities of a set of faces
    assert len(files.read(tmp_path / "b.pt")["names"]) == 150_000


def flood(gigabytes):
    """A deflate stream of so many GiB of zeros, of some 1 MB a GiB, without making them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (64 * gigabytes)


def swollen(name, start=b"", gigabytes=3):
    """A zip with a member of that many GiB, `start` first."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH) + flood(gigabytes)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
        archive.filelist[0].compress_type = zipfile.ZIP_DEFLATED
        archive.filelist[0].file_size = len(start) + (gigabytes << 30)
    return file.getvalue()


def array(shape, kind="<f8", more=""):
    file = io.BytesIO()
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, {more}}}"
    file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n")
    return file.getvalue()


def test_bombs_in_archives(tmp_path):
    """Members that inflate to 3 GB, overlap, or promise what a header cannot hold."""
    one = zipped({"cat/a.png": picture()})
    at, end = one.index(b"PK\1\2"), one.index(b"PK\5\6")
    overlap = one[:at] + one[at:end] * 500 + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 500, 500, 500 * (end - at), at, 0)
    entry, pax = tarfile.TarInfo("cat/a.png"), tarfile.TarInfo("pax")
    entry.size, pax.size, pax.type = 3 << 30, 3 << 30, tarfile.XHDTYPE
    tars = []
    for header in (entry, pax):
        head = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = head.compress(header.tobuf()) + head.flush(zlib.Z_FULL_FLUSH) + flood(3)
        tars.append(b"\x1f\x8b\x08\0\0\0\0\0\0\3" + body)
    sparse = tarfile.TarInfo("cat/a.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    block[386:410], block[483:495] = b"00000000000\0" + b"00000001000\0", b"77777777777\0"
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    text = picture()[:33] + struct.pack(">I", 2 ** 31 - 1) + b"tEXt"              # a PNG whose text is 2 GB of zeros
    jobs = [("tensors", "a.pt", swollen("a/data.pkl")), ("tensors", "b.pt", swollen("a/data/0")), ("checkpoint",
        "c.pt", swollen("data.pkl")),
            ("tensors", "d.pt", overlap), ("listed", "a.zip", overlap), ("listed", "b.zip", swollen("cat/a.png",
            b"\x89PNG\r\n\x1a\n\0\0\0\0")),
            ("listed", "a.tar.gz", tars[0]), ("listed", "b.tar.gz", tars[1]), ("listed", "s.tar",
            bytes(block) + text.ljust(1536, b"\0")),
            ("statistics", "a.npz", swollen("mu.npy", array((3 << 27,)))), ("samples", "b.npz", swollen("arr_0.npy",
            array((1, 30_000, 30_000, 3), "|u1"))),
            ("batch", "train_data_batch_1.npz", swollen("data.npy", array((1 << 18, 12_288), "|u1")))]
    jobs += [("statistics", "c.npz", zipped({"mu.npy": array((10 ** 12,)), "sigma.npy": array((10 ** 12, 10 ** 12))})),
             ("samples", "d.npz", zipped({"arr_0.npy": array((10 ** 6, 10 ** 4, 10 ** 4, 3), "|u1")})),
             ("batch", "train_data_batch_2.npz", zipped({"data.npy": array((10 ** 9, 12), "|u1"),
             "labels.npy": array((10 ** 9,), "<i8")}))]
    for loader, name, content in jobs:
        (tmp_path / name).write_bytes(content)
    refused([(loader, tmp_path / name) for loader, name, _ in jobs], tmp_path, seconds=5, megabytes=1000)


def test_images_that_promise_more_than_they_hold(tmp_path):
    chunk = lambda name, content: struct.pack(">I", len(content)) + name + content + struct.pack(">I",
        zlib.crc32(name + content))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 50_000, 50_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT",
        zlib.compress(bytes(10 ** 6))) + chunk(b"IEND", b"")
    bmp, tif, ppm = (bytearray(picture(form)) for form in ("BMP", "TIFF", "PPM"))
    bmp[18:26] = struct.pack("<2i", 50_000, 50_000)
    for tag in (256, 257):
        place = next(i for i in range(len(tif)) if tif[i:i + 4] in (struct.pack("<2H", tag, 3), struct.pack("<2H",
            tag, 4)))
        tif[place + 2:place + 12] = struct.pack("<HII", 4, 1, 50_000)
    webp = bytearray(picture("WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    files = {"a.png": png, "a.bmp": bytes(bmp), "a.tif": bytes(tif), "a.webp": bytes(webp),
        "a.ppm": ppm.replace(b"12 12", b"50000 50000"),
             "a.gif": b"GIF89a" + struct.pack("<2H", 65_000, 65_000) + picture("GIF")[10:]}
    Image.new("1", (12_000, 12_000)).save(large := io.BytesIO(), "PNG")              # 10 KB, and it holds what it promises
    refused([("image", path) for path in written(tmp_path, {**files, "large.png": large.getvalue()})], tmp_path,
        seconds=2, megabytes=1000)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Encapsulated PostScript by whatever name: Pillow would hand it to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/planted\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadInput, match="cannot be read as an image"):
        data.load_image(tmp_path / "a.png")
    assert not (tmp_path / "planted").exists()


def test_headers_of_arrays_that_lie(tmp_path):
    """Terabytes, Python objects, Python code, and pickles where an array was expected."""
    good = {"images.npy": npy(np.zeros((4, 3, 8, 8), np.uint8)), "labels.npy": npy(np.array([0, 1, 0, 1])),
        "meta.json": json.dumps(META).encode()}
    code = Planted(os.system, f"touch {tmp_path}/planted")
    objects = io.BytesIO()
    np.save(objects, np.array([code] * 4), allow_pickle=True)                # what a stranger may send; never loaded so
    odd = [array((10 ** 12, 3, 8, 8), "|u1"), array((4, 3, 8, 8), "|O"), objects.getvalue(), pickle.dumps(code), b"",
        array("(4, __import__('os').system('touch x'))"),
           array("(-4, -3, 8, 8)", "|u1"), array("(" * 3000), array((4, 3, 8, 8), "|u1", "'x': " + "-" * 3000 + "1"),
           array((4, 3, 8, 8), "|S0"), array("(True,)", "\\\\q")]
    jobs = []
    for i, wrong in enumerate(odd):
        for name in ("images.npy", "labels.npy"):
            jobs.append(("packed", written(tmp_path / f"{i}{name}", {**good, name: wrong})[0]))
        jobs.append(("statistics", written(tmp_path, {f"{i}.npz": zipped({"mu.npy": wrong, "sigma.npy": wrong})})[0]))
        jobs.append(("batch", written(tmp_path, {f"{i}/train_data_batch_1.npz": zipped({"data.npy": wrong,
            "labels.npy": npy(np.arange(4))})})[0]))
    refused(jobs, tmp_path)
    assert not list(tmp_path.glob("**/planted"))


def test_meta_that_lies(tmp_path):
    good = {"images.npy": npy(np.zeros((4, 3, 8, 8), np.uint8)), "labels.npy": npy(np.array([0, 1, 0, 1]))}
    texts = [json.dumps({**META, key: value}) for key, value in (("count", 10 ** 30), ("count", 4.0), ("count", True),
        ("count", None), ("size", -8), ("size", "8"),
             ("size", 10 ** 9), ("count", float("nan")), ("count", float("inf")), ("classes", "ab"), ("classes",
             [["a"], "b"]), ("classes", {"a": 1}), ("dataset", ["x"]),
             ("split", {}), ("vae", "x"), ("vae_file", 3), ("classes", []))]
    texts += ["[" * 10 ** 5, '{"a":' * 10 ** 5, "null", "3", '"x"',
        '{"count": 4, "count": 5' + json.dumps(META)[1:-1].replace('"count": 4', ', "size": 8') + "}", "9" * 9999, "\0"]
    refused([("packed", written(tmp_path / str(i), {**good, "meta.json": text.encode()})[2]) for i,
        text in enumerate(texts)], tmp_path)


def test_json_of_a_terabyte_is_not_read(tmp_path):
    for size in (1 << 26) + 1, 1 << 40:
        with open(tmp_path / "meta.json", "wb") as file:
            file.truncate(size)                                              # a hole, which takes no space
        with pytest.raises(BadInput, match="meta.json: .* size"):
            files.read_json(tmp_path / "meta.json")


def test_safetensors_that_lie(tmp_path):
    pytest.importorskip("safetensors")
    at = lambda *offsets, shape=(2, 2), kind="F32": dict(dtype=kind, shape=shape, data_offsets=offsets)
    headers = [{"w": at(0, 10 ** 15)}, {"w": at(10 ** 9, 10 ** 9 + 16)}, {"w": at(0, 16), "v": at(0, 16)}, {"w": at(0,
        16), "v": at(8, 24)}, {"w": at(16, 0)}, {"w": at(-1, 15)},
               {"w": at(0, 16, shape=[10 ** 12, 10 ** 12])}, {"w": at(0, 16, shape=[2 ** 63, 2])}, {"w": at(0, 16,
               kind="os.system")}, {"w": 3}, [], {"w": at(0, 4)}]
    files = {f"{i}.safetensors": safetensors(header) for i, header in enumerate(headers)}
    files |= {f"long{n}.safetensors": struct.pack("<Q", n) + b'{"w": 1}' for n in (0, 10 ** 8, 2 ** 40,
        2 ** 64 - 1)} | {"deep.safetensors": safetensors(b'{"w":' * 10 ** 5)}
    jobs = [(loader, path) for path in written(tmp_path, files) for loader in ("tensors", "vae")]
    refused(jobs, tmp_path, "cannot be loaded")


def test_archives_lead_nowhere_else(tmp_path):
    """Names that climb, links and pipes: refused, or no images."""
    (tmp_path / "secret.png").write_bytes(picture())
    jobs = []
    for i, name in enumerate(("../secret.png", "/etc/a.png", "cat/../../secret.png", "cat\\..\\a.png", "..",
            "a//b.png", f"{tmp_path}/secret.png")):
        jobs += [("listed", path) for path in written(tmp_path, {f"{i}.zip": zipped({name: picture()}),
            f"{i}.tar": tarred({name: picture()})})]
    for i, (kind, link) in enumerate(((tarfile.SYMTYPE, "../secret.png"), (tarfile.SYMTYPE, f"{tmp_path}/secret.png"),
            (tarfile.LNKTYPE, "secret.png"), (tarfile.FIFOTYPE, ""),
                                      (tarfile.CHRTYPE, ""), (tarfile.BLKTYPE, ""), (tarfile.DIRTYPE, ""))):
        for first in ((),
                ("cat/a.png",)):                                   # alone, and instead of a file of the same name
            with tarfile.open(tmp_path / f"link{i}{len(first)}.tar", "w") as archive:
                for name in first:
                    archive.addfile(tarfile.TarInfo(name))
                entry = tarfile.TarInfo("cat/a.png")
                entry.type, entry.linkname, entry.devmajor, entry.devminor = kind, link, 1, 5
                archive.addfile(entry)
            jobs.append(("listed", tmp_path / f"link{i}{len(first)}.tar"))
    refused(jobs, tmp_path)
    entry = zipfile.ZipInfo("cat/a.png")
    entry.external_attr = 0o120777 << 16                                     # a symbolic link in a zip is its text
    (tmp_path / "link.zip").write_bytes(zipped({entry: f"{tmp_path}/secret.png"}))
    refused([("listed", tmp_path / "link.zip")], tmp_path, "cannot be read as an image")


def test_pipes_and_devices_do_not_block(tmp_path):
    names = {"image": "a.png", "batch": "data_batch_1", "tensors": "a.pt", "checkpoint": "ckpt.pt",
        "vae": "a.safetensors", "statistics": "a.npz"}
    jobs = []
    for loader, name in names.items():
        (tmp_path / "pipe").mkdir(exist_ok=True), (tmp_path / "zero").mkdir(exist_ok=True)
        os.mkfifo(tmp_path / "pipe" / name)
        os.symlink("/dev/zero", tmp_path / "zero" / name)
        jobs += [(loader, tmp_path / kind / name) for kind in ("pipe", "zero") if loader != "statistics"]
    for name in ("images.npy", "labels.npy", "meta.json", "protocol.json"):
        good = {"images.npy": npy(np.zeros((4, 3, 8, 8), np.uint8)), "labels.npy": npy(np.array([0, 1, 0, 1])),
            "meta.json": json.dumps(META).encode(), "protocol.json": b"{}"}
        written(tmp_path / name, {key: value for key, value in good.items() if key != name})
        os.mkfifo(tmp_path / name / name)
        jobs.append(("claimed" if name == "protocol.json" else "packed", tmp_path / name / name))
    jobs += [("listed", tmp_path / "pipe"), ("samples", tmp_path / "pipe" / "a.npz")]
    refused(jobs, tmp_path, seconds=5)


def test_configs_that_lie(tmp_path):
    """Sizes cost nothing before the tensors have them; paths are names; types are those that train.py writes."""
    unet = dict(img_size=8, in_channels=3, channels=32, channel_mult=[1], res_blocks=1, attention_resolutions=[])
    sizes = [dict(img_size=10 ** 9), dict(dim=4800), dict(depth=10 ** 6), dict(dim=10 ** 9), dict(heads=0),
        dict(heads=-2), dict(heads=3.5), dict(patch_size=0), dict(num_classes=10 ** 9),
             dict(T=10 ** 9), dict(in_channels=10 ** 6), dict(depth="x" * 9), dict(dim=2 ** 63), dict(evil=1),
             dict(img_size=float("nan")), dict(img_size=[4])]
    networks = [{**NETWORK, **size} for size in sizes] + [{**unet, **size} for size in (
        dict(channels=32 * 10 ** 7), dict(res_blocks=10 ** 6), dict(channel_mult=[1] * 10 ** 4),
        dict(img_size=2 ** 30), dict(channel_mult="1"), dict(heads=0))]
    changes = [dict(network=network) for network in networks] + [dict(T=10 ** 12), dict(T="9"), dict(T=-1),
        dict(schedule=["cosine"]), dict(target="__class__"), dict(ema="\x1b[2J"),
               dict(step="\x1b"), dict(dataset=["../x"]), dict(classes=["a"]), dict(classes=[1, 2]), dict(classes={}),
               dict(cfg="1"), dict(drop=None), dict(sample_steps=10 ** 9),
               dict(interval="ab"), dict(interval=[1]), dict(interval=[{}, 1]), dict(vae="x"), dict(vae_file=3)]
    files = {f"{i}.pt": saved({**state(**change), "step": change.get("step", 3)}) for i, change in enumerate(changes)}
    files["odd.pt"] = saved(state(dataset="../../etc/x", vae_file="/etc/passwd", data="/dev/zero",
        out="/tmp/x"))      # read by no one
    *results, odd = judge([("checkpoint", path) for path in written(tmp_path, files)], tmp_path)
    for change, (found, text, spent, peak, deeds) in zip(changes, results):
        assert found == "refused" and "disagree" in text and spent < 10 and peak < 1000 and not deeds, (change, found,
            text, spent, peak)
    assert odd[0] == "loaded" and not odd[4]


@pytest.mark.slow
def test_a_run_is_not_resumed_from_a_lie(script, tmp_path):
    script("train.py", "--steps", 1, "--batch-size", 8, "--sample-steps", 1, "--out", "run")
    whole = files.read(tmp_path / "run/ckpt.pt")
    for part, change in (("config", dict(size=9996)), ("config", dict(T=10 ** 6)), ("config", dict(steps=2.0)),
                         ("config", dict(lr="1")), ("config", dict(batch_size=[8])), ("config", dict(seed=2 ** 70)),
                         ("optimizer", dict(state={0: 3})), ("model", {5: torch.zeros(1)}),
                         ("config", dict(data="\x1b]0;x\x07", dataset="\x1b[2J\n"))):
        torch.save({**whole, part: {**whole[part], **change}}, tmp_path / "run/ckpt.pt")
        assert (text := script("train.py", "--out", "run", "--resume", "--steps", 2,
            code=2)) and text.strip().isprintable(), (part, change)


def test_names_do_not_steer_the_terminal(script, tmp_path, capsys):
    """Names of classes, files, tensors and data sets with line breaks, escape sequences, right-to-left marks."""
    evil = "cat\n\x1b[31m\x1b]0;x\x07\u202e\udc80"
    (tmp_path / "src" / evil).mkdir(parents=True)
    for name in ("a.png", f"{evil}.png"):
        (tmp_path / "src" / evil / name).write_bytes(picture())
    data.pack(tmp_path / "src", 8, tmp_path / "pack", workers=1)
    capsys.readouterr()
    files.run(lambda: data.check(tmp_path / "pack"))
    text = capsys.readouterr().out
    assert data.Packed(tmp_path / "pack").classes == [evil] and "x1b[31m" in text and all(line.isprintable()
        for line in text.splitlines())
    (tmp_path / "src" / evil / "a.png").write_bytes(b"")
    assert r"cat \x1b[31m\x1b]0;x\x07\u202e\udc80/a.png" in script("data.py", "--src", "src", "--size", 8, "--out",
        "x", code=2)
    torch.save(state(dataset=evil, classes=[evil, "b"]), tmp_path / "a.pt")
    assert script("sample.py", "--ckpt", "a.pt", "--classes", "x", code=2).strip().isprintable()
    torch.save({**ViT(**NETWORK).state_dict(), evil[:-1]: torch.zeros(1)}, tmp_path / "few.pt")
    text = script("sample.py", "--ckpt", "few.pt", "--heads", 2, code=2)
    assert text.strip().isprintable() and r"\x1b[31m" in text
    (tmp_path / "a.pt").write_bytes(pickled(b"cevil\x1b[31m\nname\n."))
    assert r"evil\x1b[31m.name" in script("sample.py", "--ckpt", "a.pt", code=2)
    files.run(lambda: print(evil.split("\n")[1]))
    assert capsys.readouterr().out.strip().isprintable()
    files.Screen(sys.stdout).write("\ra\tb\n\x1b[2J\x9b1m\u2028\x00")
    assert capsys.readouterr().out == "\ra\tb\n\\x1b[2J\\x9b1m\\u2028\\x00"
    assert str(BadInput("a\nb\x85c\x00" + "d" * 9999)).startswith(r"a b\x85c\x00d")
    assert len(str(BadInput("d" * 9999))) == 2000


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
    for (kind, loader, path, _), (found, text, spent, peak, deeds) in zip(jobs, results):
        case = f"{loader} {path.name} {kind}: {found} {text[:300]!r} {spent:.2f} s {peak:.0f} MB {deeds}"
        fine = found in ("refused", "loaded") and peak < 2048 and not deeds
        fine &= spent < (30 if kind == "whole" else 10)                      # the first imports what PyTorch left out
        unread = loader in ("vae", "inception") or "pip install safetensors" in text
        assert fine and (found == "loaded" or kind != "whole" or unread), case


def test_mutated_files_are_refused_in_one_line_or_load_right(tmp_path):
    jobs = [job for _, part in fuzz(6, tmp_path) for job in part]
    examine(jobs, judge(jobs, tmp_path))


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path, capsys):
    """The table of the README: by loaders and by kind of mutation."""
    rows, since = {}, time.monotonic()
    for group, jobs in fuzz(280, tmp_path):
        results = judge(jobs, tmp_path)
        examine(jobs, results)
        for (kind, *_), (found, _, spent, peak, _) in zip(jobs[1:], results[1:]):
            for key in (group, kind, "all"):
                tried, lost, worst, most = rows.get(key, (0, 0, 0, 0))
                rows[key] = tried + 1, lost + (found == "refused"), max(worst, spent), max(most, peak)
    with capsys.disabled():
        print(f"\n| files | tried | refused | loaded | slowest | peak memory |  ({time.monotonic() - since:.0f} s)\n"
              "|---|---|---|---|---|---|")
        for key, (tried, lost, worst, most) in rows.items():
            print(f"| {key} | {tried:,} | {lost:,} | {tried - lost:,} | {worst:.2f} s | {most:,.0f} MB |")
    assert rows["all"][0] >= 10_000 and all(
        0 < lost < tried for key, (tried, lost, *_) in rows.items() if key != "safetensors")     # it may lack
