"""Fixtures and options shared by all tests."""

import difflib
import gc
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, and inherited by the ranks that tests start: with a pool of threads
# in each, 16 ranks on 2 cores mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Weights come from installed packages or a seed, so a test that asks a model hub is mistaken.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch.export remembers what each op makes of its symbolic shapes. With models of one or two
# layers hardly anything is asked for twice, and to remember takes half of the time of an export.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import numpy as np
import pytest
import torch

from ringcompile import planning
from ringcompile.capture import export
from tests.support import captured_once

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused in CI: goldens change in commits only")
    torch.set_num_threads(1)
    # A shell that starts a job behind others has it ignore SIGINT, and so would the processes that
    # tests of Ctrl-C start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not walk over it after each few tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is never freed is reported as a leak by libraries in C++


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def zoo_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process capture a model of the zoo only where no test before has."""
    for module in (export, planning):
        monkeypatch.setattr(module, "capture", captured_once)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Returns `check(name, text)`: `text` has to equal the file tests/golden/`name`."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN_DIR / name
        actual = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(actual, encoding="utf-8")
            return
        shown = f"tests/golden/{name}"
        if not path.exists():
            pytest.fail(f"{shown} does not exist; `make golden` writes it", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if actual == expected:
            return
        diff = difflib.unified_diff(
            expected.splitlines(), actual.splitlines(), shown, "actual", lineterm=""
        )
        hint = "if the change is meant, run `make golden` and review the diff"
        pytest.fail("\n".join([f"{shown} differs; {hint}", *diff]), pytrace=False)

    return check
