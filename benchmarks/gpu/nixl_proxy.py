"""The smallest fair proxy for vLLM's NixlConnector: prefill, then decode with what prefill answered, relayed.

Servers take turns. No more than the rival needs: it pulls, so its decode leg begins when the prefill
leg has answered, and the client's first token is decode's.
"""

import argparse
import itertools
import json

import aiohttp
from aiohttp import web

_ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def make_app(prefill: list[str], decode: list[str]) -> web.Application:
    """An application that serves ``/v1/completions`` and ``/health``."""
    app = web.Application(client_max_size=64 << 20)
    prefill_turn, decode_turn = itertools.cycle(prefill), itertools.cycle(decode)

    async def session(application: web.Application):  # type: ignore[no-untyped-def]  # noqa: ANN202
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as client:
            application["client"] = client
            yield

    async def completions(request: web.Request) -> web.StreamResponse:
        client: aiohttp.ClientSession = request.app["client"]
        body = await request.json()
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": _ASK}
        first.pop("stream_options", None)
        first.pop("min_tokens", None)
        async with client.post(next(prefill_turn) + "/v1/completions", json=first) as answer:
            if answer.status != 200:
                return web.Response(status=answer.status, body=await answer.read())
            params = (await answer.json())["kv_transfer_params"]
        async with client.post(
            next(decode_turn) + "/v1/completions", json={**body, "kv_transfer_params": params}
        ) as answer:
            relayed = web.StreamResponse(status=answer.status, headers={"content-type": answer.content_type})
            await relayed.prepare(request)
            async for chunk in answer.content.iter_any():
                await relayed.write(chunk)
            await relayed.write_eof()
            return relayed

    async def health(_: web.Request) -> web.Response:
        return web.Response(text=json.dumps({"status": "ok"}))

    app.cleanup_ctx.append(session)
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/health", health)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", nargs="+", required=True)
    parser.add_argument("--decode", nargs="+", required=True)
    args = parser.parse_args()
    web.run_app(make_app(args.prefill, args.decode), host="127.0.0.1", port=args.port, print=None, access_log=None)
