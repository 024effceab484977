"""Rules about the project itself: one test command, types, style, nothing of the machine that it was written on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path
    for pattern in ("vmm/**/*.py", "guests/**/*", "docs/*.md", "tests/**/*.py", "benchmarks/*.py", "*.md", ".ci/run")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix not in (".elf", ".bin", ".pyc")
)


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_and_ci_have_the_same_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```sh\n(.*?)\n```", readme, re.DOTALL)
    test_command = next(command for command in commands if "pytest" in command)
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_types_are_strict() -> None:
    run("mypy")


def test_style_is_clean() -> None:
    run("ruff", "check", ".")


def test_only_one_package_imports_unicorn() -> None:
    importing = {
        path.relative_to(ROOT).parts[1]
        for path in (ROOT / "vmm").rglob("*.py")
        if re.search(r"^\s*(import|from) unicorn", path.read_text(), re.MULTILINE)
    }
    assert importing == {"cpu"}


def test_every_quirk_that_the_code_names_has_an_entry() -> None:
    entries = (ROOT / "docs" / "unicorn-quirks.md").read_text()
    named = {
        name
        for path in (ROOT / "vmm").rglob("*.py")
        for name in re.findall(r'quirk "([a-z0-9-]+)"', path.read_text())
    }
    assert {name for name in named if not re.search(rf"^\| Q\d\d {name} \|", entries, re.MULTILINE)} == set()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_names_the_machine_that_it_was_written_on(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(work|farm|root)/", text)


def test_every_link_in_the_documents_leads_somewhere() -> None:
    broken = [
        f"{document.name}: {target}"
        for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not broken
