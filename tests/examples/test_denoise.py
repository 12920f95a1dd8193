"""The denoising loop: ranks give what the model alone gives."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[dev]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "denoise.py"


@pytest.mark.parametrize(
    ("parallel", "backend"),
    [("dp=2,ring=2", "lockstep"), pytest.param("dp=2,ring=2", "gloo", marks=pytest.mark.slow),
     pytest.param("dp=2,tp=2", "lockstep", marks=pytest.mark.slow)],
)
def test_denoising(
    parallel: str, backend: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--steps", "3", "--parallel", parallel, "--backend", backend]
    monkeypatch.setattr(sys, "argv", ["denoise.py", *words])
    parts = runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr()
    assert "denoising" in shown.err  # the bar

    model = parts["build"]()
    with torch.no_grad():
        alone = parts["denoise"](lambda given: model(**given, return_dict=False), 3, 4.0)
    words = shown.out.split()
    assert words[:5] == ["latents", "[1,", "4,", "16,", "16]"]
    assert (float(words[6]), float(words[8])) == pytest.approx(
        (float(alone.min()), float(alone.max())), abs=2e-3
    )
