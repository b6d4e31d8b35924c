"""Who reaches whom: NetworkPolicies are evaluated as Kubernetes defines them, and the Ingress's paths."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from manifests import OVERLAYS, Manifest, changed, clusters, only, render

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
OURS = {"kubernetes.io/metadata.name": "objdrive"}
Labels = dict[str, str]


@dataclass(frozen=True)
class Peer:
    """A pod, or an address outside of the cluster."""

    labels: Labels = field(default_factory=dict)
    namespace: Labels = field(default_factory=lambda: OURS)
    address: str = ""


def selects(selector: dict[str, Any], labels: Labels) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in expressions), "only In is evaluated here"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in expressions
    )


def matches(rule: dict[str, Any], peer: Peer) -> bool:
    if "ipBlock" in rule:
        block = rule["ipBlock"]
        if not peer.address or ipaddress.ip_address(peer.address) not in ipaddress.ip_network(block["cidr"]):
            return False
        inside = (ipaddress.ip_network(one) for one in block.get("except", []))
        return not any(ipaddress.ip_address(peer.address) in one for one in inside)
    if peer.address:
        return False
    if "namespaceSelector" not in rule and peer.namespace != OURS:
        return False
    return selects(rule.get("namespaceSelector", {}), peer.namespace) and selects(
        rule.get("podSelector", {}), peer.labels
    )


def one_way(policies: list[Manifest], way: str, pod: Peer, other: Peer, port: int) -> bool:
    """Whether a pod may talk to the other (Egress), or be talked to by it (Ingress)."""
    if pod.address or pod.namespace != OURS:
        return True
    mine = [
        one["spec"]
        for one in policies
        if way in one["spec"]["policyTypes"] and selects(one["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for policy in mine for rule in policy.get(way.lower(), [])]
    return not mine or any(
        (not peers or any(matches(one, other) for one in peers)) and (not ports or port in ports)
        for rule in rules
        for peers in [rule.get("to" if way == "Egress" else "from", [])]
        for ports in [[one["port"] for one in rule.get("ports", [])]]
    )


def reaches(policies: list[Manifest], source: Peer, target: Peer, port: int) -> bool:
    return one_way(policies, "Egress", source, target, port) and one_way(policies, "Ingress", target, source, port)


def policies(overlay: str) -> list[Manifest]:
    return [one for one in render(overlay) if one["kind"] == "NetworkPolicy"]


def pods(overlay: str) -> dict[str, Peer]:
    """Pods with the labels that the templates and KubeRay give them."""
    found = {}
    for manifest in render(overlay):
        if manifest["kind"] in ("RayJob", "RayService"):
            [cluster] = clusters(manifest)
            kind = "batch" if manifest["kind"] == "RayJob" else "service"
            groups = {"head": cluster["headGroupSpec"]} | {one["groupName"]: one for one in cluster["workerGroupSpecs"]}
            for name, group in groups.items():
                node = "head" if name == "head" else "worker"
                labels = group["template"]["metadata"]["labels"] | {"ray.io/node-type": node, "ray.io/group": name}
                found[f"{kind} {name}"] = Peer(labels)
    found["redis"] = Peer(only(render(overlay), "StatefulSet")["spec"]["template"]["metadata"]["labels"])
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    found["operator"] = Peer(operator, {"kubernetes.io/metadata.name": "kuberay-system"})
    found["ingress"] = Peer(namespace={"kubernetes.io/metadata.name": "traefik", "objdrive/ingress": "yes"})
    found["prometheus"] = Peer(namespace={"kubernetes.io/metadata.name": "watch", "objdrive/monitoring": "yes"})
    found["stranger"] = Peer(namespace={"kubernetes.io/metadata.name": "default"})
    # With no label that anything knows.
    found["pod"] = Peer({"app": "shell"})
    found["dns"] = Peer({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
    found["node's dns"] = Peer(address="169.254.20.10")
    found["bucket"] = Peer(address="52.218.0.1")
    found["intranet"] = Peer(address="10.0.0.1")
    found["metadata"] = Peer(address="169.254.169.254")
    return found


ALLOWED = [
    ("batch trainers", "batch head", 6379),
    ("batch head", "batch trainers", 20000),
    ("service api", "service generators", 30000),
    ("service head", "redis", 6379),
    ("operator", "service head", 8265),
    ("operator", "batch head", 8265),
    ("ingress", "service api", 8000),
    ("ingress", "service generators", 8000),
    ("prometheus", "service api", 8080),
    ("prometheus", "batch head", 44217),
    ("batch trainers", "dns", 53),
    ("service api", "node's dns", 53),
    ("batch trainers", "bucket", 443),
    ("batch trainers", "bucket", 80),
    ("service api", "bucket", 443),
    # The API server's.
    ("batch head", "intranet", 443),
    ("service head", "intranet", 6443),
]
DENIED = [
    ("stranger", "service head", 8265),
    ("stranger", "service head", 6379),
    ("stranger", "service head", 10001),
    ("stranger", "service api", 8000),
    ("stranger", "redis", 6379),
    ("stranger", "batch trainers", 20000),
    ("pod", "service head", 8265),
    ("pod", "redis", 6379),
    ("pod", "bucket", 443),
    ("ingress", "service head", 8265),
    ("ingress", "batch head", 8265),
    ("prometheus", "service head", 8265),
    ("operator", "service api", 30000),
    ("batch trainers", "service head", 6379),
    ("batch head", "redis", 6379),
    ("service api", "batch head", 8265),
    # Where the address of a merchant's photo may not lead.
    ("batch trainers", "intranet", 443),
    ("batch trainers", "metadata", 80),
    ("batch head", "metadata", 80),
    ("batch head", "metadata", 443),
    ("service api", "intranet", 443),
    ("service api", "bucket", 80),
]


@each_overlay
@pytest.mark.parametrize(("source", "target", "port"), ALLOWED)
def test_what_must_talk_can(overlay: str, source: str, target: str, port: int) -> None:
    there = pods(overlay)
    assert reaches(policies(overlay), there[source], there[target], port)


@each_overlay
@pytest.mark.parametrize(("source", "target", "port"), DENIED)
def test_nothing_else_can(overlay: str, source: str, target: str, port: int) -> None:
    there = pods(overlay)
    assert not reaches(policies(overlay), there[source], there[target], port)
    assert reaches([], there[source], there[target], port)


def test_every_pod_of_ray_is_of_a_policy() -> None:
    labelled = {name: peer.labels for name, peer in pods("gpu").items() if name.startswith(("batch ", "service "))}
    assert len(labelled) == 6
    for labels in labelled.values():
        named = [one["metadata"]["name"] for one in policies("gpu") if selects(one["spec"]["podSelector"], labels)]
        assert {"objdrive-default", "objdrive-metrics"} < set(named)


@each_overlay
def test_prometheus_reaches_every_port_that_is_named_for_it(overlay: str) -> None:
    there, written = pods(overlay), policies(overlay)
    for manifest in (one for one in render(overlay) if one["kind"] in ("RayJob", "RayService")):
        [cluster] = clusters(manifest)
        [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        named = {port["name"]: port["containerPort"] for port in head["ports"] if port["name"].endswith("metrics")}
        assert named == {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
        name = "batch head" if manifest["kind"] == "RayJob" else "service head"
        assert all(reaches(written, there["prometheus"], there[name], port) for port in named.values())


def served(ingress: Manifest, path: str) -> bool:
    [rule] = ingress["spec"]["rules"]
    return any(
        path == one["path"] or (one["pathType"] == "Prefix" and path.startswith(one["path"].rstrip("/") + "/"))
        for one in rule["http"]["paths"]
    )


@pytest.mark.filterwarnings("ignore")
def test_the_ingress_serves_the_api_and_nothing_of_serves_own() -> None:
    from serve.routes import catalog, images, models, operations, page

    ingress = only(render("gpu"), "Ingress")
    routes = [route.path for module in (catalog, images, models, operations, page) for route in module.router.routes]
    assert len(routes) > 8
    assert [path for path in [*routes, "/openapi.json"] if not served(ingress, path)] == []
    assert not any(served(ingress, path) for path in ("/-/routes", "/-/healthz", "/metrics", "/v2", "/objectsx"))


def test_the_ingress_leads_to_the_service() -> None:
    manifests = render("gpu")
    ingress, service = only(manifests, "Ingress"), only(manifests, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [rule] = ingress["spec"]["rules"]
    backends = [path["backend"]["service"] for path in rule["http"]["paths"]]
    # KubeRay's name of the service that leads to Serve's proxies.
    name = f"{service['metadata']['name']}-serve-svc"
    assert all(one == {"name": name, "port": {"number": config["http_options"]["port"]}} for one in backends)
    [tls] = ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    assert config["applications"][0]["args"]["public_url"] == f"https://{rule['host']}"


def test_the_evaluation_sees_a_hole() -> None:
    there, written = pods("gpu"), policies("gpu")
    hole = changed(only(written, "NetworkPolicy", "objdrive-heads"), "spec/ingress/0/from", [])
    assert reaches([*written, hole], there["stranger"], there["service head"], 8265)
