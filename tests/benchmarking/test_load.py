"""The client of the GPU benchmarks: loads, routers, and the times of answers."""

import itertools
import json

import msgspec
import pytest
from benchmarks.gpu import _load
from benchmarks.gpu._figures import Results, cells, figures_of, results_of, write_results
from benchmarks.gpu._load import Load, Question, Router, Stream, parse_load, questions
from benchmarks.gpu._rows import LEVELS, Answer, Row, add_records, read_rows, share_within, write_row

from tests.http.support import Running, async_test, free_port

EVENT = b'data: {"choices": [{"text": " t17"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}}\n\n'
STREAM = EVENT * 3 + USAGE + b"data: [DONE]\n\n"


def test_loads_are_read() -> None:
    """A load has defaults for all but its arrivals and rate."""
    assert parse_load("even:6") == Load("even", 6, 30)
    assert parse_load("poisson:2.5") == Load("poisson", 2.5, 120)
    assert parse_load("poisson:4x60:2000/1000~0.8@1,2") == Load("poisson", 4, 60, 2000, 1000, 0.8, (1, 2))


@pytest.mark.parametrize("text", ["uneven:6", "even:6:7500"])
def test_what_is_no_load_is_refused(text) -> None:
    """The error has the text and examples."""
    with pytest.raises(ValueError, match=f"'{text}' is no load; examples: "):
        parse_load(text)


@pytest.mark.parametrize("arrivals", ["even", "poisson"])
def test_arrivals_take_exactly_their_time(arrivals) -> None:
    """The last of rate times seconds requests is due when the load ends."""
    asked = questions(Load(arrivals, 4, 5, 10, 2), 1, "m")
    assert len(asked) == 20
    assert asked[-1].at == pytest.approx(5)
    assert [question.at for question in asked] == sorted(question.at for question in asked)


def test_even_arrivals_are_more_even_than_poisson() -> None:
    """The largest gap of even arrivals is smaller."""
    gaps = []
    for arrivals in ("even", "poisson"):
        moments = [question.at for question in questions(Load(arrivals, 4, 25, 10, 2), 1, "m")]
        gaps.append(max(late - early for early, late in itertools.pairwise(moments)))
    assert gaps[0] < 0.4 < gaps[1]


def test_a_seed_means_the_same_requests() -> None:
    """Every system is sent the same, and another seed's prompts share no beginning with them."""
    load, fresh = Load("poisson", 4, 5, 10, 2), questions.__wrapped__
    assert fresh(load, 1, "m") == fresh(load, 1, "m")
    one, other = (json.loads(questions(load, seed, "m")[0].body)["prompt"] for seed in (1, 2))
    assert one[0] != other[0]


def test_lengths_spread_around_their_mean() -> None:
    """Prompts and answers have between 0.2 and 1.8 times the mean."""
    asked = questions(Load("even", 10, 20, 100, 20, 0.8), 1, "m")
    bodies = [json.loads(question.body) for question in asked]
    assert all(len(body["prompt"]) == question.prompt for body, question in zip(bodies, asked, strict=True))
    assert 20 <= min(question.prompt for question in asked) < 40
    assert 160 < max(question.prompt for question in asked) <= 180
    assert {body["max_tokens"] for body in bodies} <= set(range(4, 37))


def test_servers_are_chosen_in_turn() -> None:
    """It does not matter which requests have ended."""
    router = Router(2)
    router.give_back(router.take())
    assert [router.take() for _ in range(4)] == [1, 0, 1, 0]


def test_the_server_with_the_fewest_requests_is_chosen() -> None:
    """Of equal ones it is the one whose turn it is."""
    router = Router(2, least=True)
    assert [router.take() for _ in range(4)] == [0, 1, 0, 1]
    router.give_back(1)
    router.give_back(1)
    assert [router.take() for _ in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("size", [1, 7, len(STREAM)])
def test_tokens_are_counted_however_the_stream_is_cut(size) -> None:
    """Each event with a choice is a token, at the moment of its last byte."""
    stream = Stream()
    for at in range(0, len(STREAM), size):
        stream.feed(STREAM[at : at + size], float(at))
    ends = [((number * len(EVENT) - 1) // size) * size for number in (1, 2, 3)]
    assert stream.moments == ends
    assert stream.usage["completion_tokens"] == 3


def test_levels_judge_each_request() -> None:
    """B forgives one slow gap of 199, not two; A looks at the mean; a request without an answer is within none."""
    smooth, once, twice = (
        Answer(at=0, prompt=1, ttft=500, gaps=[5.0] * (199 - slow) + [150.0] * slow, tokens=200) for slow in (0, 1, 2)
    )
    slow = Answer(at=0, prompt=1, ttft=100, gaps=[25.1] * 199, tokens=200)
    late = Answer(at=0, prompt=1, ttft=500.1, gaps=[5.0] * 199, tokens=200)
    failed = Answer(at=0, prompt=1, error="503")
    all_of_them = [smooth, once, twice, slow, late, failed]
    assert [[level.holds(answer) for answer in all_of_them] for level in LEVELS] == [
        [True, True, True, False, False, False],
        [True, True, False, True, False, False],
    ]
    assert share_within(all_of_them, LEVELS[0]) == 0.5


def test_rows_are_read_as_they_were_written(tmp_path) -> None:
    """A file gets a line for each row, and the table counts all seeds of a load together."""
    rows = [
        Row("s", "even:1x1:1/2", seed, 1.0, 2.0, [Answer(at=0, prompt=8, ttft=seed, gaps=[1.5], tokens=2)])
        for seed in (1, 2)
    ]
    for row in rows:
        write_row(tmp_path / "rows.jsonl", row)
    assert read_rows([tmp_path / "rows.jsonl"]) == rows
    line = cells(figures_of(rows))
    assert line[:6] == ["s", "even:1x1:1/2", "1,2", "2/2", "2.0", "2.0"]
    assert "server 0: 2" in line


def test_published_results_tell_each_run_apart(tmp_path) -> None:
    """The file has the share of all requests and of each run, and what no request has is none."""
    late = Answer(at=0, prompt=8, ttft=900, tokens=1)
    rows = [
        Row("s", "even:1x1:1/2", 1, 1.0, 2.0, [late, Answer(at=1, prompt=8, ttft=9, gaps=[5.0], tokens=2)]),
        Row("s", "even:1x1:1/2", 2, 1.0, 2.0, [late]),
        Row("t", "even:1x1:1/2", 1, 1.0, 2.0, [late], about={"versions": {"vllm": "1"}}),
    ]
    file = tmp_path / "results.json"
    write_results(file, results_of(rows))
    read = msgspec.json.decode(file.read_bytes(), type=Results)
    assert read.machines == [{}, {"vllm": "1"}]
    first, second = read.figures
    assert (first.system, first.seeds, first.asked, first.gap2_p50) == ("s", [1, 2], 3, 5.0)
    assert first.within["A"] == pytest.approx(1 / 3, abs=1e-4)
    assert first.within_runs["A"] == [0.5, 0.0]
    assert (second.system, second.seeds, second.gap2_p50) == ("t", [1], None)


def test_an_answer_gets_what_the_proxy_tells_about_it() -> None:
    """By its request's id: the workers, by their ports, and the times that are known."""
    split, whole, unknown = (Answer(at=0, prompt=1, request_id=name) for name in ("a", "b", "c"))
    split.headers = {"x-kvbelt-path": "first-token"}
    known: dict[str, object] = {"timings_ms": {"queue": None, "total": 5.0}, "transfer": None, "after": []}
    records = [
        {"request_id": "b", "workers": {"prefill": None, "decode": "127.0.0.1:7211"}} | known,
        {"request_id": "a", "workers": {"prefill": "127.0.0.1:7210", "decode": "127.0.0.1:7211"}} | known,
    ]
    add_records([split, whole, unknown], records)
    assert [answer.action for answer in (split, whole, unknown)] == ["first-token 7210>7211", "7211", "server 0"]
    assert split.record["timings_ms"] == {"total": 5.0}


def test_a_damaged_file_is_refused(tmp_path) -> None:
    """The error names the file and the line."""
    (tmp_path / "rows.jsonl").write_text('{"system": 1}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1 is no row"):
        read_rows([tmp_path / "rows.jsonl"])


@async_test
async def test_each_request_is_timed() -> None:
    """Tokens, gaps, headers, cached tokens and refusals are noted; requests go where the router says."""

    async def answer(exchange):
        if b"refuse" in exchange.request.body:
            exchange.respond(503, (), b"full")
            return
        exchange.start(200, ((b"x-kvbelt-path", b"local; reason=short_prompt"), (b"server", b"x")))
        exchange.write(STREAM)
        exchange.end()

    async with Running(answer) as one, Running(answer) as other:
        asked = [Question(0.0, 5, b"{}"), Question(0.0, 6, b"{}"), Question(0.0, 7, b"refuse")]
        answers, _ = await _load._send(asked, [one.port, other.port], Router(2))
    assert [(answer.prompt, answer.server) for answer in answers] == [(5, 0), (6, 1), (7, 0)]
    assert answers[0].headers == {"x-kvbelt-path": "local; reason=short_prompt"}
    assert (answers[0].tokens, len(answers[0].gaps), answers[0].cached, answers[0].action) == (3, 2, 16, "local")
    assert answers[0].ttft > 0
    assert [answer.error for answer in answers] == ["", "", "503 full"]


@async_test
async def test_a_request_without_an_answer_is_cancelled(monkeypatch) -> None:
    """After the patience of the load it is missed; the others count. Nobody listening is noted, too."""
    monkeypatch.setattr(_load, "PATIENCE_SECONDS", 0.05)

    async def silent(exchange):
        exchange.start(200, (), EVENT)
        await exchange.drain()
        await _load.asyncio.Event().wait()

    async with Running(silent) as running:
        asked = [Question(0.0, 5, b"{}"), Question(0.0, 5, b"{}")]
        answers, _ = await _load._send(asked, [running.port, free_port()], Router(2))
    assert answers[0].error == "not answered in time"
    assert answers[1].error.startswith("ConnectError: ")
