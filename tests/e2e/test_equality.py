"""Token for token: 1p1d, 2p2d, 0p1d and transformers' own generate give the same answers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.asking import Answer, ask_all, assert_same
from tests.e2e.prompts import TWENTY

pytestmark = pytest.mark.e2e

NEW_TOKENS = 20
GREEDY = [{**body, "temperature": 0, "max_tokens": NEW_TOKENS} for body in TWENTY]
#: What is asked one at a time in each topology. The two longest, more tokens than all others together, are asked eight
#: at a time in each.
SHORTER = len(GREEDY) - 2


@pytest.fixture(scope="module")
def generated(demo_model: Path) -> list[tuple[int, tuple[int, ...]]]:
    """Prompt length and new ids of each prompt, by transformers' own generate, fp32, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    results = []
    for body in TWENTY:
        if "messages" in body:
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = tokenizer.encode(body["prompt"])
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        results.append((len(ids), tuple(out[0, len(ids) :].tolist())))
    return results


@pytest.fixture(scope="module")
def yardstick(aggregated: SyncDeployment) -> list[Answer]:
    """What the aggregated server answers, one at a time."""
    return ask_all(aggregated.url, GREEDY, at_once=1)


def test_the_prompts_are_what_they_claim(generated: list[tuple[int, tuple[int, ...]]]) -> None:
    """Twenty prompts between 5 and about 1,500 tokens."""
    lengths = sorted(length for length, _ in generated)
    assert len(lengths) == 20
    assert lengths[0] <= 6
    assert 1400 <= lengths[-1] <= 1600


def test_aggregated_equals_generate(yardstick: list[Answer], generated: list[tuple[int, tuple[int, ...]]]) -> None:
    """The aggregated server's ids, lengths and ends are those of transformers' generate."""
    for answer, (prompt_length, ids) in zip(yardstick, generated, strict=True):
        assert answer.token_ids == (ids,)
        assert answer.usage == (prompt_length, len(ids))
        assert answer.finish_reasons == (("length" if len(ids) == NEW_TOKENS else "stop"),)


@pytest.mark.parametrize(
    ("topology", "stream", "at_once"),
    [
        pytest.param("one_p_one_d", False, 1, id="1p1d-whole-alone"),
        pytest.param("one_p_one_d", True, 8, id="1p1d-streamed-eight"),
        pytest.param("one_p_one_d_mooncake", False, 8, id="1p1d-mooncake-whole-eight"),
        pytest.param("two_p_two_d", True, 1, id="2p2d-streamed-alone"),
        pytest.param("two_p_two_d", False, 8, id="2p2d-whole-eight"),
        pytest.param("aggregated", True, 8, id="0p1d-streamed-eight"),
    ],
)
def test_every_topology_gives_the_same_answers(
    topology: str, stream: bool, at_once: int, yardstick: list[Answer], request: pytest.FixtureRequest
) -> None:
    """Texts, ids, ends and usage equal the aggregated server's, streamed or whole, alone or eight at a time."""
    deployment: SyncDeployment = request.getfixturevalue(topology)
    count = SHORTER if at_once == 1 else len(GREEDY)
    answers = ask_all(deployment.url, GREEDY[:count], at_once=at_once, stream=stream)
    for answer, expected in zip(answers, yardstick[:count], strict=True):
        assert_same(answer, expected)
    paths = {answer.path.partition(";")[0] for answer in answers}
    assert paths <= ({"local"} if topology == "aggregated" else {"first-token", "re-derive"})
