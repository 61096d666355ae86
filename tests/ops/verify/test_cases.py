"""The table of what ``kvbelt verify`` asks."""

from collections import Counter

from kvbelt.ops.verify.cases import CASES, CHAT, COMPLETIONS, UNTRIED, cases_of, questions
from kvbelt.wire.fields import CHATS_ONLY, COMPLETIONS_ONLY, FIELDS


def test_every_field_is_tried_or_says_why_not() -> None:
    """The list of fields and the table of cases go together."""
    tried = {case.field for case in CASES} - {"(plain)"}
    assert tried | UNTRIED.keys() == FIELDS.keys()
    assert not tried & UNTRIED.keys()


def test_a_case_has_one_name_and_its_field() -> None:
    """Results are kept by endpoint and name, and a case's body has its field."""
    assert set(Counter((case.endpoint, case.name) for case in CASES).values()) == {1}
    assert [case for case in CASES if case.field not in case.body] == [case for case in CASES if not case.body]


def test_a_field_of_one_endpoint_is_tried_there() -> None:
    """Fields that one endpoint does not know are tried at the other."""
    tried = {(case.endpoint, case.field) for case in CASES}
    assert {(CHAT, name) for name in CHATS_ONLY} | {(COMPLETIONS, name) for name in COMPLETIONS_ONLY} <= tried


def test_a_seed_fixes_all_bodies() -> None:
    """The same seed asks the same, another one something else; greedy is a part of the whole."""
    whole = questions(CASES, 1, quick=False)
    assert whole == questions(CASES, 1, quick=False)
    assert whole != questions(CASES, 2, quick=False)
    assert all(question in whole for question in questions(cases_of({"n", "echo"}), 1, quick=True))
