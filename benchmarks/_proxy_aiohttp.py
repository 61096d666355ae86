"""The baseline: a plain prefill-then-decode proxy on aiohttp, uvloop and msgspec, as one would first write it.

It does what the benchmarked road does (first token from the prefill worker, then the decode worker's stream)
and nothing else: no health, no errors, no deadlines, no metrics.

Usage: proxy_aiohttp.py PORT PREFILL_PORT DECODE_PORT
"""

import asyncio
import sys
import uuid

import aiohttp
import msgspec
import uvloop
from aiohttp import web

decode, encode = msgspec.json.decode, msgspec.json.encode


async def main(port: int, prefill_port: int, decode_port: int) -> None:
    """Serve until the process is killed."""
    prefill = f"http://127.0.0.1:{prefill_port}/v1/completions"
    decoder = f"http://127.0.0.1:{decode_port}/v1/completions"
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    receiver = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}

    async def completions(request: web.Request) -> web.StreamResponse:
        body = decode(await request.read())
        headers = {"x-request-id": uuid.uuid4().hex, "content-type": "application/json"}
        handoff = {"transfer_id": uuid.uuid4().hex, "deadline_seconds": 600.0}
        leg = {**body, "max_tokens": 1, "stream": False, "return_token_ids": True}
        leg["kv_transfer_params"] = {**handoff, "receiver": receiver}
        async with session.post(prefill, data=encode(leg), headers=headers) as answer:
            first = decode(await answer.read())
        choice = first["choices"][0]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        event = {"index": 0, "text": choice["text"], "logprobs": None, "finish_reason": None}
        chunk = {"id": first["id"], "object": "text_completion", "created": first["created"], "model": first["model"]}
        await response.write(b"data: " + encode({**chunk, "choices": [event]}) + b"\n\n")
        leg = {**body, "prompt": choice["prompt_token_ids"] + choice["token_ids"]}
        leg |= {"max_tokens": body["max_tokens"] - 1, "kv_transfer_params": handoff}
        async with session.post(decoder, data=encode(leg), headers=headers) as answer:
            async for data in answer.content.iter_any():
                await response.write(data)
        await response.write_eof()
        return response

    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:4])))
