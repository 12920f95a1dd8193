"""A small run of `python -m benchmarks.compile_time`, and what holds of its numbers anywhere."""

from __future__ import annotations

from click.testing import CliRunner

from benchmarks.compile_time import main, measured


def test_a_small_run() -> None:
    found = measured(1, ("ring=2",), "gpt-tiny")
    assert found["capture"]["torch.export"] < found["capture"]["capture"]
    assert found["specs"]["ring=2"].keys() == {
        "program for all ranks", "all ranks", "verify", "save", "megabytes",
    }
    assert 0 < found["specs"]["ring=2"]["megabytes"] < 1


def test_what_it_prints() -> None:
    done = CliRunner().invoke(main, ["--layers", "1", "--spec", "tp=2"])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.output.splitlines()] == ["capture", "tp=2"]
