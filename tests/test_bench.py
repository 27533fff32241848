"""bench.py: the counted FLOPs, the arithmetic of a line, every part once, small. gpu.py: its parts and its table."""
import json
import sys
import time

import numpy as np
import pytest
import torch

from experiments import bench, gpu
from files import BadInput
from model_vit import ViT


def test_flops_of_a_vit_are_the_formula():
    """24 N D^2 + 4 N^2 D a block of N tokens, and 2 n (4 4 3) D for the patches and again for the head."""
    model = ViT(24, 4, 3, 8, dim=32, depth=3, heads=2)
    x = torch.randn(5, 3, 24, 24)
    t = torch.arange(5)
    N, n, D = 38, 36, 32
    block = 24 * N * D ** 2 + 4 * N ** 2 * D
    ends = 4 * n * 48 * D
    found = bench.flops(lambda: model(x, t, t))
    assert found == 5 * (3 * block + ends)


def test_a_line_by_hand(monkeypatch, capsys):
    """Medians over rounds of ratios; MFU from each round's own product of 10 x 10 matrices, 2,000 FLOPs."""
    monkeypatch.setattr(bench, "PRODUCT", 10)
    rounds = np.array([[2, 1, 1], [4, 8, 2], [3, 1, 3]])
    bench.report("x", 6, 1000, 0.5, 7, rounds, "other")
    found = capsys.readouterr().out.split()
    assert found == ["x", "6", "2", "3000", "3.33e-10", "25.0%", "0.5", "7.0", "2", "other"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "PRODUCT", 256)
    monkeypatch.setattr(bench, "SIDE", 32)
    monkeypatch.setattr(bench, "ROUNDS", 3)


@pytest.mark.parametrize("part, lines", [
    ("train", 1),
    ("sample", 3),
    ("vae", 2),
    ("fid", 1),
])
def test_every_part_once(small, monkeypatch, capsys, part, lines):
    words = ["bench", part, "--batch-size", "2", "--size", "8", "--sample-steps", "2"]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    _, _, *found = capsys.readouterr().out.splitlines()
    assert len(found) == lines
    for line in found:
        images, rate, *_ = line[36:].split()
        assert images == "2"
        assert float(rate) > 0


@pytest.mark.slow
def test_a_compiled_network_has_a_line_of_its_own(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "bench train --batch-size 2 --size 8 --compile".split())
    bench.main()
    *_, compiled, eager = capsys.readouterr().out.splitlines()
    first = [float(line[36:].split()[6]) for line in (compiled, eager)]      # seconds of the first call
    assert compiled.endswith("eager") and eager.endswith("plain")
    assert first[0] > 5 * first[1]


# ------------------------------------------------------------------------------------------------------ gpu.py

def parts_of(monkeypatch, tmp_path, *parts):
    """What gpu.json says, and gpu.md, after these parts."""
    monkeypatch.setattr(gpu, "SHORT", parts)
    monkeypatch.setattr(sys, "argv", ["gpu", "--short", "--out", str(tmp_path / "an out")])
    with pytest.raises(SystemExit):
        gpu.main()
    out = tmp_path / "an out"
    return json.loads((out / "gpu.json").read_text())["parts"], (out / "gpu.md").read_text()


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    parts, table = parts_of(monkeypatch, tmp_path, ("bad", 60, "-c 1/0"), ("good", 60, "-c print('{out}')"))
    assert [part["code"] for part in parts] == [1, 0]
    assert parts[1]["lines"] == [str(tmp_path / "an out")]
    assert "## bad: failed, exit code 1" in table and "## good: done" in table


def test_a_part_whose_time_is_over_ends_with_the_processes_that_it_started(monkeypatch, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text("import os, time\nos.fork()\nwhile True: time.sleep(.05), os.write(1, b'%d\\n' % os.getpid())")
    [part], table = parts_of(monkeypatch, tmp_path, ("endless", 2, str(script)))
    assert len(set(part["lines"])) == 2                                      # two processes wrote
    assert part["code"] is None and "not done in 2 s" in table
    before = (tmp_path / "an out/endless.txt").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "an out/endless.txt").stat().st_size == before


def test_all_parts_together_have_a_limit_too(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ALL_PARTS", 1)
    script = tmp_path / "sleeps.py"
    script.write_text("import time; time.sleep(60)")
    parts, _ = parts_of(monkeypatch, tmp_path, ("first", 60, str(script)), ("second", 60, str(script)))
    assert [part["code"] for part in parts] == [None, None]
    assert sum(part["seconds"] for part in parts) < 10


def test_an_earlier_measurement_is_not_overwritten(monkeypatch, tmp_path):
    (tmp_path / "gpu.md").write_text("earlier")
    monkeypatch.setattr(sys, "argv", ["gpu", "--short", "--out", str(tmp_path)])
    with pytest.raises(BadInput, match="an earlier measurement"):
        gpu.main()


def test_without_a_gpu_only_the_short_form_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "new")])
    with pytest.raises(BadInput, match="no GPU here"):
        gpu.main()
    assert not (tmp_path / "new").exists()
