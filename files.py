"""What every script shares: one line for a user's mistake, files that are whole or absent, processes.

A mistake is a BadInput, which `run` turns into one line and exit code 2. `replace` writes a file so that it
appears when it is whole. `read` loads checkpoints and weights as data: nothing in a file is executed.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist


# --------------------------------------------------------------------------------- one line for a mistake

class BadInput(ValueError):
    """An end that is no bug, mostly a user's mistake. Its text is the one line that is printed."""
    code = 2


class NotFinite(BadInput):
    """Weights or images hold inf or nan, as after a divergence: exit code 3."""
    code = 3


def run(main):
    """Call main(). Errors that are no bug become one line and an exit code, not a traceback: a user's mistake, what
    the operating system refuses (a missing file, a full disk), a full memory, Ctrl-C, and the death of another
    process of the run. The codes: 2 for a mistake or a refusal of the system, 3 for NotFinite, 1 for a full memory
    or a lost process, 130 for Ctrl-C.
    """
    try:
        return main()
    except BadInput as error:
        code, line = error.code, str(error)
    except OSError as error:
        code, line = 2, str(error)
    except KeyboardInterrupt:
        code, line = 130, "stopped"
    except (RuntimeError, MemoryError) as error:
        full = "out of memory|allocate memory"
        lost = r"connection (was likely )?(closed|reset|refused)|remote process exited|broken pipe|timed ?out"
        if isinstance(error, MemoryError) or re.search(full, str(error), re.I):
            code, line = 1, "out of memory; try a smaller --batch-size, in train.py --accum 2 or --grad-ckpt"
        elif dist.is_initialized() and re.search(lost, str(error), re.I):    # words of gloo, NCCL or their store
            code, line = 1, "another process of this run has ended; start all again, train.py with --resume"
        else:
            raise
    grouped = dist.is_initialized()
    # Until the processes have joined in a group (torch.distributed), they all meet the same mistake, and one on each
    # machine prints it. But memory may run out, or a number not be finite, in one process alone. That one prints it.
    alone = code in (1, 3)
    if grouped or env("LOCAL_RANK") == 0 or alone:
        print(Path(sys.argv[0]).name + ":", *line.split(), file=sys.stderr, flush=True)  # as one line
    if grouped:
        os._exit(code)                           # sys.exit would wait for processes that are gone
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------- flags

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the script's docstring as it is written, and all defaults but None and False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with this help, without abbreviated flags, and with BadInput for its errors."""

    def __init__(self, doc=None, **how):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **how)

    def error(self, message):
        raise BadInput(message)


def between(low, high, kind=float, expected="a number from {} to {}"):
    """An argparse type: a number from low to high, with kind=int a whole one. expected: what the error says, with
    {} for low and for high.
    """
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:                                         # nan is refused, too
            raise argparse.ArgumentTypeError(f"found {text}, expected {expected.format(low, high)}")
        return value
    return parse


def at_least(low, high=10 ** 15):
    """An argparse type: a whole number from low to high. The default of high keeps it within 64 bits."""
    return between(low, high, int, "a whole number, at least {} and at most {:,}")


positive = between(1e-30, 1e30, expected="a positive number")


# ---------------------------------------------------------------------------------- processes and progress

def env(name, default=0):
    """RANK, WORLD_SIZE or LOCAL_RANK, which torchrun sets for each process; without torchrun the default."""
    return int(os.environ.get(name, default))


def processes(kind=None):
    """-> rank, world, device: the number of this process, how many there are, and what it computes on.

    kind: "cuda", "cpu" or "mps", a Mac's GPU, which is never taken unasked; by default "cuda" where there is one,
    else "cpu". Of several GPUs each process takes its own. Raises BadInput for a device that is not there.
    """
    rank, world, local = env("RANK"), env("WORLD_SIZE", 1), env("LOCAL_RANK")
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if not getattr(torch, kind).is_available():
        raise BadInput(f"--device {kind}: PyTorch finds none on this machine")
    if kind != "cuda":
        return rank, world, torch.device(kind)
    torch.cuda.set_device(local)
    return rank, world, torch.device("cuda", local)


def allow_tf32(allowed):
    """Allow, or forbid, a GPU to shorten the factors of float32 products to TF32: 10 bits of mantissa instead of 23,
    several times as fast.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def leave_group():
    """End the process group. The pause lets gloo's threads drop their last tensors, for which they need Python's
    lock: destroy_process_group waits for them with that lock held, and without the pause 1 exit in 6 hung.
    """
    time.sleep(0.2)
    dist.destroy_process_group()


def say(*words):
    """print, by one process of several."""
    if env("RANK") == 0:
        print(*words, flush=True)


shown_at = 0.0                                    # time of `progress`'s last line


def progress(what, done, total, since):
    """One line with rate and time left, by one process of several. Of frequent calls five a second are shown, and
    the last, done == total. since: time.monotonic() at the start.
    """
    global shown_at
    now = time.monotonic()
    if env("RANK") > 0 or (now < shown_at + 0.2 and done < total):
        return
    shown_at = now
    rate = max(done, 1) / max(now - since, 1e-9)
    left = (total - done) / rate / 60
    end = "\n" if done == total else ""
    print(f"\r{what} {done:,} / {total:,}   {rate:,.0f}/s   {left:.1f} min left   ", end=end, flush=True)


# ---------------------------------------------------------------------------------------------------- files

def replace(path, write):
    """Call write(file) on a file beside path, then rename it: path is the old file or the new one, never half of it.
    Raises BadInput where it cannot be written.
    """
    part = Path(f"{path}.{env('RANK')}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error               # torch.save turns an OSError into a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise BadInput(f"{path}: cannot be written ({cause})") from None
    finally:
        part.unlink(missing_ok=True)


def read(path):
    """The dict in a checkpoint or weight file, PyTorch's or .safetensors; of a folder, in its ckpt.pt.

    Nothing in it is executed: PyTorch loads tensors and plain values and refuses everything else. Raises BadInput.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():                                        # torch.load does not look at checksums
                    raise ValueError("a checksum does not match")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise BadInput(f"{path}: reading it needs a package: pip install safetensors") from None
    except Exception as error:                                               # each format raises its own kinds
        why = f"damaged, or no weights: {error!r:.80}"
        foreign = re.search(r"GLOBAL [\w.]+", str(error))
        if foreign:
            why = f"it holds a foreign object, {foreign[0]}"
        raise BadInput(f"{path}: cannot be loaded ({why})") from None


def read_json(path):
    """The dict in a JSON file. Raises BadInput."""
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def write_json(path, value):
    """Write a value as a JSON file, whole or absent."""
    replace(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def hash_file(path):
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url, file, sha256, flag):
    """Fetch url into file, which appears when it is whole and has this SHA-256. Raises BadInput, which says where to
    put a copy fetched by hand, or to name it with `flag`.
    """
    print(f"downloading {url}", flush=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"cannot download ({error}); put {file.name} (SHA-256 {sha256}) into {file.parent} or "
                       f"name it with {flag}") from None
