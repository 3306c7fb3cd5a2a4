"""The command's front: help, versions, the table of systems, flags that are not understood."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxgen.cli import COMMANDS, main
from jaxgen.cli.systems import SYSTEMS, systems_table

ROOT = Path(__file__).parents[2]


def refused(capsys, *words):
    """The one line on standard error of a command that cannot be carried out."""
    assert main(words) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    return lines[0]


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from jaxgen.cli import main; assert main(['--help']) == 0;"
        "heavy = {'jax', 'flax', 'tyro', 'matplotlib', 'sklearn', 'grain'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name}" in done.stdout
    assert "examples:" in done.stdout


def test_a_heavy_command_starts_again_once_for_large_pages(monkeypatch, tmp_path):
    started = []

    def execve(program, words, environment):
        started.append((program, words, environment["GLIBC_TUNABLES"]))

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["jaxgen", "sample", str(tmp_path)])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert main() == 2
    again = [sys.executable, *sys.orig_argv[1:]]
    assert started == [(sys.executable, again, "glibc.malloc.hugetlb=1")]
    monkeypatch.setenv("GLIBC_TUNABLES", "mine")
    assert main() == 2
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "argv", ["jaxgen", "systems"])
    assert main() == 0
    assert len(started) == 1


def test_the_module_is_the_command(tmp_path):
    words = [sys.executable, "-m", "jaxgen.cli", "sample", str(tmp_path / "none")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "jaxgen train" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(capsys, name):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"jaxgen {name}" in said
    if name in ("train", "sample", "evaluate", "inpaint"):
        assert "For example" in said and "--steps" in said


def test_the_stable_flags_are_there(capsys):
    main(["train", "--help"])
    said = capsys.readouterr().out
    for flag in (
        *("--data", "--process", "--steps", "--seed", "--out", "--config", "--precision"),
        *("--share", "--share-scheme"),
    ):
        assert flag in said
    main(["sample", "--help"])
    said = capsys.readouterr().out
    for flag in ("--n", "--solver", "--steps", "--seed", "--out"):
        assert flag in said


def test_version_names_versions_and_devices(capsys):
    assert main(["version"]) == 0
    said = capsys.readouterr().out
    assert jax.__version__ in said and said.count("device ") == jax.device_count()


@pytest.mark.parametrize(("words", "code"), [(["systems"], 0), (["train", "--steps", "1"], 2)])
def test_without_the_extra(words, code):
    lacking = "import sys; sys.modules['tyro'] = None; from jaxgen.cli import main"
    line = [sys.executable, "-c", f"{lacking}; sys.exit(main({words}))"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 1 and 'pip install "jaxgen[run]"' in done.stderr


def test_no_such_command(capsys):
    assert "no command 'trian'" in refused(capsys, "trian")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("train", "--stepz", "3"), "--stepz"),
        (("train", "--steps", "many"), "--steps"),
        (("train", "--data"), "--data"),
        (("train", "--process", "vpp"), "'vp', 'sub_vp'"),
        (("sample",), "PATH"),
        (("systems", "now"), "now"),
        (("inpaint", "x", "--hide", "all"), "'right'"),
    ],
)
def test_flags_that_are_not_understood(capsys, words, part):
    line = refused(capsys, *words)
    assert part in line and line.startswith(f"jaxgen {words[0]}: ")
    assert f"jaxgen {words[0]} --help" in line


def test_systems_prints_the_table(capsys):
    assert main(["systems"]) == 0
    assert capsys.readouterr().out.strip() == systems_table()


def test_the_readme_holds_the_table():
    assert systems_table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.claim)
def test_systems_are_where_the_table_says(system):
    for path in system.where:
        assert (ROOT / "jaxgen" / path).exists(), path
    assert (ROOT / system.claim).is_file()


def test_every_claim_test_has_its_row():
    claims = {str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "claims").glob("test_*.py")}
    assert claims == {system.claim for system in SYSTEMS}
