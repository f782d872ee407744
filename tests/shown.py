"""What README, docs and examples show: blocks of code by language, and the commands in those for a shell.

A small reader of shell, for what documentation needs: one command a line, continued lines, comments, ``&&`` and pipes,
assignments, ``$name``, ``$(...)`` and ``for``. Whatever else stands there is refused, so that nothing goes unread.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = "bash"
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NESTED = re.compile(r"\$\(([^()]*)\)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_SEPARATORS = {";", "&&", "||", "|", "&"}
# Of a loop only the commands count, for its first value.
_KEYWORDS = {"do", "done"}
# <what a reader has to put in>
_BLANK = re.compile(r"<([^<>\n]+)>")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what language it is in, its text, and the text of the page before it."""

    page: Path
    line: int
    language: str
    text: str
    before: str = ""

    @property
    def place(self) -> str:
        """For messages and names of tests."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def filled(self) -> str:
        """The text with a word in the place of what a reader has to put in."""
        return _BLANK.sub(lambda blank: re.sub(r"\W", "_", blank[1]), self.text)

    @property
    def script(self) -> str | None:
        """The file that the page says a block with ``#!`` is, such as ``train.sh``."""
        if not self.text.startswith("#!"):
            return None
        named = re.findall(r"`(\w+\.sh)`", self.before)
        assert named, f"{self.place}: a script of what name?"
        return str(named[-1])


@dataclass(frozen=True)
class Command:
    """One simple command.

    Attributes:
        words: program and arguments, variables not expanded; empty if there are only assignments.
        assigned: variables set for it, or for all that follow if there are no words or ``export`` is the first.
        place: where it stands.
    """

    words: tuple[str, ...]
    assigned: tuple[tuple[str, str], ...]
    place: str

    def __str__(self) -> str:
        # An assignment is not quoted as a whole: that would make it a word like any other.
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.assigned]
        words = [shlex.quote(word) for word in self.words]
        return " ".join([*words, *assigned] if words == ["export"] else [*assigned, *words])


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2], text[: found.start()])
        for found in _FENCE.finditer(text)
    ]


def all_blocks(language: str) -> list[Block]:
    """Those of all pages in a language."""
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def commands(text: str, place: str) -> list[Command]:
    """The simple commands of a shell text, in order; a nested ``$(...)`` comes before the command it stands in."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [command for line in joined.splitlines() for command in _of_line(line, place)]


def _of_line(line: str, place: str) -> Iterator[Command]:
    for nested in _NESTED.findall(line.partition(" #")[0]):
        yield from _of_line(nested, place)
    line = _BLANK.sub(lambda blank: re.sub(r"\W", "_", blank[1]), line)
    # Parentheses would separate words.
    kept = {f"__nested{number}__": nested[0] for number, nested in enumerate(_NESTED.finditer(line))}
    for name, nested in kept.items():
        line = line.replace(nested, name, 1)
    reader = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    reader.whitespace_split = True
    words: list[str] = []
    for word in [*reader, ";"]:
        if word not in _SEPARATORS:
            for name, nested in kept.items():
                word = word.replace(name, nested)
            words.append(word)
        elif words:
            yield from _simple(words, place)
            words = []


def _simple(words: list[str], place: str) -> Iterator[Command]:
    while words and words[0] in _KEYWORDS:
        words = words[1:]
    if words[:1] == ["for"]:
        assert words[2] == "in", f"{place}: for what?"
        yield Command((), ((words[1], words[3]),), place)
        return
    for sign in (">", ">>"):
        while sign in words:
            at = words.index(sign)
            words = words[:at] + words[at + 2 :]
    strange = {"(", ")", "<", "<<", "if", "while", "case"} & set(words)
    assert not strange, f"{place}: too much shell for the reader in tests/shown.py: {shlex.join(words)}"
    assigned = []
    exported = words[:1] == ["export"]
    for word in words[exported:]:
        found = _ASSIGNMENT.fullmatch(word)
        if not found:
            break
        assigned.append((found[1], found[2]))
    words = words[:1] if exported else words[len(assigned) :]
    if words or assigned:
        yield Command(tuple(words), tuple(assigned), place)


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with the variables that are known in place; others stay as they are."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), text)


def inline(page: Path) -> list[str]:
    """What stands in backquotes within sentences and looks like one of our commands."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found = (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text))
    return [span for span in found if re.match(r"(nnunet_ima|nnUNetv2_\w+) ", span)]
