"""Whom a chart's network policies let through, as a cluster's network would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from tests.chart import NAMESPACE, Rendered

Port = tuple[int, str]
# Those that something listens at, and one at which nothing does.
PORTS: list[Port] = [
    *itertools.product((53, 5353), ("UDP", "TCP")),
    *((port, "TCP") for port in (22, 6379, 7401, 7402, 7403, 7411, 7413, 9090, 9091)),
]
POD_NAMES = {
    "control-plane": "control plane",
    "data-plane": "data plane",
    "redis": "Redis",
    "test": "`helm test`",
}


@dataclass(frozen=True)
class Actor:
    """Who may be at an end of a connection: a pod, or by its address alone a host.

    Attributes:
        namespace: labels of a pod's; None for a host.
        labels: a pod's.
        address: where the other end sees it, and a policy's ipBlock, too.
    """

    namespace: Mapping[str, str] | None
    labels: Mapping[str, str]
    address: str


def _labels(namespace: str) -> dict[str, str]:
    """What Kubernetes puts on a namespace."""
    return {"kubernetes.io/metadata.name": namespace}


# Those outside of the release.
OUTSIDERS = {
    "anyone": Actor(_labels("elsewhere"), {}, "10.244.9.1"),
    "the Internet": Actor(None, {}, "203.0.113.9"),
    "`clientsFrom`": Actor(_labels(NAMESPACE), {"app": "client"}, "10.244.9.2"),
    "`operatorsFrom`": Actor(_labels("operators"), {}, "10.244.9.3"),
    "`metricsFrom`": Actor(_labels("monitoring"), {}, "10.244.9.4"),
    "DNS": Actor(_labels("kube-system"), {"k8s-app": "kube-dns"}, "10.244.9.5"),
    "a node's DNS cache": Actor(None, {}, "169.254.20.10"),
}


def selects(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def _is(peer: dict[str, Any], actor: Actor) -> bool:
    """Whether a policy means this actor by a peer."""
    if "ipBlock" in peer:
        address, block = ip_address(actor.address), peer["ipBlock"]
        out = (ip_network(cidr) for cidr in block.get("except", ()))
        return address in ip_network(block["cidr"]) and not any(address in each for each in out)
    if actor.namespace is None:
        return False
    # Pods without a namespace's selector are those of the policy's own.
    where = peer.get("namespaceSelector", {"matchLabels": _labels(NAMESPACE)})
    return selects(where, actor.namespace) and selects(peer.get("podSelector", {}), actor.labels)


def _has(rule: dict[str, Any], port: Port) -> bool:
    """Whether a rule is about a port; one that names none is about all."""
    number, protocol = port
    return not rule.get("ports") or any(
        each["port"] <= number <= each.get("endPort", each["port"])
        and protocol == each.get("protocol", "TCP")
        for each in rule["ports"]
    )


def _rules(policies: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rules, each with the key of its peers."""
    for policy in policies:
        for kind, side in (("ingress", "from"), ("egress", "to")):
            for rule in policy.get(kind, ()):
                yield side, rule


def _ports(policies: list[dict[str, Any]]) -> set[Port]:
    """Those to try: the known ones, and whatever a rule names."""
    named = (
        (each[end], each.get("protocol", "TCP"))
        for _, rule in _rules(policies)
        for each in rule.get("ports", ())
        for end in ("port", "endPort")
        if end in each
    )
    return {*PORTS, *named}


def _strangers(policies: list[dict[str, Any]], known: Mapping[str, Actor]) -> dict[str, Actor]:
    """One for each peer that is nobody we know, by what the policy says of it."""
    found = {}
    for side, rule in _rules(policies):
        for peer in rule.get(side, ()):
            if not any(_is(peer, actor) for actor in known.values()):
                network = ip_network(peer.get("ipBlock", {}).get("cidr", "10.244.9.6"))
                where = peer.get("namespaceSelector", {}).get("matchLabels", _labels(NAMESPACE))
                stranger = Actor(
                    None if "ipBlock" in peer else where,
                    peer.get("podSelector", {}).get("matchLabels", {}),
                    str(network[0]),
                )
                assert _is(peer, stranger)
                found[str(peer)] = stranger
    return found


def reachable(rendered: Rendered) -> set[tuple[str, str, Port]]:
    """All (source, target, port) that the policies let through.

    Sources and targets are the release's pods, OUTSIDERS and, by its text, each peer of a rule
    that is none of these. What anyone may is not said again of others.
    """
    policies = [each["spec"] for each in rendered.all("NetworkPolicy")]
    actors = OUTSIDERS | {
        POD_NAMES[component]: Actor(
            _labels(NAMESPACE), pod["metadata"]["labels"], f"10.244.1.{number}"
        )
        for number, (component, pod) in enumerate(rendered.pods())
    }
    actors |= _strangers(policies, actors)

    def allowed(one: str, other: str, port: Port, side: str, kind: str) -> bool:
        """Whether policies for `one` let it talk with `other`."""
        own = [
            policy
            for policy in policies
            if kind in policy["policyTypes"]
            and actors[one].namespace == _labels(NAMESPACE)
            and selects(policy["podSelector"], actors[one].labels)
        ]
        return not own or any(
            _has(rule, port)
            and (not rule.get(side) or any(_is(peer, actors[other]) for peer in rule[side]))
            for policy in own
            for rule in policy.get(kind.lower(), ())
        )

    found = {
        (source, target, port)
        for source, target, port in itertools.product(actors, actors, _ports(policies))
        if {source, target} & set(POD_NAMES.values())
        and allowed(target, source, port, "from", "Ingress")
        and allowed(source, target, port, "to", "Egress")
    }
    return {
        (source, target, port)
        for source, target, port in found
        if source == "anyone" or ("anyone", target, port) not in found
    }
