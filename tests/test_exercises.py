"""The course's exercises: red as shipped, and green with the solutions."""
import re
import shutil
import subprocess
import sys

from conftest import ROOT


def check(folder):
    """-> pytest's exit code, which is 0 if green, 1 if red, 2 if a file does not import, and its text."""
    command = [sys.executable, "-m", "pytest", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stdout


def test_exercises_are_red_as_shipped_and_green_when_solved(tmp_path):
    shutil.copytree(ROOT / "exercises", tmp_path, dirs_exist_ok=True)
    code, text = check(tmp_path)
    failed = re.findall(r"FAILED .*(lecture\d)", text)
    assert (code, len(set(failed))) == (1, 8), text
    shutil.copytree(ROOT / "exercises/solutions", tmp_path, dirs_exist_ok=True)
    code, text = check(tmp_path)
    assert code == 0, text
