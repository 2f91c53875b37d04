"""As much of a Kubernetes API server as Helm needs to look into a cluster before it installs."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

# Kinds by group and version, with the names of their resources.
_KINDS = {
    "/api/v1": ["ConfigMap", "Pod", "Secret", "Service", "ServiceAccount"],
    "/apis/apps/v1": ["Deployment", "StatefulSet"],
    "/apis/autoscaling/v2": ["HorizontalPodAutoscaler"],
    "/apis/policy/v1": ["PodDisruptionBudget"],
    "/apis/networking.k8s.io/v1": ["NetworkPolicy"],
}


def _resource(kind: str) -> str:
    name = kind.lower()
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"


def _group(path: str) -> str:
    return path.split("/")[2] if path.startswith("/apis") else ""


def _version(path: str) -> str:
    return path.rpartition("/")[2]


def _groups() -> dict[str, Any]:
    groups = []
    for path in _KINDS:
        version = {"groupVersion": path.removeprefix("/apis/"), "version": _version(path)}
        groups.append({"name": _group(path), "versions": [version], "preferredVersion": version})
    return {"kind": "APIGroupList", "groups": [each for each in groups if each["name"]]}


def _resources(path: str) -> dict[str, Any]:
    resources = [
        {
            "name": _resource(kind),
            "singularName": kind.lower(),
            "namespaced": True,
            "kind": kind,
            "verbs": ["get", "create", "patch"],
        }
        for kind in _KINDS[path]
    ]
    version = path.removeprefix("/apis/").removeprefix("/api/")
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def _schema(path: str) -> dict[str, Any]:
    """Says no more than that the server checks fields itself, so that Helm need not."""
    paths = {
        f"{path}/namespaces/{{namespace}}/{_resource(kind)}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {},
                "x-kubernetes-group-version-kind": {
                    "group": _group(path),
                    "version": _version(path),
                    "kind": kind,
                },
            }
        }
        for kind in _KINDS[path]
    }
    return {"openapi": "3.0.0", "info": {"title": "", "version": ""}, "paths": paths}


def _metadata(name: str, namespace: str, release: str) -> dict[str, Any]:
    """Of an object that a release of Helm has made."""
    return {
        "name": name,
        "namespace": namespace,
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {
            "meta.helm.sh/release-name": release,
            "meta.helm.sh/release-namespace": namespace,
        },
    }


def _answers(
    secrets: Mapping[str, Mapping[str, str]],
    replicas: Mapping[str, int],
    namespace: str,
    release: str,
) -> Any:
    """What there is to get, by path."""
    paths = {path: {"serverRelativeURL": f"/openapi/v3{path}"} for path in _KINDS}
    found: dict[str, Any] = {
        "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": _groups(),
        "/openapi/v3": {"paths": {path.lstrip("/"): where for path, where in paths.items()}},
    }
    found |= {path: _resources(path) for path in _KINDS}
    found |= {f"/openapi/v3{path}": _schema(path) for path in _KINDS}
    for name, data in secrets.items():
        found[f"/api/v1/namespaces/{namespace}/secrets/{name}"] = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": _metadata(name, namespace, release),
            "data": {key: base64.b64encode(text.encode()).decode() for key, text in data.items()},
        }
    for name, count in replicas.items():
        found[f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}"] = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": _metadata(name, namespace, release),
            "spec": {"replicas": count},
        }
    return found


@contextmanager
def api_server(
    secrets: Mapping[str, Mapping[str, str]],
    namespace: str,
    release: str,
    replicas: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[str]:
    """A cluster that holds these objects of a release and nothing else; yields a kubeconfig.

    Args:
        secrets: their data, by name.
        replicas: how many each Deployment has, by name.
    """
    answers = _answers(secrets, replicas, namespace, release)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            status = 404 if answer is None else 200
            missing = {"kind": "Status", "apiVersion": "v1", "reason": "NotFound", "code": 404}
            body = json.dumps(answer or missing).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
            yield json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "test", "user": {}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "current-context": "test",
                }
            )
        finally:
            server.shutdown()
            thread.join()
