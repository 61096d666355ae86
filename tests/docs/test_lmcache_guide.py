"""docs/lmcache-guide.md: commands are taken, names exist, figures were measured, and the translation fits."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from kvbelt.cli import build_parser, main
from kvbelt.metrics import CATALOGUE
from kvbelt.settings import BeltFile, load_belt_file
from tests.docs.pages import DOCS, ROOT, cells, links, prose
from tests.docs.test_findings import findings
from tests.docs.test_names import METRIC, OPTIONS
from tests.http.support import free_port
from tests.test_settings import RECEIVER, SENDER

GUIDE = DOCS / "lmcache-guide.md"
CHINESE = DOCS / "zh" / "lmcache-guide.md"
TEXT = GUIDE.read_text(encoding="utf-8")

#: What starts nothing and needs no network. Everything else is parsed only.
HARMLESS = ("doctor --config", "deploy k8s", "keys new")

_COMMENT = re.compile(r"\s+#.*$", re.MULTILINE)


def blocks(text: str) -> list[str]:
    """The shell blocks of a page, without comments."""
    found = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [_COMMENT.sub("", block) for block in found]


def code(text: str) -> set[str]:
    """What stands between backticks outside blocks."""
    return set(re.findall(r"`([^`]+)`", "\n".join(line for _, line in prose(text))))


def commands(text: str) -> list[list[str]]:
    """The words of each kvbelt command in blocks and in the text, placeholders included."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", "").splitlines()]
    found = [part for line in [*lines, *sorted(code(text))] for part in re.split(r"&&|\|", line)]
    return [shlex.split(part)[1:] for part in found if re.match(r"kvbelt [a-z]", part.strip())]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the guide's two files. The doctor looks whether their ports are free, so these are."""
    receiver = RECEIVER.replace("7300", str(free_port())).replace("7400", str(free_port()))
    (tmp_path / "lmcache-prefiller-config.yaml").write_text(SENDER, encoding="utf-8")
    (tmp_path / "lmcache-decoder-config.yaml").write_text(receiver, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [GUIDE, CHINESE], ids=["English", "Chinese"])
def test_every_command_is_taken(page: Path) -> None:
    """The parser takes kvbelt's own, and bash all blocks."""
    text = page.read_text(encoding="utf-8")
    found = commands(text)
    assert {words[0] for words in found} >= {"up", "proxy", "doctor", "deploy", "keys", "simulate"}
    for words in found:
        if len(words) > 1:  # a command's bare name may lack what it needs
            more = ["--topology", "1p1d", "--model", "m", "--gpu", "any"] if "--rdma" in words else []
            build_parser().parse_args([word.replace("RESOURCE", "rdma/ib") for word in words] + more)
    for block in blocks(text):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_what_starts_nothing_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the page's order, in one folder. The doctor only warns of the files: this machine need not have a GPU."""
    ran = [words for words in commands(TEXT) if " ".join(words).startswith(HARMLESS)]
    assert len(ran) >= len(HARMLESS)
    for words in ran:
        if words[0] == "doctor":
            assert main([*words, "--no-measure", "--device", "cpu"]) < 2
        elif "--output" in words or words[0] == "keys":
            assert main(words) == 0
    capsys.readouterr()
    overlay = here / "my-kvbelt"
    wanted = yaml.safe_load((overlay / "kustomization.yaml").read_text(encoding="utf-8"))["replicas"]
    assert {one["name"]: one["count"] for one in wanted} == {"vllm-prefill": 2, "vllm-decode": 2}
    assert (overlay / "keys" / "proxy.key_secret").exists()


def test_up_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Each kvbelt up of the page describes itself, and starts nothing."""
    shapes = []
    for words in commands(TEXT):
        if words[0] == "up" and len(words) > 1:
            assert main([*words, "--print-config"]) == 0
            shapes.append(yaml.safe_load(capsys.readouterr().out)["topology"])
    assert set(shapes) == {"0p1d", "1p1d", "2p2d"}


def test_every_key_of_the_two_files_is_explained(here: Path) -> None:
    """The files load, and the table has their keys and no others."""
    files = {name: load_belt_file(here / f"lmcache-{name}-config.yaml") for name in ("prefiller", "decoder")}
    assert [file.pd_role for file in files.values()] == ["sender", "receiver"]
    table = TEXT.partition("### 2.3")[2].partition("### 2.4")[0]
    first = [cells(line)[0] for line in table.splitlines() if line.startswith("| `")]
    named = {key for cell in first for key in re.findall(r"`(\w+)`", cell)}
    assert named == {*yaml.safe_load(SENDER), *yaml.safe_load(RECEIVER)} <= set(BeltFile.__struct_fields__)


def test_both_forms_of_the_proxys_arguments_mean_the_ports_of_the_guide() -> None:
    """7100 and up, 7200 and up, 9100."""
    proxies = [
        build_parser().parse_args(words) for words in commands(TEXT) if words[0] == "proxy" and "--port" in words
    ]
    assert [(one.prefill_port, one.decode_port, one.port) for one in proxies] == [([7100], [7200], 9100)] * 2
    assert {(one.num_prefillers, one.num_decoders) for one in proxies} == {(None, None), (2, 2)}


def test_every_name_exists() -> None:
    """Options, metrics, alerts and the doctor's findings."""
    theirs = {"--enforce-eager", "--no-enable-prefix-caching"}
    named = code(TEXT)
    assert {word for text in named for word in re.findall(r"(?<!\S)--[a-z-]+", text)} - theirs <= OPTIONS
    kept = {"lmcache_rpc_port"}
    assert set(METRIC.findall(TEXT)) - kept <= set(CATALOGUE)
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    anchors = [link.partition("#")[2] for link in links(TEXT.partition("### 3.5")[2]) if link.startswith("metrics.md#")]
    assert anchors[:3] == [rule["alert"].lower() for rule in rules]
    tables = TEXT.partition("### 3.3")[2].partition("### 3.5")[0]
    last = [cells(line)[-1] for line in tables.splitlines() if line.startswith("| ")]
    assert {name for cell in last for name in re.findall(r"`(\w+)`", cell)} <= findings()


@pytest.mark.parametrize("page", [GUIDE, CHINESE], ids=["English", "Chinese"])
def test_the_figures_were_measured(page: Path) -> None:
    """Each row of the table is a run in docs/results; what was not run is empty."""
    runs = {}
    for session in json.loads((DOCS / "results" / "vllm-0.26-2xh200.json").read_bytes()):
        name = {"aggregated": "aggregated", "kvbelt": "1p1d"}.get(session["system"])
        for run in session["runs"] if name else ():
            bench = run["bench"]
            runs[name, run["rate"]] = [
                f"{bench['p99_ttft_ms']:.0f}",
                f"{bench['total_token_throughput']:,.0f}",
                [f"{gpu['utilisation']:.0f}" for gpu in run["gpus"].values()],
            ]
    table = page.read_text(encoding="utf-8").partition("### 3.2")[2].partition("### 3.3")[0]
    rows = [cells(line) for line in table.splitlines() if re.match(r"\| \S+ \| \d", line)]
    assert len(rows) == 6
    for (name, rate, ttft, tokens, busy), expected in zip(rows, ["aggregated", "1p1d", "2p2d"] * 2, strict=True):
        assert name in {expected, "聚合"}
        measured = runs.get((expected, float(rate)), ["", "", []])
        assert [ttft, tokens, re.findall(r"\d+", busy)] == measured


def test_the_chinese_page_has_the_same_commands() -> None:
    """And the same names, links and sections."""
    chinese = CHINESE.read_text(encoding="utf-8")
    assert blocks(chinese) == blocks(TEXT)
    assert code(chinese) == code(TEXT)

    def leads(page: Path) -> set[str]:
        found = [link.partition("#") for link in links(page.read_text(encoding="utf-8"))]
        return {f"{(page.parent / path).resolve()}#{anchor}" for path, _, anchor in found} - {
            f"{GUIDE}#",
            f"{CHINESE}#",
        }

    assert leads(CHINESE) == leads(GUIDE)
    assert re.findall(r"^#+ ([\d.–]+)", chinese, re.MULTILINE) == re.findall(r"^#+ ([\d.–]+)", TEXT, re.MULTILINE)


def test_the_chinese_readme_has_the_same_three_commands() -> None:
    """And the same chart and questions."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert blocks(chinese) == blocks(english)[:2]
    assert "](docs/images/results.svg)" in chinese
