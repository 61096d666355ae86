"""What a vLLM server's steps cost, what it has to do, and how much of a prompt a step may carry."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from kvbelt.pacing.costs import DEFAULT_COSTS, LEAST_PROMPT_TOKENS, StepCosts
from kvbelt.vllm.chunk_limit import ChunkLimit
from kvbelt.vllm.pacing import REPORT_SECONDS, SOLVE_SECONDS, Pacing, StepLimits
from kvbelt.wire.steps import StepsNow
from tests.vllm.belts import Clock

BLOCK, MOST = 16, 2048

#: Of a server whose steps cost nothing but this.
TRUTH = StepCosts(base=10e-3, prefill=0.0, token=20e-6, token_context=0.0, decode=0.0, kv_token=0.0)


class Scheduler:
    """As much of vLLM's scheduler as tells ``Pacing`` of steps. A request's answer has no end."""

    def __init__(self, **limits: int) -> None:
        self.clock = Clock()
        self.pacing = Pacing(
            StepLimits(**{"block_size": BLOCK, "prompt_tokens": MOST, "requests": 64, "kv_tokens": 1000} | limits),
            self.clock,
        )
        self.computed: dict[str, int] = {}

    def come(self, request_id: str, num_tokens: int, *, loads: bool = False, generates: bool = True) -> None:
        """A new request."""
        self.pacing.on_new_request(request_id, num_tokens, loads=loads, generates=generates)

    def schedule(self, tokens: Mapping[str, int], began: Mapping[str, int] | None = None) -> None:
        """A step that computes so many tokens of each; ``began``: what was there of those that are new."""
        began = began or {}
        ids = [request_id for request_id in tokens if request_id not in began]
        self.pacing.on_scheduled(tokens, began, ids, [self.computed[request_id] for request_id in ids])
        for request_id, count in tokens.items():
            self.computed[request_id] = began.get(request_id, self.computed.get(request_id, 0)) + count

    def step(self, tokens: Mapping[str, int], began: Mapping[str, int] | None = None, seconds: float = 0.01) -> None:
        """A step and, so many seconds later, its output."""
        self.schedule(tokens, began)
        self.clock.now += seconds
        self.pacing.on_output()

    def know(self, costs: StepCosts) -> None:
        """Let the costs be these, whatever steps take."""
        self.pacing._costs, self.pacing._solve_at = costs, math.inf

    def now(self) -> tuple[int, int, int]:
        """Prompt tokens, decodes, tokens of KV."""
        steps = self.pacing.now()
        return steps.prompt_tokens, steps.decodes, steps.kv_tokens


@pytest.fixture
def vllm() -> Scheduler:
    """A server without requests."""
    return Scheduler()


def test_a_prompt_is_work_until_it_is_computed(vllm: Scheduler) -> None:
    """Cached tokens are not counted; after its last chunk the request decodes, and reads all its KV."""
    vllm.come("a", 100)
    assert vllm.now() == (100, 0, 0)
    vllm.step({"a": 50}, {"a": 32})
    assert vllm.now() == (18, 0, 0)
    vllm.step({"a": 18})
    assert vllm.now() == (0, 1, 100)
    vllm.step({"a": 1})
    assert vllm.now() == (0, 1, 101)
    vllm.pacing.on_finished("a")
    vllm.step({})
    assert vllm.now() == (0, 0, 0)


def test_a_prompt_may_end_with_a_single_token(vllm: Scheduler) -> None:
    """Its chunk of one token costs what a decode costs; the request decodes afterwards."""
    vllm.come("a", 33)
    vllm.step({"a": 32}, {"a": 0})
    assert vllm.now() == (0, 0, 0)  # a single token is no prompt any more, and no decode yet
    vllm.step({"a": 1})
    assert vllm.now() == (0, 1, 33)


def test_what_another_server_sends_is_not_computed_here(vllm: Scheduler) -> None:
    """If it does not come, the prompt is computed after all."""
    vllm.come("a", 100, loads=True)
    vllm.come("b", 100, loads=True)
    assert vllm.now() == (0, 0, 0)
    vllm.step({"a": 1, "b": 40}, {"a": 99, "b": 0})
    assert vllm.now() == (60, 1, 100)


def test_a_request_that_ends_with_its_first_token_does_not_decode(vllm: Scheduler) -> None:
    """As those of a prefill server: the next prompt is not cut for its sake."""
    vllm.pacing.level = 0.02
    vllm.come("a", 100, generates=False)
    vllm.step({"a": 100}, {"a": 0})
    assert vllm.now() == (0, 0, 0)
    assert vllm.pacing.chunk_tokens() == 0


def test_an_aborted_prompt_is_work_no_longer(vllm: Scheduler) -> None:
    """Whether a step has computed a part of it or not."""
    vllm.come("a", 100)
    vllm.come("b", 100)
    vllm.step({"a": 50}, {"a": 0})
    vllm.pacing.on_finished("a")
    vllm.pacing.on_finished("b")
    assert vllm.now() == (0, 0, 0)


def learn(vllm: Scheduler, steps: int = 200, *, ahead: bool = False, pause: float = 0.0) -> StepCosts:
    """The costs after steps of TRUTH with and without a prompt. ``ahead``: each is scheduled during the one before."""
    chunks = [(0, 100, 700, 0, 1500)[number % 5] for number in range(steps)]
    vllm.step({"a": 1}, {"a": 99})
    begun = False
    for number, chunk in enumerate(chunks):
        if not begun:
            vllm.schedule(*_work(number, chunk))
        begun = ahead and number + 1 < steps
        if begun:
            vllm.schedule(*_work(number + 1, chunks[number + 1]))
        vllm.clock.now += TRUTH.step_seconds(chunk, 0, 1, 0)
        vllm.pacing.on_output()
        if not begun:
            vllm.clock.now += pause
    vllm.clock.now += SOLVE_SECONDS
    vllm.step({"a": 1}, seconds=TRUTH.base)
    return vllm.pacing.now().costs


def _work(number: int, chunk: int) -> tuple[dict[str, int], dict[str, int]]:
    return ({"a": 1, f"p{number}": chunk}, {f"p{number}": 0}) if chunk else ({"a": 1}, {})


@pytest.mark.parametrize(("ahead", "pause"), [(False, 0.0), (True, 0.0), (False, 3.0)])
def test_steps_are_learned_however_they_are_scheduled(vllm: Scheduler, ahead: bool, pause: float) -> None:
    """One after another, one step ahead of the device, or after pauses, which belong to no step."""
    costs = learn(vllm, ahead=ahead, pause=pause)
    for work in ((0, 0, 1, 100), (1000, 0, 1, 100)):
        assert costs.step_seconds(*work) == pytest.approx(TRUTH.step_seconds(*work), rel=0.05)


def test_steps_without_work_are_no_samples(vllm: Scheduler) -> None:
    """VLLM takes them while it waits for KV; the next step has not taken their time."""
    vllm.step({}, seconds=5.0)
    vllm.schedule({})
    vllm.schedule({"a": 1}, {"a": 99})
    vllm.clock.now += 7.0
    vllm.pacing.on_output()
    vllm.clock.now += 0.5
    vllm.pacing.on_output()
    assert vllm.pacing.now().costs.samples == 1


def test_outputs_that_are_never_told_teach_nothing(vllm: Scheduler) -> None:
    """The default stands, and no memory is taken."""
    vllm.schedule({"a": 1}, {"a": 99})
    for _ in range(1000):
        vllm.schedule({"a": 1})
    assert len(vllm.pacing._line) < 10
    assert vllm.pacing.now().costs == DEFAULT_COSTS


#: The level in ms, the decodes, what prompts miss, and the most that the next step computes of each.
CHUNKS = [
    (0, 2, [1000], 0),  # no level
    (30, 0, [1000], 0),  # no decode
    (30, 2, [], 576),  # the next prompt may come before the next step: (0.72 * 30 - 10) ms at 20 us, in whole blocks
    (30, 2, [1000], 576),
    (30, 2, [5000, 900], 288),  # together within the level
    (30, 2, [1, 1000], 576),  # a prompt with a single token left is like a decode
    (100, 2, [5000], 0),  # all that vLLM takes
    (5, 2, [1000], LEAST_PROMPT_TOKENS),  # a level that cannot be kept: prompts advance all the same
    (5, 2, [1000] * 5, LEAST_PROMPT_TOKENS // 5),  # less than a block
    (5, 2, [1000] * 100, 1),
]


@pytest.mark.parametrize(("level", "decodes", "missing", "chunk"), CHUNKS)
def test_prompts_beside_decodes_are_cut_to_the_level(level: int, decodes: int, missing: list[int], chunk: int) -> None:
    """So that all of them together keep it, as far as the step's costs are known."""
    vllm = Scheduler()
    vllm.know(TRUTH)
    vllm.pacing.level = level / 1e3
    running = {f"d{number}": 1 for number in range(decodes)}
    vllm.step(running, dict.fromkeys(running, 500))
    for number, tokens in enumerate(missing):
        vllm.come(f"p{number}", tokens)
    assert vllm.pacing.chunk_tokens() == chunk


def test_the_context_of_a_prompt_makes_its_chunks_shorter(vllm: Scheduler) -> None:
    """Later tokens attend to more."""
    vllm.know(StepCosts(10e-3, 0.0, 20e-6, 10e-9, 0.0, 0.0))
    vllm.pacing.level = 0.03
    vllm.come("p", 20_000)
    vllm.step({"d": 1, "p": 16}, {"d": 500, "p": 0})
    first = vllm.pacing.chunk_tokens()
    vllm.step({"d": 1, "p": 10_000})
    assert BLOCK <= vllm.pacing.chunk_tokens() < 0.5 * first


def test_the_level_is_kept_with_what_was_learned(vllm: Scheduler) -> None:
    """The chunk follows from the server's own steps, not from the default."""
    learn(vllm)
    vllm.pacing.level = 0.03
    assert vllm.pacing.chunk_tokens() == pytest.approx(576, rel=0.1)


def told(vllm: Scheduler) -> StepsNow | None:
    """What the proxy is told now."""
    return vllm.pacing.take_report()


def test_the_proxy_is_told_of_changes_now_and_then(vllm: Scheduler) -> None:
    """Not of each step, and of nothing twice; but at once when there is nothing left to do."""
    assert told(vllm) is None, "nothing has happened"
    vllm.step({"a": 1}, {"a": 99})
    first = told(vllm)
    assert first is not None
    assert (first.decodes, first.most_prompt_tokens) == (1, MOST)
    vllm.step({"a": 1}, seconds=0.01)
    assert told(vllm) is None, "it was told a moment ago"
    vllm.clock.now += REPORT_SECONDS
    assert told(vllm) is not None
    vllm.pacing.on_finished("a")
    vllm.step({})
    last = told(vllm)
    assert last is not None
    assert last.decodes == 0
    vllm.clock.now += 10.0
    assert told(vllm) is None


#: vLLM's own limit, ours, and what is set.
LIMITS = [(0, 0, 0), (0, 512, 512), (300, 0, 300), (300, 512, 300), (300, 128, 128)]


@pytest.mark.parametrize(("own", "ours", "set_to"), LIMITS)
def test_the_operator_s_limit_stands_but_for_a_lower_one(own: int, ours: int, set_to: int) -> None:
    """And comes back."""
    config = SimpleNamespace(long_prefill_token_threshold=own, enable_chunked_prefill=True)
    limit = ChunkLimit(config)
    limit.set(ours)
    assert config.long_prefill_token_threshold == set_to
    limit.set(0)
    assert config.long_prefill_token_threshold == own


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (SimpleNamespace(long_prefill_token_threshold=0, enable_chunked_prefill=False), "chunked prefill is off"),
        (SimpleNamespace(enable_chunked_prefill=True), "no long_prefill_token_threshold"),
    ],
)
def test_a_server_that_cannot_cut_prompts_says_so_once(config: SimpleNamespace, why: str, caplog) -> None:
    """And is left as it is."""
    before = vars(config).copy()
    limit = ChunkLimit(config)
    assert why in caplog.text
    caplog.clear()
    limit.set(512)
    assert vars(config) == before
    assert not caplog.records
