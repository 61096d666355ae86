"""vLLM's ``vllm bench serve``, in a process that stays alive.

Importing vLLM takes longer than some loads do. So a process is started with the servers, imports while they load their
models, and then runs one load after another: each is vLLM's command line, as a shell would call it.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu._servers import NAME, Plan


class Client:
    """The handle of such a process."""

    def __init__(self, plan: Plan, log: Path, cores: Iterable[int] | None) -> None:
        self._plan = plan
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu._client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)
        self._log = log
        self._lock = threading.Lock()

    def load(  # noqa: PLR0917 -- of one load
        self, port: int, folder: Path, tag: str, rate: float, prompts: int, seed: int
    ) -> dict[str, Any]:
        """Run one load. Returns what vLLM's client saved, and its duration."""
        plan = self._plan
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [
            "bench", "serve", "--backend", "openai",
            "--base-url", f"http://127.0.0.1:{port}", "--endpoint", "/v1/completions", "--model", str(plan.model),
            "--served-model-name", NAME, "--dataset-name", "random", "--random-input-len", str(plan.input_len),
            "--random-output-len", str(plan.output_len), "--num-prompts", str(prompts), "--request-rate", str(rate),
            "--burstiness", "100", "--ignore-eos", "--temperature", "0", "--seed", str(seed), "--disable-tqdm",
            "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
            "--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", f"{tag}.json",
        ]  # fmt: skip
        log = folder / f"{tag}.log"
        began = time.monotonic()
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the client has ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        if json.loads(answer)["status"] != 0:
            raise SystemExit(f"vllm {' '.join(arguments[:2])} failed:\n{log.read_text(errors='replace')[-3000:]}")
        saved: dict[str, Any] = json.loads((folder / f"{tag}.json").read_text())
        if not saved["completed"]:
            raise SystemExit(f"no request of {tag} was answered:\n{log.read_text(errors='replace')[-3000:]}")
        saved.pop("generated_texts", None)
        return saved | {"client_seconds": time.monotonic() - began}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """The process: each line of JSON is a load, and gets a line as its answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # all other output goes to the log
    import vllm.entrypoints.cli.main as command_line  # noqa: PLC0415 -- seconds

    # The command line imports what it runs; so that this does not fall into the first load, it is asked for help.
    sys.argv = ["vllm", "bench", "serve", "--help"]
    with contextlib.suppress(SystemExit):
        command_line.main()
    kept = os.dup(1)
    for line in sys.stdin:
        load = json.loads(line)
        with Path(load["log"]).open("wb") as log:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            status: Any = 0
            sys.argv = ["vllm", *load["arguments"]]
            try:
                command_line.main()
            except SystemExit as end:
                status = end.code or 0
            except Exception as error:  # noqa: BLE001 -- sent to the caller
                print(repr(error), file=sys.stderr)
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            for number in (1, 2):
                os.dup2(kept, number)
        answers.write(json.dumps({"status": status}) + "\n")


if __name__ == "__main__":
    main()
