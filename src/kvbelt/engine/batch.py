"""One step's chunks as the model takes them: what it computes, whose next token is drawn, and what is announced."""

from collections.abc import Sequence
from functools import partial

import torch

from kvbelt.engine.attention import Segment
from kvbelt.engine.live import Live
from kvbelt.engine.model import PagedModel
from kvbelt.engine.outgoing import Announcement, announcements
from kvbelt.engine.pool import KVPool
from kvbelt.engine.sampling import Sampled, SampleInput, reports_of, sample
from kvbelt.engine.scheduler import Chunk


class Batch:
    """The chunks of a step, each with its request."""

    def __init__(self, chunks: Sequence[Chunk], lives: Sequence[Live], pool: KVPool) -> None:
        self._pool = pool
        self._segments: list[Segment] = []
        self._token_ids: list[int] = []
        self._rows: list[int] = []  # whose logits are sampled
        self._sampling: list[Live] = []  # for these requests
        self._reported: list[tuple[Live, range]] = []
        self._report_rows: list[int] = []
        for chunk, live in zip(chunks, lives, strict=True):
            end = chunk.start + chunk.length
            if asked := _to_report(chunk, live):
                self._reported.append((live, asked))
                first = len(self._token_ids) - chunk.start
                self._report_rows.extend(range(first + asked.start, first + asked.stop))
            self._segments.append(Segment(chunk.sequence.block_ids, chunk.start, chunk.length))
            self._token_ids.extend(chunk.sequence.token_ids[chunk.start : end])
            if chunk.samples:
                self._rows.append(len(self._token_ids) - 1)
                self._sampling.append(live)
        self._announced = announcements(zip(chunks, lives, strict=True), pool.layout)

    def forward(self, model: PagedModel) -> torch.Tensor:
        """Run the model, announcing each layer's blocks. Returns the logits to sample from."""
        listener = partial(_notify, self._announced) if self._announced else None
        num_rows = len(self._rows)
        logits = model.forward(self._pool, self._segments, self._token_ids, self._rows + self._report_rows, listener)
        report_logits, logits = logits[num_rows:], logits[:num_rows]
        for live, asked in self._reported:
            followed = live.request.prompt_token_ids[asked.start + 1 : asked.stop + 1]
            count = live.request.sampling.prompt_logprobs or 0
            live.prompt_reports += reports_of(report_logits[: len(asked)], followed, count)
            report_logits = report_logits[len(asked) :]
        return logits

    def sample(self, logits: torch.Tensor) -> list[tuple[Live, Sampled]]:
        """Draw the next tokens. The announced blocks count as announced from here on."""
        for one in self._announced:
            one.live.announced = one.first + len(one.block_ids)
        inputs = [
            SampleInput(
                live.request.sampling,
                live.seed,
                live.request.prompt_token_ids,
                live.sequence.token_ids[live.sequence.prompt_len :],
                live.answer.end_token_ids,
                live.request.grammar,
            )
            for live in self._sampling
        ]
        return list(zip(self._sampling, sample(logits, inputs), strict=True)) if inputs else []


def _to_report(chunk: Chunk, live: Live) -> range:
    """Positions of the chunk whose next token is one of the prompt that has no report yet."""
    if live.request.sampling.prompt_logprobs is None:
        return range(0)
    end = min(chunk.start + chunk.length, chunk.sequence.prompt_len - 1)
    return range(min(end, max(chunk.start, len(live.prompt_reports))), end)


def _notify(announced: list[Announcement], layer: int, ready: object) -> None:
    for one in announced:
        one.notify(layer, ready)
