"""Long calls in the view for reading are cut into lines as `textwrap` cuts them."""

from __future__ import annotations

import textwrap

from hypothesis import given
from hypothesis import strategies as st

from ringcompile.dump.python_view import _INDENT, _WIDTH, _wrapped

_WORDS = st.text(st.sampled_from("ab,-[]0\"'"), min_size=1, max_size=120)
_SPACES = st.sampled_from([" ", " ", " ", "  ", "\t", "\n", "\u00a0"])


@given(st.lists(st.tuples(_WORDS, _SPACES), min_size=1, max_size=40))
def test_lines_are_those_of_textwrap(words: list[tuple[str, str]]) -> None:
    text = "".join(f"{word}{space}" for word, space in words).strip()
    assert _wrapped(text) == textwrap.wrap(
        text, _WIDTH, initial_indent=_INDENT * 2, subsequent_indent=_INDENT * 2,
        break_long_words=False, break_on_hyphens=False,
    )
