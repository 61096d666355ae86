"""The level between tokens: how much of a prompt a step carries beside decodes."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.engine.api import Output
from kvbelt.engine.scheduler import StepPlan
from kvbelt.pacing.costs import AIM, LEAST_PROMPT_TOKENS, StepCosts
from tests.engine.simulation import Simulation
from tests.engine.support import Client, engine_of

#: A millisecond for each prompt token, and nothing else.
COSTS = StepCosts(base=0, prefill=0, token=1e-3, token_context=0, decode=0, kv_token=0)


def prompt_tokens(plan: StepPlan) -> int:
    """Of all prompts in the step."""
    return sum(chunk.length for chunk in plan.chunks if chunk.length > 1)


def beside_decodes(*levels: float | None, most: int = 512) -> Simulation:
    """Requests that decode, with these levels."""
    simulation = Simulation(2000, max_batch_tokens=most, max_running=16, costs=COSTS)
    for level in levels:
        simulation.add(3, 50, itl_seconds=level)
    simulation.step()
    return simulation


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((0.1,), round(AIM * 100)),
        ((0.3, 0.2, None), round(AIM * 200)),
        ((1e-6,), LEAST_PROMPT_TOKENS),
        ((10.0,), 512 - 1),
        ((None,), 512 - 1),
        ((), 512),
    ],
    ids=["level", "tightest", "least", "wide", "none", "no decode"],
)
def test_all_prompts_of_a_step_keep_the_tightest_level(levels: tuple[float | None, ...], expected: int) -> None:
    """Prompts share what the level leaves, the first one first; without a level or decodes they take all."""
    simulation = beside_decodes(*levels)
    simulation.add(50, 2)
    simulation.add(1000, 2, itl_seconds=1e-6)  # its own level does not count before it decodes
    assert prompt_tokens(simulation.step()) == expected


def test_a_long_context_counts_for_the_whole_step() -> None:
    """Attention to the tokens before a prompt's is paid for, too."""
    simulation = beside_decodes(0.2)
    simulation.costs = replace(COSTS, token_context=1e-6)
    simulation.add(1000, 2)
    lengths = [prompt_tokens(simulation.step()) for _ in range(4)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 9), st.sampled_from([None, 1e-6, 0.1])), min_size=1, max_size=9
    )
)
def test_prompts_advance_beside_decodes_of_any_level(requests: list[tuple[int, int, float | None]]) -> None:
    """Every request ends, and every decode gets its token in each step."""
    simulation = Simulation(1000, max_batch_tokens=256, max_running=4, costs=COSTS)
    for prompt, answer, level in requests:
        simulation.add(prompt, answer, itl_seconds=level)
    for _ in range(sum(prompt // LEAST_PROMPT_TOKENS + 1 + answer for prompt, answer, _ in requests)):
        decoding = {id(s) for s in simulation.scheduler.running if len(s.token_ids) - s.computed == 1}
        assert decoding <= {id(chunk.sequence) for chunk in simulation.step().chunks}
    assert len(simulation.finished) == len(requests)


def test_an_engine_answers_the_same_at_any_level(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level cuts a prompt that comes beside a decode into many steps, and changes no token."""
    prompt, answers = list(b"chunk " * 40), []
    for level, most_rows in ((None, len(prompt) + 1), (1e-6, LEAST_PROMPT_TOKENS + 1)):
        rows: list[int] = []
        with engine_of(tiny_llama, num_blocks=200, itl_seconds=level) as engine:
            forward = engine._model.forward
            monkeypatch.setattr(
                engine._model, "forward", lambda *given, f=forward, rows=rows: rows.append(len(given[2])) or f(*given)
            )
            decoding = Client(engine, list(b"decoding"), submit=False)
            late = Client(engine, prompt, submit=False)

            def on_output(output: Output, decoding: Client = decoding, late: Client = late) -> None:
                if not decoding.outputs:
                    late.engine.submit(late.request)
                decoding._on_output(output)

            engine.submit(replace(decoding.request, on_output=on_output))
            answers.append((late.token_ids, decoding.token_ids))
        assert max(rows) == most_rows
    assert answers[0] == answers[1]
