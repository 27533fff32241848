"""The FID Inception against golden features, Frechet distances in closed form, the command line."""
import json
import shutil
from itertools import permutations, product

import numpy as np
import pytest
import torch
from conftest import ROOT, formula, relative
from PIL import Image

import fid
from data import shapes
from files import BadInput


@pytest.fixture(scope="session")
def values():
    file = np.load(ROOT / "tests/golden/fid.npz")
    return {key: file[key] for key in file.files}


@pytest.fixture(scope="session")
def weights(values):
    """The 472 tensors by the formula that the golden features were computed with."""
    return formula(values["keys"], values["shapes"])


@pytest.fixture(scope="session")
def inception(weights):
    return fid.load_inception(weights)


@pytest.fixture(scope="session")
def inception_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "formula.pth"
    torch.save(weights, path)
    return path


def nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


# ------------------------------------------------------------------------------------------------ the network

def test_features_are_golden(values, inception):
    features, spatial = inception(nchw(values["images_64"]), spatial=True)
    assert features.dtype == torch.float32
    assert relative(features, values["features_64"]) < 1e-4
    assert relative(spatial, values["spatial_64"]) < 1e-4
    assert relative(inception.probs(features), values["probs_64"]) < 1e-4


def test_features_of_another_size_are_golden(values, inception):
    features = inception(nchw(values["images_256"]))
    assert relative(features, values["features_256"]) < 1e-4


def test_resize_of_a_row_is_golden(values):
    row = torch.tensor([[[[0.0, 10.0]]]])
    resized = fid.resize(row, 4)[0, 0, 0]
    assert np.array_equal(resized, values["resize_row"])


def test_weights_with_counters_load(weights, inception):
    fid.load_inception({**inception.state_dict(), **weights})


@pytest.mark.parametrize("change", [
    {"fc.bias": None},
    {"fc.weight": torch.zeros(1000, 2048)},
    {"extra": torch.zeros(1)}])
def test_other_weights_are_refused(change, weights):
    state = {**weights, **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(BadInput, match="not the FID Inception"):
        fid.load_inception(state)


# ------------------------------------------------------------------------------------------------ the metrics

@pytest.mark.parametrize("pair", ["AB", "CD", "AA"])
def test_frechet_is_golden(pair, values):
    one, two = (moments(values[name]) for name in pair)
    expected = float(values[f"frechet_{pair}"])
    found = fid.frechet_distance(*one, *two)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [100, 5])                  # 5 samples: a singular covariance
def test_frechet_of_equal_covariances(n):
    mu, sigma = moments(np.random.RandomState(0).randn(n, 30))
    found = fid.frechet_distance(mu, sigma, mu + 1, sigma)
    assert found == pytest.approx(30, rel=1e-7)


def test_statistics_that_are_streamed_are_those_of_numpy():
    x = np.random.RandomState(1).gamma(2.0, size=(500, 40))
    statistics = fid.Statistics()
    for part in np.array_split(x, [7, 100, 101, 340]):
        statistics.add(torch.from_numpy(part))
    mu, sigma = statistics.result()
    assert relative(mu, x.mean(0)) < 1e-12
    assert relative(sigma, np.cov(x, rowvar=False)) < 1e-12


def test_the_inception_score_is_10_for_10_sure_classes_and_1_for_unsure_ones_chunk_by_chunk():
    sure = torch.eye(10).repeat(6, 1)
    assert fid.inception_score(sure, split=30) == pytest.approx(10)
    unsure = torch.full((60, 10), 0.1)
    assert fid.inception_score(unsure) == pytest.approx(1)
    in_order = sure.sort(0, descending=True).values
    assert fid.inception_score(in_order, split=6) < 3


def share_in_a_ball(points, centres):
    """The balls reach from each centre to the third nearest of the others."""
    among = (centres[:, None] - centres).norm(dim=2)     # (C,C)
    radius = among.sort(1).values[:, 3]
    inside = (points[:, None] - centres).norm(dim=2) <= radius           # (P,C)
    return inside.any(1).double().mean().item()


def test_precision_is_the_share_of_the_samples_in_a_ball_and_recall_that_of_the_reference():
    reference = torch.randn(40, 3).double()
    samples = torch.randn(30, 3).double()
    expected = share_in_a_ball(samples, reference), share_in_a_ball(reference, samples)
    assert fid.precision_recall(reference, samples) == pytest.approx(expected)


def mmd(x, y):
    """MMD^2 of KID's kernel, a pair of rows at a time: two different rows in a set, any two across."""
    def mean(pairs):
        return np.mean([(one @ two / len(one) + 1) ** 3 for one, two in pairs])

    return mean(permutations(x, 2)) + mean(permutations(y, 2)) - 2 * mean(product(x, y))


def test_kid_is_a_mean_over_pairs():
    x = torch.rand(7, 4).double()
    y = torch.rand(4).double().expand(12, 4)             # its subsets of 7 are alike
    mean, _ = fid.kid(x, y)
    assert mean == pytest.approx(mmd(x.numpy(), y.numpy()), rel=1e-9)
    assert fid.kid(x, y, subset=5)[1] > 1e-9             # drawn at random


def test_fd_pixels_grows_with_the_difference_of_the_images():
    real, _ = shapes(range(400), 16)
    other, _ = shapes(range(400, 800), 16)
    assert abs(fid.fd_pixels(real, real)) < 1e-6
    assert 1e-6 < fid.fd_pixels(real, other) < fid.fd_pixels(real, 255 - other)


# -------------------------------------------------------------------------------------------- drawing images

def test_one_image_of_each_portion_is_drawn():
    edges = np.arange(400) * 600 // 399
    rows = fid.spread(399, 600, seed=0)
    assert np.all(edges[:-1] <= rows)
    assert np.all(rows < edges[1:])
    assert rows != fid.spread(399, 600, seed=1)


# ---------------------------------------------------------------------------------------------- command line

PIXELS = ("--features", "pixels")


def write_pngs(folder, images):
    """As PNGs, every other one in a sub-folder."""
    (folder / "deep").mkdir(parents=True)
    for i, image in enumerate(images):
        name = f"{i:03d}.png" if i % 2 else f"deep/{i:03d}.PNG"
        Image.fromarray(image).save(folder / name)


def write_samples(folder, images, n):
    """As sample.py writes them, n of them by their protocol."""
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k:06d}.png")
    (folder / "protocol.json").write_text(json.dumps(dict(n=n)))


@pytest.fixture
def sets(tmp_path):
    """Twenty images as a folder a, as a.zip and as a.npz; thirty others as b.npz.

    batch.npz is ADM's kind of file: the twenty images beside statistics that are not theirs.
    """
    images, _ = shapes(range(50), 24)
    images = images.transpose(0, 2, 3, 1)
    write_pngs(tmp_path / "a", images[:20])
    write_pngs(tmp_path / "a/.ipynb_checkpoints", images[:4])
    shutil.make_archive(tmp_path / "a", "zip", tmp_path / "a")
    np.savez(tmp_path / "a.npz", arr_0=images[:20])
    np.savez(tmp_path / "batch.npz", arr_0=images[:20], mu=np.zeros(192), sigma=np.eye(192))
    np.savez_compressed(tmp_path / "b.npz", arr_0=images[20:])
    return tmp_path


def parsed(text):
    return json.loads(text.splitlines()[-1])


@pytest.fixture(params=[
    "pixels",
    pytest.param("inception", marks=pytest.mark.slow)])
def features(request):
    if request.param == "pixels":
        return PIXELS
    return ("--inception", request.getfixturevalue("inception_file"))


def test_one_score_whatever_the_form_and_batch(script, sets, features):
    first = script("fid.py", "a.npz", "b.npz", *features)
    [(name, value)] = parsed(first)["result"].items()
    assert f"{name} {value:.2f}" in first
    assert "warning: a.npz: 20 images" in first
    assert "warning: b.npz: 30 images" in first
    script("fid.py", "stats", "--data", "b.npz", "--out", "ref.npz", *features)
    second = script("fid.py", "a", "b.npz", "--batch-size", 7, *features)
    third = script("fid.py", "a.zip", "ref.npz", *features)
    for text in (second, third):
        found = parsed(text)
        assert found["result"] == pytest.approx({name: value}, rel=1e-4)
        assert found["reference"]["n"] == 30


@pytest.mark.parametrize("reference, name", [
    ("a", "FD-pixels-20"),
    ("batch.npz", "FD-pixels-30")])                      # published statistics do not say of how many images
def test_the_smaller_side_names_a_score(reference, name, script, sets):
    text = script("fid.py", "b.npz", reference, *PIXELS)
    assert f"{name} " in text


def test_samples_with_statistics_are_scored_on_their_images(script, sets):
    found = parsed(script("fid.py", "batch.npz", "a", *PIXELS))
    assert found["result"]["FD-pixels-20"] == pytest.approx(0, abs=1e-6)


def test_count_measures_the_drawn_images(script, sets):
    images = np.load(sets / "b.npz")["arr_0"]
    np.savez(sets / "drawn.npz", arr_0=images[fid.spread(10, 30, 5)])
    found = parsed(script("fid.py", "b.npz", "drawn.npz", "--count", 10, "--seed", 5, *PIXELS))
    assert found["result"]["FD-pixels-10"] == pytest.approx(0, abs=1e-6)
    assert found["samples"]["drawn"] == {"count": 10, "seed": 5}


@pytest.mark.parametrize("channel", [0, slice(1)])       # (N,S,S) and (N,S,S,1)
def test_grey_images_are_read_as_rgb(channel, script, sets):
    images = np.load(sets / "a.npz")["arr_0"]
    np.savez(sets / "grey.npz", arr_0=images[..., channel])
    np.savez(sets / "rgb.npz", arr_0=images[..., :1].repeat(3, 3))
    text = script("fid.py", "grey.npz", "rgb.npz", *PIXELS)
    assert "grey.npz: grey images, read as RGB" in text
    assert parsed(text)["result"]["FD-pixels-20"] == pytest.approx(0, abs=1e-6)


def divide_by_0():
    fid.pixels = lambda images: torch.ones(len(images), 192) / 0


def test_statistics_that_are_not_finite(script, mistakes):
    assert "nan.npz: mu holds inf or nan" in script("fid.py", "a", "nan.npz", *PIXELS, code=3)


def test_features_that_are_not_finite(script, sets):
    assert "a: mu holds inf or nan" in script("fid.py", "a", "b.npz", *PIXELS, code=3, change=divide_by_0)


def test_a_pack_has_the_score_of_its_images(script, sets):
    script("data.py", "--src", "a/deep", "--out", "pack", "--size", 24)
    text = script("fid.py", "pack", "a/deep", *PIXELS)
    found = parsed(text)
    assert found["result"] == {"FD-pixels-10": pytest.approx(0, abs=1e-6)}
    assert found["samples"]["dataset"] == "pack"


@pytest.mark.slow
def test_all_metrics_are_those_of_their_formulas(script, sets, inception, inception_file):
    """Against ADM's kind of reference: statistics, beside them 30 images whose statistics are not used."""
    a = np.load(sets / "a.npz")["arr_0"]
    b = np.load(sets / "b.npz")["arr_0"]
    features, spatial = inception(nchw(a), spatial=True)
    mu = np.linspace(0, 1, 2048)
    mu_s = np.linspace(0, 1, 2023)
    sigma, sigma_s = np.diag(mu), np.diag(mu_s)
    np.savez(sets / "adm.npz", arr_0=b, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    words = ("--inception", inception_file, "--metrics", "all", "--batch-size", 9)
    text = script("fid.py", "a.npz", "adm.npz", *words)
    real = inception(nchw(b))
    precision, recall = fid.precision_recall(real, features)
    mean, std = fid.kid(real, features)
    assert f"KID {mean:.4f}" in text
    assert "adm.npz does not say how many images" in text
    assert parsed(text)["result"] == pytest.approx({
        "FID-20": fid.frechet_distance(*moments(features.numpy()), mu, sigma),
        "IS": fid.inception_score(inception.probs(features)),
        "sFID": fid.frechet_distance(*moments(spatial.numpy()), mu_s, sigma_s),
        "precision": precision,
        "recall": recall,
        "KID": mean,
        "KID_std": std}, rel=1e-3)


def print_tf32():
    fid.allow_tf32 = lambda allowed: print("tf32", allowed)


@pytest.mark.parametrize("flags, said", [((), "tf32 True"), (("--exact",), "tf32 False")])
def test_products_are_tf32_unless_exact(flags, said, script, sets):
    assert said in script("fid.py", "a", "b.npz", *PIXELS, *flags, change=print_tf32)


def test_images_beyond_the_protocol_are_said(script, sets):
    write_samples(sets / "drawn", np.load(sets / "a.npz")["arr_0"], 18)
    text = script("fid.py", "drawn", "b.npz", *PIXELS)
    assert "drawn: holds 20 images, 18 of them by its protocol; measured are 18 of these" in text


@pytest.mark.slow
def test_metrics_that_need_images_are_said_to_be_left_out(script, sets, inception_file):
    np.savez(sets / "bare.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    text = script("fid.py", "a", "bare.npz", "--metrics", "all", "--inception", inception_file)
    assert "left out: sFID, as bare.npz" in text
    assert "left out: precision, recall and KID, as bare.npz" in text


@pytest.fixture
def mistakes(sets):
    """One mistake or damage of each kind."""
    small, _ = shapes(range(9), 16)
    small = small.transpose(0, 2, 3, 1)
    np.savez(sets / "small.npz", arr_0=small)
    np.savez(sets / "float.npz", arr_0=small / 255)
    np.savez(sets / "columns.npz", arr_0=np.asfortranarray(small))
    np.savez(sets / "wide.npz", arr_0=small[:, :12])
    np.save(sets / "array.npy", small)
    (sets / "array.npy").rename(sets / "array.npz")
    np.savez(sets / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(sets / "keys.npz", other=small)
    np.savez(sets / "odd.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(sets / "minus.npz", mu=np.zeros(192), sigma=-np.eye(192))
    np.savez(sets / "skew.npz", mu=np.zeros(192), sigma=np.triu(np.ones((192, 192))))
    np.savez(sets / "words.npz", mu=np.full(192, "x"), sigma=np.eye(192))
    write_samples(sets / "stray", small, 9)
    (sets / "stray/0.png").write_bytes((sets / "stray/000001.png").read_bytes())
    (sets / "oblong").mkdir()
    for i in range(4):
        Image.new("RGB", (24, 16)).save(sets / f"oblong/{i}.png")
    meta = json.dumps(dict(extractor="another"))
    np.savez(sets / "extractor.npz", mu=np.zeros(192), sigma=np.eye(192), meta=meta)
    (sets / "cut.npz").write_bytes((sets / "small.npz").read_bytes()[:900])
    whole = bytearray((sets / "b.npz").read_bytes())
    whole[len(whole) // 2] ^= 16
    (sets / "flipped.npz").write_bytes(whole)
    write_samples(sets / "short", small, 30)
    for name in ("empty", "mixed", "jpeg", "broken"):
        write_pngs(sets / name, small[:0 if name == "empty" else 9])
    Image.new("RGB", (24, 24)).save(sets / "mixed/9.png")
    Image.new("RGB", (16, 16)).save(sets / "jpeg/9.JPG")
    (sets / "broken/9.png").write_bytes((sets / "broken/001.png").read_bytes()[:99])


@pytest.mark.parametrize("words, named", [
    ("small.npz b.npz", "size"),
    ("a extractor.npz", "another"),
    ("float.npz b.npz", "float64"),
    ("columns.npz b.npz", "arr_0"),
    ("wide.npz b.npz", "(9, 12, 16, 3), expected uint8 (N,S,S,3)"),
    ("array.npz b.npz", "array.npz"),
    ("extractor.npz a", "SAMPLES REFERENCE"),
    ("keys.npz b.npz", "arr_0"),
    ("a odd.npz", "192 features"),
    ("a minus.npz", "no covariance"),
    ("a skew.npz", "no covariance"),
    ("a words.npz", "words.npz"),
    ("stray b.npz", "stray: found 000000.png, expected image 1 of its protocol.json"),
    ("oblong small.npz", "square"),
    ("cut.npz b.npz", "cut.npz"),
    ("flipped.npz b.npz", "flipped.npz"),
    ("empty b.npz", "found no images, expected .png"),
    ("mixed small.npz", "9.png"),
    ("broken small.npz", "9.png"),
    ("jpeg small.npz", "JPEG"),
    ("short small.npz", "at least 30"),
    ("a b.npz --count 21", "at least 21"),
    ("none b.npz", "none"),
    ("stats --data a.npz --out ./a.npz", "itself"),
    ("stats --data a --out ref", ".npz"),
    ("a b.npz --metrics all", "--metrics all")])
def test_a_mistake_is_one_line(words, named, script, mistakes):
    assert named in script("fid.py", *words.split(), *PIXELS, code=2)


def test_cached_weights_that_are_not_the_published_ones(script, sets, monkeypatch):
    monkeypatch.setattr(fid, "CACHED", sets / "cached.pth")
    (sets / "cached.pth").write_bytes(b"not it")
    assert fid.SHA256 in script("fid.py", "a", "b.npz", code=2)


@pytest.mark.parametrize("samples, named", [
    ("a", "no network"),
    ("small.npz", "size")])
def test_weights_are_fetched_after_all_checks(samples, named, script, mistakes, tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(fid, "CACHED", tmp_path / "none.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert named in script("fid.py", samples, "b.npz", code=2)
