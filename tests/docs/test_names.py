"""Names in the documentation are names in the code."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbelt.cli import COMMANDS, build_parser
from kvbelt.metrics import CATALOGUE
from kvbelt.settings import BeltFile
from tests.docs.pages import DOCS, PAGES, ROOT

SOURCES = [
    file
    for folder in ("src", "scripts", "benchmarks", "tests", "deploy", "tools")
    for file in (ROOT / folder).rglob("*")
    if file.is_file() and file.suffix in {".py", ".sh", ".yaml", ".yml", ".js", ""}
]
CODE = "".join(file.read_text("utf-8") for file in SOURCES if "corpus" not in file.parts)
#: Two metrics that the changelog calls replaced, a setting, a finding and a module.
NO_METRICS = {
    "kvbelt_messages_ignored_total",
    "kvbelt_proxy_notifications_malformed_total",
    "lmcache_rpc_port",
    "lmcache_keys",
    "kvbelt_versions",
}
DERIVED = re.compile(r"_(?:sum|count|bucket)$")
METRIC = re.compile(r"`((?:kvbelt|lmcache|nixl_transfer)_[a-z_]+)")
COMMAND = re.compile(rf"(?<!install )\bkvbelt (?:{'|'.join(command.name for command in COMMANDS)})\b([^`\n|#&]*)")
HEADER = re.compile(r"x-kvbelt-[a-z-]+")
PATH = re.compile(
    r"`((?:src|tests|benchmarks|scripts|deploy|tools|proxy|transfer|wire|engine|vllm|channels)/[\w./-]+\w)`"
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def options(parser: object) -> Iterator[str]:
    """Every option of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from options(command)


OPTIONS = set(options(build_parser()))


@every_page
def test_metrics_exist(page: Path) -> None:
    """Each metric that a page names is in the catalogue."""
    named = {DERIVED.sub("", name) for name in METRIC.findall(page.read_text("utf-8"))}
    assert {name for name in named if not name.endswith("_")} - set(CATALOGUE) <= NO_METRICS


@every_page
def test_headers_exist(page: Path) -> None:
    """Each header of kvbelt's that a page names is in the source."""
    assert {name for name in HEADER.findall(page.read_text("utf-8")) if name not in CODE} == set()


@every_page
def test_options_exist(page: Path) -> None:
    """Each option of a kvbelt command in a page is one that kvbelt takes."""
    named: set[str] = set()
    for words in COMMAND.findall(page.read_text("utf-8")):
        named.update(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"--worker-arg=\S+", "--worker-arg", words)))
    assert named <= OPTIONS


@every_page
def test_paths_exist(page: Path) -> None:
    """Each file or folder of the repository that a page names exists."""
    named = set(PATH.findall(page.read_text("utf-8")))
    assert {
        name for name in named if not (ROOT / name).exists() and not (ROOT / "src" / "kvbelt" / name).exists()
    } == set()


def test_every_setting_of_a_workers_file_is_explained() -> None:
    """docs/configuration.md has each key that a worker's file may have."""
    page = (DOCS / "configuration.md").read_text("utf-8")
    assert [name for name in BeltFile.__struct_fields__ if f"`{name}`" not in page] == []


def test_every_folder_is_described() -> None:
    """docs/architecture.md has each folder of the source, and those of the two that are large."""
    page = (DOCS / "architecture.md").read_text("utf-8")
    source = ROOT / "src" / "kvbelt"
    folders = {
        file.parent.name for where in ("*", "proxy/*", "transfer/*") for file in source.glob(f"{where}/__init__.py")
    }
    assert len(folders) > 15
    assert [name for name in sorted(folders) if f"`{name}/`" not in page] == []
