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
from fid import (Inception, Source, Statistics, fd_pixels, frechet_distance, inception_score, load_inception,
                 precision_recall, resize)


@pytest.fixture(scope="session")
def values():
    file = np.load(ROOT / "tests/golden/fid.npz")
    return {key: file[key] for key in file.files}


@pytest.fixture(scope="session")
def weights(values):
    """The 472 tensors by the formula that the golden features were computed with."""
    return formula(values["keys"], values["shapes"])


@pytest.fixture(scope="session")
def inception_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "formula.pth"
    torch.save(weights, path)
    return path


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


# ------------------------------------------------------------------------------------------------ the network

def test_features_golden(values, weights):
    model = load_inception(weights)
    assert sum(p.numel() for p in model.parameters()) == 23_850_960 and len(model.state_dict()) == 566
    small, large = (torch.from_numpy(values[f"images_{size}"]).permute(0, 3, 1, 2) for size in (64, 256))
    features, spatial = model(small, spatial=True)
    assert features.dtype == torch.float32 and relative(features, values["features_64"]) < 1e-4
    assert relative(spatial, values["spatial_64"]) < 1e-4 and relative(model.probs(features), values["probs_64"]) < 1e-4
    assert relative(model(large), values["features_256"]) < 1e-4
    assert relative(features, values["features_64_pytorch_fid_resize"]) > 1e-3                  # another resize would show
    fused = load_inception(weights).fuse()
    assert relative(fused(small), features) < 1e-5 and sum(p.requires_grad for p in fused.parameters()) == 0
    model.train()
    assert not model.training and relative(model(small[:2]), values["features_64"][:2]) < 1e-4


def test_resize_is_tf1s(values):
    row = torch.tensor([0.0, 10.0]).view(1, 1, 1, 2)
    assert np.array_equal(resize(row, 4)[0, 0, 0].numpy(), values["resize_row"])
    x = torch.rand(2, 3, 40, 56)
    grid = [(torch.arange(299) * (n / 299) * 2 + 1) / n - 1 for n in (40, 56)]                  # shifted grid_sample
    grid = torch.stack(torch.meshgrid(grid[1], grid[0], indexing="xy"), -1).expand(2, -1, -1, -1)
    other = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    assert (resize(x) - other).abs().max() < 1e-4


def test_weights_are_strict(weights, tmp_path):
    missing = dict(list(weights.items())[1:])
    wrong = {**weights, "fc.weight": torch.zeros(1000, 2048)}
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    torch.save([1], tmp_path / "list.pth")
    for bad in (missing, wrong, {**weights, "extra": torch.zeros(1)}, tmp_path / "cut.pth", tmp_path / "list.pth", tmp_path / "none"):
        with pytest.raises(ValueError):
            load_inception(bad)
    counters = {key: value for key, value in Inception().state_dict().items() if key.endswith("num_batches_tracked")}
    assert len({**weights, **counters}) == 566
    load_inception({**weights, **counters})


# ------------------------------------------------------------------------------------------------- the metrics

def test_frechet_golden(values):
    for pair in ("AB", "CD", "AA"):
        found = frechet_distance(*moments(values[pair[0]]), *moments(values[pair[1]]))
        assert found == pytest.approx(float(values[f"frechet_{pair}"]), rel=1e-6, abs=1e-6)


def test_frechet_closed_forms():
    rng = np.random.RandomState(0)
    a, b, mu, nu = rng.rand(30) + 0.1, rng.rand(30) + 0.1, rng.randn(30), rng.randn(30)
    shift = ((mu - nu) ** 2).sum()
    diagonal = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + shift
    assert frechet_distance(mu, np.diag(a), nu, np.diag(b)) == pytest.approx(diagonal, rel=1e-10)
    _, full = moments(rng.randn(100, 30))
    assert frechet_distance(mu, full, nu, full) == pytest.approx(shift, rel=1e-10)
    few = moments(rng.randn(5, 30))
    assert abs(frechet_distance(*few, *few)) < 1e-6 and np.isfinite(frechet_distance(*few, mu, full))
    assert frechet_distance(mu, 0 * full, nu, 0 * full) == pytest.approx(shift, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("D, n, tolerance", [(2048, 5000, 1e-6), (512, 250, 1e-3)])
def test_frechet_against_sqrtm(D, n, tolerance):
    rng = np.random.RandomState(0)
    mix = rng.randn(D, D) / D ** 0.5
    one, two = (moments(np.maximum(rng.randn(n, D) @ mix + shift, 0)) for shift in (0.0, 0.2))
    frechet_distance(*one, *two)                                             # warm
    since = time.time()
    found = frechet_distance(*one, *two)
    ours, since = time.time() - since, time.time()
    root = scipy.linalg.sqrtm(one[1] @ two[1])
    theirs = time.time() - since
    expected = ((one[0] - two[0]) ** 2).sum() + np.trace(one[1]) + np.trace(two[1]) - 2 * np.trace(root).real
    print(f"\nn = {n}: ours {ours:.1f} s, sqrtm {theirs:.1f} s, ratio {theirs / ours:.1f}, difference {found - expected:.1e}")
    assert found == pytest.approx(expected, abs=tolerance * max(1, expected)) and (D < 2048 or theirs > 5 * ours)


def test_streaming_is_np_cov():
    x = np.random.RandomState(1).gamma(2.0, size=(500, 40))
    statistics = Statistics(40)
    for part in np.array_split(x, [7, 100, 101, 340]):
        statistics.add(torch.from_numpy(part))
    mu, sigma = statistics.result()
    assert relative(mu, x.mean(0)) < 1e-12 and relative(sigma, np.cov(x, rowvar=False)) < 1e-12


def test_inception_score_and_precision_recall():
    onehot = torch.eye(10).repeat(6, 1) + 1e-12
    assert inception_score(onehot, split=30) == pytest.approx(10, rel=1e-6)                      # sure and diverse
    assert inception_score(torch.full((60, 10), 0.1)) == pytest.approx(1, rel=1e-9)              # unsure
    assert inception_score(onehot.sort(0, descending=True).values, split=6) < 3                  # file order matters
    line = torch.arange(10.0)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    near, far = torch.tensor([[4.5], [100.0]]), torch.tensor([[4.5], [5.5], [6.5], [100.0]])
    assert precision_recall(line, torch.cat([near, far]))[0] == pytest.approx(4 / 6)
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    radius = torch.cdist(x, x).sort(1).values[:, 3]
    assert precision_recall(x, y)[0] == pytest.approx((torch.cdist(y, x) <= radius).any(1).double().mean().item())


def test_fd_pixels():
    real, other = shapes(range(400), 16)[0], shapes(range(400, 800), 16)[0]
    assert abs(fd_pixels(real, real)) < 1e-6 < fd_pixels(real, other) < fd_pixels(real, 255 - other)


# ---------------------------------------------------------------------------------------------- command line

@pytest.fixture
def sets(tmp_path):
    """The same 20 images as PNG folder and npz, and 30 other images."""
    a, b = (shapes(range(*r), 24)[0].transpose(0, 2, 3, 1) for r in ((0, 20), (100, 130)))
    (tmp_path / "a/deep").mkdir(parents=True)
    for i, image in enumerate(a):
        Image.fromarray(image).save(tmp_path / ("a/deep" if i % 2 else "a") / f"{i:03d}.{'PNG' if i % 3 else 'png'}", "PNG")
    np.savez(tmp_path / "a.npz", arr_0=a, arr_1=np.zeros(20))
    np.savez_compressed(tmp_path / "b.npz", arr_0=b)
    return tmp_path


def parsed(text):
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def score(text):
    return parsed(text)["result"]


@pytest.mark.slow
def test_one_score_whatever_the_form_batch_and_processes(script, sets, inception_file):
    words = ("b.npz", "--inception", inception_file)
    text = script("fid.py", "a.npz", *words, "--metrics", "all")
    whole = score(text)
    assert f"FID-20 {whole['FID-20']:.2f}" in text and "warning: 20 images" in text and set(whole) == {"FID-20", "IS", "sFID", "precision", "recall"}
    assert score(script("fid.py", "a", *words, "--batch-size", 7))["FID-20"] == pytest.approx(whole["FID-20"], rel=1e-4)
    assert score(script("fid.py", "a.npz", *words, processes=2))["FID-20"] == pytest.approx(whole["FID-20"], rel=1e-4)
    script("fid.py", "stats", "--data", "b.npz", "--out", "ref.npz", "--inception", inception_file)
    text = script("fid.py", "a", "ref.npz", "--inception", inception_file)
    assert score(text)["FID-20"] == pytest.approx(whole["FID-20"], rel=1e-4)
    both = parsed(text)
    assert both["reference"]["n"] == 30 and both["reference"]["extractor"] == both["samples"]["extractor"] == both["extractor"]


def test_sources_count_every_image_once(sets):
    folder, npz = Source(sets / "a"), Source(sets / "a.npz")
    assert folder.count == npz.count == 20 and folder.size == npz.size == 24
    assert torch.equal(torch.cat(list(npz.batches(3, 17, 5))), torch.cat(list(npz.batches(0, 20, 20)))[3:17])
    as_sets = [sorted(image.numpy().tobytes() for image in torch.cat(list(source.batches(0, 20, 6)))) for source in (folder, npz)]
    assert as_sets[0] == as_sets[1]


def test_pixels_and_refusals(script, sets, tmp_path, monkeypatch):
    text = script("fid.py", "a", "b.npz", "--features", "pixels")
    assert "FD-pixels-20 " in text and "FID" not in text
    script("fid.py", "stats", "--data", "b.npz", "--out", "ref.npz", "--features", "pixels")
    small = shapes(range(9), 16)[0].transpose(0, 2, 3, 1)
    np.savez(tmp_path / "small.npz", arr_0=small)
    np.savez(tmp_path / "float.npz", arr_0=small / 255)
    np.savez(tmp_path / "keys.npz", other=small)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(5), sigma=np.zeros((4, 4)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "small.npz").read_bytes()[:900])
    for name in ("empty", "mixed", "broken", "jpeg"):
        (tmp_path / name).mkdir()
    for size in (16, 24):
        Image.new("RGB", (size, size)).save(tmp_path / f"mixed/{size}.png")
    (tmp_path / "broken/a.png").write_bytes((sets / "a/000.png").read_bytes()[:60])
    Image.new("RGB", (24, 24)).save(tmp_path / "jpeg/a.JPG", "JPEG")
    pixels = ("--features", "pixels")
    for words, named in ((("small.npz", "ref.npz"), "size 16"), (("float.npz", "b.npz"), "float64"), (("keys.npz", "b.npz"), "other"),
                         (("cut.npz", "b.npz"), "cut.npz"), (("empty", "b.npz"), "no .png"), (("mixed", "small.npz"), "24 x 24"),
                         (("broken", "b.npz"), "a.png"), (("jpeg", "b.npz"), "JPEG"), (("none", "b.npz"), "none"), (("a",), "expected"),
                         (("a", "odd.npz"), "odd.npz"), (("a", "b.npz", "--count", 21), "20 images"), (("stats", "--data", "a"), "--out"),
                         (("a", "b.npz", "--batch-size", 0), "--batch-size")):
        assert named in script("fid.py", *words, *pixels, code=2), words
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / fid.FILE).write_bytes(b"not it")
    assert fid.SHA256 in script("fid.py", "a", "b.npz", code=2)
    (tmp_path / "hub/checkpoints" / fid.FILE).unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    text = script("fid.py", "a", "b.npz", code=2)
    assert fid.FILE in text and fid.SHA256 in text and "hub/checkpoints" in text


@pytest.mark.slow
def test_all_metrics_are_those_of_their_formulas(script, sets, inception_file):
    """Against ADM's kind of reference: statistics beside 30 images, whose own statistics are not used."""
    model = load_inception(inception_file)
    a, b = (torch.from_numpy(np.load(sets / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2) for name in "ab")
    (fa, sa), (fb, _) = model(a, True), model(b, True)
    rng = np.random.default_rng(0)
    mu, mu_s = rng.random(2048), rng.random(2023)
    sigma, sigma_s = np.diag(rng.random(2048) + 0.1), np.diag(rng.random(2023) + 0.1)
    np.savez(sets / "adm.npz", arr_0=b.permute(0, 2, 3, 1).numpy(), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    text = script("fid.py", "a", "adm.npz", "--inception", inception_file, "--metrics", "all", "--batch-size", 9)
    found, (precision, recall) = score(text), precision_recall(fb, fa)
    expected = {"FID-20": frechet_distance(*moments(fa.numpy()), mu, sigma), "IS": inception_score(model.probs(fa)),
                "sFID": frechet_distance(*moments(sa.numpy()), mu_s, sigma_s), "precision": precision, "recall": recall}
    assert found == pytest.approx(expected, rel=1e-3) and found["FID-20"] != pytest.approx(found["sFID"], rel=0.01)
    assert "adm.npz: its mu and sigma are used, not the 30 images" in text
    assert parsed(text)["reference"]["keys"] == "mu, sigma, not arr_0" and len(parsed(text)["reference"]["sha256"]) == 64
    meta = dict(file="b.npz", n=30, size=24, extractor=parsed(text)["extractor"])
    np.savez(sets / "ref.npz", mu=mu, sigma=sigma, meta=json.dumps(meta))
    text = script("fid.py", "a", "ref.npz", "--inception", inception_file, "--metrics", "all", "--count", 4)
    assert set(score(text)) == {"FID-4", "IS"} and "sFID, precision, recall" in text
    assert parsed(text)["reference"]["file"] == "ref.npz" and parsed(text)["reference"]["of"] == "b.npz"
    for key, value in (("extractor", "other"), ("n", "x"), ("size", 32)):
        np.savez(sets / "wrong.npz", mu=mu, sigma=sigma, meta=json.dumps({**meta, key: value}))
        assert f"{key}" in script("fid.py", "a", "wrong.npz", "--features", "pixels", code=2)


def test_damage_is_one_line(script, sets, tmp_path):
    pixels = ("--features", "pixels")
    rng = np.random.default_rng(0)
    whole, caught = (sets / "b.npz").read_bytes(), 0
    for place in rng.integers(0, len(whole), 25):                            # compressed samples, one bit flipped
        (sets / "bad.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        try:
            source = Source(sets / "bad.npz")
            list(source.batches(0, source.count, 7))
        except ValueError:
            caught += 1
    assert caught >= 20
    Image.new("RGB", (24, 24)).save(sets / "a/z.png", "JPEG")
    assert "not PNG" in script("fid.py", "a", "b.npz", *pixels, code=2)
    (sets / "a/z.png").unlink()
    (sets / "a/protocol.json").write_text("[1]")
    assert "protocol.json" in script("fid.py", "a", "b.npz", *pixels, code=2)
    (sets / "a/protocol.json").write_text(json.dumps(dict(n=30)))
    assert "promises 30" in script("fid.py", "a", "b.npz", *pixels, code=2)
    (sets / "a/protocol.json").unlink()
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(tmp_path / "half.npz", mu=np.zeros(192), sigma=np.eye(192), mu_s=np.zeros(3))
    np.savez(tmp_path / "minus.npz", mu=np.zeros(192), sigma=-np.eye(192))
    for words, named in ((("a", "nan.npz"), "nan.npz"), (("a", "minus.npz"), "minus.npz"), (("a", "b.npz", "--count", 0), "--count"),
                         (("a", "b.npz", "--out", "c.npz"), "expected SAMPLES"), (("stats", "--data", "b.npz", "--out", "b.npz"), "itself")):
        assert named in script("fid.py", *words, *pixels, code=2)
    script("fid.py", "a", "half.npz", *pixels)                               # what is not used may be odd
    text = script("fid.py", "a", "a", *pixels, "--count", 2, processes=2)
    assert "FD-pixels-2 0.00" in text
    assert "too few for 3 processes" in script("fid.py", "a", "a", *pixels, "--count", 2, processes=3, code=2)
    (sets / "a/019.PNG").write_bytes((sets / "a/deep/001.PNG").read_bytes()[:99])
    assert "019.PNG" in script("fid.py", "a", "b.npz", *pixels, processes=2, code=2)      # named by the process that met it
