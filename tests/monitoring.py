"""What `infra/kuberay/monitoring` holds, and which metrics there are."""

import json
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

import jobs.metrics
import serve.metrics
from objdrive.metrics import PREFIX, Metric

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "infra" / "kuberay" / "monitoring"

METRICS: dict[str, Metric] = {
    **jobs.metrics.MEASURED,
    **serve.metrics.MEASURED,
    **{name: reading.metric for name, reading in serve.metrics.READ.items()},
}
"""All metrics of ours."""

_REPORTER = "dashboard/modules/reporter/reporter_agent.py"
_AUTOSCALER = "autoscaler/_private/prom_metrics.py"
RAY_METRICS = {
    "ray_node_cpu_utilization": _REPORTER,
    "ray_node_disk_utilization_percentage": _REPORTER,
    "ray_node_gpus_utilization": _REPORTER,
    "ray_node_gram_available": _REPORTER,
    "ray_node_gram_used": _REPORTER,
    "ray_node_mem_total": _REPORTER,
    "ray_node_mem_used": _REPORTER,
    "ray_serve_autoscaling_target_replicas": "serve/_private/deployment_state.py",
    "ray_serve_deployment_queued_queries": "serve/_private/router.py",
    "ray_serve_deployment_replica_healthy": "serve/_private/deployment_state.py",
    "autoscaler_active_nodes": _AUTOSCALER,
    "autoscaler_pending_nodes": _AUTOSCALER,
}
"""The metrics of Ray's own that dashboards and alerts use, and the file of Ray's that defines each."""
RAY_LABELS = {"deployment", "application", "GpuIndex", "NodeType"}
TARGET_LABELS = {"namespace", "pod", "ray_io_cluster", "job"}
"""What a PodMonitor gives to everything that it scrapes."""


def series_of(name: str, metric: Metric) -> list[str]:
    """The names of a metric's time series on a cluster."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[metric.kind]
    return [f"ray_{PREFIX}{name}{suffix}" for suffix in suffixes]


def known_series() -> dict[str, set[str]]:
    """The labels of every time series that there is, by its name; those of its target aside."""
    known = {name: set(RAY_LABELS) for name in RAY_METRICS} | {"up": set()}
    for name, metric in METRICS.items():
        known |= {series: {*metric.labels, "le"} for series in series_of(name, metric)}
    return known


@dataclass(frozen=True)
class Alert:
    """An alert, and the file that it is in."""

    path: Path
    name: str
    rule: dict[str, Any]


def rule_files() -> list[Path]:
    return sorted((FOLDER / "rules").glob("*.yaml"))


def alerts() -> list[Alert]:
    found = []
    for path in rule_files():
        for group in yaml.safe_load(path.read_text())["spec"]["groups"]:
            found += [Alert(path, rule["alert"], rule) for rule in group["rules"]]
    return found


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "dashboards").glob("*.json"))}


def queries() -> list[tuple[str, str]]:
    """(where, PromQL) of all alerts and panels, Grafana's variables in strings left as they are."""
    found = [(alert.name, alert.rule["expr"]) for alert in alerts()]
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                where = f"{name}: {panel['title']} {target['refId']}"
                found.append((where, target["expr"].replace("$__rate_interval", "5m")))
    return found


@dataclass
class Used:
    """A selector of time series: their name, the labels it matches, and those that aggregations around it keep."""

    series: str
    matched: set[str]
    grouped: set[str]


def used(query: str) -> list[Used]:
    """All selectors of a query.

    Raises:
        ValueError: it is no PromQL.
    """
    found: list[Used] = []
    _walk(promql_parser.parse(query), set(), found)
    return found


def _walk(node: Any, grouped: set[str], found: list[Used]) -> None:
    match node:
        case promql_parser.VectorSelector():
            found.append(Used(node.name, {matcher.name for matcher in node.matchers.matchers}, grouped))
        case promql_parser.MatrixSelector():
            _walk(node.vector_selector, grouped, found)
        case promql_parser.AggregateExpr():
            _walk(node.expr, grouped | set(node.modifier.labels if node.modifier else ()), found)
        case promql_parser.Call():
            for argument in node.args:
                _walk(argument, grouped, found)
        case promql_parser.BinaryExpr():
            _walk(node.lhs, grouped, found)
            _walk(node.rhs, grouped, found)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            _walk(node.expr, grouped, found)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise TypeError(f"no rule walks {type(node).__name__}: add one")


def scraped(ports: Iterable[int]) -> Mapping[str, list[tuple[dict[str, str], float]]]:
    """Labels and values of all time series that Ray's nodes on this machine export, by name."""
    found = defaultdict(list)
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    found[sample.name].append((sample.labels, sample.value))
    return found
