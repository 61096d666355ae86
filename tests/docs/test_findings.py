"""docs/troubleshooting.md lists what the doctor can find."""

import ast

from tests.docs.pages import DOCS, ROOT

CHECKS = ROOT / "src" / "kvbelt" / "ops" / "doctor" / "checks"


def findings() -> set[str]:
    """The name of every Finding that the checks build."""
    calls = [
        node
        for file in CHECKS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
    ]
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def test_every_finding_is_listed() -> None:
    """Each name stands in one of the tables of findings."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## The doctor's findings")[2]
    assert len(findings()) > 40
    assert [name for name in sorted(findings()) if f"`{name}`" not in page] == []
