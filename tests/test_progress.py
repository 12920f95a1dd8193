"""Loops tell how far they are, once each, to whoever listens; commands show it on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ringcompile.cli import cli
from ringcompile.progress import counted, heard_by

Told = list[tuple[str, int, int]]


def test_the_outermost_loop_is_told() -> None:
    told: Told = []
    with heard_by(lambda *step: told.append(step)):
        for _ in counted("ranks", range(2)):
            assert list(counted("passes", "abc")) == ["a", "b", "c"]
        assert list(counted("weights", [5])) == [5]
    assert told == [("ranks", 0, 2), ("ranks", 1, 2), ("ranks", 2, 2),
                    ("weights", 0, 1), ("weights", 1, 1)]


def test_nobody_listens_behind_it_or_after_an_error() -> None:
    told: Told = []

    def fails() -> None:
        with heard_by(lambda *step: told.append(step)):
            for _ in counted("ranks", range(3)):
                raise KeyError("full")

    with pytest.raises(KeyError, match="full"):
        fails()
    assert list(counted("ranks", range(3))) == [0, 1, 2]
    assert told == [("ranks", 0, 3)]


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[str, bytes]:
    """What a command writes to a terminal as its errors, and to a pipe as its output."""
    main, terminal = pty.openpty()
    with subprocess.Popen(command, stderr=terminal, stdout=subprocess.PIPE, env=environment) as one:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody holds the terminal any more
            while read := os.read(main, 1 << 16):
                shown += read
        os.close(main)
        assert one.stdout is not None
        return shown.decode(), one.stdout.read()


def test_a_terminal_shows_it_and_a_pipe_does_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ringcompile", "transform", "llama-tiny", "--parallel=ring=2",
               "--no-weights", "--overwrite", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    shown, written = on_a_terminal(command, environment)
    assert "transforming: passes, " in shown
    assert "writing 2 programs" in shown
    piped = CliRunner().invoke(cli, command[3:])
    assert piped.stderr == ""
    assert piped.stdout_bytes == written
