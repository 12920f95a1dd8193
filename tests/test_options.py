"""Options: one dataclass behind the command line, `transform`, manifests and the passes."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from ringcompile.commands.check import check
from ringcompile.commands.transform import transform
from ringcompile.errors import RingCompileError
from ringcompile.options import Given, Options, option_fields


def test_the_keywords_for_type_checkers_are_the_fields() -> None:
    assert list(get_type_hints(Given)) == [option.name for option in option_fields()]


@pytest.mark.parametrize("command", [transform, check], ids=lambda command: command.name)
def test_every_field_is_an_option_of_the_command_line(command: Any) -> None:
    flags = {text for option in command.params for text in option.opts}
    for option in option_fields():
        name = option.metadata["flag"] or option.name
        assert f"--{name.replace('_', '-')}" in flags
        assert option.metadata["help"].endswith(".")


def test_a_record_gives_the_options_back() -> None:
    options = Options(order="zigzag", tp_sequence=True, stages=("blocks.1",), length=48)
    assert Options.recorded({**options.record(), "model": "llama-tiny", "batch": 1}) == options
    assert Options.of(options.given()) == options


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"ordr": "auto"}, "unknown option 'ordr'",
         f"options are: {', '.join(field.name for field in option_fields())}"),
        ({"order": "spiral"}, "unknown order 'spiral'", "one of: auto, contiguous, zigzag"),
        ({"ring": "split"}, "unknown ring 'split'", "one of: rotate, gather"),
        ({"capacity": "all"}, "unknown capacity 'all'", "one of: exact, local"),
        ({"length": 0}, "sequence length 0: it must be at least 1", None),
        ({"cache": 0}, "a cache for 0 tokens: it must be at least 1", None),
    ],
)
def test_what_an_option_does_not_take(
    given: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(RingCompileError) as raised:
        Options.of(given)
    assert (raised.value.message, raised.value.hint) == (message, hint)
