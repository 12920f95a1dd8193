"""The viewer's page: whole, closed to the network, and the same programs that `dump` prints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import ringcompile as rc
from ringcompile.ir.communication import SHIFT
from ringcompile.ir.printer import print_program
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.view import page
from tests.support import zoo_program

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@lru_cache
def made(spec: str = "ring=2,tp=2") -> ParallelProgram:
    return rc.transform(zoo_program("llama-tiny", "llama-tiny", sequence=24), spec)


@lru_cache
def text() -> str:
    return page(made())


def data(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


def lines(found: dict[str, Any], program: dict[str, Any]) -> list[str]:
    """The calls of a program with the names filled in, as the viewer does."""
    made = []
    for block, template, start in program["runs"]:
        def name(match: re.Match[str], block: int = block, start: int = start) -> str:
            kind, rest = match[1], match[2]
            return {
                "r": lambda: f"%{start + int(rest)}", "a": lambda: f"%{rest}",
                "w": lambda: f"@{found['texts'][block]}{rest}", "v": lambda: f"@{rest}",
            }[kind]()

        for row in found["templates"][template]:
            made.append(re.sub(r"<([rawv])([^>]*)>", name, found["texts"][row[1]]))
    return made


def test_a_page_asks_no_network_and_runs_its_own_script_only() -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text())
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", text(), re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy[1] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert set(re.findall(r"https?://[^\s\"']+", text())) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text())


def test_names_of_a_model_cannot_leave_the_data() -> None:
    program = made().program
    name = "</script><script>alert(1)</script>"
    odd = ParallelProgram(
        program.with_graph(program.graph, name=name), made().mesh, made().options)
    html = page(odd)
    assert name not in html
    assert html.count("<script") == 2
    assert data(html)["model"] == name


@pytest.mark.parametrize("spec", ["ring=2,tp=2", "pp=2,time=2"])
def test_the_programs_are_those_that_dump_prints(spec: str) -> None:
    found = data(page(made(spec)))
    for number, program in enumerate(found["ranks"]):
        printed = print_program(made(spec).rank(number))
        calls = lines(found, program)
        assert len(calls) == len(re.findall(r"(?m)^%\d+:", printed))
        for call in calls:
            assert f"= {call} " in f"{printed} ".replace("\n", " \n"), call
    assert [stage["label"] for stage in found["stages"]][:2] == ["one device", "canonicalize"]
    assert found["stages"][-1]["ops"]


def test_layers_that_are_alike_are_written_once() -> None:
    """Eight layers take no more templates than four."""
    counts = []
    for layers in (4, 8):
        module, inputs = zoo.build("gpt-tiny", sequence=24)
        module.blocks.extend([module.blocks[1]] * (layers - len(module.blocks)))
        parallel = rc.transform(rc.capture(module, inputs), "ring=2")
        counts.append(len(data(page(parallel))["templates"]))
    assert counts[0] == counts[1]


def test_messages_are_those_of_the_programs() -> None:
    found = data(text())
    for number, program in enumerate(found["ranks"]):
        shown = [
            found["messages"][row[6]] for _, template, _ in program["runs"]
            for row in found["templates"][template] if row[6] >= 0
        ]
        graph = made().rank(number).graph
        shifts = [dict(node.kwargs) for node in graph.nodes if str(node.target) == SHIFT]
        assert [(m["axis"], m["to"], m["source"]) for m in shown if m["shift"]] == [
            (kwargs["axis"], kwargs["to"], kwargs["source"]) for kwargs in shifts
        ]
        assert all(isinstance(message["bytes"], int) for message in shown)
    assert found["timeline"]["events"]


def test_without_a_cluster_that_fits_the_page_says_so() -> None:
    found = data(page(made("ring=2"), cluster="nowhere"))
    assert found["timeline"] == {"missing": "unknown cluster 'nowhere'", "cluster": "nowhere"}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_picked_value(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(text(), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--virtual-time-budget=3000", f"{file.as_uri()}#rank=1&node=12"],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert '<option value="3">rank 3</option>' in done.stdout
    assert 'class="node' in done.stdout
    assert "<h2>%12</h2>" in done.stdout
    assert "<canvas" in done.stdout
