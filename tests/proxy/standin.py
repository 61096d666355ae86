"""A stand-in worker: the contract between proxy and workers on a toy model, on our own HTTP server.

The model's next token depends on every token before it, so that a continuation over the wrong prompt, or
from the wrong place, gives another text. ``tests/proxy/test_standin.py`` verifies it against the contract.
"""

import asyncio
import json
from dataclasses import dataclass, field

from kvbelt.http import Exchange, Server, ServerLimits
from tests.http.support import free_port

EOS = 0
VOCABULARY = 499
COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
MAX_MODEL_LEN = 4096


def tokenize(text):
    """One token a byte, never EOS."""
    return [byte % (VOCABULARY - 1) + 1 for byte in text.encode()]


def next_token(ids):
    """The toy model."""
    return (sum(i * token for i, token in enumerate(ids, 1)) * 7919 + len(ids)) % VOCABULARY


def text_of(token):
    """A token's text: words, some with characters beyond ASCII and some that JSON escapes."""
    if token == EOS:
        return ""
    return f' w{token}"' if token % 7 == 0 else f" 字{token}\n" if token % 5 == 0 else f" w{token}"


@dataclass
class Script:
    """How a stand-in misbehaves. Everything is off at first."""

    status: int | None = None  #: answer completions with this
    body: bytes = b'{"error": {"message": "as scripted", "type": "test", "param": null, "code": 1}}'
    before_head: asyncio.Event | None = None  #: wait for it before answering
    die_before_head: bool = False
    die_behind_head: bool = False  #: of a stream: the head leaves, and nothing else
    die_after_tokens: int | None = None
    stop_after_tokens: tuple[int, asyncio.Event] | None = None  #: wait for it in mid-answer
    health_status: int = 200
    health_hangs: bool = False
    transfer_state: dict | None = None  #: a prefill worker's kv_transfer_params
    first_text: str | None = None  #: what it says that the first token is
    cached_tokens: int | None = None  #: of the prompt, as it says; None: it does not say
    kv: str | None = None  #: a decode worker's x-kvbelt-kv; None: received
    kv_in_answer: bool = False  #: as vLLM, whole answers say it in kv_transfer_params, streams and heads nothing
    kv_arrives: asyncio.Event | None = None  #: a decode worker waits for it
    kv_seconds: bool = False  #: a decode worker waits for KV for as long as it was told to
    bad_event: bool = False  #: the second event of a stream is not JSON
    pad: int = 0  #: extra bytes a streamed token
    peers_status: int = 200  #: of /kvbelt/peers; 404: has no such route, as vLLM
    peers_by_request: bool = False  #: as vLLM, it is told of receivers by a request of two tokens
    vllm_metrics: str | None = None  #: as vLLM, its health has no body, and this is its /metrics
    peers_hang: asyncio.Event | None = None  #: a handshake that takes so long
    peers_refusal: dict | None = None  #: what is said of each peer instead of "ready"
    extra_message: dict = field(default_factory=dict)
    api_key: str | None = None  #: as vLLM with --api-key, its /v1 routes ask for it
    others: dict = field(default_factory=dict)  #: other routes: path → (status, content type, pieces of the body)
    about: dict | None = None  #: what it says of itself to who looks for a fault; None: nothing, as vLLM


class Standin:
    """One worker."""

    def __init__(self, role, *, engine_id=None):
        self.role = role
        self.engine_id = engine_id or f"{role}-life-1"
        self.script = Script()
        self.requests = []  # (path, headers, body)
        self.described = []  # the parameters of the questions to describe itself
        self.questions = []  # headers of what the proxy asks for itself, as a vLLM server is asked
        self.told = []  # engine ids of receivers, in the order in which it was told of them
        self.missed = 0  # requests for a route that it has not
        self.gone = 0  # requests whose caller closed
        self.gone_event = asyncio.Event()
        self.arrived = asyncio.Event()
        self.created = 1_700_000_000 if role == "prefill" else 1_700_000_007
        self.has_receiver = role != "prefill"
        self.more_health = {}
        self.models = ["toy"]
        self.server = None
        self.port = 0

    async def start(self, port=0):
        """Listen."""
        self.server = Server(self.handle, limits=ServerLimits())
        self.port = await self.server.start("127.0.0.1", port or free_port())
        return self

    async def stop(self):
        """End as a killed process does."""
        if self.server is not None:
            await self.server.close(0)
            self.server = None

    def health(self):
        """The contract's body."""
        receiver = None
        if self.has_receiver:
            receiver = {"engine_id": self.engine_id, "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
        return {
            "status": "ok", "state": "ready" if self.script.health_status == 200 else "draining", "role": self.role,
            "model": "toy", "engine_id": self.engine_id, "max_model_len": MAX_MODEL_LEN,
            "load": {"running": 0, "waiting": 0, "blocks_total": 10, "blocks_free": 10, "blocks_cached": 0},
            "receiver": receiver, "engine": "embedded",
            **self.more_health,
        }  # fmt: skip

    async def handle(self, exchange: Exchange):
        """Answer."""
        path = exchange.request.path
        if path == "/health":
            if self.script.health_hangs:
                await asyncio.Event().wait()
            if self.script.vllm_metrics is not None:
                exchange.respond(200, (), b"")
                return
            answer(exchange, self.script.health_status, self.health())
        elif self.script.api_key is not None and path.startswith("/v1/") and not self.has_key(exchange):
            answer(exchange, 401, {"error": "Unauthorized"})
        elif path == "/metrics":
            exchange.respond(200, (), (self.script.vllm_metrics or "").encode())
        elif b'"kvbelt":"describe"' in exchange.request.body.replace(b" ", b""):
            self.questions.append(dict(exchange.request.headers))
            self.described.append(json.loads(exchange.request.body)["kv_transfer_params"])
            answer(exchange, 200, {"kv_transfer_params": self.health()})
        elif path == "/kvbelt/about":
            answer(exchange, 404 if self.script.about is None else 200, self.script.about or {})
        elif path == "/kvbelt/peers":
            await self.greet(exchange)
        elif self.script.peers_by_request and b'"kvbelt":"warm"' in exchange.request.body:
            self.questions.append(dict(exchange.request.headers))
            params = json.loads(exchange.request.body)["kv_transfer_params"]
            assert set(params) == {"kvbelt", "receivers"}
            await self.greet(exchange, params["receivers"])
        elif path == "/v1/models":
            cards = [{"id": name, "object": "model"} for name in self.models]
            answer(exchange, 200, {"object": "list", "data": cards})
        else:
            try:
                await (self.answer_other if self.script.others and path not in COMPLETIONS else self.generate)(exchange)
            except asyncio.CancelledError:
                self.gone += 1
                self.gone_event.set()
                raise

    def kv_header(self):
        """What became of the KV, unless the answer's body says it."""
        return [] if self.script.kv_in_answer else [(b"x-kvbelt-kv", (self.script.kv or "received").encode())]

    async def answer_other(self, exchange):
        """A route besides completions; without an entry, as FastAPI answers."""
        path = exchange.request.path
        self.requests.append((exchange.request.target, dict(exchange.request.headers), exchange.request.body))
        status, kind, pieces = self.script.others.get(path, (404, "application/json", [b'{"detail":"Not Found"}']))
        if self.script.die_before_head:
            self.die(exchange)
            await asyncio.Event().wait()
        exchange.start(status, ((b"content-type", kind.encode()),))
        for piece in pieces:
            if piece is None:
                await asyncio.sleep(0)
                self.die(exchange)
                await asyncio.Event().wait()
            exchange.write(piece)
        exchange.end()

    def has_key(self, exchange):
        """Whether a request has the key, where one is asked for."""
        return exchange.request.headers.get(b"authorization") == f"Bearer {self.script.api_key}".encode()

    async def greet(self, exchange, asked_by_request=None):
        """Handshakes with receivers."""
        script = self.script
        if script.peers_status != 200 and asked_by_request is None:
            self.missed += 1
            answer(exchange, script.peers_status, {})
            return
        receivers = asked_by_request or json.loads(exchange.request.body)
        self.told += [receiver["engine_id"] for receiver in receivers]
        if script.peers_hang is not None:
            await script.peers_hang.wait()
        said = script.peers_refusal or {"state": "ready", "reason": "", "detail": ""}
        peers = [{"engine_id": receiver["engine_id"]} | said for receiver in receivers]
        told = {"peers": peers}
        answer(exchange, 200, told if asked_by_request is None else {"kv_transfer_params": told})

    async def generate(self, exchange):
        """Completions and chat."""
        script, chat = self.script, exchange.request.path == COMPLETIONS[1]
        request_id = exchange.request.headers.get(b"x-request-id", b"none").decode()
        body = json.loads(exchange.request.body)
        self.requests.append((exchange.request.path, dict(exchange.request.headers), body))
        self.arrived.set()
        if script.before_head is not None:
            await script.before_head.wait()
        if script.die_before_head:
            self.die(exchange)
            await asyncio.Event().wait()
        if script.status is not None:
            exchange.respond(script.status, [(b"content-type", b"application/json")], script.body)
            return
        if chat:
            prompts = [tokenize("".join(f"<{m['role']}>{m['content']}" for m in body["messages"]))]
        elif isinstance(body["prompt"], str):
            prompts = [tokenize(body["prompt"])]
        elif isinstance(body["prompt"][0], int):
            prompts = [body["prompt"]]
        else:
            prompts = [tokenize(text) for text in body["prompt"]]
        limit = (chat and body.get("max_completion_tokens")) or body.get("max_tokens")
        if limit is None:
            limit = MAX_MODEL_LEN - len(prompts[0]) if chat else 16
        if len(prompts[0]) + limit > MAX_MODEL_LEN:
            error = {"message": "too long", "type": "invalid_request_error", "param": "max_tokens", "code": 400}
            answer(exchange, 400, {"error": error})
            return
        headers = [(b"server-timing", b"queue;dur=1.5, prefill;dur=20, kv;dur=3, load;dur=0.5")]
        params = body.get("kv_transfer_params")
        if params is not None and "receiver" not in params and "kvbelt" not in params:
            if script.kv_arrives is not None:
                await script.kv_arrives.wait()
            if script.kv_seconds:
                await asyncio.sleep(params["deadline_seconds"])
            headers += self.kv_header()
        await self.write(exchange, body, prompts, limit, headers=headers, request_id=request_id, chat=chat)

    async def write(self, exchange, body, prompts, limit, *, headers, request_id, chat):  # noqa: C901, PLR0912
        """The answer, streamed or whole."""
        script = self.script
        base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if chat else "text_completion", "created": self.created, "model": "toy",
        }  # fmt: skip
        stream, wants_ids = body.get("stream"), body.get("return_token_ids")
        usage_wanted = (body.get("stream_options") or {}).get("include_usage")
        tail = {"usage": None} if usage_wanted else {}
        if stream:
            exchange.start(200, [(b"content-type", b"text/event-stream; charset=utf-8"), *headers])
            if script.die_behind_head:
                await asyncio.sleep(0)
                self.die(exchange)
                await asyncio.Event().wait()
            if chat:
                base["object"] = "chat.completion.chunk"
                choice = {
                    "index": 0,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
                ids = {"prompt_token_ids": prompts[0]} if wants_ids else {}
                exchange.write(event(base | {"choices": [choice]} | tail | ids))
        choices, total = [], 0
        for index, prompt in enumerate(prompts):
            ids, text, finish = [], "", None
            while finish is None:
                if script.die_after_tokens == total:
                    exchange.write(b'data: {"id":"cut')
                    await asyncio.sleep(0)
                    self.die(exchange)
                    await asyncio.Event().wait()
                if script.stop_after_tokens is not None and script.stop_after_tokens[0] == total:
                    await script.stop_after_tokens[1].wait()
                token = next_token(prompt + ids)
                ids.append(token)
                total += 1
                ended = token == EOS and not body.get("ignore_eos")
                finish = "stop" if ended else "length" if len(ids) == limit else None
                piece = text_of(token)
                if total == 1 and script.first_text is not None:
                    piece = script.first_text
                text += piece
                if stream and script.bad_event and total == 2:
                    exchange.write(b"data: {nonsense}\n\n")
                if stream:
                    exchange.write(
                        event(
                            base
                            | {
                                "choices": [
                                    chunk(
                                        chat,
                                        index,
                                        piece + "x" * script.pad,
                                        finish=finish,
                                        ids=[token],
                                        wants_ids=wants_ids,
                                        prompt=prompt if len(ids) == 1 else None,
                                    )
                                ]
                            }
                            | tail
                        )
                    )
                    if exchange.paused:
                        await exchange.drain()
                    if total % 8 == 0:
                        await asyncio.sleep(0)
            choices.append(
                whole(chat, index, text, finish=finish, prompt=prompt, ids=ids, wants_ids=wants_ids)
                | script.extra_message
            )
        prompt_tokens = sum(map(len, prompts))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": total, "total_tokens": prompt_tokens + total}
        if script.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": script.cached_tokens}
        if stream:
            if usage_wanted:
                exchange.write(event(base | {"choices": [], "usage": usage}))
            exchange.write(b"data: [DONE]\n\n")
            exchange.end()
            return
        reply = base | {"choices": choices, "usage": usage}
        if chat and wants_ids:
            reply["prompt_token_ids"] = prompts[0]
        params = body.get("kv_transfer_params")
        if params is not None and "receiver" in params:
            reply["kv_transfer_params"] = script.transfer_state or {
                "transfer_id": params["transfer_id"],
                "state": "open",
                "reason": None,
            }
        elif params is not None and script.kv_in_answer:
            fate, _, reason = (script.kv or "received").partition("; reason=")
            said = {"transfer_id": params["transfer_id"], "kv": fate} | ({"reason": reason} if reason else {})
            reply |= {"system_fingerprint": None, "kv_transfer_params": said, "metrics": None}
        answer(exchange, 200, reply, headers)

    def die(self, exchange):
        """The connection ends as if the process had been killed."""
        exchange._outlet.transport.close()


def chunk(chat, index, piece, *, finish, ids, wants_ids, prompt):
    """One choice of a stream event."""
    if chat:
        choice = {
            "index": index,
            "delta": {"content": piece} if piece else {},
            "logprobs": None,
            "finish_reason": finish,
        }
        if finish is not None:
            choice["stop_reason"] = None
        return choice | ({"token_ids": ids} if wants_ids else {})
    choice = {"index": index, "text": piece, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return choice | ({"prompt_token_ids": prompt, "token_ids": ids} if wants_ids else {})


def whole(chat, index, text, *, finish, prompt, ids, wants_ids):
    """One choice of a whole answer."""
    if chat:
        choice = {
            "index": index, "message": {"role": "assistant", "content": text}, "logprobs": None,
            "finish_reason": finish, "stop_reason": None,
        }  # fmt: skip
        return choice | ({"token_ids": ids} if wants_ids else {})
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return choice | ({"prompt_token_ids": prompt, "token_ids": ids} if wants_ids else {})


def event(body):
    """One server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def answer(exchange, status, body, headers=()):
    """A whole JSON answer."""
    exchange.respond(status, [(b"content-type", b"application/json"), *headers], json.dumps(body).encode())
