"""`make bench-gpu` without a GPU: a dry run, the tables, and processes that die."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import cases, peers, report
from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.supervisor import Supervisor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


@pytest.mark.parametrize("tune", [False, True], ids=["measure", "tune"])
def test_a_dry_run_goes_through_every_section(tune: bool) -> None:
    before = sorted(RESULTS.iterdir())
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *(["--tune"] if tune else [])],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    cells = (cases.tuned if tune else cases.measured)(True)
    assert {cell.section for cell in cells} == (
        {"tune-decode", "tune-prefill"} if tune else {*SECTIONS}
    )
    for cell in cells:
        assert f"  {cell.key}: " in run.stderr, cell.key
    assert "FAILED" not in run.stderr and "left out" not in run.stdout
    assert tune or ("SDPA" in run.stdout and "continuous batching" in run.stdout)
    assert run.stdout.endswith("no figure means anything\n")
    assert sorted(RESULTS.iterdir()) == before


def test_cells_have_names_of_their_own() -> None:
    for make in (cases.measured, cases.tuned):
        for dry in (False, True):
            keys = [cell.key for cell in make(dry)]
            assert len(set(keys)) == len(keys)


def test_the_tables_of_the_page_are_those_of_the_renderer() -> None:
    text = report.PAGE.read_text()
    source = report.SOURCE.findall(text)[0]
    lines = {} if source == "none" else report.read(ROOT / source)
    assert report.page(text, source, lines) == text
    assert {name for _, name, _ in report.BLOCK.findall(text)} == set(report.render({}, []))


def _lines() -> dict[str, Any]:
    """What a run would say, of a device that reads 4,000 GB/s, and copies as fast."""
    cells = {cell.key: cell for cell in cases.measured(False)}
    decode = cases.Decode(64, 1024)
    peer = {"us": 90.0, "low": 89.0, "high": 91.0, "error": 0.001}
    figures: dict[str, dict[str, Any]] = {
        "ceiling name=read": {"us": 1.0, "gb_s": 4000.0},
        "ceiling name=copy": {"us": 1.0, "gb_s": 4000.0},
        "ceiling name=pinned": {"us": 1.0, "out_gb_s": 50.0, "in_gb_s": 40.0},
        decode.key: {
            "us": 80.0,
            "low": 79.0,
            "high": 81.0,
            "contiguous_us": 79.0,
            "plan_us": 5.0,
            "kv_bytes": 64 * 1024 * 4096,
            "operations": 1,
            "peers": {"FlashInfer": peer},
            "missing": {"SGLang Triton": "not importable"},
        },
        "decode batch=64 context=4096": {"failed": "error nan"},
        cases.Swap(2048, 32, 512, "in", "block-first").key: {"us": 1e4, "bytes": 512 << 20},
    }
    lines: dict[str, Any] = {}
    for key, found in figures.items():
        lines[key] = report.line(cells[key], found, lines)
    return lines


def test_lines_hold_shares_of_the_ceilings() -> None:
    lines = _lines()
    decode = lines["decode batch=64 context=1024"]
    assert decode["gb_s"] == 3355 and decode["of_read"] == 0.8389 == decode["of_floor"]
    assert decode["paging_overhead"] == 0.01266
    assert lines[cases.Swap(2048, 32, 512, "in", "block-first").key]["of_pinned"] == 1.342


def test_tables_show_what_a_run_says(tmp_path: Path) -> None:
    lines = {**_lines(), "": {"benchmark": "gpu", "name": "A GPU", "date": "2026-01-02"}}
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    assert report.read(path) == lines
    tables = report.render(lines, cases.measured(False))
    rows = tables["decode"].splitlines()
    measured = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert measured[:5] == ["64", "1024", "32/8", "16", "bf16"]
    assert measured[5:12] == ["80 (79 to 81)", "3355", "84%", "84%", "79", "+1.3%", "5"]
    assert dict(zip(peers.names(), measured[12:], strict=True))["FlashInfer"] == "90"
    assert "failed" in rows[3] and report.NOTHING in rows[4]
    assert "| name | A GPU |" in tables["device"]
    text = report.summary(lines)
    assert "FlashInfer 90" in text and "failed cells: 1" in text


WORKER = """
import json, os, sys, time
settings = json.loads(sys.argv[1])
def say(event, **content):
    print(json.dumps({"event": event, **content}), flush=True)
say("device", name="fake")
for cell in ("first", "second", "third"):
    if cell in settings["skip"]:
        continue
    say("begin", cell=cell)
    if cell == "first" and "slow peer" not in settings["without"]:
        say("peer", name="slow peer")
        time.sleep(60)
    if cell == "second" and cell not in settings["bare"]:
        os._exit(9)
    if cell == "third":
        os.abort()
    say("result", cell=cell, figures={"us": 1.0})
say("end")
"""


def test_a_process_that_dies_or_hangs_costs_no_other_cell() -> None:
    settings = {"seconds": 60, "skip": [], "without": [], "ahead": True}
    told: list[str] = []
    command = (sys.executable, "-c", WORKER)
    supervisor = Supervisor(settings, lambda key, _: told.append(key), command, silence=1.5)
    outcome = supervisor.run()
    assert outcome.figures["first"] == outcome.figures["second"] == {"us": 1.0}
    assert "status -6" in outcome.figures["third"]["failed"]
    assert outcome.without == ["slow peer"] and outcome.bare == ["second", "third"]
    assert len(outcome.faults) == 4 and outcome.device == {"name": "fake"}


def test_a_process_that_does_not_begin_is_not_started_again() -> None:
    settings = {"seconds": 60, "skip": [], "without": [], "ahead": True}
    supervisor = Supervisor(
        settings, lambda *_: None, (sys.executable, "-c", "raise SystemExit(1)")
    )
    outcome = supervisor.run()
    assert outcome.faults == ["the process ended with status 1 at no cell"]
