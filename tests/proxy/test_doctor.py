"""The doctor's first finding in the console's data."""

from tests.proxy.support import Deployment, async_test

KEY = "k" * 32
PLACE = "/kvbelt/console.json?doctor=1"


async def finding(deployment, **request):
    """Ask, let the doctor look, and ask again."""
    assert (await deployment.get(PLACE, **request)).json["doctor"] is None
    await deployment.proxy._doctor._task
    return (await deployment.get(PLACE, **request)).json["doctor"]


@async_test
async def test_the_doctor_names_a_worker_that_is_gone():
    """It looks at this proxy, from a process of its own."""
    async with Deployment(1, 2, health_interval_seconds=0.05, health_timeout_seconds=0.2) as deployment:
        gone = deployment.decode[0]
        await gone.stop()
        found = await finding(deployment)
        assert found["severity"] == "critical"
        assert str(gone.port) in found["what"]
        assert found["change"]


@async_test
async def test_the_doctor_has_the_key_where_the_proxy_asks_for_it():
    """Beyond loopback nobody sees requests without it."""
    settings = {"host": "0.0.0.0", "admin_key": KEY, "health_interval_seconds": 0.05, "health_timeout_seconds": 0.2}
    async with Deployment(1, 2, **settings) as deployment:
        await deployment.decode[0].stop()
        found = await finding(deployment, headers=((b"authorization", f"Bearer {KEY}".encode()),))
        assert str(deployment.decode[0].port) in found["what"]


@async_test
async def test_nobody_is_asked_while_nobody_looks():
    async with Deployment() as deployment:
        assert (await deployment.get("/kvbelt/console.json")).json["doctor"] is None
        assert deployment.proxy._doctor._task is None
