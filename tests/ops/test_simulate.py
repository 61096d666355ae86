"""``kvbelt simulate``."""

import json
from pathlib import Path

import pytest

from kvbelt.cli import main

SMALL = ["simulate", "--seconds", "10", "--rate", "2"]


def test_it_prints_a_line_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--policy", "elastic", "--policy", "least@2048"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["elastic", "least@2048"]


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--workers", "2p2d", "--policy", "whole", "--mix", "1000/50:2,4000/20"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["policy"] == "whole"
    assert row["requests"] == 20
    assert {
        "ttft_p50",
        "ttft_max",
        "tpot_p99",
        "itl_p99",
        "within_a",
        "within_b",
        "tokens_per_second",
        "busiest",
    } <= row.keys()


def test_costs_come_from_a_workers_health_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = {"base": 1e-3, "prefill": 0, "token": 1e-6, "token_context": 0, "decode": 0, "kv_token": 0}
    file = tmp_path / "health.json"
    file.write_text(json.dumps({"status": "ok", "steps": {"costs": costs, "decodes": 0}}))
    assert main([*SMALL, "--costs", str(file), "--json", "--policy", "least"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["tpot_p50"] == pytest.approx(1.0, rel=0.05)


def test_a_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"arrival": 0, "prompt_tokens": 50, "output_tokens": 5}\n' * 3)
    assert main(["simulate", "--trace", str(file), "--json", "--policy", "elastic"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["requests"] == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers", "1p"], "1p"),
        (["--workers", "1p2000d"], "1000"),
        (["--dies", "x9@3"], "x9"),
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--costs", "/nowhere.json"], "/nowhere.json"),
        (["--hot", "0.5", "--turns", "3"], "--hot 0.5 and --turns 3"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--policy", "best"), ("--arrivals", "often"), ("--mix", "7500:1"), ("--dies", "d0"), ("--range-ratio", "2")],
)
def test_a_value_of_another_form_is_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, flag, value])
    assert ended.value.code == 2
    assert value in capsys.readouterr().err
