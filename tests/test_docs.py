"""The pages of docs/: their code runs, their commands exist, their reference is complete.

A ```python block runs and a ```pycon block is a doctest, in the order and namespace of its page.
A ```py block is somebody else's code, and a ```sh block is for a shell: neither runs.
"""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import jaxgen
from jaxgen.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "reference"]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path, *languages):
    """Code of a page, with language and line."""
    text = path.read_text(encoding="utf-8")
    found = [(m[1], m[2], text[: m.start()].count("\n") + 2) for m in _BLOCK.finditer(text)]
    return [block for block in found if block[0] in languages]


def name(path):
    return str(path.relative_to(DOCS))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_code_of_a_page(path):
    space = {"__name__": "page"}
    runner = doctest.DocTestRunner()
    for language, code, line in blocks(path, "python", "pycon"):
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), space)
        else:
            page = f"{name(path)}, line {line}"
            test = doctest.DocTestParser().get_doctest(code, space, page, str(path), line - 1)
            assert test.examples, f"{page}: a doctest without a prompt"
            runner.run(test, clear_globs=False)
            space = test.globs
    assert runner.summarize(verbose=False).failed == 0


def test_the_first_example_is_the_readmes():
    ours = blocks(DOCS / "index.md", "python")[0][1]
    assert ours in (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_and_flags_exist(capsys):
    said = {}
    for path in PAGES:
        text = "\n".join(code for _, code, _ in blocks(path, "sh"))
        text += "\n" + "\n".join(re.findall(r"`(jaxgen [^`]*)`", path.read_text(encoding="utf-8")))
        for line in re.findall(r"^jaxgen .*", text, re.MULTILINE):
            command, *words = line.partition("#")[0].split()[1:]
            if command.startswith("--"):
                continue
            assert command in COMMANDS, f"{name(path)}: {line}"
            if command not in said:
                main([command, "--help"])
                said[command] = capsys.readouterr().out
            for word in words:
                if word.startswith("--") and word != "--help":
                    flag = rf"{re.escape(word.partition('=')[0])}\b"
                    assert re.search(flag, said[command]), f"{name(path)}: {line}"


def test_links_to_files_of_the_repository():
    for path in PAGES:
        for word in re.findall(
            r"`((?:examples|tests|benchmarks|notebooks|jaxgen)/[\w./]+)`", path.read_text()
        ):
            assert "NAME" in word or (ROOT / word).exists(), f"{name(path)}: {word}"


def test_the_reference_has_each_room():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for room in jaxgen._ROOMS:
        text = (DOCS / "reference" / f"{room}.md").read_text(encoding="utf-8")
        assert f"reference/{room}.md" in navigation
        module = getattr(jaxgen, room)
        assert f"::: {module.__name__}\n" in text
        for public in module.__all__:
            thing = getattr(module, public)
            if inspect.ismodule(thing):
                assert f"::: {thing.__name__}\n" in text, thing.__name__
            # A function in a file of its name is hidden behind the file, and needs its own line.
            elif getattr(thing, "__module__", "").endswith(f".{public}"):
                assert f"::: {thing.__module__}.{public}\n" in text, f"{room}.{public}"
