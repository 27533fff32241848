"""README and docs: links lead somewhere, quoted code is the project's, commands have the flags they name."""
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT
from files import Parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text() for page in PAGES}
SCRIPTS = sorted((ROOT / "experiments").glob("*.sh"))
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT["README.md"], re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#]+)", TEXT[page.name])
    own = [link for link in links if not link.startswith("http")]
    missing = [link for link in own if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("block, file", [(0, "diffusion.py"), (1, "tests/mlp.py")])
def test_quoted_code_is_the_projects(block, file):
    source = (ROOT / file).read_text().splitlines()
    quoted = [line for line in BLOCKS[block].splitlines() if line.strip()]
    assert [line for line in quoted if line not in source] == []


def commands():
    """(module, words) of every command of this project in the pages and shell scripts."""
    texts = [*TEXT.values(), *(script.read_text() for script in SCRIPTS)]
    text = "\n".join(texts).replace("\\\n", " ")
    for words in re.findall(r"(?:python|PYTHON|torchrun)(?: +[^#`|\n]+)", text):
        found = re.search(r" (?:-m (experiments\.\w+)|(\w+)\.py)((?: [^#`|;\n]*)?)", words)
        if found:
            yield found[1] or found[2], found[3].split()


COMMANDS = sorted({(module, word, words[0] if words else "")
                   for module, words in commands() for word in words if word.startswith("--")})


@pytest.mark.parametrize("module, flag, first", COMMANDS)
def test_a_flag_in_the_docs_is_one_of_its_script(module, flag, first, monkeypatch, capsys):
    words = [first] if first.isalpha() and module not in ("train", "sample") else []
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    assert re.search(rf"{flag}\b", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ the course

COURSE = TEXT["course.md"]
FUNCTIONS = re.findall(r"\[`(?:\w+\.)?(\w+)`\]\(\.\./(.+?)\)", COURSE)


@pytest.mark.parametrize("name, file", sorted(set(FUNCTIONS)))
def test_a_function_that_the_course_links_is_in_its_file(name, file):
    source = (ROOT / file).read_text()
    assert re.search(rf"^ *(def|class) {name}\b|^{name} = ", source, re.M)


class Parsed(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize("command", re.findall(r"(?:^|`)(python [^`\n]+)", COURSE, re.M))
def test_a_command_of_the_course_parses(command, monkeypatch):
    _, first, *words = shlex.split(command, comments=True)
    if first == "-c":
        compile(words[0], command, "exec")
        return
    if words[0] == "pytest":
        assert f"](../exercises/{words[-1]}.py)" in COURSE                   # and a link's file exists
        return
    if first == "-m":
        first, *words = words
    parse_args = Parser.parse_args

    def parse_and_stop(*line):
        parse_args(*line)
        raise Parsed
    monkeypatch.setattr(Parser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [first, *words])
    with pytest.raises(Parsed):
        importlib.import_module(first.removesuffix(".py")).main()
