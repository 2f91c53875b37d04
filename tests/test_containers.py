"""The container files: pinned bases, no root, no torch where none belongs, the chart's commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from control_plane.settings import Settings as ControlSettings
from data_plane.settings import Settings as DataSettings
from tests.chart import render

ROOT = Path(__file__).resolve().parent.parent
PLANES = ("control-plane", "data-plane")
ENVIRONMENT = {"extra": ""}


@dataclass
class Stage:
    """What a stage of a container file says."""

    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.lines if name == instruction]


def stages(plane: str) -> list[Stage]:
    """Parses a container file: one instruction a line, or continued by a backslash."""
    text = (ROOT / f"Containerfile.{plane}").read_text().replace("\\\n", " ")
    found: list[Stage] = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "FROM":
            found.append(Stage(value.partition(" AS ")[0]))
        else:
            found[-1].lines.append((name, value.strip()))
    return found


def copied(plane: str) -> set[str]:
    """What comes from the source tree."""
    return {
        source
        for stage in stages(plane)
        for value in stage.values("COPY")
        if not value.startswith("--from=")
        for source in value.split()[:-1]
    }


def closure(names: list[str]) -> set[str]:
    """All distributions that installing these brings, by the metadata of those installed here."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found or not (requirement.marker is None or applies(requirement)):
            continue
        found.add(name)
        try:
            waiting += map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            raise AssertionError(f"{name} is not installed") from None
    return found


def applies(requirement: Requirement) -> bool:
    assert requirement.marker is not None
    return requirement.marker.evaluate(ENVIRONMENT)


@pytest.mark.parametrize("plane", PLANES)
def test_bases_are_pinned_and_nobody_is_root(plane: str) -> None:
    build, final = stages(plane)
    assert build.base == final.base
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+\.\d+-slim-[a-z]+", final.base)
    assert final.values("USER") == ["10001:10001"]
    assert not final.values("ARG") and not final.values("ADD")
    # Nothing is installed by the last stage but what the first one made.
    assert [value for value in final.values("COPY") if "--from=build" not in value] == []
    assert not any("pip" in value for value in final.values("RUN"))


@pytest.mark.parametrize("plane", PLANES)
def test_what_is_copied_exists_and_is_not_ignored(plane: str) -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    for source in copied(plane):
        assert (ROOT / source).exists()
        assert any(fnmatch(source, line.removeprefix("!")) for line in lines[1:] if line[0] == "!")
    packages = {"control-plane": {"control_plane"}, "data-plane": {"data_plane", "kernels"}}[plane]
    assert {each for each in copied(plane) if (ROOT / each).is_dir()} == packages | {"protos"}


@pytest.mark.parametrize("plane", PLANES)
def test_an_image_starts_what_the_chart_starts(plane: str) -> None:
    *_, final = stages(plane)
    (entry,) = map(json.loads, final.values("ENTRYPOINT"))
    (flags,) = map(json.loads, final.values("CMD"))
    (health,) = re.findall(r"CMD (\[.+\])$", final.values("HEALTHCHECK")[0])
    rendered = render()
    (container,) = (
        container
        for component, pod in rendered.pods()
        if component == plane
        for container in pod["spec"]["containers"]
    )
    assert container["command"] == entry and "args" not in container
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    names = {name.removeprefix("--").replace("-", "_"): value for name, value in given.items()}
    settings = {"control-plane": ControlSettings, "data-plane": DataSettings}[plane]
    settings(**names)
    told = rendered.settings(plane)
    assert names == {name: str(told[name]) for name in names}
    ports = {str(port["containerPort"]) for port in container["ports"]}
    assert set(final.values("EXPOSE")[0].split()) == ports
    assert json.loads(health)[:3] == ["python", "-m", "protos.probe"]
    assert json.loads(health)[3] == told["health_listen"].replace("0.0.0.0", "127.0.0.1")
    user = final.values("USER")[0].partition(":")[0]
    for component, pod in rendered.pods():
        if component == plane:
            assert str(pod["spec"]["securityContext"]["runAsUser"]) == user


@pytest.mark.parametrize("plane", PLANES)
def test_what_is_installed_is_whole(plane: str, tmp_path: Path) -> None:
    """From what a container file copies, and nothing else, the package can be made and started."""
    source, wheels, site = (tmp_path / name for name in ("source", "wheels", "site"))
    source.mkdir()
    leave = shutil.ignore_patterns("__pycache__")
    for name in copied(plane):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=leave)
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    pip += ["--disable-pip-version-check", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, str(source)], check=True, timeout=120)
    (wheel,) = wheels.iterdir()
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    module = plane.replace("-", "_")
    answer = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"usage: python -m {module}" in answer.stdout, answer.stderr
    packages = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {each for each in copied(plane) if (ROOT / each).is_dir()}
    if plane == "data-plane":
        assert (site / "data_plane/demo_model/model.safetensors").exists()


def test_there_is_no_torch_in_the_control_planes_image() -> None:
    build, _ = stages("control-plane")
    assert "torch" not in " ".join(build.values("RUN")) + " ".join(build.values("COPY"))
    (install,) = (value for value in build.values("RUN") if "pip install" in value)
    # The package without any extra.
    assert install.endswith("pip install --no-cache-dir .")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = closure(project["dependencies"])
    assert len(installed) > 20
    assert not {"torch", "triton", "transformers", "safetensors"} & installed


def test_the_data_planes_image_has_what_triton_needs() -> None:
    build, final = stages("data-plane")
    assert any(re.search(r"\bgcc\b", value) for value in final.values("RUN"))
    (install,) = (value for value in build.values("RUN") if "[data-plane]" in value)
    assert "redis" not in install
    # The same torch as in `make test`.
    (torch,) = (value for value in build.values("ARG") if value.startswith("TORCH="))
    assert re.search(rf"^TORCH \?= {re.escape(torch.partition('=')[2])}$", makefile(), re.M)


def makefile() -> str:
    return (ROOT / "Makefile").read_text()
