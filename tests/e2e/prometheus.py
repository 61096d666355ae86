"""A real Prometheus server (Debian's package) over a deployment, in a hurry.

The rules are those of deploy/prometheus with every duration, ``for`` and ``[5m]`` alike, divided by 60: a minute there
is a second here. Expressions, thresholds and labels stay as they are. Everything is scraped twice a second.
"""

import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from kvbelt.ops.deployment import RunningProcess
from kvbelt.ops.ports import find_free
from tests.e2e.asking import get, until
from tests.programs import need_program

RULES = Path(__file__).parents[2] / "deploy" / "prometheus"

#: A minute of the rules is a second of a test.
HURRY = 60

_MILLISECONDS = {"s": 1000, "m": 60_000, "h": 3_600_000}
_DURATION = re.compile(r"(\d+)([smh])")


def hurried(rules: str) -> str:
    """The rules with every duration divided by 60."""
    return re.sub(
        r"(\[|for: )(\d+[smh])(?=\]|\n)",
        lambda found: f"{found[1]}{_divided(found[2])}",
        rules,
    )


def _divided(duration: str) -> str:
    number, unit = _DURATION.fullmatch(duration).groups()  # type: ignore[union-attr]
    return f"{int(number) * _MILLISECONDS[unit] // HURRY}ms"


class Prometheus:
    """A server that scrapes some processes inside a ``with`` block. Its files are in ``folder``."""

    def __init__(self, processes: Sequence[RunningProcess], folder: Path) -> None:
        self._program = need_program("prometheus")
        (self._port,) = find_free(1)
        self._folder = folder
        for name in ("recording.yml", "alerts.yml"):
            (folder / name).write_text(hurried((RULES / name).read_text(encoding="utf-8")), encoding="utf-8")
        jobs: dict[str, list[str]] = {}
        for process in processes:
            jobs.setdefault(f"kvbelt-{process.role}", []).append(f"{process.host}:{process.port}")
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["recording.yml", "alerts.yml"],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def __enter__(self) -> Self:
        """Start it, and wait until it has scraped every process."""
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                    "--log.level=warn",
                ],
                stderr=log,
            )
        until(lambda: self._answers("/-/ready"), what="Prometheus ready")
        until(lambda: self.query("count(up == 1) == count(up)"), what="every process scraped")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The present samples of an expression."""
        reply = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=60).raise_for_status()
        found: list[dict[str, Any]] = reply.json()["data"]["result"]
        return found

    def firing(self) -> set[str]:
        """Names of alerts that fire now."""
        alerts = get(f"{self._url}/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def broken_rules(self) -> list[str]:
        """Rules that could not be evaluated, and why."""
        groups = get(f"{self._url}/api/v1/rules").raise_for_status().json()["data"]["groups"]
        return [
            f"{rule['name']}: {rule['lastError']}" for g in groups for rule in g["rules"] if rule["health"] == "err"
        ]

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _answers(self, path: str) -> bool:
        try:
            return get(self._url + path).status_code == 200
        except httpx.HTTPError:
            return False
