"""The chart as Helm renders it: valid manifests, refused values, security, who may reach whom."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from fnmatch import fnmatch
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import promql_parser as promql
import pytest
import yaml
from kubernetes_validate import utils
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from control_plane.settings import Settings as ControlSettings
from data_plane.engine import Engine, EngineSizes
from data_plane.metrics.families import registry_of
from data_plane.model import Model
from data_plane.ranks import Place
from data_plane.settings import Settings as DataSettings
from helm.generate import OF_THE_CHART, SETTINGS, readme, schema
from tests.api_server import api_server
from tests.chart import (
    CHART,
    NAME,
    NAMESPACE,
    ROOT,
    Manifest,
    Rendered,
    chart,
    claim_templates,
    merged,
    render,
    templates,
    values_file,
)
from tests.policies import PORTS, Port, reachable, selects
from tests.promql import Labels, check_labels, grouped, is_of_nothing
from tests.stack import Stack, failure, led, request, running_replica, serving_engine
from tests.test_docs import section

LAPTOP, H200 = values_file("values-laptop.yaml"), values_file("values-h200.yaml")
SECRETS = {"controlPlane": "a", "dataPlane": "b", "client": "c"}
# Peers of policies, by what tests call those behind them.
PEERS: dict[str, Any] = {
    name: [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]
    for name in ("operators", "monitoring")
}
EXTERNAL_REDIS = {
    "redis": {"enabled": False},
    "externalRedis": {
        "url": "rediss://redis.example:6380/1",
        "existingSecret": "redis-user",
        "caSecret": "redis-ca",
    },
}
MONITORED = {
    "monitoring": {"monitors": True, "rules": True, "dashboard": True},
    "networkPolicy": {"metricsFrom": PEERS["monitoring"]},
}
EIGHT = {"nodes": 2, "tensorParallel": 16, "replicas": 2}
HUB = {"repository": "someone/llama", "revision": "a" * 40}
# Every feature by itself, so that each one's templates are rendered both ways.
CASES: dict[str, Mapping[str, Any]] = {
    "defaults": {},
    "laptop": LAPTOP,
    "h200": H200,
    "autoscaling": {"controlPlane": {"autoscaling": {"enabled": True}}},
    "load balancer": {
        "controlPlane": {"service": {"type": "LoadBalancer", "annotations": {"a.example/b": "c"}}}
    },
    "load balancer for some": {
        "controlPlane": {
            "service": {
                "type": "LoadBalancer",
                "externalTrafficPolicy": "Local",
                "loadBalancerClass": "example.com/inner",
                "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8::/32"],
            }
        }
    },
    "no budgets": {
        plane: {"podDisruptionBudget": {"enabled": False}}
        for plane in ("controlPlane", "dataPlane")
    },
    "tensor parallel": {"dataPlane": {"tensorParallel": 8, "replicas": 3, "swapMemoryMib": 4096}},
    "several nodes": {
        "dataPlane": EIGHT | {"swapMemoryMib": 1000, "annotations": {"a.example/b": "c"}}
    },
    "several nodes of everything": merged(
        H200, {"dataPlane": EIGHT | {"cache": {"claim": True}, "model": {"hub": HUB}}}
    ),
    "several nodes that fetch": {
        "dataPlane": EIGHT | {"cache": {"claim": True}, "model": {"hub": HUB}}
    },
    "existing claim": {"dataPlane": {"model": {"existingClaim": "models", "path": "llama/8b"}}},
    "made claim": {
        "dataPlane": {
            "model": {
                "claim": {
                    "create": True,
                    "storageClassName": "fast",
                    "dataSourceRef": {
                        "apiGroup": "snapshot.storage.k8s.io",
                        "kind": "VolumeSnapshot",
                        "name": "llama",
                    },
                }
            }
        }
    },
    "claims for caches": {
        "dataPlane": {"replicas": 2, "cache": {"claim": True, "storageClassName": "fast"}}
    },
    "hub": {
        "dataPlane": {
            "model": {"hub": HUB | {"tokenSecret": "hub", "storageClassName": "fast"}},
            "cache": {"claim": True},
        }
    },
    "hub without claims": {
        "dataPlane": {
            "model": {
                "name": "llama",
                "path": "a/b",
                "hub": HUB | {"claim": False, "endpoint": "http://hub.example:8080/x"},
            }
        }
    },
    "hub into a claim": {
        "dataPlane": {"model": {"existingClaim": "models", "path": "fetched", "hub": HUB}}
    },
    "hub into a made claim": {
        "dataPlane": {
            "model": {"claim": {"create": True, "accessMode": "ReadWriteMany"}, "hub": HUB}
        }
    },
    "external redis": EXTERNAL_REDIS,
    "traces": {
        "controlPlane": {"settings": {"traces_endpoint": "https://collector.example:4317"}},
        "networkPolicy": {"tracesTo": PEERS["monitoring"]},
    },
    "access": {
        "access": {"existingSecret": "callers", "anonymousRoles": [], "testSecret": "tester"}
    },
    "prefixes": {"prefixes": {"guide": {"text": "Be short.\n", "form": "plain", "pinned": True}}},
    "tls of secrets": {"tls": {"enabled": True, "existingSecrets": SECRETS}},
    "tls of cert-manager": {
        "tls": {
            "enabled": True,
            "certManager": {
                "enabled": True,
                "issuerRef": {"name": "company", "kind": "ClusterIssuer"},
                "extraNames": ["quire.example"],
            },
        }
    },
    "no policies": {"networkPolicy": {"enabled": False}},
    "all policies": {
        "networkPolicy": {
            "operatorsFrom": PEERS["operators"],
            "metricsFrom": PEERS["monitoring"],
            "healthFrom": [{"ipBlock": {"cidr": "192.168.0.0/16", "except": ["192.168.1.0/24"]}}],
        }
    },
    "monitoring": MONITORED,
    "platform's users": {
        "securityContext": {"runAsUser": None, "fsGroup": None},
        "redis": {"runAsUser": None},
    },
    "placement": {
        plane: {
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "a", "operator": "Equal", "value": "b"}],
            "affinity": {"podAntiAffinity": {}},
            "podAnnotations": {"note": "x"},
        }
        | ({} if plane == "redis" else {"annotations": {"reloader.example/auto": "true"}})
        for plane in ("controlPlane", "dataPlane", "redis")
    },
    "callers without certificates": {
        "tls": {"enabled": True, "existingSecrets": SECRETS | {"client": ""}},
        "controlPlane": {"settings": {"client_certificates": False}},
        "access": {"testSecret": "tester", "testKey": "bearer"},
    },
    "more environment": {
        plane: {
            "extraEnv": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "a", "valueFrom": {"secretKeyRef": {"name": "b", "key": "c"}}},
                {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            ]
        }
        for plane in ("controlPlane", "dataPlane")
    },
    "names": {
        "fullnameOverride": "q",
        "serviceAccount": {"create": False, "name": "own"},
        "imagePullSecrets": [{"name": "registry"}],
        "commonLabels": {"team": "serving"},
        "controlPlane": {"image": {"repository": "r.example/q", "digest": f"sha256:{'0' * 64}"}},
    },
}  # fmt: skip
# Kinds of other projects, without schemas here: their groups, what they must have, and which keys
# they may have at any depth, with which values: a mapping in braces, where ANY stands for all keys;
# a list in brackets; a text of a pattern or of a set; or a type. None stands for anything.
KEYS = dict[str, Any]
ANY = "*"
GO_DURATION = re.compile(r"(\d+(\.\d+)?(h|m|s|ms))+")
PROMETHEUS_DURATION = re.compile(r"(?=\d)(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?")
SCRAPED: KEYS = {
    "port": str,
    "interval": PROMETHEUS_DURATION,
    "path": str,
    "scheme": {"http", "https"},
}
WATCHED: KEYS = {
    "selector": {"matchLabels": {ANY: str}},
    "namespaceSelector": {"matchNames": [str]},
}
# cert-manager's names of them.
USAGES = {"digital signature", "server auth", "client auth"}
CUSTOM: dict[str, tuple[str, set[str], KEYS]] = {
    "Issuer": ("cert-manager.io/v1", set(), {"selfSigned": {}, "ca": {"secretName": str}}),
    "Certificate": (
        "cert-manager.io/v1",
        {"secretName", "issuerRef"},
        {
            "secretName": str,
            "dnsNames": [str],
            "ipAddresses": [str],
            "usages": [USAGES],
            "isCA": bool,
            "commonName": str,
            "duration": GO_DURATION,
            "renewBefore": GO_DURATION,
            "issuerRef": {"name": str, "kind": {"Issuer", "ClusterIssuer"}, "group": str},
            "privateKey": {
                "algorithm": {"RSA", "ECDSA", "Ed25519"},
                "size": int,
                "rotationPolicy": {"Always", "Never"},
            },
        },
    ),
    "LeaderWorkerSet": (
        "leaderworkerset.x-k8s.io/v1",
        {"leaderWorkerTemplate"},
        {
            "replicas": int,
            "startupPolicy": {"LeaderCreated", "LeaderReady"},
            "rolloutStrategy": {
                "type": {"RollingUpdate"},
                "rollingUpdateConfiguration": {"maxUnavailable": int, "maxSurge": int},
            },
            # Of the templates Kubernetes's own schemas say what is right.
            "leaderWorkerTemplate": dict.fromkeys(
                ("leaderTemplate", "workerTemplate", "volumeClaimTemplates")
            )
            | {
                "size": int,
                "restartPolicy": {"RecreateGroupOnPodRestart"},
                "persistentVolumeClaimRetentionPolicy": {
                    "whenDeleted": {"Retain", "Delete"},
                    "whenScaled": {"Retain", "Delete"},
                },
            },
        },
    ),
    "ServiceMonitor": (
        "monitoring.coreos.com/v1",
        {"selector", "endpoints"},
        WATCHED | {"endpoints": [SCRAPED]},
    ),
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        {"selector", "podMetricsEndpoints"},
        WATCHED | {"podMetricsEndpoints": [SCRAPED]},
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        {"groups"},
        {
            "groups": [
                {
                    "name": str,
                    "rules": [
                        {
                            "alert": str,
                            "expr": str,
                            "for": PROMETHEUS_DURATION,
                            "labels": {"severity": {"critical", "warning"}},
                            "annotations": {"summary": str, "description": str},
                        }
                    ],
                }
            ],
        },
    ),
}
# The first that the chart allows, and the last five.
VERSIONS = ["1.30", *dict.fromkeys(map(utils.major_minor, utils.all_versions()[-10:]))]


@functools.cache
def case(name: str) -> Rendered:
    return render(CASES[name])


def every_case(test: Any) -> Any:
    return pytest.mark.parametrize("name", CASES)(test)


# What Helm and Kubernetes take.


@every_case
def test_helm_finds_nothing_to_complain_about(name: str) -> None:
    report = helm.lint(CHART, dict(CASES[name]), strict=True)
    assert not report["errors"]
    assert {each["error"] for each in report["messages"]} <= {"icon is recommended"}


@every_case
def test_manifests_are_valid_for_every_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert VERSIONS[-1] >= "1.37" and len(VERSIONS) == 6
    monkeypatch.setattr(utils, "schema_contents", SCHEMAS)
    for manifest, version in itertools.product(case(name).objects, VERSIONS):
        if manifest["kind"] in CUSTOM:
            group, needed, keys = CUSTOM[manifest["kind"]]
            assert manifest["apiVersion"] == group
            assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
            assert needed <= manifest["spec"].keys()
            assert set(unknown(manifest["spec"], keys)) == set()
            assert set(manifest["spec"].get("usages", ())) <= USAGES
            for template in templates(manifest):
                pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
                kubernetes_validate.validate(pods, version, strict=True)
            for claim in claim_templates(manifest):
                kubernetes_validate.validate(claim, version, strict=True)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


SCHEMAS = functools.cache(utils.schema_contents)


def unknown(part: Any, kind: Any) -> Iterator[str]:
    """What of a part, at any depth, is no key that may be there, or no value as it must be."""
    if isinstance(kind, dict) and isinstance(part, dict):
        for key, value in part.items():
            if key in kind or ANY in kind:
                yield from unknown(value, kind.get(key, kind.get(ANY)))
            else:
                yield key
    elif isinstance(kind, list) and isinstance(part, list):
        for each in part:
            yield from unknown(each, kind[0])
    elif isinstance(kind, re.Pattern) and isinstance(part, str):
        yield from () if kind.fullmatch(part) else (part,)
    elif isinstance(kind, set):
        yield from () if part in kind else (part,)
    elif kind is not None and type(part) is not kind:
        yield repr(part)


@every_case
def test_objects_belong_to_the_release(name: str) -> None:
    rendered = case(name)
    keys = [(each["kind"], each["metadata"]["name"]) for each in rendered.objects]
    assert len(set(keys)) == len(keys)
    for manifest in rendered.objects:
        metadata = manifest["metadata"]
        assert metadata["namespace"] == NAMESPACE
        assert metadata["labels"]["app.kubernetes.io/instance"] == NAME
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "Helm"
    claims = {
        each["metadata"]["name"]
        for workload in rendered.all("StatefulSet", "LeaderWorkerSet")
        for each in claim_templates(workload)
    }
    for pod, manifest in rendered.pods():
        volumes = {each["name"] for each in manifest["spec"]["volumes"]}
        if pod == "data-plane":
            assert not volumes & claims
            volumes |= claims
        for container in manifest["spec"]["containers"]:
            assert {each["name"] for each in container["volumeMounts"]} == volumes, pod
        for container in manifest["spec"].get("initContainers", ()):
            assert {each["name"] for each in container["volumeMounts"]} <= volumes, pod


@every_case
def test_selectors_select_what_they_are_for(name: str) -> None:
    rendered = case(name)
    pods = {component: pod["metadata"]["labels"] for component, pod in rendered.pods()}
    for manifest in rendered.all("Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor"):
        spec = manifest["spec"]
        selectors = [spec["selector"]] + [
            each["labelSelector"]
            for each in spec.get("template", {"spec": {}})["spec"].get(
                "topologySpreadConstraints", ()
            )
        ]
        own = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
        for selector in selectors:
            assert [each for each, labels in pods.items() if selects(selector, labels)] == [own]
    for budget in rendered.all("PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1
    for scaler in rendered.all("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        found = rendered.get(target["kind"], target["name"])
        assert found["apiVersion"] == target["apiVersion"]
        assert found["metadata"]["labels"]["app.kubernetes.io/component"] == "control-plane"


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("serving.v1.2", {}, "serving-v1-2-quire"),
        ("quire.v1", {}, "quire-v1"),
        ("x" * 33 + ".quire", {}, "x" * 33 + "-quire"),
        ("x" * 32 + "..quire", {}, "x" * 32 + "--quire"),
        ("x" * 39 + ".quire", {}, "x" * 33 + "-8bd30c"),
        ("x" * 32 + ".long.quire", {}, "x" * 32 + "--b15411"),
        ("1st", {"fullnameOverride": "first"}, "first"),
        ("one", {"nameOverride": "engines"}, "one-engines"),
    ],
)
def test_names_are_what_services_may_be_called(
    release: str, values: dict[str, Any], name: str
) -> None:
    rendered = render(values, name=release)
    assert rendered.get("Service", f"{name}-control-plane")
    for manifest in rendered.objects:
        assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", manifest["metadata"]["name"])
    with pytest.raises(helm.HelmError, match=r"begins with a digit.*fullnameOverride"):
        render(name="1st")


def test_releases_with_long_names_do_not_take_each_others() -> None:
    names = [f"team-of-research-the-llama-3-1-instruct-{size}b" for size in ("70", "8")]
    found = [
        {(each["kind"], each["metadata"]["name"]) for each in render(name=name).objects}
        for name in names
    ]
    assert found[0].isdisjoint(found[1])


def test_names_that_yaml_takes_for_something_else_stay_texts() -> None:
    values = merged(MONITORED, {"fullnameOverride": "on", "nameOverride": "1"})
    for manifest in render(values, name="123", namespace="456").objects:
        assert manifest["metadata"]["namespace"] == "456"
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "123"
        assert labels["app.kubernetes.io/name"] == "1"
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)
        else:
            assert set(unknown(manifest["spec"], CUSTOM[manifest["kind"]][2])) == set()


def test_long_names_stay_within_what_kubernetes_takes() -> None:
    for manifest in render(CASES["monitoring"], name="r" * 53).objects:
        # A StatefulSet's pods get its name, a hash and their number in a label.
        assert len(manifest["metadata"]["name"]) <= (
            52 if manifest["kind"] == "StatefulSet" else 63
        )
    # LeaderWorkerSet makes StatefulSets of workers, with the number of the group at their end.
    (engines,) = render(CASES["several nodes"], name="r" * 53).all("LeaderWorkerSet")
    assert len(f"{engines['metadata']['name']}-1023") <= 52


@every_case
def test_settings_files_are_what_the_planes_take(name: str, tmp_path: Path) -> None:
    rendered = case(name)
    prefix = "q" if name == "names" else NAME
    for plane, settings in (("control-plane", ControlSettings), ("data-plane", DataSettings)):
        data = rendered.get("ConfigMap", f"{prefix}-{plane}")["data"]
        given = yaml.safe_load(data["settings.yaml"])
        if "access" in given:
            given["access"] = str(tmp_path / "access.yaml")
            (tmp_path / "access.yaml").write_text("callers: []\n")
        settings(**given)


# What is refused, and how.


def hub(changed: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Values for a model from a hub, with something changed or added."""
    return {"dataPlane": {"model": model | {"hub": HUB | changed}}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"controlPlane": {"settings": {"traces_endpoint": "https://collector.example"}}},
            "traces_endpoint is https://collector.example: it must be http://HOST:PORT",
        ),
        ({"controlPlane": {"replicas": "two"}}, "at '/controlPlane/replicas': got string"),
        ({"dataPlane": {"replicas": 0}}, "minimum: got 0, want 1"),
        ({"dataplane": {}}, "additional properties 'dataplane' not allowed"),
        ({"dataPlane": {"image": {"tags": "1"}}}, "additional properties 'tags' not allowed"),
        ({"controlPlane": {"settings": {"listen": "x"}}}, "'listen' not allowed"),
        ({"dataPlane": {"settings": {"block_size": 1000}}}, "got 1,000, want 256"),
        ({"dataPlane": {"settings": {"dtype": "int3"}}}, "value must be one of"),
        ({"dataPlane": {"model": {"path": "../etc"}}}, "does not match pattern"),
        ({"redis": {"password": "short"}}, "does not match pattern"),
        ({"access": {"anonymousRoles": ["admin"]}}, "value must be one of"),
        ({"prefixes": {"guide": {"form": "system"}}}, "missing property 'text'"),
        ({"networkPolicy": {"clientsFrom": [{}]}}, "minProperties"),
        ({"externalRedis": {"url": "http://x"}}, "does not match pattern"),
        ({"commonLabels": {"a": "not a label"}}, "does not match pattern"),
        ({"commonLabels": {"a/b/c": "d"}}, "does not match pattern"),
        ({"dataPlane": {"nodeSelector": {"a": "b c"}}}, "does not match pattern"),
        ({"fullnameOverride": "a.b"}, "does not match pattern"),
        ({"fullnameOverride": "1a"}, "does not match pattern"),
        ({"nameOverride": "A"}, "does not match pattern"),
        ({"clusterDomain": "cluster.local."}, "does not match pattern"),
        (
            {"controlPlane": {"podDisruptionBudget": {"maxUnavailable": "0%"}}},
            "does not match pattern",
        ),
        ({"dataPlane": {"podDisruptionBudget": {"maxUnavailable": 0}}}, "got 0, want 1"),
        ({"dataPlane": {"cache": {"size": "0"}}}, "does not match pattern"),
        ({"tls": {"certManager": {"duration": "1d"}}}, "does not match pattern"),
        ({"dataPlane": {"settings": None}}, "at '/dataPlane': missing property 'settings'"),
        ({"networkPolicy": {"dnsTo": None}}, "missing property 'dnsTo'"),
        (
            {"dataPlane": {"model": {"claim": {"create": True, "dataSourceRef": {"name": "a"}}}}},
            "missing property 'kind'",
        ),
        # What each value may be, and not both together.
        ({"redis": {"enabled": False}}, "There is no Redis for the prefix index"),
        ({"externalRedis": {"url": "redis://x"}}, "redis.enabled and externalRedis.url are both"),
        (
            {"redis": {"enabled": False}, "externalRedis": {"url": "redis://a:b@x"}},
            "externalRedis.url must not hold credentials",
        ),
        (
            {"redis": {"enabled": False}, "externalRedis": {"url": "redis://x", "caSecret": "y"}},
            "of use with a rediss:// URL only",
        ),
        (
            {"commonLabels": {"app.kubernetes.io/name": "mine"}},
            "commonLabels must not hold app.kubernetes.io/name",
        ),
        ({"monitoring": {"labels": {"helm.sh/chart": "x"}}}, "monitoring.labels must not hold"),
        ({"tls": {"certManager": {"duration": "720h"}}}, "shorter than it"),
        ({"tls": {"certManager": {"renewBefore": "4m59s"}}}, "at least five minutes"),
        ({"tls": {"certManager": {"duration": "87600h"}}}, "the chart's own authority"),
        ({"tls": {"enabled": True}}, "tls.enabled needs certificates"),
        (
            {"tls": {"enabled": True, "existingSecrets": SECRETS | {"client": ""}}},
            "set tls.existingSecrets.client",
        ),
        ({"tls": {"certManager": {"enabled": True}}}, "tls.enabled is off"),
        (
            {"tls": CASES["tls of secrets"]["tls"] | {"certManager": {"enabled": True}}},
            "certificates come from one of them",
        ),
        ({"dataPlane": {"nodes": 2}}, "tensorParallel is 1, which 2 nodes do not divide"),
        ({"dataPlane": {"nodes": 3, "tensorParallel": 8}}, "8, which 3 nodes do not divide"),
        ({"dataPlane": {"nodes": 0}}, "minimum: got 0, want 1"),
        ({"dataPlane": {"model": {"path": "a"}}}, "dataPlane.model.path is in no volume"),
        (hub({"revision": "main"}), "does not match pattern"),
        (hub({"repository": "a/b/c"}), "does not match pattern"),
        (hub({"endpoint": "https://user:secret@hub.example"}), "does not match pattern"),
        (hub({"revision": ""}), "revision is empty: pin a full commit of someone/llama"),
        (hub({"repository": ""}), "revision is of no repository"),
        (hub({}, claim={"create": True}), "nothing can be fetched into it"),
        (
            hub({}, claim={"create": True, "dataSourceRef": {"kind": "a", "name": "b"}}),
            "the claim is filled by one of them",
        ),
        (hub({}) | {"networkPolicy": {"hubTo": []}}, "no policy lets engines reach it"),
        (
            {"dataPlane": {"model": {"existingClaim": "a", "claim": {"create": True}}}},
            "the model is in one of them",
        ),
        *(
            (
                {"dataPlane": {"model": {"claim": {"create": True, "accessMode": mode}}}},
                "makes an empty volume",
            )
            for mode in ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce")
        ),
        (
            {"controlPlane": {"autoscaling": {"enabled": True, "maxReplicas": 1}}},
            "minReplicas is above maxReplicas",
        ),
        ({"dataPlane": {"settings": {"max_slots": 4096}}}, "max_step_tokens is below max_slots"),
        (
            {"dataPlane": {"settings": {"blocks": 100}, "gpu": {"enabled": False}}},
            "set dataPlane.kvMemoryMib, which is part of the memory request",
        ),
        (
            {"controlPlane": {"extraEnv": [{"name": "QUIRE_ENGINES", "value": "a:1"}]}},
            "controlPlane.extraEnv must not hold QUIRE_ENGINES",
        ),
        *(
            ({"dataPlane": {"extraEnv": [{"name": name, "value": "1"}]}}, f"must not hold {name}")
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        ),
        ({"dataPlane": {"extraEnv": [{"name": "a"}]}}, "'oneOf' failed"),
        ({"dataPlane": {"extraEnv": [{"name": "a b", "value": ""}]}}, "does not match pattern"),
        (
            {"controlPlane": {"service": {"externalTrafficPolicy": "Local"}}},
            "set type to NodePort or LoadBalancer",
        ),
        (
            {"controlPlane": {"service": {"type": "NodePort", "loadBalancerClass": "a"}}},
            "loadBalancerClass is of use with the type LoadBalancer only",
        ),
        (
            {"controlPlane": {"service": {"loadBalancerSourceRanges": ["192.0.2.0/24"]}}},
            "loadBalancerSourceRanges is of use with the type LoadBalancer only",
        ),
        (
            {"controlPlane": {"service": {"loadBalancerSourceRanges": ["192.0.2.1"]}}},
            "does not match pattern",
        ),
        *(
            (
                {"controlPlane": {"autoscaling": {"enabled": True}, "resources": resources}},
                "set controlPlane.resources.requests.cpu",
            )
            for resources in (
                {"requests": None},
                {"requests": {"cpu": None}},
                {"requests": {"cpu": "0m"}},
            )
        ),
        ({"access": {"anonymousRoles": []}}, "Nobody could call"),
        ({"access": {"anonymousRoles": ["read", "write"]}}, "Nobody could call"),
        ({"monitoring": {"monitors": True}}, "no policy admits Prometheus"),
        ({"monitoring": {"rules": True}}, "monitoring.rules needs monitoring.monitors"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm.HelmError) as refused:
        render(values)
    assert sentence in str(refused.value)


def test_the_schema_is_closed_and_has_every_value() -> None:
    root = json.loads((CHART / "values.schema.json").read_text())

    def check(part: Any, values: Any, path: str) -> None:
        while "$ref" in part:
            part = root["definitions"][part["$ref"].rpartition("/")[2]]
        if isinstance(values, dict) and "properties" in part:
            assert part["additionalProperties"] is False, path
            if not path.endswith(("settings", "claim.dataSourceRef", "affinity", "resources")):
                assert set(part["properties"]) - {"global"} == set(values), path
                # Null takes a default away; templates expect one but of users and groups.
                assert set(part["required"]) == set(values) - {"runAsUser", "fsGroup"}, path
            for key, value in values.items():
                check(part["properties"][key], value, f"{path}.{key}".lstrip("."))

    check(root, values_file("values.yaml"), "")
    for name, definition in root["definitions"].items():
        assert definition.get("additionalProperties") is not True, name


def test_what_is_generated_is_up_to_date() -> None:
    again = "run python -m helm.generate"
    assert (CHART / "README.md").read_text() == readme(), again
    assert (CHART / "values.schema.json").read_text() == schema(), again
    for name, settings in SETTINGS.items():
        assert OF_THE_CHART[name] <= settings.model_fields.keys()


# What the pods are told.


def test_the_control_plane_is_told_of_each_engine() -> None:
    rendered = case("tensor parallel")
    engines = rendered.get("StatefulSet", "quire-data-plane")["spec"]
    service = rendered.get("Service", engines["serviceName"])["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    assert rendered.settings("control-plane")["engines"].split(",") == [
        f"quire-data-plane-{number}.quire-data-plane.serving.svc.cluster.local:7411"
        for number in range(engines["replicas"])
    ]
    assert engines["replicas"] == 3


def test_an_engine_of_several_nodes_is_a_group_of_pods() -> None:
    rendered = case("several nodes")
    engines = rendered.get("LeaderWorkerSet", "quire-engine")
    group = engines["spec"]["leaderWorkerTemplate"]
    assert (engines["spec"]["replicas"], group["size"]) == (2, 2)
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert engines["metadata"]["annotations"] == {"a.example/b": "c"}
    assert rendered.settings("data-plane")["tensor_parallel"] == 16
    # Each group's first pod, by the name that it has in the Service that the set makes.
    assert rendered.settings("control-plane")["engines"].split(",") == [
        f"quire-engine-{number}.quire-engine.serving.svc.cluster.local:7411" for number in range(2)
    ]
    names = {each["metadata"]["name"] for each in rendered.all("Service", "StatefulSet")}
    assert not names & {"quire-data-plane", "quire-engine"}
    (first,), (worker,) = (
        group[kind]["spec"]["containers"] for kind in ("leaderTemplate", "workerTemplate")
    )
    # Nobody calls a worker, and the first pod notices when one ends or hangs.
    own = {"ports", "startupProbe", "readinessProbe", "livenessProbe"}
    assert {key: value for key, value in first.items() if key not in own} == worker
    assert first.keys() - worker.keys() == own
    # What the set tells its pods, as the program's own variables.
    environment = {each["name"]: each.get("value") for each in worker["env"]}
    place = Place.of(
        16,
        {
            name: str(value)
            .replace("$(LWS_WORKER_INDEX)", "1")
            .replace("$(LWS_GROUP_SIZE)", "2")
            .replace("$(LWS_LEADER_ADDRESS)", "quire-engine-0.quire-engine.serving")
            for name, value in environment.items()
        },
    )
    leader = "quire-engine-0.quire-engine.serving"
    assert place == Place(8, 16, 0, 8, leader, 7412, starts_others=True)
    for amounts in ("requests", "limits"):
        assert worker["resources"][amounts]["nvidia.com/gpu"] == 8
        assert worker["resources"][amounts]["memory"] == f"{8 * (8192 + 1000) + 1024}Mi"


def test_claims_of_groups_stay_when_workers_go_with_every_restart() -> None:
    engines = case("several nodes that fetch").get("LeaderWorkerSet", "quire-engine")
    group = engines["spec"]["leaderWorkerTemplate"]
    policy = {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert group["persistentVolumeClaimRetentionPolicy"] == policy
    alone = render(CASES["several nodes that fetch"], {"dataPlane": {"nodes": 1}})
    assert claim_templates(engines) == claim_templates(alone.get("StatefulSet", "quire-data-plane"))


@pytest.mark.parametrize("name", ["h200", "several nodes of everything"])
def test_certificates_cover_the_names_that_are_called(name: str) -> None:
    rendered = case(name)

    def names(component: str) -> list[str]:
        return list(rendered.get("Certificate", f"quire-{component}")["spec"]["dnsNames"])

    settings = rendered.settings("control-plane")
    for engine in settings["engines"].split(","):
        host = engine.rpartition(":")[0]
        assert any(fnmatch(host, name) for name in names("data-plane"))
        # A certificate's star stands for one label.
        assert any(host.count(".") == name.count(".") for name in names("data-plane"))
    (command,) = (
        container["command"]
        for component, pod in rendered.pods()
        if component == "test"
        for container in pod["spec"]["containers"]
    )
    (address,) = (word for word in command if word.startswith("--address="))
    assert address.removeprefix("--address=").rpartition(":")[0] in names("control-plane")
    for name in (rendered.settings("data-plane")["leader_names"], settings["peer_name"]):
        assert name in names("control-plane")
    assert not set(names("client")) & set(names("control-plane"))
    secrets = {each["spec"]["secretName"] for each in rendered.all("Certificate")}
    for component, pod in rendered.pods():
        for volume in pod["spec"]["volumes"]:
            if volume["name"] == "tls":
                assert volume["secret"]["secretName"] in secrets, component


def test_grace_periods_are_longer_than_drains() -> None:
    for name in ("defaults", "laptop"):
        for component in ("control-plane", "data-plane"):
            rendered = case(name)
            kind = "Deployment" if component == "control-plane" else "StatefulSet"
            pod = rendered.get(kind, f"quire-{component}")["spec"]["template"]["spec"]
            hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {})
            settings = rendered.settings(component)
            stop = ControlSettings if component == "control-plane" else DataSettings
            told = stop(**settings)
            drains = told.model_dump(include={"drain_seconds", "stop_grace_seconds"}).values()
            before = hook.get("sleep", {}).get("seconds", 0)
            assert before == {"defaults": 10, "laptop": 4}[name] * (component == "control-plane")
            if isinstance(told, ControlSettings):
                # Whoever is connected when endpoints are updated has connected anew by then.
                assert 1 <= told.connection_age_seconds <= before / 2
            assert pod["terminationGracePeriodSeconds"] >= before + sum(drains) + 8


def test_an_update_of_the_control_plane_takes_nothing_away_first() -> None:
    deployment = case("defaults").get("Deployment", "quire-control-plane")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "replicas" not in case("autoscaling").get("Deployment", "quire-control-plane")["spec"]


def test_rollouts_wait_for_engines() -> None:
    few = {"dataPlane": {"startupSeconds": 7, "replicas": 2}}
    for values, seconds in ((LAPTOP, 300), ({}, 3600), (few, 7)):
        rendered = render(values)
        engines = rendered.get("StatefulSet", "quire-data-plane")["spec"]
        probe = engines["template"]["spec"]["containers"][0]["startupProbe"]
        assert seconds <= probe["failureThreshold"] * probe["periodSeconds"] < seconds + 5
        control = rendered.get("Deployment", "quire-control-plane")["spec"]
        assert control["progressDeadlineSeconds"] == seconds + 600
        fetching = render(values, hub({"fetchSeconds": 100}))
        control = fetching.get("Deployment", "quire-control-plane")["spec"]
        assert control["progressDeadlineSeconds"] == seconds + 700
        assert engines.get("minReadySeconds", 0) == (30 if engines["replicas"] > 1 else 0)


def test_workloads_take_annotations_for_those_who_restart_them() -> None:
    rendered = case("placement")
    for kind, component in (("Deployment", "control-plane"), ("StatefulSet", "data-plane")):
        metadata = rendered.get(kind, f"quire-{component}")["metadata"]
        assert metadata["annotations"] == {"reloader.example/auto": "true"}


def test_replicas_tell_each_other_the_address_of_their_pod() -> None:
    rendered = case("defaults")
    pod = rendered.get("Deployment", "quire-control-plane")["spec"]["template"]["spec"]
    environment = {each["name"]: each for each in pod["containers"][0]["env"]}
    assert environment["QUIRE_ADVERTISE"]["value"] == "$(POD_IP):7401"
    assert environment["POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert rendered.settings("control-plane")["listen"] == "0.0.0.0:7401"
    # Only what stands before it is put in.
    assert list(environment).index("POD_IP") < list(environment).index("QUIRE_ADVERTISE")


def test_helm_test_shows_what_it_is_given() -> None:
    def pod(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        (found,) = (pod["spec"] for component, pod in case(name).pods() if component == "test")
        return found, {each["name"]: each for each in found["volumes"]}

    for name, secret, key in (
        ("access", "tester", "token"),
        ("callers without certificates", "tester", "bearer"),
    ):
        (token,) = pod(name)[0]["containers"][0]["env"]
        assert token["name"] == "QUIRE_TOKEN"
        assert token["valueFrom"] == {"secretKeyRef": {"name": secret, "key": key}}
    assert "env" not in pod("defaults")[0]["containers"][0]
    for name, flags in (
        ("tls of secrets", {"--tls-ca", "--tls-certificate", "--tls-key"}),
        ("callers without certificates", {"--tls-ca"}),
    ):
        spec, volumes = pod(name)
        (container,) = spec["containers"]
        files = {
            flag: path
            for flag, _, path in (word.partition("=") for word in container["command"])
            if flag.startswith("--tls")
        }
        assert files.keys() == flags
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "tls")
        mounted = {item["path"] for item in volumes["tls"]["secret"]["items"]}
        assert {f"{mount['mountPath']}/{path}" for path in mounted} == set(files.values())
    assert pod("tls of secrets")[1]["tls"]["secret"]["secretName"] == SECRETS["client"]
    # Nobody else's key.
    tls = pod("callers without certificates")[1]["tls"]["secret"]
    assert (tls["secretName"], [item["key"] for item in tls["items"]]) == ("a", ["ca.crt"])


def test_helm_test_is_left_out_where_it_could_not_generate() -> None:
    def tests(*values: Mapping[str, Any]) -> list[str]:
        rendered = render({"access": {"existingSecret": "callers", "anonymousRoles": []}}, *values)
        commanded = "\n  helm test " in rendered.notes
        assert commanded != ("There is no `helm test`" in rendered.notes)
        found = [component for component, _ in rendered.pods() if component == "test"]
        assert commanded == bool(found)
        return found

    assert not tests()
    assert not tests({"access": {"anonymousRoles": ["read"]}})
    for values in (
        {"access": {"testSecret": "tester"}},
        {"access": {"anonymousRoles": ["generate"]}},
        CASES["tls of secrets"],
        CASES["tls of cert-manager"],
    ):
        assert tests(values)
    without = CASES["callers without certificates"] | {"access": {"testSecret": ""}}
    assert not tests(without)


def test_redis_lets_hints_give_way_and_keeps_nothing_on_disk() -> None:
    lines = case("laptop").get("ConfigMap", "quire-redis")["data"]["redis.conf"].splitlines()
    said = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    assert said["maxmemory-policy"] == "volatile-lru"
    assert said["maxmemory"] == "32mb"
    assert (said["save"], said["appendonly"]) == ('""', "no")


def test_the_example_for_a_gpu_asks_for_its_nodes() -> None:
    pod = case("h200").get("StatefulSet", "quire-data-plane")["spec"]["template"]["spec"]
    # As NVIDIA's GPU feature discovery labels nodes.
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_memory_of_engines_counts_all_that_is_in_host_memory() -> None:
    def resources(name: str) -> dict[str, Any]:
        spec = case(name).get("StatefulSet", "quire-data-plane")["spec"]["template"]["spec"]
        return dict(spec["containers"][0]["resources"])

    assert resources("defaults")["requests"]["memory"] == f"{8192 + 1024}Mi"
    parallel = resources("tensor parallel")
    assert parallel["requests"]["memory"] == f"{8 * (8192 + 4096) + 1024}Mi"
    assert parallel["limits"]["nvidia.com/gpu"] == 8
    laptop = resources("laptop")
    assert laptop["requests"]["memory"] == f"{1280 + 64 + 32 + 64}Mi"
    assert "nvidia.com/gpu" not in laptop["limits"]


def environment(rendered: Rendered, component: str) -> dict[str, dict[str, Any]]:
    """A plane's variables, as its container has them; workers' are those of the first pod."""
    pod, *_ = (pod["spec"] for each, pod in rendered.pods() if each == component)
    variables = pod["containers"][0]["env"]
    assert len({each["name"] for each in variables}) == len(variables)
    return {each["name"]: each for each in variables}


@pytest.mark.parametrize(
    ("cpu", "ranks", "nodes", "threads"),
    [
        ("4", 1, 1, 4), ("4", 8, 1, 1), ("20", 8, 1, 2), ("96", 1, 1, 32), ("96", 4, 1, 24),
        ("96", 16, 2, 12), (12.5, 1, 1, 12), ("2500m", 1, 1, 2), ("100m", 1, 1, 1),
    ],
)  # fmt: skip
def test_ranks_share_the_cores_of_a_node_to_compile_with(
    cpu: str | float, ranks: int, nodes: int, threads: int
) -> None:
    rendered = render({"dataPlane": {"cpu": cpu, "tensorParallel": ranks, "nodes": nodes}})
    found = environment(rendered, "data-plane")["TORCHINDUCTOR_COMPILE_THREADS"]
    assert found["value"] == str(threads)


@pytest.mark.parametrize("plane", ["controlPlane", "dataPlane"])
def test_more_environment_leaves_the_charts_own_alone(plane: str) -> None:
    component = {"controlPlane": "control-plane", "dataPlane": "data-plane"}[plane]
    given = CASES["more environment"][plane]["extraEnv"]
    usual = environment(case("defaults"), component)
    more = environment(case("more environment"), component)
    assert more == usual | {each["name"]: each for each in given}
    own = {name for each in CASES if each != "more environment"
           for name in environment(case(each), component)}  # fmt: skip
    assert own >= usual.keys()
    for name in own:
        with pytest.raises(helm.HelmError, match=rf"{plane}.extraEnv must not hold {name}:"):
            render({plane: {"extraEnv": [{"name": name, "value": "x"}]}})


def test_the_model_is_mounted_for_reading_only() -> None:
    for name, claim in (("existing claim", "models"), ("made claim", "quire-model")):
        pod = case(name).get("StatefulSet", "quire-data-plane")["spec"]["template"]["spec"]
        (volume,) = (each for each in pod["volumes"] if each["name"] == "model")
        assert volume["persistentVolumeClaim"] == {"claimName": claim, "readOnly": True}
        (mount,) = (
            each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "model"
        )
        assert mount["readOnly"]
        model = Path(case(name).settings("data-plane")["model"])
        assert model.is_relative_to(mount["mountPath"])
    assert case("existing claim").settings("data-plane")["model"] == "/model/llama/8b"
    assert case("made claim").settings("data-plane")["model"] == "/model"
    assert "model" not in case("laptop").settings("data-plane")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("hub")])
def test_what_fetches_the_model_alone_writes_it_and_has_the_token(name: str) -> None:
    pod = case(name).get("StatefulSet", "quire-data-plane")["spec"]["template"]["spec"]
    (fetching,), (serving,) = pod["initContainers"], pod["containers"]
    settings = case(name).settings("data-plane")
    assert f"--into={settings['model']}" in fetching["command"]
    assert settings["served_model_name"] == ("llama" if "without" in name else "someone/llama")
    mounts = [
        next(mount for mount in container["volumeMounts"] if mount["name"] == "model")
        for container in (fetching, serving)
    ]
    assert [mount.get("readOnly", False) for mount in mounts] == [False, True]
    assert Path(settings["model"]).is_relative_to(mounts[0]["mountPath"])
    environments = [{each["name"] for each in each["env"]} for each in (fetching, serving)]
    assert ["HF_HUB_OFFLINE" in each for each in environments] == [False, True]
    assert ["HF_TOKEN" in each for each in environments] == [name == "hub", False]
    # It costs the cluster nothing beyond the engine: a pod's request is the larger of both.
    for amounts in ("requests", "limits"):
        own = fetching["resources"][amounts]
        assert own.items() <= serving["resources"][amounts].items()
        assert "nvidia.com/gpu" not in own
    assert fetching["image"] == serving["image"]


def test_a_model_is_fetched_into_a_volume_of_the_engine_or_a_shared_one() -> None:
    def volumes(name: str) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
        spec = case(name).get("StatefulSet", "quire-data-plane")["spec"]
        pod = spec["template"]["spec"]
        found = {volume["name"]: volume for volume in pod["volumes"]}
        claims = {each["metadata"]["name"]: each for each in spec.get("volumeClaimTemplates", ())}
        return found, pod["initContainers"][0]["command"], claims

    found, command, claims = volumes("hub")
    assert "--sole" in command and set(claims) == {"cache", "model"}
    assert claims["model"]["spec"]["storageClassName"] == "fast"
    assert claims["model"]["spec"]["resources"] == {"requests": {"storage": "200Gi"}}
    assert "storageClassName" not in claims["cache"]["spec"]
    found, command, claims = volumes("hub without claims")
    assert "--sole" in command and not claims
    assert found["model"]["emptyDir"] == {"sizeLimit": "200Gi"}
    # What others share is not theirs to remove from.
    for name, claim in (("hub into a claim", "models"), ("hub into a made claim", "quire-model")):
        found, command, claims = volumes(name)
        assert "--sole" not in command and not claims
        assert found["model"]["persistentVolumeClaim"] == {"claimName": claim}
    # Nobody may change a claim's template, so that another revision must not.
    before = case("hub").get("StatefulSet", "quire-data-plane")["spec"]
    later = render(CASES["hub"], hub({"revision": "b" * 40}), {"commonLabels": {"a": "b"}})
    after = later.get("StatefulSet", "quire-data-plane")["spec"]
    assert after["volumeClaimTemplates"] == before["volumeClaimTemplates"]
    assert after["template"] != before["template"]


def test_a_made_claim_binds_to_a_volume_without_a_class() -> None:
    def claim(values: dict[str, Any]) -> dict[str, Any]:
        made = {"dataPlane": {"model": {"claim": {"create": True} | values}}}
        return dict(render(made).get("PersistentVolumeClaim", "quire-model")["spec"])

    assert claim({"volumeName": "models"})["storageClassName"] == ""
    assert claim({"volumeName": "models", "storageClassName": "nfs"})["storageClassName"] == "nfs"
    source = {"dataSourceRef": {"kind": "PersistentVolumeClaim", "name": "models"}}
    assert "storageClassName" not in claim(source)


def test_caches_may_outlive_pods() -> None:
    engines = case("claims for caches").get("StatefulSet", "quire-data-plane")["spec"]
    (claim,) = engines["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"] == {"requests": {"storage": "10Gi"}}
    assert engines["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Delete",
        "whenScaled": "Delete",
    }
    # Nobody may change it, so nothing in it follows values that have nothing to do with it.
    other = render(CASES["claims for caches"], {"commonLabels": {"team": "serving"}})
    after = other.get("StatefulSet", "quire-data-plane")["spec"]
    assert after["volumeClaimTemplates"] == [claim]
    assert "helm.sh/chart" not in claim["metadata"]["labels"]


def test_pods_change_with_their_settings_and_not_with_the_charts_version() -> None:
    def templates(rendered: Rendered) -> list[Manifest]:
        return [each["spec"]["template"] for each in rendered.all("Deployment", "StatefulSet")]

    password = {"redis": {"password": "a-password-of-its-own"}}
    before = templates(render(password))
    assert "helm.sh/chart" not in json.dumps(before)
    for values, changed in (
        ({"controlPlane": {"settings": {"chunk_tokens": 64}}}, [True, False, False]),
        ({"prefixes": {"a": {"text": "b"}}}, [True, False, False]),
        ({"dataPlane": {"settings": {"max_slots": 64}}}, [False, True, False]),
        ({"redis": {"maxMemoryMib": 64}}, [False, False, True]),
        ({"redis": {"password": "another-password-1"}}, [True, False, True]),
    ):
        after = templates(render(password, values))
        assert [a != b for a, b in zip(before, after, strict=True)] == changed, values


def test_redis_knows_the_password_by_its_digest_alone() -> None:
    def secret() -> dict[str, str]:
        return dict(render().get("Secret", "quire-redis")["stringData"])

    one, other = secret(), secret()
    assert one["password"] != other["password"] and len(one["password"]) == 32
    assert hashlib.sha256(one["password"].encode()).hexdigest() in one["users.acl"]
    assert one["password"] not in one["users.acl"]
    assert f"~{NAMESPACE}.{NAME}:*" in one["users.acl"]
    page = (ROOT / "docs/operations.md").read_text()
    (needed,) = re.findall(r"^ACL SETUSER quire on >PASSWORD ~quire:\* (.*)$", page, re.M)
    granted = set(re.findall(r"\+\S+", one["users.acl"].splitlines()[1]))
    assert granted - set(needed.split()) == {"+@connection", "+client|setinfo", "+client|setname"}
    assert set(needed.split()) <= granted
    assert case("defaults").settings("control-plane")["index_namespace"] == f"{NAMESPACE}.{NAME}"


def installed(
    values: Mapping[str, Any],
    secrets: Mapping[str, dict[str, str]] | None = None,
    replicas: Mapping[str, int] | None = None,
) -> Rendered:
    """What Helm would apply to a cluster that has these of the release."""
    with (
        api_server(secrets or {}, NAMESPACE, NAME, replicas or {}) as kubeconfig,
        helm.Config(
            kubeconfig_content=kubeconfig, namespace=NAMESPACE, storage_driver="memory"
        ) as config,
    ):
        release = config.install(chart(), NAME, dict(values), dry_run="server", namespace=NAMESPACE)
    objects = [each for each in yaml.safe_load_all(release["manifest"]) if each]
    return Rendered(objects, "")


def test_autoscaling_is_turned_on_without_taking_replicas_away() -> None:
    def replicas(values: Mapping[str, Any], before: dict[str, int]) -> int | None:
        deployment = installed(values, replicas=before).get("Deployment", "quire-control-plane")
        return deployment["spec"].get("replicas")

    scaled = CASES["autoscaling"]
    assert replicas(scaled, {"quire-control-plane": 5}) == 5
    # Nothing runs yet, and it is the autoscaler's to say how much shall.
    assert replicas(scaled, {}) is None
    assert replicas({}, {"quire-control-plane": 5}) == 2


def test_redis_password_is_kept_over_upgrades() -> None:
    def secret(known: dict[str, dict[str, str]]) -> dict[str, str]:
        return dict(installed({}, secrets=known).get("Secret", "quire-redis")["stringData"])

    first = secret({})
    again = secret({"quire-redis": {"password": first["password"]}})
    assert again == first and len(first["password"]) == 32


def test_an_external_redis_gets_its_credentials_from_the_secret() -> None:
    rendered = case("external redis")
    pod = rendered.get("Deployment", "quire-control-plane")["spec"]["template"]["spec"]
    references = {
        each["name"]: each["valueFrom"]["secretKeyRef"]
        for each in pod["containers"][0]["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }
    assert references == {
        "QUIRE_REDIS_USERNAME": {"name": "redis-user", "key": "username"},
        "QUIRE_REDIS_PASSWORD": {"name": "redis-user", "key": "password"},
    }
    assert rendered.settings("control-plane")["redis_ca"] == "/etc/quire/redis/ca.crt"
    assert not [each for each in rendered.objects if each["metadata"]["name"] == "quire-redis"]
    assert "~serving.quire:*" in rendered.notes


def test_probes_ask_the_plain_text_health_ports() -> None:
    for name in ("defaults", "h200"):
        for component, pod in case(name).pods():
            (container,) = pod["spec"]["containers"]
            probes = [value for key, value in container.items() if key.endswith("Probe")]
            assert len(probes) == {"test": 0, "redis": 2}.get(component, 3)
            port = {"control-plane": 7403, "data-plane": 7413}.get(component)
            if port:
                assert {probe["grpc"]["port"] for probe in probes} == {port}
                (of_settings,) = (
                    value
                    for key, value in case(name).settings(component).items()
                    if key == "health_listen"
                )
                assert of_settings == f"0.0.0.0:{port}"


# What pods may do.


@every_case
def test_pods_satisfy_the_restricted_standard(name: str) -> None:
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    pods = list(case(name).pods())
    assert len(pods) >= 3
    for component, manifest in pods:
        pod = manifest["spec"]
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
        assert pod["automountServiceAccountToken"] is False, component
        assert pod["enableServiceLinks"] is False
        for volume in pod["volumes"]:
            assert volume.keys() - {"name"} <= allowed
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"].get("runAsUser", 1) != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"] == {
                "runAsNonRoot": True,
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            assert not any("hostPort" in port for port in container.get("ports", ()))
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]


def test_pods_run_as_the_values_say() -> None:
    rendered = render({"securityContext": {"runAsUser": 4321, "fsGroup": 8765}})
    for component, pod in rendered.pods():
        context = pod["spec"]["securityContext"]
        users = (context["runAsUser"], context["runAsGroup"], context["fsGroup"])
        assert users == ((999,) * 3 if component == "redis" else (4321, 4321, 8765))
    for _, pod in case("platform's users").pods():
        assert not pod["spec"]["securityContext"].keys() & {"runAsUser", "runAsGroup", "fsGroup"}


# Asks libraries where they would write and how they would compile.
ASKED = """
import getpass, json, os, tempfile
import huggingface_hub.constants, torch.hub, triton.knobs
from torch._inductor import config
from torch._inductor.runtime.runtime_utils import cache_dir
from transformers.utils import hub
places = {
    "home": os.path.expanduser("~"),
    "temporary": tempfile.gettempdir(),
    "inductor": cache_dir(),
    "triton": triton.knobs.cache.dir,
    "torch.hub": torch.hub.get_dir(),
    "huggingface_hub": huggingface_hub.constants.HF_HUB_CACHE,
    "transformers": hub.HF_MODULES_CACHE,
    "cuda": os.environ["CUDA_CACHE_PATH"],
}
print(json.dumps([places, config.compile_threads, getpass.getuser(), hub.is_offline_mode()]))
"""


def test_what_libraries_write_goes_into_volumes(tmp_path: Path) -> None:
    rendered = render({"dataPlane": {"cpu": "7"}})
    pod = rendered.get("StatefulSet", "quire-data-plane")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    writable = {
        mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
    }
    assert writable == {"/tmp", "/cache", "/dev/shm"}
    variables = {
        name: each["value"].replace("/cache", str(tmp_path))
        for name, each in environment(rendered, "data-plane").items()
        if "value" in each
    }
    command = [sys.executable, "-c", ASKED]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    places, threads, user, offline = json.loads(done.stdout)
    # What is compiled is worth a claim.
    elsewhere = {name for name, place in places.items() if not place.startswith(str(tmp_path))}
    assert elsewhere == {"temporary"} and places["temporary"] == "/tmp"
    assert (threads, user, offline) == (7, "quire", True)
    (shared,) = (each for each in pod["volumes"] if each["name"] == "shared-memory")
    assert shared["emptyDir"]["medium"] == "Memory"


# Who may reach whom.


def test_who_may_reach_whom_is_as_documented() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    documented = {
        (source, target, (int(port), protocol))
        for source, target, ports in re.findall(
            r"^\| ([^|]+?) \| ([^|]+?) \| (\d[^|]*) \| [^|]+ \|$",
            section(text, "## Who may reach whom"),
            re.M,
        )
        for port in re.findall(r"\d+", ports)
        for protocol in re.findall("UDP|TCP", ports) or ["TCP"]
    }
    policies = {
        "networkPolicy": {
            "operatorsFrom": PEERS["operators"],
            "metricsFrom": PEERS["monitoring"],
        }
    }
    assert reachable(render(policies)) == documented


EVERYWHERE = [{"ipBlock": {"cidr": "0.0.0.0/0"}}]
PRIVATE = ["10.0.0.0/8", "169.254.0.0/16"]


@pytest.mark.parametrize(
    ("policy", "kind", "rule", "source", "target", "port"),
    [
        ("data-plane", "ingress", {"from": EVERYWHERE, "ports": [{"port": 7411}]},
         "anyone", "data plane", 7411),
        ("control-plane", "egress", {"to": EVERYWHERE, "ports": [{"port": 443}]},
         "control plane", "the Internet", 443),
        ("control-plane", "egress", {"ports": [{"port": 80, "endPort": 443}]},
         "control plane", "anyone", 443),
        ("control-plane", "egress",
         {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": PRIVATE}}]},
         "control plane", "the Internet", 22),
        ("redis", "ingress", {"from": [{"namespaceSelector": {}}], "ports": [{"port": 2222}]},
         "anyone", "Redis", 2222),
        ("redis", "ingress", {"from": [{"ipBlock": {"cidr": "192.168.7.0/24"}}]},
         "{'ipBlock': {'cidr': '192.168.7.0/24'}}", "Redis", 6379),
        ("redis", "ingress", {"from": [{"podSelector": {"matchLabels": {"app": "backup"}}}]},
         "{'podSelector': {'matchLabels': {'app': 'backup'}}}", "Redis", 6379),
    ],
)  # fmt: skip
def test_no_rule_more_would_go_unnoticed(
    policy: str, kind: str, rule: dict[str, Any], source: str, target: str, port: int
) -> None:
    rendered = deepcopy(case("defaults"))
    before = reachable(rendered)
    found = rendered.get("NetworkPolicy", f"quire-{policy}")["spec"]
    found[kind] = [*found.get(kind, ()), rule]
    assert (source, target, (port, "TCP")) in reachable(rendered) - before


def test_dns_may_be_where_the_documentation_says_it_can_be() -> None:
    def asked(values: dict[str, Any]) -> set[tuple[str, int]]:
        """Whom the control plane may ask for names, at which ports."""
        reached = reachable(render(values))
        assert not [each for each in reached if each[0] == "data plane"]
        return {
            (target, port)
            for source, target, (port, _) in reached
            if source == "control plane" and port in (53, 5353)
        }

    page = section((ROOT / "docs/kubernetes.md").read_text(), "## Who may reach whom")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    documented = asked(yaml.safe_load(example))
    assert {"DNS", "{'ipBlock': {'cidr': '10.96.0.10/32'}}"} == {each for each, _ in documented}
    anywhere = asked({"networkPolicy": {"dnsTo": []}})
    assert {("the Internet", 53), ("anyone", 53), ("a node's DNS cache", 53)} <= anywhere


def test_by_default_nobody_operates_and_an_engine_calls_nobody() -> None:
    reached = reachable(case("defaults"))
    assert not [each for each in reached if each[2][0] in (9090, 9091)]
    # Replicas ask each other.
    assert {source for source, _, (port, _) in reached if port == 7402} == {"control plane"}
    assert not [each for each in reached if each[0] in ("data plane", "Redis")]
    assert {source for source, _, (port, _) in reached if port == 7411} == {"control plane"}
    assert {source for source, _, (port, _) in reached if port == 6379} == {"control plane"}
    assert not case("no policies").all("NetworkPolicy")


def test_engines_that_fetch_reach_the_hub_and_names_alone() -> None:
    def egress(name: str) -> list[dict[str, Any]]:
        policy = case(name).get("NetworkPolicy", "quire-data-plane")["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        return list(policy.get("egress", ()))

    assert egress("existing claim") == []
    for name, port in (("hub", 443), ("hub into a claim", 443), ("hub without claims", 8080)):
        names, hub = egress(name)
        assert {each["port"] for each in names["ports"]} == {53, 5353}
        assert hub["ports"] == [{"port": port}]
        # The Internet, and nobody in the cluster or beside it.
        blocks = [peer["ipBlock"] for peer in hub["to"]]
        assert [block["cidr"] for block in blocks] == ["0.0.0.0/0", "2000::/3"]
        private = [ip_network(inside) for inside in blocks[0]["except"]]
        for address in ("10.0.0.1", "172.31.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"):
            assert any(ip_address(address) in inside for inside in private)


def test_ranks_on_several_nodes_reach_each_other_and_names_alone() -> None:
    def of_engines(name: str) -> set[tuple[str, str, Port]]:
        return {each for each in reachable(case(name)) if each[0] == "data plane"}

    assert not of_engines("tensor parallel")
    names = {
        ("data plane", target, port)
        for target in ("DNS", "a node's DNS cache")
        for port in PORTS
        if port[0] in (53, 5353)
    }
    assert of_engines("several nodes") == names | {
        ("data plane", "data plane", port) for port in PORTS if port != (7413, "TCP")
    }


def test_health_can_be_kept_from_others_too() -> None:
    reached = reachable(case("all policies"))
    (peer,) = CASES["all policies"]["networkPolicy"]["healthFrom"]
    assert {source for source, _, (port, _) in reached if port in (7403, 7413)} == {str(peer)}


def test_an_external_redis_is_reached_at_its_port() -> None:
    policy = case("external redis").get("NetworkPolicy", "quire-control-plane")
    ports = [rule["ports"][0]["port"] for rule in policy["spec"]["egress"]]
    assert ports == [53, 7401, 7411, 6380]


def test_traces_reach_their_collector_and_nothing_else() -> None:
    policy = case("traces").get("NetworkPolicy", "quire-control-plane")
    *_, rule = policy["spec"]["egress"]
    assert rule == {"ports": [{"port": 4317}], "to": PEERS["monitoring"]}
    assert case("traces").settings("control-plane")["traces_endpoint"].startswith("https://")
    without = case("defaults").get("NetworkPolicy", "quire-control-plane")["spec"]["egress"]
    assert len(without) == len(policy["spec"]["egress"]) - 1


# What the documentation tells to type.


def test_the_laptops_commands_fit_together() -> None:
    page = section((ROOT / "docs/kubernetes.md").read_text(), "## Install")
    text = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)[0]
    lines = [shlex.split(line) for line in text.splitlines()]
    built = {}
    for line in lines:
        if line[:2] == ["docker", "build"]:
            assert line[-1] == "."
            given = dict(zip(line[2:-1:2], line[3:-1:2], strict=True))
            file = (ROOT / given["--file"]).read_text()
            built[given["--tag"]] = given["--file"]
            if "--build-arg" in given:
                assert f"\nARG {given['--build-arg'].partition('=')[0]}=" in file
    (loaded,) = (line[3:] for line in lines if line[:3] == ["kind", "load", "docker-image"])
    (installed,) = (line for line in lines if line[:2] == ["helm", "install"])
    name, folder = installed[2:4]
    assert ROOT / folder == CHART
    values = yaml.safe_load((ROOT / installed[installed.index("--values") + 1]).read_text())
    namespace = installed[installed.index("--namespace") + 1]
    rendered = render(values, name=name, namespace=namespace)
    images = {
        component: container["image"]
        for component, pod in rendered.pods()
        for container in pod["spec"]["containers"]
        if component.endswith("plane")
    }
    assert built == {image: f"Containerfile.{component}" for component, image in images.items()}
    assert set(loaded) == set(built)
    for line in lines:
        if line[0] in ("kubectl", "helm"):
            assert line[line.index("--namespace") + 1] == namespace
        if "status" in line:
            kind, _, workload = line[line.index("status") + 1].partition("/")
            assert rendered.get(kind.capitalize(), workload)


# What is watched.


def labels_of(registry: CollectorRegistry, target: dict[str, set[str] | None]) -> dict[str, Labels]:
    """Each series's labels with the values that they have in a scrape, and those of its target."""
    found: dict[str, dict[str, set[str] | None]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, dict(target))
            for name, value in sample.labels.items():
                labels[name] = {value} | (labels.get(name) or set())
    return dict(found)


@pytest.fixture(scope="module")
def series(llama: Model) -> dict[str, Labels]:
    """What both planes serve after a request and a refused one, with labels of their targets."""

    async def scrape() -> dict[str, Labels]:
        engine = Engine(llama, EngineSizes(16, 64, 8, 8, 256, 512))
        async with (
            serving_engine(engine, None) as (service, worker, port),
            running_replica([port]) as replica,
        ):
            await led(replica)
            stack = Stack(engine, worker, replica)
            await stack.generate(request([5, 6, 7], 2))
            await failure(stack.generate(request([], 1)))
            await stack.channel.close()
            await stack.admin_channel.close()
            pod: dict[str, set[str] | None] = {"namespace": {NAMESPACE}, "pod": None}
            control = pod | {"service": {"quire-control-plane-headless"}}
            # There on a GPU only, without labels of its own.
            device = {"quire_engine_device_memory_bytes": pod}
            engines = labels_of(registry_of(engine, service), pod)
            return device | engines | labels_of(replica.metrics.registry, control)

    return asyncio.run(scrape())


def dashboard_of(rendered: Rendered) -> tuple[str, dict[str, Any]]:
    """The dashboard's file: its name, and what it says."""
    (data,) = (
        each["data"]
        for each in rendered.all("ConfigMap")
        if "grafana_dashboard" in each["metadata"]["labels"]
    )
    ((name, text),) = data.items()
    return name, json.loads(text)


def test_dashboards_of_releases_do_not_replace_each_other() -> None:
    places = (("quire", "a"), ("quire", "b"), ("quire-2", "a"))
    found = [
        dashboard_of(render(MONITORED, name=name, namespace=namespace))
        for name, namespace in places
    ]
    assert len({name for name, _ in found}) == len(places)
    for key in ("uid", "title"):
        assert len({dashboard[key] for _, dashboard in found}) == len(places)
    assert found[0][1]["title"] == "Quire: a/quire"
    # Grafana takes no longer one.
    assert all(re.fullmatch("[a-z0-9-]{1,40}", dashboard["uid"]) for _, dashboard in found)


# What Grafana puts in before it asks.
VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$namespace": NAMESPACE,
    "$service": "quire-control-plane-headless",
}


def asked(query: str) -> str:
    """A query as Grafana asks it."""
    return re.sub(r"\$\w+", lambda found: VARIABLES[found[0]], query)


def alerts() -> list[dict[str, Any]]:
    rule = case("monitoring").get("PrometheusRule", "quire-control-plane")
    return list(rule["spec"]["groups"][0]["rules"])


def test_alerts_and_dashboard_use_metrics_and_labels_that_there_are(
    series: dict[str, Labels],
) -> None:
    _, dashboard = dashboard_of(case("monitoring"))
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [asked(target["expr"]) for target in targets]
    for expression in [rule["expr"] for rule in alerts()] + queries:
        assert "quire_" in expression
        check_labels(expression, series)
        # What begins anew with a process is only good for its rate, and nothing else has one.
        counted = re.findall(r"(?:rate|increase|resets)\((quire_\w+)", expression)
        assert all(re.search("_(total|bucket|sum|count)$", name) for name in counted), expression
    for target, query in zip(targets, queries, strict=True):
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped(query)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 8
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables.keys() == {"datasource", "namespace", "service"}
    for name in ("namespace", "service"):
        query = asked(variables[name]["definition"])
        assert asked(variables[name]["query"]["query"]) == query
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert found
        check_labels(f"count by ({found[2]}) ({found[1]})", series)


def test_alerts_say_what_they_are_about_and_fire_where_nothing_is_led() -> None:
    found = {rule["alert"]: rule for rule in alerts()}
    assert list(found) == [
        "QuireNoEngineLed",
        "QuireEngineNotLed",
        "QuireIndexDown",
        "QuirePreemptionsHigh",
        "QuireQueueLong",
        "QuireEngineFlapping",
    ]
    for rule in found.values():
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s")) and rule["annotations"]["summary"]
        told = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert told <= grouped(rule["expr"])
        # Of other releases they know nothing.
        for label in (f'namespace="{NAMESPACE}"', 'service="quire-control-plane-headless"'):
            assert rule["expr"].count(label) == rule["expr"].count("{")
    # A count of nothing is nothing, and not less than one.
    silent = {name for name, rule in found.items() if is_of_nothing(promql.parse(rule["expr"]))}
    assert set(found) - silent == {"QuireNoEngineLed", "QuireEngineNotLed"}


def test_monitors_find_ports_that_there_are() -> None:
    rendered = case("monitoring")
    services = rendered.get("ServiceMonitor", "quire-control-plane")["spec"]
    port = services["endpoints"][0]["port"]
    found = [
        each["metadata"]["name"]
        for each in rendered.all("Service")
        if selects(services["selector"], each["metadata"]["labels"])
        and port in [named["name"] for named in each["spec"]["ports"]]
    ]
    # One of them, or each replica would be scraped twice.
    assert found == ["quire-control-plane-headless"]
    pods = rendered.get("PodMonitor", "quire-data-plane")["spec"]
    engines = rendered.get("StatefulSet", "quire-data-plane")["spec"]["template"]
    assert selects(pods["selector"], engines["metadata"]["labels"])
    containers = {component: pod["spec"]["containers"][0] for component, pod in rendered.pods()}
    for component, (endpoint,) in (
        ("control-plane", services["endpoints"]),
        ("data-plane", pods["podMetricsEndpoints"]),
    ):
        # What Prometheus takes where nothing is said.
        assert endpoint.get("path", "/metrics") == "/metrics"
        assert endpoint.get("scheme", "http") == "http"
        ports = {each["name"]: each["containerPort"] for each in containers[component]["ports"]}
        assert ports[endpoint["port"]] == rendered.settings(component)["metrics_port"]
    for monitor in (services, pods):
        assert monitor["namespaceSelector"] == {"matchNames": [NAMESPACE]}


def test_a_load_balancer_gets_what_is_set_and_nothing_else() -> None:
    def service(values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(render(values).get("Service", "quire-control-plane")["spec"])

    given = CASES["load balancer for some"]["controlPlane"]["service"]
    assert given.items() <= service(CASES["load balancer for some"]).items()
    usual = service(CASES["load balancer"]).keys()
    assert usual == {"type", "selector", "ports"} == service({}).keys()
    ports = {"controlPlane": {"service": {"type": "NodePort", "externalTrafficPolicy": "Local"}}}
    assert service(ports)["externalTrafficPolicy"] == "Local"


def test_services_lead_to_ports_that_containers_have() -> None:
    rendered = case("defaults")
    for service in rendered.all("Service"):
        (pod,) = (
            pod
            for _, pod in rendered.pods()
            if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        )
        ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
