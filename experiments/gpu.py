"""What this project does on a GPU, in one report: its tests there, its speeds, the demo, and the Min-SNR study.

    python -m experiments.gpu            # at most 8 minutes of an H100 or H200; pip install scikit-image
    python -m experiments.gpu --short    # a small version of it, also on a CPU: about 2 minutes

The report has parts, each one command. The study is experiments/min_snr.sh with the environment LONG_STUDY or
SHORT_STUDY below. A part that fails or exceeds its time is reported as such, and the others still run until the 8
minutes are over. The folder --out gets gpu.md (the report), gpu.json (the same for programs), and a file with the
whole output of each part.
"""
import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from files import BadInput, Parser, replace, run, write_json

ROOT = Path(__file__).resolve().parent.parent
BENCH = "-m experiments.bench"
STUDY = "experiments/min_snr.sh"
ALL_PARTS = 480                                  # seconds for all parts together
LAST = 12                                        # lines from the end of a part's output that the report shows

# name, limit in seconds, what to run: python's arguments, or STUDY, a shell script; {out} is --out
FULL = [
    ("tests", 90, "-m pytest -q -m gpu tests"),
    ("ViT-XL/2, latents", 90, f"{BENCH} train --dataset imagenet256 --model vit-xl --batch-size 256"),
    ("ViT-B/2, latents", 60, f"{BENCH} train --dataset imagenet256 --model vit-b --batch-size 256"),
    ("UNet of ADM, 64 pixels", 60,
     f"{BENCH} train --dataset imagenet64 --model unet-adm --batch-size 128 --no-compile"),  # compiling takes minutes
    ("sampling", 60, f"{BENCH} sample --dataset imagenet256 --model vit-xl --batch-size 64 --sample-steps 2"),
    ("autoencoder", 60, f"{BENCH} vae --batch-size 32"),
    ("FID", 30, f"{BENCH} fid --batch-size 256"),
    ("demo", 60, "train.py --out {out}/demo"),
    ("convergence", 240, STUDY),
]
SHORT = [
    ("tests", 60, "-m pytest -q -m gpu tests"),
    ("vit-tiny", 120, f"{BENCH} train --batch-size 16 --compile"),
    ("convergence", 300, STUDY),
]
# The environment that min_snr.sh reads. JOBS runs train at the same time, as one leaves most of the GPU idle.
LONG_STUDY = dict(DATA="shapes crops", WEIGHTINGS="const min_snr", TARGETS="x0", SEEDS="0 1 2", STEPS="5000",
                  EVERY="1250", EMA="0.999", N="1024", JOBS="12", FLAGS="--data-on-gpu --compile --graph")
SHORT_STUDY = dict(DATA="shapes", WEIGHTINGS="const min_snr", TARGETS="x0 v", SEEDS="0", STEPS="20",
                   EVERY="20", EMA="0.9", N="64", JOBS="2", FLAGS="")


def run_part(name, limit, words, out, env):
    """Run a part; what it prints goes to the file NAME.txt in `out`, with - for /. -> dict(name, command, code,
    seconds, lines): code is the exit code, or None where the part was stopped at its limit; lines are its last ones.
    """
    arguments = [word.format(out=out) for word in words.split()]
    command = ["sh" if words == STUDY else sys.executable, *arguments]
    log, since = out / f"{name}.txt".replace("/", "-"), time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:                                 # also on Ctrl-C: stop it and all processes that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - since, 1)
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LAST:]
    return dict(name=name, command=" ".join(command), code=code, seconds=seconds, lines=lines)


def outcome(part, limit):
    """How a part went, in a few words for the report."""
    if part["code"] is None:
        return f"not done in {limit:.0f} s"
    return "done" if part["code"] == 0 else f"failed, exit code {part['code']}"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--short", action="store_true", help="a small version, on a CPU or a GPU")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="new folder to write")
    args = parser.parse_args()
    out = args.out.resolve()
    parts, study = (SHORT, SHORT_STUDY) if args.short else (FULL, LONG_STUDY)
    if not args.short and not torch.cuda.is_available():
        raise BadInput("there is no GPU here; expected one, or --short")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: holds an earlier measurement; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, **study, OUT=str(out / "min_snr"), OBJECTIVE="", PYTHON=sys.executable)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = f"# {card}, PyTorch {torch.__version__}, {date.today()}\n"
    print(text, flush=True)
    done, since = [], time.monotonic()
    for name, limit, words in parts:
        limit = min(limit, since + ALL_PARTS - time.monotonic())
        part = run_part(name, limit, words, out, env)
        done.append(part)
        lines = "\n".join(part["lines"])
        report = f"\n## {name}: {outcome(part, limit)}, {part['seconds']:.0f} s\n\n```\n{lines}\n```\n"
        print(report, flush=True)
        text += report
        write_json(out / "gpu.json", dict(card=card, torch=torch.__version__, parts=done))
        replace(out / "gpu.md", lambda file: file.write(text.encode()))
    if any(part["code"] != 0 for part in done):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
