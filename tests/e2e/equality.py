"""Twenty prompts, answered by transformers' own generate and by deployments, to the token."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.asking import Answer, ask_all, assert_same
from tests.e2e.prompts import TWENTY

NEW_TOKENS = 20
GREEDY = [{**body, "temperature": 0, "max_tokens": NEW_TOKENS} for body in TWENTY]
#: What is asked one at a time. The two longest, more tokens than all others together, are asked eight at a time.
SHORTER = len(GREEDY) - 2


class Generated(NamedTuple):
    """One prompt's length in tokens, and the new ids."""

    prompt_tokens: int
    ids: tuple[int, ...]


def generate(folder: Path) -> list[Generated]:
    """What transformers' generate gives, fp32, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
        results.append(Generated(len(ids), tuple(out[0, len(ids) :].tolist())))
    return results


def assert_generated(answers: list[Answer], generated: list[Generated]) -> None:
    """Ids, lengths and ends are those of generate."""
    for answer, (prompt_tokens, ids) in zip(answers, generated, strict=True):
        assert answer.token_ids == (ids,)
        assert answer.usage == (prompt_tokens, len(ids))
        assert answer.finish_reasons == (("length" if len(ids) == NEW_TOKENS else "stop"),)


def assert_answers(url: str, right: list[Answer], *, stream: bool, at_once: int, paths: set[str]) -> None:
    """Texts, ids, ends and usage equal the right ones, and every answer took one of these paths."""
    count = SHORTER if at_once == 1 else len(GREEDY)
    answers = ask_all(url, GREEDY[:count], at_once=at_once, stream=stream)
    for answer, expected in zip(answers, right[:count], strict=True):
        assert_same(answer, expected)
    assert {answer.path.partition(";")[0] for answer in answers} <= paths
