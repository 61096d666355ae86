"""Generates the rules for Kubernetes from ``deploy/prometheus``: for kustomize and for the Helm chart.

    python -m tools.draw_rules deploy

A test compares the files with its output.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

SOURCES = ("recording.yml", "alerts.yml")
COMPONENT = Path("kubernetes", "components", "monitoring", "rules.yaml")
CHART = Path("helm", "kvbelt", "files", "rules.yaml")

_HEAD = "# Drawn from deploy/prometheus by python -m tools.draw_rules deploy; change it there.\n"


def groups_of(deploy: Path) -> list[dict[str, Any]]:
    return [
        group
        for name in SOURCES
        for group in yaml.safe_load((deploy / "prometheus" / name).read_text(encoding="utf-8"))["groups"]
    ]


def drawn(deploy: Path) -> dict[Path, str]:
    """The contents of the files, by their path in ``deploy/``."""
    spec = {"groups": groups_of(deploy)}
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "kvbelt",
            "namespace": "inference",
            "labels": {"app.kubernetes.io/part-of": "kvbelt", "release": "prometheus"},
        },
        "spec": spec,
    }
    return {COMPONENT: _HEAD + _dump(rule), CHART: _HEAD + _dump(spec)}


def _dump(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


def main(argv: list[str]) -> None:
    deploy = Path(argv[0])
    for place, text in drawn(deploy).items():
        (deploy / place).parent.mkdir(parents=True, exist_ok=True)
        (deploy / place).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
