"""Service levels: the deployment's, a request's own, and how they reach workers."""

import asyncio

import pytest

from kvbelt.cli import build_parser
from kvbelt.errors import SettingsError
from kvbelt.ops.arguments import placement_arguments
from kvbelt.proxy.settings import Address, ProxySettings
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode
from tests.proxy.support import Deployment, async_test

BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0}


async def levels_and_header(headers=(), **settings):
    """What a request is booked with, and what its decode worker is told."""
    async with Deployment(**settings) as deployment:
        decode = deployment.decode[0]
        decode.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(BODY, headers=headers))
        await decode.arrived.wait()
        (booking,) = deployment.proxy.context.dispatcher.placement._running
        decode.script.before_head.set()
        await asking
        return booking.demand.levels, decode.requests[0][1].get(b"x-kvbelt-itl-ms")


@async_test
async def test_a_request_has_the_deployments_levels():
    assert await levels_and_header() == (ServiceLevels(0.5, 0.05, None), b"50")
    settings = {"slo_ttft_ms": 200.0, "slo_itl_ms": 0.0, "slo_tpot_ms": 25.0}
    assert await levels_and_header(**settings) == (ServiceLevels(0.2, None, 0.025), None)


@async_test
async def test_a_request_may_have_levels_of_its_own():
    headers = ((b"x-kvbelt-slo-ttft-ms", b"2000"), (b"x-kvbelt-slo-itl-ms", b"12.5"))
    assert await levels_and_header(headers) == (ServiceLevels(2.0, 0.0125, None), b"12.5")
    headers = ((b"x-kvbelt-slo-itl-ms", b"0"), (b"x-kvbelt-slo-tpot-ms", b"20"))
    assert await levels_and_header(headers) == (ServiceLevels(0.5, None, 0.02), None)


@pytest.mark.parametrize("name", ["x-kvbelt-slo-ttft-ms", "x-kvbelt-slo-itl-ms", "x-kvbelt-slo-tpot-ms"])
@async_test
async def test_a_level_that_is_no_number_is_refused(name):
    async with Deployment() as deployment:
        for said in (b"soon", b"-1", b"nan", b"inf", b"", *([b"0"] if "ttft" in name else [])):
            got = await deployment.ask(BODY, headers=((name.encode(), said),))
            assert (got.status, got.json["error"]["param"]) == (400, name)
            assert "milliseconds" in got.json["error"]["message"]
        assert not deployment.prefill[0].requests


@pytest.mark.parametrize("settings", [{"slo_ttft_ms": 0.0}, {"slo_itl_ms": -1.0}, {"slo_tpot_ms": float("nan")}])
def test_a_setting_that_is_no_level_is_refused(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        ProxySettings(decode=(Address("a", 1),), **settings)


def test_kvbelt_up_hands_every_level_on():
    given = ["--placement", "whole", "--slo-ttft-ms", "200", "--slo-itl-ms", "0", "--slo-tpot-ms", "12.5"]
    given += ["--min-prompt-tokens", "7"]
    for command in (["proxy"], ["up", "1p1d"]):
        assert list(placement_arguments(build_parser().parse_args([*command, *given]))) == given


@pytest.mark.parametrize(
    ("settings", "itl"),
    [
        ({"prefill": (Address("a", 2),)}, 0.05),
        ({}, None),
        ({"prefill": (Address("a", 2),), "placement": Mode.WHOLE}, None),
        ({"placement": Mode.WHOLE, "slo_itl_ms": 30.0}, 0.03),
    ],
)
def test_only_where_requests_can_be_split_is_there_a_level_between_tokens_by_default(settings, itl):
    """Prompts that are cut take longer, and whole requests must take no longer than on plain servers."""
    assert ProxySettings(decode=(Address("a", 1),), **settings).levels.itl == itl
