"""Dashboards and alerts: every metric exists, every query parses, every alert fires when it should and only then."""

import re
import subprocess
import typing
from pathlib import Path

import monitoring
import pytest
import ray
import yaml
from documents import ROOT
from monitoring import FOLDER, METRICS, RAY_METRICS, TARGET_LABELS, Alert
from pydantic import BaseModel, ConfigDict, Field

from jobs.leases import Event

CASES = sorted((Path(__file__).parent / "alerts").glob("*.yaml"))
DOCUMENT = ROOT / "docs" / "monitoring.md"
ALERTS = monitoring.alerts()
TEAMS = {"catalog", "platform", "serving"}
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
each_query = pytest.mark.parametrize(("where", "query"), monitoring.queries(), ids=[w for w, _ in monitoring.queries()])


@each_query
def test_every_query_is_of_metrics_and_labels_that_exist(where, query):
    known = monitoring.known_series()
    selected = monitoring.used(query)
    assert selected, "it reads no metric"
    for one in selected:
        assert one.series in known, f"{one.series} is exported by nobody"
        unknown = (one.matched | one.grouped) - known[one.series] - TARGET_LABELS
        assert not unknown, f"{one.series} has no labels {unknown}"


@pytest.mark.parametrize("name", monitoring.dashboards())
def test_a_dashboard_s_variables_are_of_metrics_that_exist(name):
    dashboard = monitoring.dashboards()[name]
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    for variable in variables.values():
        if variable["type"] == "query":
            query, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            [selected] = monitoring.used(query)
            assert label in TARGET_LABELS | monitoring.known_series()[selected.series]
    text = (FOLDER / "dashboards" / f"{name}.json").read_text()
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__all", "__rate_interval"} <= set(variables)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "query", ["ray_objdrive_run_rows", "sum by (object_id) (ray_objdrive_run_rows_total)", 'up{color="red"}']
)
def test_what_does_not_exist_is_found_out(query):
    with pytest.raises(AssertionError):
        test_every_query_is_of_metrics_and_labels_that_exist("made up", query)
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        monitoring.used(f"sum({query}")


@pytest.mark.parametrize("series", RAY_METRICS)
def test_ray_defines_the_metrics_of_its_own_that_are_used(series):
    source = (Path(ray.__file__).parent / RAY_METRICS[series]).read_text()
    bare = series.removeprefix("ray_").removeprefix("autoscaler_")
    assert re.search(rf'^\s*(name=)?"{bare}",$', source, re.MULTILINE)


def test_no_metric_of_ray_is_listed_that_is_not_used():
    used = {one.series for _, query in monitoring.queries() for one in monitoring.used(query)}
    assert set(RAY_METRICS) <= used


# Alerts


@pytest.fixture
def promtool(tmp_path):
    """Run promtool in a folder that holds the rules as Prometheus reads them, their links aside."""
    for path in monitoring.rule_files():
        spec = yaml.safe_load(path.read_text())["spec"]
        for group in spec["groups"]:
            for rule in group["rules"]:
                del rule["annotations"]["runbook"]
        (tmp_path / path.name).write_text(yaml.safe_dump(spec))

    def run(*arguments):
        try:
            return subprocess.run(["promtool", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        except FileNotFoundError:
            pytest.fail("promtool is not installed: apt-get install prometheus")

    return run


def test_prometheus_takes_the_rules(promtool):
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *(path.name for path in monitoring.rule_files()))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(case, promtool, tmp_path):
    tests = yaml.safe_load(case.read_text())
    assert "rule_files" not in tests
    tests["rule_files"] = [path.name for path in monitoring.rule_files()]
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(tests))
    done = promtool("test", "rules", "case.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def untested(alerts: list[Alert], cases: list[dict]) -> set[tuple[str, str]]:
    """(alert, "fires" or "is silent") for everything that no test tells."""
    wanted = {(alert.name, what) for alert in alerts for what in ("fires", "is silent")}
    told = {
        (one["alertname"], "fires" if one.get("exp_alerts") else "is silent")
        for case in cases
        for test in case["tests"]
        for one in test["alert_rule_test"]
    }
    return wanted - told


def test_every_alert_is_tested_to_fire_and_to_be_silent():
    cases = [yaml.safe_load(path.read_text()) for path in CASES]
    assert untested(ALERTS, cases) == set()
    assert untested([Alert(FOLDER, "New", {})], cases) == {("New", "fires"), ("New", "is silent")}


@each_alert
def test_an_alert_says_how_urgent_it_is_whose_it_is_and_where_to_read_what_to_do(alert):
    rule = alert.rule
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["labels"]["team"] in TEAMS
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{alert.name.lower()}"
    section = re.search(rf"^### {alert.name}\n\n(.+?)(?=\n#|\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert section, f"{DOCUMENT.name} has no section on {alert.name}"
    assert f"{rule['labels']['severity']}, {rule['labels']['team']}." in section[1]


def test_no_document_tells_of_alerts_that_are_gone():
    told = re.findall(r"^### (\w+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert sorted(told) == sorted(alert.name for alert in ALERTS)


# Manifests


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(Strict):
    name: str = Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$")


class Relabelling(Strict):
    action: typing.Literal["drop"]
    sourceLabels: list[str]  # noqa: N815
    regex: str


class Endpoint(Strict):
    port: str
    interval: str
    metricRelabelings: list[Relabelling] = []  # noqa: N815


class Selector(Strict):
    matchLabels: dict[str, str]  # noqa: N815


class PodMonitorSpec(Strict):
    selector: Selector
    podTargetLabels: list[str]  # noqa: N815
    podMetricsEndpoints: list[Endpoint]  # noqa: N815


class PodMonitor(Strict):
    apiVersion: typing.Literal["monitoring.coreos.com/v1"]  # noqa: N815
    kind: typing.Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Groups(Strict):
    groups: list[dict]


class PrometheusRule(Strict):
    apiVersion: typing.Literal["monitoring.coreos.com/v1"]  # noqa: N815
    kind: typing.Literal["PrometheusRule"]
    metadata: Metadata
    spec: Groups


def pod_monitors() -> list[PodMonitor]:
    text = (FOLDER / "pod-monitors.yaml").read_text()
    return [PodMonitor.model_validate(one) for one in yaml.safe_load_all(text)]


def test_pods_of_head_and_workers_are_scraped_without_labels_of_single_adapters():
    head, workers = pod_monitors()
    assert head.spec.selector.matchLabels["ray.io/node-type"] == "head"
    assert workers.spec.selector.matchLabels["ray.io/node-type"] == "worker"
    assert {"metrics", "as-metrics"} <= {endpoint.port for endpoint in head.spec.podMetricsEndpoints}
    for monitor in (head, workers):
        assert "ray.io/cluster" in monitor.spec.podTargetLabels
        [ray_nodes] = [endpoint for endpoint in monitor.spec.podMetricsEndpoints if endpoint.port == "metrics"]
        [dropped] = ray_nodes.metricRelabelings
        assert dropped.sourceLabels == ["__name__"]
        assert re.fullmatch(dropped.regex, "ray_serve_registered_multiplexed_model_id")
        # The alert on pods that give no metrics knows them by this.
        [scraped] = [alert for alert in ALERTS if alert.name == "RayPodNotScraped"]
        pattern = re.search(r'job=~"(.+?)"', scraped.rule["expr"])[1]
        assert re.fullmatch(pattern, f"shop/{monitor.metadata.name}")


def test_rules_are_the_operator_s():
    for path in monitoring.rule_files():
        PrometheusRule.model_validate(yaml.safe_load(path.read_text()))


def test_everything_that_is_there_is_applied_and_each_dashboard_has_a_config_map_of_its_own():
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    maps = [one["files"] for one in kustomization["configMapGenerator"]]
    assert all(len(files) == 1 for files in maps)
    applied = {*kustomization["resources"], *(files[0] for files in maps)}
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.*") if path.is_file()}
    assert applied == there - {"kustomization.yaml"}
    assert kustomization["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    for files in maps:
        # Kubernetes' limit of a ConfigMap.
        assert (FOLDER / files[0]).stat().st_size < 2**20


# The document


def test_the_document_s_table_is_what_the_code_exports():
    lines = [
        f"| `{name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} "
        f"| {metric.unit} | {metric.description} |"
        for name, metric in METRICS.items()
    ]
    told = re.findall(r"^\| `(?:run_|\w+)` \| (?:counter|gauge|histogram) \|.*$", DOCUMENT.read_text(), re.MULTILINE)
    assert [re.sub(r" +", " ", line) for line in told] == [re.sub(r" +", " ", line) for line in lines]


def test_the_document_tells_every_event():
    told = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert set(typing.get_args(Event)) <= set(told)
