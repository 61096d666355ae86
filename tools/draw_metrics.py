"""Generates the metrics and alerts in ``docs/metrics.md`` from the catalogue in ``kvbelt/metrics`` and the alert rules.

    python -m tools.draw_metrics docs/metrics.md

It replaces the text between the marks. A test compares the page with its output.
"""

import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvbelt.errors import SettingsError
from kvbelt.metrics import GROUPS, By, Group, Kind, Spec

BEGIN = "<!-- drawn from the catalogue: python -m tools.draw_metrics docs/metrics.md -->"
END = "<!-- end of what is drawn -->"
BEGIN_ALERTS = "<!-- drawn from deploy/prometheus/alerts.yml likewise -->"

#: Beside the page's folder, in a checkout.
RULES = Path("deploy", "prometheus", "alerts.yml")

WIDTH = 100

_WHERE = {By.PROXY: "the proxy", By.WORKER: "workers", By.VLLM: "vLLM servers"}


def tables() -> str:
    """A table for each group of metrics."""
    return "\n".join(f"### {group.title}\n\n{_listed(group)}\n" for group in GROUPS)


def alerts(rules: Path) -> str:
    """A heading for each alert, so that it can be linked to."""
    groups = yaml.safe_load(rules.read_text(encoding="utf-8"))["groups"]
    return "\n".join(_alert(rule) for group in groups for rule in group["rules"])


def _alert(rule: Mapping[str, Any]) -> str:
    said = {name: _plain(text) for name, text in rule["annotations"].items()}
    waits = f", after {rule['for']}" if "for" in rule else ""
    expression = "\n".join(" ".join(line.split()) for line in rule["expr"].strip().splitlines())
    return "\n\n".join(
        [
            f"### {rule['alert']}",
            f"{rule['labels']['severity'].capitalize()}{waits}.",
            f"```promql\n{expression}\n```",
            _filled(f"{_sentence(said['summary'])} {_sentence(said['action'])}") + "\n",
        ]
    )


def _sentence(text: str) -> str:
    return text.rstrip(".") + "."


def _plain(text: str) -> str:
    """Templates in plain text: ``{{ $labels.worker }}`` becomes *worker*, ``{{ $value | … }}`` *value*."""
    return re.sub(r"\{\{ \$(?:labels\.)?(\w+)[^}]*\}\}", r"*\1*", text.strip())


def redrawn(page: str, rules: Path) -> str:
    """The page with its generated parts.

    Raises:
        SettingsError: a mark is missing.
    """
    return _between(_between(page, BEGIN, tables()), BEGIN_ALERTS, alerts(rules))


def _between(page: str, mark: str, drawn: str) -> str:
    before, begin, rest = page.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SettingsError(f"the page has no {mark!r} followed by {END!r}")
    return f"{before}{mark}\n\n{drawn}\n{END}{after}"


def _listed(group: Group) -> str:
    mixed = len({spec.by for spec in group.specs}) > 1
    where = "" if mixed else f"In `/metrics` of {_where(group.specs[0].by)}.\n\n"
    return where + "\n".join(_filled(_item(spec, tell=mixed)) for spec in group.specs)


def _item(spec: Spec, *, tell: bool) -> str:
    act = f" *When it moves:* {_sentence(spec.act)}" if spec.act else ""
    return f"- **{_name(spec)}**{_kind(spec)}: {_meaning(spec, tell=tell)}{act}"


def _filled(text: str) -> str:
    """Wrapped lines; those of a list item are indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _name(spec: Spec) -> str:
    labels = f"{{{','.join(spec.labels)}}}" if spec.labels else ""
    return f"`{spec.name}{labels}`"


def _kind(spec: Spec) -> str:
    return "" if spec.kind in (Kind.COUNTER, Kind.GAUGE) else f" ({spec.kind})"


def _meaning(spec: Spec, *, tell: bool) -> str:
    return f"{spec.help} (Of {_where(spec.by)}.)" if tell else spec.help


def _where(by: By) -> str:
    return " and of ".join(name for flag, name in _WHERE.items() if flag in by)


def main(argv: list[str]) -> None:
    if argv:
        page = Path(argv[0])
        rules = page.resolve().parents[1] / RULES
        page.write_text(redrawn(page.read_text(encoding="utf-8"), rules), encoding="utf-8")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
