"""Draws what becomes of each field into its page, from the results of ``kvbelt verify --json``.

python -m tools.draw_api docs/api.md
"""

import sys
from pathlib import Path

from kvbelt.ops.verify.cases import CHAT, COMPLETIONS, UNTRIED
from kvbelt.ops.verify.judge import REFUSED, REWORDED, CaseResult
from kvbelt.ops.verify.report import Result, by_field, cell, from_json

RESULTS = {"embedded": "verify-embedded.json", "vLLM": "verify-vllm.json"}

_BEGIN, _END = "<!-- drawn: python -m tools.draw_api docs/api.md -->\n", "<!-- end of what is drawn -->\n"
_MOST_CHARACTERS = 110
_ENDPOINTS = (COMPLETIONS, CHAT)


def read(folder: Path) -> dict[str, Result]:
    """The results by engine."""
    return {name: from_json((folder / file).read_bytes()) for name, file in RESULTS.items() if (folder / file).exists()}


def drawn(results: dict[str, Result]) -> str:
    tables = {engine: by_field(result) for engine, result in results.items()}
    columns = [(engine, endpoint) for engine in tables for endpoint in _ENDPOINTS]
    fields = list(dict.fromkeys(field for found in tables.values() for field in found))
    rows = [
        [f"`{field}`" if "(" not in field else field]
        + [_short(tables[engine].get(field, {}).get(endpoint, [])) for engine, endpoint in columns]
        for field in fields
    ]
    told = [f"- {name}: {_told(result)}" for name, result in results.items()]
    head = ["field", *(f"{engine}, {endpoint}" for engine, endpoint in columns)]
    refused = [row for engine, found in tables.items() for field in found for row in _why(engine, field, found[field])]
    untried = [f"`{field}` is not tried: {why}." for field, why in UNTRIED.items()]
    return "\n".join(
        ["", *told, "", *_markdown(head, rows), "", *untried, "", "Why fields are refused, in the engine's words:", "",
         *_markdown(["field", "engine", "endpoint", "words"], refused), ""]
    )  # fmt: skip


def _told(result: Result) -> str:
    judged = result.judged
    return (
        f"{result.engine}, kvbelt {result.kvbelt}: {len(judged.cases)} cases, {result.requests:,} requests;\n"
        f"  {judged.differ:,} of {judged.answers:,} answers differ."
    )


def _short(cases: list[CaseResult]) -> str:
    return cell(cases).removeprefix("exact: ") or "-"


def _why(engine: str, field: str, cases: dict[str, list[CaseResult]]) -> list[list[str]]:
    """One row for both endpoints, if their words are the same."""
    words: dict[str, list[str]] = {}
    for endpoint in _ENDPOINTS:
        if cell(cases[endpoint]) == "refused":
            said = next(case.why for case in cases[endpoint] if case.outcome in (REFUSED, REWORDED)).replace("\n", " ")
            said = said if len(said) <= _MOST_CHARACTERS else said[: _MOST_CHARACTERS - 2] + " …"
            words.setdefault(said.replace("|", "\\|"), []).append(endpoint)
    return [[f"`{field}`", engine, ", ".join(endpoints), said] for said, endpoints in words.items()]


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def page_with_tables(page: str, results: dict[str, Result]) -> str:
    """Raises ValueError: the page has no place for the tables."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the page lacks {_BEGIN!r} or {_END!r}")
    return f"{before}{begin}{drawn(results)}{end}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    page = page_with_tables(file.read_text(encoding="utf-8"), read(file.parent / "results"))
    file.write_text(page, encoding="utf-8")
