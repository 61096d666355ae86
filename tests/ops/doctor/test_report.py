"""Findings as text and as JSON, and the exit status."""

import json

import pytest

from kvbelt.cli import main
from kvbelt.ops.doctor import gpus, report, vllm_metrics
from kvbelt.ops.doctor.finding import Finding, FindingKind, Severity, in_order
from tests.http.support import free_port
from tests.ops.served import serving

CAUSE = Finding("dead_worker", Severity.ERROR, "it is dead", "others do its work", "start it", ("refused",))
SYMPTOM = Finding("failures", Severity.ERROR, "requests failed", "see above", "", (), FindingKind.SYMPTOM)
NOTE = Finding("no_gpu", Severity.NOTE, "no GPU", "CPUs", "")


def test_causes_come_first_then_symptoms_then_notes() -> None:
    """The order does not depend on the order of discovery."""
    assert in_order([NOTE, SYMPTOM, CAUSE]) == [CAUSE, SYMPTOM, NOTE]


def test_people_read_what_was_seen_why_and_what_to_change() -> None:
    """The text also says which finding to look at first."""
    text = "\n".join(report.lines([CAUSE, SYMPTOM, NOTE], "http://x"))
    assert "error, look here first: it is dead  [dead_worker]" in text
    assert "  seen:     refused" in text
    assert "  why:      others do its work" in text
    assert "  change:   start it" in text
    assert text.endswith("2 errors, 0 warnings; the first finding is the most likely cause")


def test_programs_read_json_with_the_status() -> None:
    """The JSON has every field, in the same order."""
    said = json.loads(report.as_json([CAUSE, NOTE], "http://x"))
    assert said["status"] == 2
    assert [one["name"] for one in said["findings"]] == ["dead_worker", "no_gpu"]
    assert said["findings"][0]["evidence"] == ["refused"]


def test_a_proxy_that_is_not_there_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing proxy is an error for scripts, too."""
    assert main(["doctor", "--url", f"http://127.0.0.1:{free_port()}", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["findings"][0]["name"] == "no_proxy"


def test_what_runs_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --url it is KVBELT_URL's, or that at the default port; a topology checks before a start."""
    with serving(1, 1) as served:
        port = served.deployment.proxy.port
        for words, variable in (([], f"127.0.0.1:{port}"), (["--port", str(port)], "")):
            monkeypatch.setenv("KVBELT_URL", variable)
            assert main(["doctor", "--seconds", "0.1", "--no-probe", *words]) == 0
            assert capsys.readouterr().out.startswith(f"http://127.0.0.1:{port}: 1p1d")
        main(["doctor", "1p1d", "--no-measure", "--port", str(port)])
        assert capsys.readouterr().out.startswith("before a start")


def test_where_nothing_runs_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Then it checks this machine."""
    main(["doctor", "--no-measure", "--port", str(free_port())])
    assert "no deployment runs at http://127.0.0.1:" in capsys.readouterr().out.splitlines()[0]


def test_a_url_that_is_none_is_a_wrong_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--url", "http://x:99999"])
    assert "not the address of a proxy" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["2p2d", "--url", "http://x:1"], ["two"]])
def test_bad_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line gives one line and status 2."""
    assert main(["doctor", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_nvidia_smi_says() -> None:
    """Samples are averaged; other lines are ignored."""
    looks = [
        gpus.parse("0, GPU-1, NVIDIA H100, 80, 40, 80\nnonsense\n"),
        gpus.parse("0, GPU-1, NVIDIA H100, 40, 60, 80\n"),
    ]
    (gpu,) = gpus.mean_of(looks)
    assert (gpu.index, gpu.utilisation, gpu.memory_used) == (0, 60.0, 0.625)
    assert gpus.mean_of([[], []]) is None


def test_a_vllm_servers_load_is_read_from_its_metrics() -> None:
    """A vLLM server's /health has no body."""
    text = (
        'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting{engine="0"} 12.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.75\nkvbelt_receive_buffer_bytes{engine="0"} 1000.0\n'
        'kvbelt_receive_bytes{engine="0",state="reserved"} 300.0\n'
        'kvbelt_receive_bytes{engine="0",state="quarantined"} 100.0\n'
        'kvbelt_transfers{engine="0",side="receive",state="queued"} 2.0\n'
    )
    sample = vllm_metrics.sample_of(text)
    assert (sample.running, sample.waiting, sample.blocks_free / sample.blocks_total) == (3, 12, 0.25)
    assert (sample.receive_bytes, sample.bytes_held, sample.bytes_quarantined, sample.queued) == (1000, 400, 100, 2)


@pytest.mark.parametrize("width", [60, 80])
def test_a_report_fits_its_terminal(width: int) -> None:
    """Only a word that is longer by itself stands out."""
    long = Finding("name_of_it", Severity.ERROR, "what " * 30, "why " * 30, "change " * 30, ("seen " * 30,))
    assert max(map(len, report.lines([long], "about " * 30, width=width))) <= width
