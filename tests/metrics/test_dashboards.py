"""The dashboards of deploy/grafana use existing metrics in valid PromQL."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metrics.scrape import promtool, unknown_names

FILES = sorted((Path(__file__).parents[2] / "deploy" / "grafana").glob("*.json"))


def expressions(file: Path) -> Iterator[tuple[str, str]]:
    """Each panel's title and expressions, and those of annotations."""
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_metric_of_a_dashboard_is_exported(file: Path) -> None:
    """Every metric is exported by a process or made by a recording rule."""
    asked = list(expressions(file))
    assert asked
    assert [(title, unknown) for title, expr in asked if (unknown := unknown_names(expr))] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_prometheus_can_read_every_expression(file: Path, tmp_path: Path) -> None:
    """Promtool parses the expressions as rules."""
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions(file))]
    made = tmp_path / "panels.yml"
    made.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", str(made))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dashboard_can_be_imported_anywhere(file: Path) -> None:
    """Its data source is a variable, its ids are unique, its panels do not overlap, and each says what it shows."""
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    panels: list[dict[str, Any]] = dashboard["panels"]
    assert dashboard["uid"] == file.stem
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_the_four_questions_are_asked() -> None:
    """Each question is a row of the overview with panels in it."""
    overview = json.loads(next(file for file in FILES if file.stem == "kvbelt-overview").read_text(encoding="utf-8"))
    rows = [panel["title"] for panel in overview["panels"] if panel["type"] == "row"]
    assert rows == [
        "Is prefill saturated?",
        "Is decode saturated?",
        "Is the transfer slow?",
        "All idle, and still slow?",
    ]
