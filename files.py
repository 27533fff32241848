"""Mistakes in one line, whole files or none, and strangers' files read without running anything in them.

What every script is held to: a user's mistake is a BadInput, one line and exit code 2 (`run`); a file appears
when it is whole (`replace`), in a folder that no other run writes to (`lock`); checkpoints, weight files and
archives are data, of which nothing is executed (`read`, `opened`).
"""
import argparse
import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import math
import os
import pickle
import re
import sys
import tarfile
import time
import unicodedata
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

ARCHIVES = (".zip", ".tar", ".gz", ".tgz")


# --------------------------------------------------------------------------------- one line for a mistake

def shown(text, kept=""):
    """text, in which what could steer a terminal (escape sequences, control characters) is spelled, \\x1b."""
    kept += "\u200c\u200d"                                               # joiners, of emoji and some scripts
    plain = lambda c: c.isprintable() or c in kept or unicodedata.category(c) == "Zs"
    return "".join(c if plain(c) else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def silent():
    """No warnings: what is odd about a file that others made is refused, or of no account."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class BadInput(ValueError):
    """A user's mistake: its text is the one line that is printed before exit code 2, whatever a file's names
    put into it.
    """

    def __init__(self, text):
        super().__init__(shown(re.sub(r"\s*[\r\n]\s*", " ", str(text).strip()))[:2000])


class Screen:
    """Standard output, which text out of a file (a name, a config) cannot steer."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.stream.write(shown(text, "\n\r\t"))


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the docstring as it is written, and each default that says something."""

    def _get_help_string(self, action):
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line too, and which takes no abbreviations."""

    def __init__(self, doc=None, **how):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False,
                         **how)

    def error(self, message):
        raise BadInput(message)


# ------------------------------------------------------------------------------------ flags, processes

def number(kind, fits, expected):
    """An argparse type: a number for which fits(number) holds, else one line that says what is expected."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):                                                  # nan fits nowhere
            raise argparse.ArgumentTypeError(f"found {text}, expected {expected}")
        return value
    return parse


def at_least(low, high=2 ** 62):
    """An argparse type: a whole number from low on; high is where its use would break."""
    expected = f"a whole number of at least {low}"
    if high < 2 ** 62:
        expected += f" and at most {high:,}"
    return number(int, lambda value: low <= value <= high, expected)


def between(low, high, below=False):
    """An argparse type: a number from low to high; with below=True, high itself is too much."""
    if below:
        return number(float, lambda value: low <= value < high, f"a number from {low} to below {high}")
    return number(float, lambda value: low <= value <= high, f"a number from {low} to {high}")


positive = number(float, lambda value: 0 < value < math.inf, "a positive number")


def processes():
    """-> rank, world, device: the number of this process, how many there are, and what it computes on."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)                # torchrun sets them
    rank, world, local = (int(os.environ.get(name, default)) for name, default in names)
    if not torch.cuda.is_available():
        return rank, world, torch.device("cpu")
    torch.cuda.set_device(local)
    return rank, world, torch.device("cuda", local)


def say(*words):
    """print, by one process of several alone."""
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)


def leave_group():
    """End the process group. gloo's threads need Python's lock to drop their last tensors, and are joined with
    that lock held: without the pause 1 exit in 6 hung.
    """
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


def run(main):
    """Call main(); a user's mistake and a full disk become one line and exit code 2, the death of another
    process of a run one line and exit code 1, not a traceback.
    """
    joined = lambda: torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        with contextlib.redirect_stdout(Screen(sys.stdout)):
            return main()
    except (BadInput, OSError) as error:
        code, line = 2, error
    except RuntimeError as error:                                        # of gloo, of NCCL or of their store
        lost = r"connection (was likely )?(closed|reset|refused)|remote process exited|broken pipe|timed ?out"
        if not joined() or not re.search(lost, str(error), re.I):
            raise
        code, line = 1, "another process of this run has ended; start all of it again, train.py with " \
                        f"--resume ({error})"
    except KeyboardInterrupt:
        sys.exit(print("\nstopped", file=sys.stderr) or 130)
    finally:
        unlock()
    if joined() or os.environ.get("LOCAL_RANK", "0") == "0":             # before they join, all find the same
        print(f"{Path(sys.argv[0]).name}: {BadInput(line)}", file=sys.stderr, flush=True)
    if joined():
        sys.stdout.flush()
        os._exit(code)                           # the group's threads would wait for those that are gone
    sys.exit(code)


def progress(what, done, total, since, start=0):
    """One line with rate and time left; `start` of the `done` were there before `since`."""
    rate = (done - start) / max(time.monotonic() - since, 1e-9)
    left = f"{(total - done) / rate / 60:.1f} min left" if rate else ""
    end = "\n" if done == total else ""
    print(f"\r{what} {done:,} / {total:,}   {rate:,.0f}/s   {left}   ", end=end, flush=True)


# ------------------------------------------------------------------------------ files whole, or not at all

HELD = {}                                        # the folders that this process has locked


def lock(folder):
    """Lock a folder against other runs, for all the processes of this one; the system unlocks it, however
    they end.
    """
    folder = Path(folder).resolve()
    if os.environ.get("RANK", "0") != "0" or folder in HELD:
        return
    HELD[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        unlock()
        raise BadInput(f"--out {folder}: another run is writing there") from None
    except OSError:                                                      # a file system without locks
        pass


def unlock():
    while HELD:
        os.close(HELD.popitem()[1])


def replace(path, write, previous=None):
    """write(file) to a neighbour of path, then rename: path is the old file or the new one, never half, even
    where the power fails. The old file is kept under the name `previous`.
    """
    part = Path(f"{path}.{os.environ.get('RANK', 0)}.part")              # a killed run's is written over
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)                                  # a second name: path is never gone
            except OSError:                                              # a file system without them
                os.replace(path, previous)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:     # torch.save turns a full disk into RuntimeError
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__
        raise BadInput(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """A JSON file, whole or absent."""
    replace(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def hash_file(path):
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url, file, sha256, flag):
    """Fetch url into file, which appears when it is whole and has this SHA-256; `flag` names it by hand."""
    print(f"downloading {url}", flush=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"cannot download ({error}); put {file.name} (SHA-256 {sha256}) into {file.parent} or "
                       f"name it with {flag}") from None


# --------------------------------------------------------------------- archives, weights, checkpoints

def open_zip(file, size, swell=200):
    """The zip archive in `file` of `size` bytes. Raises BadInput for a damaged one or a bomb: a member that
    inflates to more than 64 MB and `swell` times its bytes, or members that overlap.
    """
    try:
        kept = zipfile.ZipFile(file)
    except Exception as error:                                           # whatever damage makes it raise
        raise BadInput(f"{getattr(file, 'name', file)}: no archive, or a damaged one ({error})") from None
    members = kept.infolist()
    if sum(member.compress_size for member in members) > size or any(
            member.file_size > max(swell * member.compress_size, (swell > 1) << 26) for member in members):
        raise BadInput(f"{getattr(file, 'name', file)}: its members inflate to far more than it holds")
    return kept


class StandIn:
    """What a numpy array, a dtype, a tensor or a storage is while a pickle is read."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def array(self):
        """An array out of its own bytes: numpy's class believes whatever shape and strides it is told."""
        _, shape, dtype, fortran, content = self.state
        content = content.encode("latin1") if type(content) is str else content
        return np.frombuffer(content, dtype.args[0]).reshape(shape, order="F" if fortran else "C")


def listed(load):
    """What loads a tuple leaves a list, as a tuple of a tuple of a ... would be hashed for ever."""
    def loaded(unpickler):
        load(unpickler)
        unpickler.stack[-1] = list(unpickler.stack[-1])
    return loaded


def charged(load):
    """A call or a setting of state copies what it is given, which a file may name again and again."""
    def loaded(unpickler):
        for given in unpickler.stack[-1:]:
            for part in [given, *given] if type(given) is list else [given]:
                if hasattr(part, "__len__"):
                    unpickler.spent += len(part) * (1 if type(part) in (str, bytes) else 64)
        if unpickler.spent > 1 << 26 and unpickler.spent > 2 * unpickler.file.tell():
            raise BadInput("copies its parts too often")
        load(unpickler)
    return loaded


class Arrays(pickle._Unpickler):
    """Builds numbers, strings, lists, dicts and stand-ins for arrays and tensors; any other name is refused,
    none is looked up. The unpickler in Python, as the one in C reserves whatever memory a file asks for.
    """
    spent = 0                                    # bytes that it copied, about
    known = re.compile(r"numpy\.core\.multiarray\._reconstruct|numpy\.(ndarray|dtype)|"
                       r"(__)?builtins?(__)?\.set|torch\._utils\._rebuild_(parameter(_with_state)?|tensor(_v2|_v3)?)|"
                       r"torch\.((storage\.)?\w+Storage|Size|device|bool|u?int\d+|b?float\w+)")
    dispatch = {code: listed(load) if load.__name__.startswith("load_tuple") else
                charged(load) if load.__name__[5:] in ("reduce", "build", "inst", "obj") else load
                for code, load in pickle._Unpickler.dispatch.items() if load.__name__ != "load_frozenset"}

    def __init__(self, file, **how):
        super().__init__(file, **how)
        self.file = file

    def find_class(self, module, name):
        name = f"{module.replace('._core.', '.core.')}.{name}"
        if name in ("collections.OrderedDict", "collections.Counter"):
            return OrderedDict
        if name == "_codecs.encode":                                     # bytes, in protocol 2
            return lambda text, _: text.encode("latin1")
        if self.known.fullmatch(name):
            return StandIn
        raise BadInput(f"holds a foreign object, {name}; expected arrays alone")

    def persistent_load(self, _):                                        # a tensor's numbers
        return StandIn()


def copied(value, room, seen):
    """A copy of what was loaded in dicts, lists, tuples, names, numbers and tensors, None for anything else.
    BadInput where it has more than room[0] parts, as lists in lists in lists may, or room[1] bytes.
    """
    room[0] -= 1
    held = isinstance(value, torch.Tensor) and (value.layout, value.device.type) == (torch.strided, "cpu")
    if held:
        if (storage := value.untyped_storage()).data_ptr() not in seen:      # tied weights are there once
            seen.add(storage.data_ptr())
            room[1] -= storage.nbytes()
        if (own := value.numel() * value.element_size()) > storage.nbytes():     # an expanded one
            room[1] -= own
        value = value.detach()
    if min(room) < 0:
        raise BadInput("found more than the file can hold")
    if isinstance(value, dict):
        return {key: copied(part, room, seen) for key, part in value.items() if type(key) in (str, int)}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(copied(part, room, seen) for part in value)
    small = type(value) is not int or value.bit_length() < 65
    return value if held or type(value) in (str, float, bool, int) and small else None


def read(path):
    """The dict in a checkpoint or weight file, torch's or .safetensors. PyTorch reads tensors and plain values
    and refuses everything else, so nothing in the file is executed. Raises BadInput.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():                             # torch.load skips the checksums
                    raise BadInput(f"{bad} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise BadInput(f"found {type(state).__name__}, expected a dict of tensors")
        return state
    except ImportError:
        raise BadInput(f"{path}: reading it needs a package: pip install safetensors") from None
    except Exception as error:                                           # each format has its own kinds
        why = f"{type(error).__name__}: {error}".split("trusted source.")[-1].split("Check the doc")[0]
        raise BadInput(f"{path}: cannot be loaded ({why.strip()})") from None


def read_json(path):
    """The dict in a JSON file. Raises BadInput."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 1 << 26:
        raise BadInput(f"{path}: no such file, or none of JSON's size")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: damaged, expected a JSON object ({error})") from None


class Gunzip:
    """What tarfile asks of a .gz, with an end where it inflates to 64 MB and 200 times the file's size."""

    def __init__(self, path):
        self.file, self.end = gzip.open(path), max(1 << 26, 200 * path.stat().st_size)
        self.tell, self.close = self.file.tell, self.file.close

    def seek(self, place, count=0):
        if place + count > self.end:
            raise tarfile.TarError("its members inflate to far more than it holds")
        return self.file.seek(place)

    def read(self, count):
        self.seek(self.tell(), count)
        return self.file.read(count)


@functools.lru_cache(maxsize=2)
def open_archive(path, process):
    """A .zip or .tar(.gz) kept open, by each process for itself: a fork would share the place in the file."""
    with contextlib.suppress(tarfile.ReadError, gzip.BadGzipFile):
        return tarfile.open(fileobj=Gunzip(path), mode="r:")
    with contextlib.suppress(tarfile.ReadError):
        return tarfile.open(path, "r:")
    return open_zip(path, path.stat().st_size)


def opened(path):
    """A file for reading; `a.zip/b/c.png` is the member b/c.png of a.zip. Links and pipes in an archive are
    no files; a link in a folder, which is its owner's, is what it leads to.
    """
    for parent in path.parents:
        if parent.suffix.lower() in ARCHIVES and parent.is_file():
            source, name = open_archive(parent, os.getpid()), path.relative_to(parent).as_posix()
            if isinstance(source, zipfile.ZipFile):
                return source.open(name if name in source.NameToInfo else f"./{name}")
            try:
                member = source.getmember(name)
            except KeyError:
                member = source.getmember(f"./{name}")
            if not member.isreg() or member.issparse():
                raise BadInput("no plain file in the archive")
            return source.extractfile(member)
    if not path.is_file():                                               # a pipe would block
        raise BadInput("no such file")
    return open(path, "rb")
