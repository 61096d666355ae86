from dataclasses import dataclass, field

from kvbelt.engine.answer import Answer
from kvbelt.engine.api import GenerationRequest, Timing
from kvbelt.engine.sampling import Sampled
from kvbelt.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Live:
    sequence: Sequence
    answer: Answer
    seed: int
    submitted: float
    started: float | None = None  #: when its first step was planned
    first_token: float | None = None
    prompt_reports: list[Sampled] = field(default_factory=list)  #: of its second token and those behind, if asked for
    load_seconds: float = 0.0
    incoming_released: bool = False  #: or its load will do it
    announced: int = 0  #: prompt blocks that ``outgoing`` has been given, in every layer
    outgoing_broken: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.sequence.request

    def timing(self) -> Timing:
        started = self.submitted if self.started is None else self.started
        prefill = 0.0 if self.first_token is None else self.first_token - started - self.load_seconds
        return Timing(
            queue=started - self.submitted,
            load=self.load_seconds,
            prefill=prefill,
            computed_tokens=self.sequence.prompt_len - self.sequence.loaded_tokens - self.sequence.cached_tokens,
            loaded_tokens=self.sequence.loaded_tokens,
            cached_tokens=self.sequence.cached_tokens,
            lost=self.sequence.lost,
            preemptions=self.sequence.preemptions,
        )
