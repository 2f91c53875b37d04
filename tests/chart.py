"""The Helm chart as Helm itself renders it, for tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "quire"
NAMESPACE = "serving"
NAME = "quire"

Manifest = dict[str, Any]


@functools.cache
def chart() -> helm.Chart:
    return helm.Chart.load(CHART)


def values_file(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CHART / name).read_text()) or {})


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm merges values: mappings key by key, anything else as a whole."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def templates(manifest: Manifest) -> list[Manifest]:
    """Those of the pods that an object makes; a pod is its own."""
    if manifest["kind"] == "Pod":
        return [manifest]
    spec = manifest.get("spec", {})
    group = spec.get("leaderWorkerTemplate", {})
    found = (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate"))
    return [template for template in found if template is not None]


def claim_templates(workload: Manifest) -> list[Manifest]:
    """Claims of which each of its pods has its own."""
    spec = workload["spec"]
    return list(spec.get("leaderWorkerTemplate", spec).get("volumeClaimTemplates", ()))


@dataclass(frozen=True)
class Rendered:
    """One rendering: all objects, hooks included, and the notes."""

    objects: list[Manifest]
    notes: str

    def get(self, kind: str, name: str) -> Manifest:
        (found,) = (
            each
            for each in self.objects
            if each["kind"] == kind and each["metadata"]["name"] == name
        )
        return found

    def all(self, *kinds: str) -> list[Manifest]:
        return [each for each in self.objects if each["kind"] in kinds]

    def add(self, kind: str, name: str, data: dict[str, str]) -> None:
        """Adds a ConfigMap or a Secret that the chart expects to find."""
        key = "stringData" if kind == "Secret" else "data"
        self.objects.append({"kind": kind, "metadata": {"name": name}, key: data})

    def settings(self, component: str) -> dict[str, Any]:
        """A plane's settings file."""
        data = self.get("ConfigMap", f"{NAME}-{component}")["data"]
        return dict(yaml.safe_load(data["settings.yaml"]))

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """Every pod's metadata with its spec, by the component's name."""
        for each in self.objects:
            for pod in templates(each):
                yield each["metadata"]["labels"]["app.kubernetes.io/component"], pod


def render(*values: Mapping[str, Any], name: str = NAME, namespace: str = NAMESPACE) -> Rendered:
    """Renders with values laid over the defaults.

    Raises:
        helm.HelmError: Helm refuses values or chart.
    """
    files = chart().render(merged(*values), name=name, namespace=namespace)
    notes = files.pop(f"{chart().name}/templates/NOTES.txt")
    objects = [
        manifest
        for _, text in sorted(files.items())
        for manifest in yaml.safe_load_all(text)
        if manifest
    ]
    return Rendered(objects, notes)
