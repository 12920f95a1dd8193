"""What commands say where a reader would have to guess: symbols, and folders of another kind."""

from __future__ import annotations

from pathlib import Path

from tests.test_cli import ringcompile


def test_check_says_what_symbols_stand_for() -> None:
    done = ringcompile("check", "llama-tiny", "--parallel", "ring=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        "rank 0 sends 256*b*n bytes a run\nrank 1 sends 512*b*n bytes a run\n"
        "where b: sequences of the batch; n: tokens on one rank, padding included\nsupported\n")


def test_a_checkpoint_in_place_of_an_artifact_is_told_from_other_folders(tmp_path: Path) -> None:
    (tmp_path / "my llama").mkdir()
    (tmp_path / "my llama" / "config.json").write_text("{}")
    done = ringcompile("info", "my llama", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: 'my llama' is not an artifact: it has no manifest.json\n"
        "  hint: this looks like a checkpoint; compile it first: "
        "`ringcompile transform 'my llama' -o out --parallel ring=2`\n")
    assert "name the folder that" in ringcompile("info", ".", cwd=tmp_path).stderr
