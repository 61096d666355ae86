"""The shadow account switches splitting off where it loses, and everybody can read so."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kvbelt.proxy.observe import shadow
from kvbelt.proxy.observe.records import Record
from kvbelt.routing.placement import Mode
from kvbelt.wire.replay import EndedRequest, ReplayAnswer
from tests.proxy.support import Deployment, async_test, eventually
from tests.wire.messages import STEPS

STREAMED = {"prompt": [5] * 30, "max_tokens": 12, "temperature": 0, "stream": True}
WITHIN, LATE = (EndedRequest(0.0, 10, 0, 10, True, 0.5, None, None, True, None, within) for within in (True, False))
LOSES, WINS = ReplayAnswer(elastic=0.7, whole=0.9), ReplayAnswer(elastic=0.9, whole=0.9)


#: Every request is within its levels, however long this machine pauses.
LENIENT = {"slo_ttft_ms": 1e9, "slo_itl_ms": 1e9}


class Told(Deployment):
    """Its workers have told what their steps cost."""

    def __init__(self, **settings):
        super().__init__(placement=Mode.ELASTIC, **settings)
        costs = msgspec.structs.replace(STEPS, costs=replace(STEPS.costs, samples=100))
        for standin in (*self.prefill, *self.decode):
            standin.more_health["steps"] = msgspec.to_builtins(costs)

    @property
    def account(self):
        return self.proxy.context.shadow

    async def ask_some(self):
        for number in range(4):
            await self.ask(STREAMED, request_id=f"s{number}")
        await eventually(lambda: not self.proxy.context.records.open)


@pytest.fixture
def few(monkeypatch):
    """A few requests make a window."""
    monkeypatch.setattr(shadow, "LEAST", 4)
    monkeypatch.setattr(shadow, "LEAST_SPLITS", 0)


def children():
    return [one for task in Path("/proc/self/task").iterdir() for one in (task / "children").read_text().split()]


@async_test
async def test_splitting_that_loses_twice_is_switched_off_until_it_wins_twice(caplog):
    async with Told() as deployment:
        account = deployment.account
        for answer in (LOSES, LOSES):
            account.take([WITHIN], answer)
        assert caplog.text.count("splitting is switched off") == 1
        placed = (await deployment.get("/health")).json["placement"]
        assert (placed["setting"], placed["mode"]) == ("elastic", "whole")
        assert placed["regret"] == pytest.approx(0.2)
        assert (await deployment.get("/kvbelt/console.json")).json["proxy"]["placement"] == placed
        metrics = (await deployment.get("/metrics")).body.decode()
        assert 'kvbelt_placement_mode{mode="whole"} 1.0' in metrics
        assert "kvbelt_placement_regret_ratio 0.2" in metrics
        assert 'kvbelt_placement_within_levels_ratio{account="actual"} 1.0' in metrics
        got = await deployment.ask(STREAMED)
        assert got.path == "local; reason=splitting_loses"
        for answer in (WINS, WINS):
            account.take([WITHIN], answer)
        assert caplog.text.count("splitting is switched on again") == 1
        assert (await deployment.get("/health")).json["placement"]["mode"] == "elastic"
        assert (await deployment.ask(STREAMED)).path != "local; reason=splitting_loses"


@async_test
async def test_a_share_far_from_the_expected_one_is_logged_once_while_it_lasts(caplog):
    async with Told() as deployment:
        for window in ([WITHIN], [LATE], [LATE], [WITHIN], [LATE]):
            deployment.account.take(window, WINS)
        assert caplog.text.count("0 % of 1 requests were within their levels, where a replay of them expects 90 %") == 2


def past(records, begin, pause):
    """Half a minute of splits, of which each had its first token soon and its second one after ``pause``."""
    for number in range(120):
        at = begin + number / 4
        record = Record(
            f"{begin}-{number}", "/v1/completions", at, 0.0, stream=True, path="first-token", status=200,
            first_token=at + 0.3, decode_first=at + 0.3 + pause, streamed=201, action="split", ttft_level=0.5,
            itl_level=0.05, prompt_tokens=7500,
        )  # fmt: skip
        records.clock = lambda: record.decode_first + 2.0  # noqa: B023 -- it is called at once
        records.add(record)
        records.end(record)


@async_test
async def test_a_slow_link_switches_splitting_off_until_it_has_recovered():
    """From records to the switch, through the process that replays."""
    async with Told() as deployment:
        modes = []
        for begin, pause in enumerate((2.0, 2.0, 0.03, 0.03)):
            past(deployment.proxy.context.records, 100 * begin, pause)
            await deployment.account.judge()
            modes.append(deployment.account.now().mode)
        assert modes == ["elastic", "whole", "whole", "elastic"]


@pytest.mark.usefixtures("few")
@async_test
async def test_a_window_is_replayed_by_another_process():
    async with Told(**LENIENT) as deployment:
        await deployment.ask_some()
        await deployment.account.judge()
        now = deployment.account.now()
        assert (now.regret, now.actual, now.expected) == (0.0, 1.0, 1.0)
        assert deployment.account._question() is None  # these requests have been in a window
        assert not children()


@async_test
async def test_a_few_requests_are_not_judged():
    async with Told() as deployment:
        await deployment.ask_some()
        assert deployment.account._question() is None


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("code", "limit", "why"),
    [("raise SystemExit('broken')", 30.0, "broken"), ("print('x')", 30.0, "the answer of the replay"),
     ("import time; time.sleep(99)", 0.05, "it took longer than 0.05 s")],
)  # fmt: skip
@async_test
async def test_a_failed_replay_changes_nothing_and_is_logged_once(monkeypatch, caplog, code, limit, why):
    monkeypatch.setattr(shadow, "_REPLAY", ("-c", code))
    monkeypatch.setattr(shadow, "LIMIT", limit)
    async with Told() as deployment:
        for _ in range(2):
            await deployment.ask_some()
            await deployment.account.judge()
        assert deployment.account.now().regret is None
        said = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert len(said) == 1
        assert why in said[0]
        assert not children()


@pytest.mark.usefixtures("few")
@async_test
async def test_a_replay_that_ends_before_it_is_asked_has_failed(monkeypatch, caplog):
    """The proxy may stand still between its start and the question."""
    start = asyncio.create_subprocess_exec

    async def ended(*command, **pipes):
        process = await start(*command, **pipes)
        await process.wait()
        await eventually(process.stdin.is_closing)
        return process

    monkeypatch.setattr(shadow, "_REPLAY", ("-c", "raise SystemExit('broken')"))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", ended)
    async with Told() as deployment:
        await deployment.ask_some()
        await deployment.account.judge()
    assert "splitting stays as it is: broken" in caplog.text


@pytest.mark.usefixtures("few")
@async_test
async def test_a_proxy_that_stops_leaves_no_replay_behind(monkeypatch):
    monkeypatch.setattr(shadow, "_REPLAY", ("-c", "import time; time.sleep(99)"))
    monkeypatch.setattr(shadow, "PERIOD", 0.02)
    monkeypatch.setattr(shadow, "TRIAL", 0.01)
    async with Told() as deployment:
        await deployment.ask_some()
        await eventually(children)
    assert not children()


@pytest.mark.parametrize("mode", [Mode.SPLIT, Mode.WHOLE])
@async_test
async def test_placement_that_was_chosen_is_left_alone(mode):
    async with Deployment(placement=mode) as deployment:
        assert deployment.proxy.context.shadow._task is None
        assert (await deployment.get("/health")).json["placement"]["mode"] == mode


@async_test
async def test_while_splitting_is_off_a_part_of_each_period_has_splits(monkeypatch):
    monkeypatch.setattr(shadow, "PERIOD", 0.1)
    monkeypatch.setattr(shadow, "TRIAL", 0.05)
    async with Told() as deployment:
        placement = deployment.proxy.context.dispatcher.placement
        for answer in (LOSES, LOSES):
            deployment.account.take([WITHIN], answer)
        for mode in (Mode.WHOLE, Mode.ELASTIC, Mode.WHOLE):
            await eventually(lambda mode=mode: placement.mode is mode)
        assert deployment.account.now().mode == Mode.WHOLE


@async_test
async def test_a_split_tells_the_pause_before_its_second_token():
    async with Deployment(**LENIENT) as deployment:
        await deployment.ask(STREAMED)
        await eventually(lambda: not deployment.proxy.context.records.open)
        (ended,) = [one.for_replay() for one in deployment.proxy.context.records.newest_ended()]
        assert (ended.split, ended.prompt, ended.output, ended.within) == (True, 30, 12, True)
        assert ended.pause is not None


@async_test
async def test_after_a_fault_of_the_account_the_next_window_is_judged(monkeypatch, caplog):
    """The fault is in the log."""
    monkeypatch.setattr(shadow, "PERIOD", 0.02)
    monkeypatch.setattr(shadow, "TRIAL", 0.01)
    windows = []

    async def judge(_):
        windows.append(1)
        raise RuntimeError("as scripted")

    monkeypatch.setattr(shadow.ShadowAccount, "judge", judge)
    async with Told():
        await eventually(lambda: len(windows) > 1)
    assert "as scripted" in caplog.text
