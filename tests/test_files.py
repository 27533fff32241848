"""files.py: one line for a mistake, flags, whole files, safe reading; what holds for every source file."""
import argparse
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import FORKS, ROOT

from files import (BadInput, NotFinite, Parser, allow_tf32, at_least, between, hash_file, positive, processes,
                   progress, read, read_json, replace, run)

W = torch.arange(40.0)
OUT_OF_MEMORY = "train.py: out of memory; try a smaller --batch-size, in train.py --accum 2 or --grad-ckpt\n"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------- errors

def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, code, line", [
    (BadInput("--n 0:\n\n  too few"), 2, "train.py: --n 0: too few\n"),
    (NotFinite("nan in ckpt.pt"), 3, "train.py: nan in ckpt.pt\n"),
    (OSError("disk full"), 2, "train.py: disk full\n"),
    (KeyboardInterrupt(), 130, "train.py: stopped\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, OUT_OF_MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, OUT_OF_MEMORY),
    (MemoryError(), 1, OUT_OF_MEMORY),
])
def test_a_mistake_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr(sys, "argv", ["/home/train.py"])
    with pytest.raises(SystemExit) as exit:
        run(raising(error))
    assert exit.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error, says", [(BadInput("wrong"), False), (NotFinite("nan"), True)])
def test_a_mistake_is_said_by_one_process_of_several_and_bad_luck_by_each(error, says, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run(raising(error))
    assert bool(capsys.readouterr().err) == says


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("timed out")])
def test_our_own_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error))


# -------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("kind, fit, unfit", [
    (at_least(1), "1 7", "0 -1 1.5 nan inf x 9999999999999999999999"),
    (at_least(0, 9), "0 9", "-1 10"),
    (between(0, 1), "0 .5 1", "-0.1 1.1 nan inf x"),
    (positive, "1e-9 1e9", "0 -1 nan inf x"),
])
def test_numbers_outside_a_range_are_refused(kind, fit, unfit):
    for text in fit.split():
        assert kind(text) == float(text)
    for text in unfit.split():
        with pytest.raises(argparse.ArgumentTypeError, match=f"found {text}, expected a"):
            kind(text)


def test_the_parser_takes_whole_flags_and_shows_defaults():
    parser = Parser("What it does.\n    an example")
    parser.add_argument("--steps", default=30, help="how many")
    parser.add_argument("--out", help="a folder")
    with pytest.raises(BadInput, match="--step"):
        parser.parse_args(["--step", "3"])
    text = parser.format_help()
    assert "What it does.\n    an example" in text
    assert "how many (default: 30)" in text
    assert "None" not in text


# -------------------------------------------------------------------------------------------- whole files

@pytest.fixture
def old():
    path = Path("a.pt")
    path.write_text("old")
    return path


def test_a_file_is_replaced(old):
    replace(old, lambda file: file.write(b"new"))
    assert old.read_text() == "new"


def break_off(file):
    file.write(b"half")
    raise RuntimeError("ours")


def test_a_write_that_fails_leaves_the_old_file_and_its_error(old):
    with pytest.raises(RuntimeError, match="ours"):
        replace(old, break_off)
    assert old.read_text() == "old"
    assert os.listdir() == ["a.pt"]


def die(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
def test_a_killed_write_leaves_the_old_file(old):
    process = FORKS.Process(target=replace, args=(old.resolve(), die))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert old.read_text() == "old"


class Full:
    """A file with room for small parts alone."""

    def write(self, part):
        if len(part) > 64:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("write", [
    lambda _: Full().write(bytes(65)),
    lambda _: torch.save(dict(w=W), Full()),
])
def test_a_full_disk_is_one_line(old, write):
    """torch.save makes a RuntimeError of it."""
    with pytest.raises(BadInput, match=r"a.pt: cannot be written \(.*No space left on device\)"):
        replace(old, write)
    assert old.read_text() == "old"


@pytest.mark.parametrize("text", ["old", "3", "[1]"])
def test_what_is_no_json_of_a_dict_is_refused(old, text):
    old.write_text(text)
    with pytest.raises(BadInput, match="a.pt: cannot be read"):
        read_json(old)


def test_hash_file_is_sha256(old):
    old.write_text("abc")
    assert hash_file(old).startswith("ba7816bf8f01cfea")                     # the standard's example


# ------------------------------------------------------------------------------------------------ devices

@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(kind):
    with pytest.raises(BadInput, match=f"--device {kind}: PyTorch finds none on this machine"):
        processes(kind)


def test_a_mac_s_gpu_is_taken_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert [processes(kind)[2].type for kind in (None, "mps")] == ["cpu", "mps"]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_in_convolutions_and_in_matrix_products(allowed):
    allow_tf32(allowed)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed


def test_progress_is_shown_five_times_a_second_and_at_the_end(monkeypatch, capsys):
    for done in range(1, 101):
        monkeypatch.setattr("time.monotonic", lambda: 1e9 + done / 100)      # one second in all
        progress("rows", done, 100, since=1e9)
    lines = capsys.readouterr().out.split("\r")[1:]
    assert 5 <= len(lines) <= 6
    assert lines[0].startswith("rows 1 / 100   100/s") and lines[-1].startswith("rows 100 / 100   100/s")
    assert lines[-1].endswith("\n")


# ------------------------------------------------------------------------------------------- safe reading

FORMATS = ["ckpt.pt", "old.ckpt", "a.safetensors"]


def save(name, state):
    """By its suffix: torch's zip, its format before that, or safetensors."""
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, name)
    else:
        torch.save(state, name, _use_new_zipfile_serialization=name == "ckpt.pt")
    return Path(name)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name):
    save(name, dict(w=W))
    assert torch.equal(read(name)["w"], W)


def test_of_a_folder_its_checkpoint_is_read():
    save("ckpt.pt", dict(step=3))
    assert read(".") == dict(step=3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share, text", [(0.9, b""), (0, b"hello"), (0, b"")])
def test_a_damaged_file_is_refused(name, share, text):
    """One that was cut, one of text, an empty one."""
    path = save(name, dict(w=W))
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))] + text)
    with pytest.raises(BadInput, match=f"{name}: cannot be loaded"):
        read(name)


@pytest.mark.parametrize("name, place", [("ckpt.pt", W.numpy().tobytes()), ("a.safetensors", b'"F32"')])
def test_a_flipped_bit_is_refused(name, place):
    path = save(name, dict(w=W))
    content = bytearray(path.read_bytes())
    content[content.index(place) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}: cannot be loaded"):
        read(name)


def test_what_is_no_dict_or_not_there_is_refused():
    save("ckpt.pt", [W])
    for name, why in (("ckpt.pt", "cannot be loaded"), ("none.pt", "no such file")):
        with pytest.raises(BadInput, match=f"{name}: {why}"):
            read(name)


class Foreign:
    def __reduce__(self):
        return os.system, ("touch planted",)


@pytest.mark.parametrize("name", ["ckpt.pt", "old.ckpt"])
def test_nothing_in_a_file_is_executed(name):
    save(name, dict(w=W, config=Foreign()))
    with pytest.raises(BadInput, match=f"(?s){name}: .*{os.name}.system"):
        read(name)
    assert not Path("planted").exists()


# ------------------------------------------------------------------------------------- every source file

SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]


@pytest.mark.parametrize("path", [*SCRIPTS, *ROOT.glob("tests/*.py")], ids=lambda path: path.name)
def test_it_compiles_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(path.read_text(), path, "exec")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_reads_no_checkpoint_but_by_read(path):
    """Which executes nothing, and refuses a damaged file in one line."""
    assert path.name == "files.py" or "torch.load(" not in path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_imports_nothing_that_windows_lacks(path):
    posix = r"^\s*(import|from)\b.*\b(fcntl|resource)\b"
    assert not re.search(posix, path.read_text(), re.M)
