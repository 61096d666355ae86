"""The prompts that a vLLM server sends: which of their blocks each step completes. Pure.

With every step that computes a part of such a prompt, the worker is told which blocks that step completes. Blocks
cached from earlier prompts go along with the first.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

from kvbelt.vllm.groups import NULL_BLOCK, Groups, kept
from kvbelt.vllm.requests import Effect, Outgoing, SendEvent, SendState, with_remaining_time
from kvbelt.vllm.step_messages import ScheduledPrompt, Send, Written
from kvbelt.wire.handoff import PrefillHandoff

log = logging.getLogger(__name__)


class Sends:
    """Of all ``requests``, those that send.

    Args:
        requests: of the server, by id. The owner adds and removes them.
        block_size: tokens in a block.
        groups: of the model's layers.
        clock: seconds, from any origin.
    """

    def __init__(
        self, requests: Mapping[str, object], block_size: int, groups: Groups, clock: Callable[[], float]
    ) -> None:
        self._requests = requests
        self._block_size = block_size
        self._groups = groups
        self._clock = clock

    def begin(self, handoff: PrefillHandoff, num_tokens: int, *, generates: bool) -> Outgoing:
        """A new request; ``generates``: it goes on after one token."""
        outgoing = Outgoing(handoff, num_tokens, self._clock() + handoff.deadline_seconds)
        # vLLM gives blocks of a window back as the answer goes on, read or not.
        if self._groups.problem or (generates and any(self._groups.windows)):
            outgoing.state, outgoing.failure = SendState.ABANDONED, "kv_groups"
        return outgoing

    def _outgoing(self, request_id: str) -> Outgoing | None:
        request = self._requests.get(request_id)
        return request if isinstance(request, Outgoing) else None

    def stop(self, preempted: Iterable[str]) -> list[str]:
        """Those of the preempted requests whose blocks the worker must not read any more."""
        stopped: list[str] = []
        for request_id in preempted:
            outgoing = self._outgoing(request_id)
            if outgoing is not None and outgoing.on(SendEvent.PREEMPTED) is Effect.STOP:
                # The decode worker is told by the belt, and computes the prompt itself.
                outgoing.failure = "preempted"
                stopped.append(request_id)
        return stopped

    def take_step(self, scheduled: Iterable[ScheduledPrompt]) -> tuple[tuple[Send, ...], tuple[Written, ...]]:
        """The prompts that a step begins to send, and the blocks that it completes."""
        sends: list[Send] = []
        written: list[Written] = []
        for prompt in scheduled:
            outgoing = self._outgoing(prompt.request_id)
            if outgoing is None:
                continue
            if outgoing.on(SendEvent.SCHEDULED) is Effect.SEND:
                handoff = with_remaining_time(outgoing.handoff, outgoing.deadline, self._clock())
                sends.append(Send(prompt.request_id, handoff, outgoing.num_tokens, outgoing.hashes))
            if outgoing.state is SendState.SENDING:
                outgoing.block_ids += prompt.new_block_ids
                outgoing.others = outgoing.others or tuple([] for _ in prompt.others)
                for known, new in zip(outgoing.others, prompt.others, strict=False):
                    known.extend(new)
                num_tokens = min(prompt.num_computed_tokens + prompt.num_scheduled_tokens, outgoing.num_tokens)
                last = num_tokens == outgoing.num_tokens
                end = -(-num_tokens // self._block_size) if last else num_tokens // self._block_size
                first, outgoing.announced = outgoing.announced, end
                # Else nothing is complete yet, or this is a later step of a request whose prompt is complete.
                if first != end:
                    blocks = (*outgoing.block_ids[first:end], *(self._kept(outgoing) if last else ()))
                    if self._groups.several and NULL_BLOCK in blocks:
                        # Never complete, the transfer fails when the request ends.
                        log.error("request %s: vLLM has given up blocks that are still seen", prompt.request_id)
                        continue
                    written.append(Written(prompt.request_id, first, blocks, last))
        return tuple(sends), tuple(written)

    def _kept(self, outgoing: Outgoing) -> tuple[int, ...]:
        return kept(outgoing.num_tokens, self._block_size, self._groups.windows, outgoing.others)

    def on_report(self, sent: Mapping[str, str]) -> None:
        """Transfers have ended, each with a reason, or an empty one."""
        for request_id, reason in sent.items():
            outgoing = self._outgoing(request_id)
            if outgoing is not None and reason:
                outgoing.failure = reason
