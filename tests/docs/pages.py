"""Pages of the documentation as programs: their fenced blocks, and a reader who does what they say.

What is done with a block follows from what stands behind its opening fence:

=================  =============================================================================================
``sh``             commands, run by the shell in the page's folder; all of them must succeed
``sh needs as ld`` the same, left out where one of these programs is missing
``sh linux``       the same, left out unless the folder has Debian's kernel, as in `tests/linux`
``python``         Python, executed; the blocks of a page share one namespace
``toml``           a complete manifest, parsed
``LANG NAME``      any of ``python``, ``toml``, ``script`` with a name: the contents of a file in the page's folder
``text``, ``json`` right behind a block that was executed: what it printed; ``...`` stands for lines left out
``text figures``   the same, but another number may stand where there is one: what depends on a kernel's build
=================  =============================================================================================
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field, frozen

from vmm.guest import parse_manifest

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r"^```(\w*)[ \t]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@frozen(slots=True)
class Block:
    """A fenced block. ``words`` is what stands behind its language; ``where`` is the file and line of its text."""

    language: str
    words: str
    text: str
    where: str

    @property
    def opening(self) -> str:
        return f"{self.language} {self.words}".strip()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2].strip(), found[3], f"{page.name}:{text.count(chr(10), 0, found.start(3)) + 1}")
        for found in _FENCED.finditer(text)
    ]


@define(slots=True)
class Reader:
    """Does what the blocks of one page say, in an empty folder. Failures are ``AssertionError`` with the place."""

    folder: Path
    #: A folder with the commands that a reader has: ``vmm`` and ``python``.
    commands: Path
    #: What the block before printed; None if there is nothing to compare.
    printed: str | None = None
    #: Whether the block before was left out for want of a program.
    left_out: bool = False
    namespace: dict[str, object] = field(factory=lambda: {"__name__": "page"})

    def follow(self, block: Block) -> None:
        """Do one block; raises ``LookupError`` for one that nothing can be done with."""
        printed, self.printed = self.printed, None
        left_out, self.left_out = self.left_out, False
        match block.language, block.words.split():
            case ("text" | "json"), [] if left_out:
                pass
            case ("text" | "json"), [] if printed is not None:
                assert matches(block.text, printed), f"{block.where}: the real output is\n{printed}"
            case "text", ["figures"] if left_out:
                pass
            case "text", ["figures"] if printed is not None:
                real = _without_figures(printed)
                assert matches(_without_figures(block.text), real), f"{block.where}: the real output is\n{printed}"
            case "sh", []:
                self.printed = self._shell(block)
            case "sh", ["needs", *programs]:
                self.left_out = not all(map(shutil.which, programs))
                self.printed = None if self.left_out else self._shell(block)
            case "sh", ["linux"]:
                self.left_out = not (self.folder / "vmlinuz").exists()
                self.printed = None if self.left_out else self._shell(block)
            case ("python" | "toml" | "script"), [name]:
                assert re.fullmatch(r"[\w.-]+", name), f"{block.where}: {name!r} is no file name"
                (self.folder / name).write_text(block.text, encoding="utf-8")
            case "python", []:
                self.printed = self._python(block)
            case "toml", []:
                parse_manifest(block.text, self.folder / "guest.toml")
            case _:
                raise LookupError(f"{block.where}: nothing to do with a block of {block.opening!r}")

    def _shell(self, block: Block) -> str:
        environment = {
            **os.environ,
            "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            # The plugin is loaded whether or not the project is installed.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "-p vmm.testing -p no:cacheprovider",
        }
        done = subprocess.run(
            ["sh", "-e", "-c", block.text],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block.where}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout

    def _python(self, block: Block) -> str:
        output = io.StringIO()
        name, line = block.where.rsplit(":", 1)
        code = compile("\n" * (int(line) - 1) + block.text, name, "exec")
        with contextlib.redirect_stdout(output), contextlib.chdir(self.folder):
            exec(code, self.namespace)
        return output.getvalue()


def _without_figures(text: str) -> str:
    """The text with each number, and the blanks in front of it, as one sign."""
    return re.sub(r"[ ]*\b(?:0x)?[0-9a-f]*\d[0-9a-f,]*\b", " #", text)


def provide_commands(folder: Path) -> None:
    """Put ``vmm`` and ``python`` of this environment into a folder."""
    folder.mkdir()
    for name, arguments in (("vmm", "-m vmm "), ("python", "")):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        command.chmod(0o755)


def matches(expected: str, real: str) -> bool:
    """Whether ``real`` is what ``expected`` says; a line ``...`` stands for any lines, blanks at ends count not."""
    lines = _lines(real)
    first, *others = _pieces(_lines(expected))
    if lines[: len(first)] != first:
        return False
    if not others:
        return len(lines) == len(first)
    *middle, last = others
    at = len(first)
    for piece in middle:
        found = next((i for i in range(at, len(lines)) if lines[i : i + len(piece)] == piece), None)
        if found is None:
            return False
        at = found + len(piece)
    return len(lines) - at >= len(last) and lines[len(lines) - len(last) :] == last


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").split("\n")]


def _pieces(lines: list[str]) -> Iterator[list[str]]:
    piece: list[str] = []
    for line in lines:
        if line.strip() == "...":
            yield piece
            piece = []
        else:
            piece.append(line)
    yield piece
