"""The documentation against the code: settings, metrics, code map, names, links, the example."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from pydantic_settings import BaseSettings

from control_plane.generation import Generations
from control_plane.metrics.families import Metrics
from control_plane.metrics.vllm import VllmMetrics
from control_plane.prefix_index import PrefixIndex
from control_plane.router import Router
from control_plane.settings import Settings as ControlSettings
from data_plane.engine import Engine, EngineSizes
from data_plane.metrics.families import registry_of
from data_plane.model import Model
from data_plane.service import EngineService, ServiceTimes
from data_plane.settings import Settings as DataSettings
from data_plane.worker import Worker
from tests.processes import control_plane, data_plane
from tests.stack import NO_REDIS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("control_plane", "data_plane", "kernels", "protos")
MARKDOWN = sorted(
    path
    for folder in (".", "docs", "data_plane")
    for path in (ROOT.glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
)


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of the same level or above."""
    level = len(title) - len(title.lstrip("#"))
    _, _, rest = text.partition(f"\n{title}\n")
    assert rest, f"no section {title!r}"
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.M)[0]


def default_of(value: Any) -> str:
    """A default as the tables write it."""
    if isinstance(value, Path):
        return "the demo model"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


@pytest.mark.parametrize(
    ("title", "settings"),
    [("### Data plane", DataSettings), ("### Control plane", ControlSettings)],
)
def test_settings_tables_are_those_of_the_code(title: str, settings: type[BaseSettings]) -> None:
    rows = re.findall(
        r"^\| `--([a-z-]+)` \| (.+?) \| (.+) \|$",
        section((ROOT / "docs/operations.md").read_text(), title),
        re.M,
    )
    assert rows == [
        (name.replace("_", "-"), default_of(field.default), field.description)
        for name, field in settings.model_fields.items()
    ]


def exported(registry: CollectorRegistry) -> set[tuple[str, str]]:
    """Name and type of each family, as the tables have them."""
    suffixes = {"counter": "_total", "info": "_info"}
    return {
        (family.name + suffixes.get(family.type, ""), family.type) for family in registry.collect()
    }


def listed(title: str) -> set[tuple[str, str]]:
    table = section((ROOT / "docs/operations.md").read_text(), title)
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| (.*)$", table, re.M)
    assert len({name for name, _, _ in rows}) == len(rows)
    on_a_gpu = "" if torch.cuda.is_available() else "on a GPU: "
    return {(name, kind) for name, kind, rest in rows if not on_a_gpu or on_a_gpu not in rest}


def test_every_metric_is_listed(llama: Model) -> None:
    metrics, index = Metrics(), PrefixIndex(NO_REDIS)
    router = Router(Generations(), index)
    metrics.observe(router, index)
    assert listed("### Metrics of a control plane") == exported(metrics.registry)
    theirs = CollectorRegistry()
    theirs.register(VllmMetrics(metrics.counters, router))
    assert listed("### Metrics under vLLM's names") == exported(theirs)
    engine = Engine(llama, EngineSizes(16, 8, 0, 4, 64, 256))
    service = EngineService(engine, Worker(), None, engine_id="e", times=ServiceTimes())
    assert listed("### Metrics of a data plane") == exported(registry_of(engine, service))


def modules() -> Iterator[str]:
    """What the code map must name, as paths: packages' own marks and generated code left out."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if "_pb2" not in name and (path.name != "__init__.py" or package == "kernels"):
                yield name


def test_the_code_map_is_complete_and_true() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(text.splitlines()) <= 200
    named = re.findall(r"^- `([^`]+)`: ", section(text, "## Code map"), re.M)
    assert len(set(named)) == len(named)
    for name in named:
        assert (ROOT / name).exists(), name
    folders = tuple(name for name in named if name.endswith("/"))
    missing = [name for name in modules() if name not in named and not name.startswith(folders)]
    assert not missing


def test_tests_and_files_that_are_named_exist() -> None:
    tests = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    for page in MARKDOWN:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert name in tests, f"{page.name}: {name}"
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|proto))`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), target
        if fragment and found.suffix == ".md":
            assert fragment in anchors(found), target


def test_the_readme_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (example,) = [block for block in blocks if "generate" in block]
    assert len([line for line in example.splitlines() if line]) <= 10
    with data_plane(tmp_path / "engine.log") as engine:
        engine.ready()
        with control_plane(tmp_path / "control.log", [engine.port]) as control:
            control.ready()
            address = f"127.0.0.1:{control.port}"
            assert "127.0.0.1:7401" in example
            answer = subprocess.run(
                [sys.executable, "-c", example.replace("127.0.0.1:7401", address)],
                capture_output=True,
                text=True,
                timeout=60,
                cwd=ROOT,
            )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("PagedAttention keeps the KV cache in blocks")
