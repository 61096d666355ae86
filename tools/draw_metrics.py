"""Draws ``docs/metrics.md``'s tables from the catalogue in ``kvbelt/metrics``, and of the alerts from their rules.

python -m kvbelt.ops.draw_metrics docs/metrics.md

What stands between the marks is drawn; the rest of the page is written by hand. A test holds them together.
"""

import re
import sys
from pathlib import Path

import yaml

from kvbelt.errors import SettingsError
from kvbelt.metrics import GROUPS, By, Group, Kind, Spec

BEGIN = "<!-- drawn from the catalogue: python -m kvbelt.ops.draw_metrics docs/metrics.md -->"
END = "<!-- end of what is drawn -->"
BEGIN_ALERTS = "<!-- drawn from deploy/prometheus/alerts.yml likewise -->"

#: Beside the page's folder, in a checkout.
RULES = Path("deploy", "prometheus", "alerts.yml")

_WHERE = {By.PROXY: "the proxy", By.WORKER: "workers", By.VLLM: "vLLM servers"}


def tables() -> str:
    """Every group's table."""
    return "\n".join(f"### {group.title}\n\n{_table(group)}\n" for group in GROUPS)


def alerts(rules: Path) -> str:
    """The table of alerts."""
    groups = yaml.safe_load(rules.read_text(encoding="utf-8"))["groups"]
    lines = ["| alert | severity | what is wrong | what to do |", "|---|---|---|---|"]
    for rule in (rule for group in groups for rule in group["rules"]):
        said = {name: _plain(text) for name, text in rule["annotations"].items()}
        waits = f", {rule['for']}" if "for" in rule else ""
        head = f"`{rule['alert']}`<br>`{rule['expr'].strip()}`{waits}".replace("|", "\\|")
        lines.append(f"| {head} | {rule['labels']['severity']} | {said['summary']} | {said['action']} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Without the templates: ``{{ $labels.worker }}`` becomes *worker*, ``{{ $value | … }}`` *value*."""
    return re.sub(r"\{\{ \$(?:labels\.)?(\w+)[^}]*\}\}", r"*\1*", text.strip())


def redrawn(page: str, rules: Path) -> str:
    """The page with its tables as they should be.

    Raises:
        SettingsError: it lacks the marks.
    """
    return _between(_between(page, BEGIN, tables()), BEGIN_ALERTS, alerts(rules))


def _between(page: str, mark: str, drawn: str) -> str:
    before, begin, rest = page.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SettingsError(f"the page has no {mark!r} followed by {END!r}")
    return f"{before}{mark}\n\n{drawn}\n{END}{after}"


def _table(group: Group) -> str:
    same = {spec.by for spec in group.specs}
    lines = ["| metric | meaning | when it moves |", "|---|---|---|"]
    lines += [f"| {_name(spec)} | {_meaning(spec, tell=len(same) > 1)} | {spec.act} |" for spec in group.specs]
    where = f"In `/metrics` of {_where(group.specs[0].by)}.\n\n" if len(same) == 1 else ""
    return where + "\n".join(lines)


def _name(spec: Spec) -> str:
    labels = f"{{{','.join(spec.labels)}}}" if spec.labels else ""
    kind = "" if spec.kind in (Kind.COUNTER, Kind.GAUGE) else f" ({spec.kind})"
    return f"`{spec.name}{labels}`{kind}"


def _meaning(spec: Spec, *, tell: bool) -> str:
    return f"{spec.help} (Of {_where(spec.by)}.)" if tell else spec.help


def _where(by: By) -> str:
    return " and of ".join(name for flag, name in _WHERE.items() if flag in by)


def main(argv: list[str]) -> None:
    """Draw the tables of the page named, or print them."""
    if argv:
        page = Path(argv[0])
        rules = page.resolve().parents[1] / RULES
        page.write_text(redrawn(page.read_text(encoding="utf-8"), rules), encoding="utf-8")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
