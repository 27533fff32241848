"""The FID Inception against golden features, Frechet distances in closed form, and the command line end to end."""
import json
import time

import numpy as np
import pytest
import scipy.linalg
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

def test_inception_has_the_parameters_of_the_published_file(inception):
    assert len(inception.state_dict()) == 566
    assert sum(p.numel() for p in inception.parameters()) == 23_850_960


def test_features_are_golden(values, inception):
    features, spatial = inception(nchw(values["images_64"]), spatial=True)
    assert features.dtype == torch.float32
    assert relative(features, values["features_64"]) < 1e-4
    assert relative(spatial, values["spatial_64"]) < 1e-4
    assert relative(inception.probs(features), values["probs_64"]) < 1e-4
    assert relative(features, values["features_64_pytorch_fid_resize"]) > 1e-3     # another resize would show


def test_features_of_another_size_are_golden(values, inception):
    assert relative(inception(nchw(values["images_256"])), values["features_256"]) < 1e-4


def test_fused_network_has_the_same_features(values, weights):
    fused = fid.load_inception(weights).fuse()
    assert relative(fused(nchw(values["images_64"])), values["features_64"]) < 1e-4
    assert not any("bn" in name for name in fused.state_dict())


def test_resize_of_a_row_is_golden(values):
    row = torch.tensor([0.0, 10.0]).view(1, 1, 1, 2)
    assert np.array_equal(fid.resize(row, 4)[0, 0, 0], values["resize_row"])


def test_resize_is_a_shifted_grid_sample():
    x = torch.rand(2, 3, 40, 56)
    rows, columns = ((torch.arange(299) * (n / 299) * 2 + 1) / n - 1 for n in (40, 56))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).expand(2, -1, -1, -1)
    other = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    assert (fid.resize(x) - other).abs().max() < 1e-4


def test_weights_may_have_counters(weights, inception):
    counters = {key: value for key, value in inception.state_dict().items() if key.endswith("tracked")}
    assert len(fid.load_inception({**weights, **counters}).state_dict()) == 566


@pytest.mark.parametrize("kind", ["missing", "shape", "extra", "cut", "list", "none"])
def test_other_weights_are_refused(kind, weights, tmp_path):
    first = next(iter(weights))
    (tmp_path / "cut").write_bytes(b"PK\x03\x04 and no more")
    torch.save([1], tmp_path / "list")
    bad = {"missing": {key: value for key, value in weights.items() if key != first},
           "shape": {**weights, "fc.weight": torch.zeros(1000, 2048)},
           "extra": {**weights, "extra": torch.zeros(1)}}
    with pytest.raises(BadInput):
        fid.load_inception(bad.get(kind, tmp_path / kind))


# ------------------------------------------------------------------------------------------------- the metrics

@pytest.mark.parametrize("pair", ["AB", "CD", "AA"])
def test_frechet_is_golden(pair, values):
    found = fid.frechet_distance(*moments(values[pair[0]]), *moments(values[pair[1]]))
    assert found == pytest.approx(float(values[f"frechet_{pair}"]), rel=1e-6, abs=1e-6)


def test_frechet_closed_forms():
    rng = np.random.RandomState(0)
    a, b, mu, nu = rng.rand(30) + 0.1, rng.rand(30) + 0.1, rng.randn(30), rng.randn(30)
    shift = ((mu - nu) ** 2).sum()
    diagonal = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + shift
    assert fid.frechet_distance(mu, np.diag(a), nu, np.diag(b)) == pytest.approx(diagonal, rel=1e-10)
    _, full = moments(rng.randn(100, 30))
    assert fid.frechet_distance(mu, full, nu, full) == pytest.approx(shift, rel=1e-10)
    assert fid.frechet_distance(mu, 0 * full, nu, 0 * full) == pytest.approx(shift, rel=1e-10)
    few = moments(rng.randn(5, 30))                                          # singular
    assert fid.frechet_distance(*few, *few) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("D, n, tolerance", [(2048, 5000, 1e-6), (512, 250, 1e-3)])
def test_frechet_against_sqrtm(D, n, tolerance):
    rng = np.random.RandomState(0)
    mix = rng.randn(D, D) / D ** 0.5
    one, two = (moments(np.maximum(rng.randn(n, D) @ mix + shift, 0)) for shift in (0.0, 0.2))
    fid.frechet_distance(*one, *two)                                         # warm
    since = time.time()
    found = fid.frechet_distance(*one, *two)
    ours, since = time.time() - since, time.time()
    root = scipy.linalg.sqrtm(one[1] @ two[1])
    theirs = time.time() - since
    shift = ((one[0] - two[0]) ** 2).sum()
    expected = shift + np.trace(one[1] + two[1]) - 2 * np.trace(root).real
    print(f"\nn = {n}: ours {ours:.1f} s, sqrtm {theirs:.1f} s, difference {found - expected:.1e}")
    assert found == pytest.approx(expected, abs=tolerance * max(1, expected))
    assert D < 2048 or theirs > 5 * ours


def test_streaming_is_np_cov():
    x = np.random.RandomState(1).gamma(2.0, size=(500, 40))
    statistics = fid.Statistics(40)
    for part in np.array_split(x, [7, 100, 101, 340]):
        statistics.add(torch.from_numpy(part))
    mu, sigma = statistics.result()
    assert relative(mu, x.mean(0)) < 1e-12 and relative(sigma, np.cov(x, rowvar=False)) < 1e-12


def test_inception_score():
    sure = torch.eye(10).repeat(6, 1)
    assert fid.inception_score(sure, split=30) == pytest.approx(10)
    assert fid.inception_score(torch.full((60, 10), 0.1)) == pytest.approx(1)
    assert fid.inception_score(sure.sort(0, descending=True).values, split=6) < 3       # file order matters


def test_precision_and_recall():
    line = torch.arange(10.0)[:, None]
    assert fid.precision_recall(line, line) == (1.0, 1.0)
    far = torch.tensor([4.5, 100, 4.5, 5.5, 6.5, 100])[:, None]
    assert fid.precision_recall(line, far)[0] == pytest.approx(4 / 6)
    x, y = torch.randn(40, 3).double(), torch.randn(30, 3).double()
    radius = (x[:, None] - x).norm(dim=2).sort(1).values[:, 3]
    inside = (y[:, None] - x).norm(dim=2) <= radius
    assert fid.precision_recall(x, y)[0] == pytest.approx(inside.any(1).double().mean().item())


def test_fd_pixels():
    real, other = shapes(range(400), 16)[0], shapes(range(400, 800), 16)[0]
    assert abs(fid.fd_pixels(real, real)) < 1e-6 < fid.fd_pixels(real, other) < fid.fd_pixels(real, 255 - other)


# ---------------------------------------------------------------------------------------------- command line

PIXELS = ("--features", "pixels")


@pytest.fixture
def sets(tmp_path):
    """The same 20 images as a folder and as an npz, and 30 others."""
    a, b = (shapes(range(*r), 24)[0].transpose(0, 2, 3, 1) for r in ((0, 20), (100, 130)))
    (tmp_path / "a/deep").mkdir(parents=True)
    for i, image in enumerate(a):
        name = f"{i:03d}.png" if i % 2 else f"deep/{i:03d}.PNG"
        Image.fromarray(image).save(tmp_path / "a" / name)
    np.savez(tmp_path / "a.npz", arr_0=a, arr_1=np.zeros(20))
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    return tmp_path


def parsed(text):
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def one_score(script, folder, *words):
    """FD of a.npz and b.npz, in whatever form, batches and processes they are measured."""
    first = script("fid.py", "a.npz", "b.npz", *words)
    script("fid.py", "stats", "--data", "b.npz", "--out", "ref.npz", *words)
    ways = [script("fid.py", "a", "b.npz", "--batch-size", 7, *words),
            script("fid.py", "a.npz", "b.npz", *words, processes=2),
            script("fid.py", "a", "ref.npz", *words)]
    [(name, value)] = parsed(first)["result"].items()
    assert name.endswith("-20") and f"{name} {value:.2f}" in first and "warning: 20 images" in first
    for text in ways:
        assert parsed(text)["result"] == pytest.approx({name: value}, rel=1e-4)
    assert parsed(ways[-1])["reference"]["n"] == 30


def test_one_fd_pixels_whatever_the_form_batch_and_processes(script, sets):
    one_score(script, sets, *PIXELS)


@pytest.mark.slow
def test_one_fid_whatever_the_form_batch_and_processes(script, sets, inception_file):
    one_score(script, sets, "--inception", inception_file)


def test_images_of_every_kind_are_read_from_any_place(sets):
    for path in ("a", "a.npz", "b.npz"):
        _, meta, count, read = fid.open_side(sets / path, None, "x", 192)
        whole = read(0, count)
        assert whole.shape == (count, 3, 24, 24) and meta["n"] == count
        assert np.array_equal(read(3, 17), whole[3:17])


def test_fewer_images_than_processes(script, sets):
    text = script("fid.py", "a", "a", *PIXELS, "--count", 4, processes=5)
    assert "FD-pixels-4 0.00" in text


@pytest.mark.slow
def test_all_metrics_are_those_of_their_formulas(script, sets, inception, inception_file):
    """Against ADM's kind of reference: statistics beside 30 images, whose own statistics are not used."""
    a, b = (nchw(np.load(sets / name)["arr_0"]) for name in ("a.npz", "b.npz"))
    (fa, sa), (fb, _) = inception(a, spatial=True), inception(b, spatial=True)
    rng = np.random.default_rng(0)
    mu, mu_s = rng.random(2048), rng.random(2023)
    sigma, sigma_s = np.diag(rng.random(2048) + 0.1), np.diag(rng.random(2023) + 0.1)
    arrays = dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(sets / "adm.npz", arr_0=b.permute(0, 2, 3, 1).numpy(), **arrays)
    words = ("--inception", inception_file, "--metrics", "all", "--batch-size", 9)
    found = parsed(script("fid.py", "a.npz", "adm.npz", *words, processes=2))["result"]
    precision, recall = fid.precision_recall(fb, fa)
    expected = {"FID-20": fid.frechet_distance(*moments(fa.numpy()), mu, sigma),
                "IS": fid.inception_score(inception.probs(fa)),
                "sFID": fid.frechet_distance(*moments(sa.numpy()), mu_s, sigma_s),
                "precision": precision, "recall": recall}
    assert found == pytest.approx(expected, rel=1e-3)


# one mistake or damaged file of each kind: the words, what the line names
def folder(path, *images):
    path.mkdir()
    for i, (size, name) in enumerate(images):
        Image.new("RGB", (size, size)).save(path / name)


@pytest.fixture
def mistakes(sets):
    small = shapes(range(9), 16)[0].transpose(0, 2, 3, 1)
    np.savez(sets / "small.npz", arr_0=small)
    np.savez(sets / "float.npz", arr_0=small / 255)
    np.savez(sets / "keys.npz", other=small)
    np.savez(sets / "odd.npz", mu=np.zeros(5), sigma=np.zeros((4, 4)))
    meta = json.dumps(dict(size=24, extractor="other"))
    np.savez(sets / "other.npz", mu=np.zeros(192), sigma=np.eye(192), meta=meta)
    (sets / "cut.npz").write_bytes((sets / "small.npz").read_bytes()[:900])
    whole = bytearray((sets / "b.npz").read_bytes())
    whole[len(whole) // 2] ^= 16
    (sets / "flipped.npz").write_bytes(whole)
    folder(sets / "empty")
    folder(sets / "mixed", (16, "16.png"), *[(24, f"{i}.png") for i in range(4)])
    folder(sets / "jpeg", (24, "a.JPG"))
    folder(sets / "broken", *[(24, f"{i}.png") for i in range(4)])
    (sets / "broken/3.png").write_bytes((sets / "broken/2.png").read_bytes()[:60])
    folder(sets / "short", *[(24, f"{i}.png") for i in range(4)])
    (sets / "short/protocol.json").write_text(json.dumps(dict(n=30)))


@pytest.mark.parametrize("words, named", [
    ("small.npz b.npz", "size"), ("a other.npz", "extractor"), ("float.npz b.npz", "float64"),
    ("keys.npz b.npz", "keys.npz"), ("a odd.npz", "odd.npz"), ("cut.npz b.npz", "cut.npz"),
    ("flipped.npz b.npz", "flipped.npz"), ("empty b.npz", "expected .png"), ("mixed b.npz", "16 x 16"),
    ("jpeg b.npz", "JPEG"), ("broken b.npz", "3.png"), ("short b.npz", "promises 30"), ("none b.npz", "none"),
    ("a", "reference"), ("stats --data a", "--out"), ("a b.npz --count 21", "20 images"),
    ("a b.npz --count 0", "--count"), ("a b.npz --batch-size 0", "--batch-size")])
def test_a_mistake_is_one_line(words, named, script, mistakes):
    assert named in script("fid.py", *words.split(), *PIXELS, code=2)


def test_a_damaged_image_is_named_by_the_process_that_met_it(script, mistakes):
    assert "3.png" in script("fid.py", "broken", "b.npz", *PIXELS, processes=2, code=2)


def test_weights_that_are_not_the_published_ones(script, sets, monkeypatch):
    monkeypatch.setattr(fid, "CACHED", sets / "cached.pth")
    (sets / "cached.pth").write_bytes(b"not it")
    assert fid.SHA256 in script("fid.py", "a", "b.npz", code=2)


def test_weights_are_fetched_after_all_checks(script, mistakes, sets, monkeypatch):
    def fetch(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(fid, "CACHED", sets / "none.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    text = script("fid.py", "a", "b.npz", code=2)
    assert "no network" in text and fid.SHA256 in text and "--inception" in text
    assert "size" in script("fid.py", "small.npz", "b.npz", code=2)
