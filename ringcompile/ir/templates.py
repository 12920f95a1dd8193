"""Texts of calls with gaps for names: what differs between blocks that are alike, written once.

A call of a block that was left out (`ir/stretched.py`) is written as the call that it is like, with
other names. So its text is made once, with marks in place of names, and filled for each block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx

from ringcompile.ir.stretched import Section

# What stands for a node, a text argument or a source line.
Said = Callable[[Any], Any]
# A character for private use; JSON writes it as an escape, between quotes.
_MARK, _ESCAPED = "\ue000", r"\ue000"
# Stands between two texts, in none of which it can be.
_END = "\x00"
_GAP = re.compile(r'\ue000(\d+)\ue000|"\\ue000(\d+)\\ue000"')


class Templates:
    """Writes nodes of a graph: those of blocks that were left out by filling templates."""

    def __init__(self, write: Callable[[fx.Node, Said], str]) -> None:
        """Make none yet.

        Args:
            write: the text of a node, given what is said of the nodes, texts and lines in it.
        """
        self.write = write
        self._known: dict[fx.Node, _Template | None] = {}
        self._joined: dict[tuple[fx.Node, ...], _Joined | None] = {}

    def texts(self, section: Section, said: Said, fill: Said) -> list[str]:
        """The texts of a section's nodes.

        Args:
            section: of a graph.
            said: what `write` is given for a node, a text argument or a source line.
            fill: what stands in the text for these.
        """
        if not section.ahead:  # its nodes are shown nowhere else
            return [self.write(node, said) for node in section.nodes]
        nodes = tuple(section.nodes)
        if nodes not in self._joined:
            self._joined[nodes] = _joined([self._template(node) for node in nodes])
        joined = self._joined[nodes]
        if joined is not None:
            return joined.filled(fill)
        return [self._filled(node, said, fill) for node in nodes]

    def _template(self, node: fx.Node) -> _Template | None:
        if node not in self._known:
            self._known[node] = _template(lambda mark: self.write(node, mark))
        return self._known[node]

    def _filled(self, node: fx.Node, said: Said, fill: Said) -> str:
        template = self._template(node)
        if template is None:
            return self.write(node, said)
        return template.text % tuple([fill(gap) for gap in template.gaps])


class _Template(NamedTuple):
    """A text with `%s` for each gap, and what is said there."""

    text: str
    gaps: tuple[Any, ...]


class _Joined(NamedTuple):
    """The templates of a section one behind another, to be filled at once.

    Attributes:
        text: with `_END` between two templates.
        gaps: what is said in any of them, each once.
        places: for each `%s` of the text, which of the gaps it is.
    """

    text: str
    gaps: tuple[Any, ...]
    places: tuple[int, ...]

    def filled(self, fill: Said) -> list[str]:
        """The texts of the section."""
        said = [fill(gap) for gap in self.gaps]
        return (self.text % tuple([said[place] for place in self.places])).split(_END)


def _joined(templates: Sequence[_Template | None]) -> _Joined | None:
    """Templates as one; None where that of a node is not known, or one holds what stands between.

    Names and JSON hold no character that does not print, so what fills the gaps does not either.
    """
    known = [template for template in templates if template is not None]
    if len(known) < len(templates) or any(_END in template.text for template in known):
        return None
    gaps = [gap for template in known for gap in template.gaps]
    numbers = {gap: i for i, gap in enumerate(dict.fromkeys(gaps))}
    return _Joined(
        _END.join(template.text for template in known), tuple(numbers),
        tuple(numbers[gap] for gap in gaps),
    )


def _template(write: Callable[[Said], str]) -> _Template | None:
    """The template of a text; None where the text itself has what marks are made of."""
    asked: list[Any] = []

    def mark(value: Any) -> str:
        asked.append(value)
        return f"{_MARK}{len(asked) - 1}{_MARK}"

    parts = _GAP.split(write(mark))
    places = [int(one or two) for one, two in zip(parts[1::3], parts[2::3], strict=True)]
    literal = "%s".join(part.replace("%", "%%") for part in parts[::3])
    strange = _MARK in literal or _ESCAPED in literal or len(set(places)) < len(places)
    if strange or not all(place < len(asked) for place in places):
        return None
    return _Template(literal, tuple(asked[place] for place in places))
