"""What is asked, and what is thrown."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvbelt.ops.chaos.questions import Manners, Sizes, make_questions
from kvbelt.ops.chaos.rubbish import frame_rubbish, http_rubbish, real_frames, zmtp_rubbish
from kvbelt.wire import codec, notification
from kvbelt.wire.ids import EngineId

SIZES = Sizes(longest=600, characters=1.0)


def test_questions_are_of_every_kind():
    """Chats and completions, greedy and seeded, short, long, with shared beginnings, with one token and with many."""
    questions = make_questions(3, 80, SIZES, model="m", chats=True)
    bodies = [question.body for question in questions]
    assert {question.route for question in questions} == {"/v1/completions", "/v1/chat/completions"}
    assert any(body["temperature"] == 0 for body in bodies)
    assert all("seed" in body for body in bodies if body["temperature"] > 0)
    assert {1, 48} <= {body["max_tokens"] for body in bodies}
    assert any(body.get("n") == 2 for body in bodies)
    prompts = [body["prompt"] for body in bodies if "prompt" in body]
    assert max(map(len, prompts)) > 400
    assert min(map(len, prompts)) < 100
    beginnings = [prompt[:100] for prompt in prompts if len(prompt) > 100]
    assert len(set(beginnings)) < len(beginnings)
    assert sum(question.long for question in questions) == 20


def test_a_model_that_cannot_chat_is_not_asked_to():
    """Everything is a completion then; a seed makes one set of questions."""
    assert not any(question.chat for question in make_questions(3, 40, SIZES, model="m", chats=False))
    assert make_questions(3, 9, SIZES, model="m", chats=True) == make_questions(3, 9, SIZES, model="m", chats=True)


def test_manners_vary():
    """Streamed and whole; some in a hurry; some leave, where clients leave."""
    chance = random.Random(1)
    question = make_questions(3, 1, SIZES, model="m", chats=False)[0]
    manners = Manners(hasty=0.2)
    patient = [manners.ask(chance, question, "r") for _ in range(200)]
    assert {asking.stream for asking in patient} == {True, False}
    assert any(asking.deadline < 2 for asking in patient)
    assert all(asking.leave_after is None for asking in patient)
    assert any(manners.ask(chance, question, "r", leaving=True).leave_after is not None for _ in range(50))
    assert "stream_options" in next(asking for asking in patient if asking.stream).body()


@given(seed=st.integers(0, 1 << 32))
def test_rubbish_takes_no_longer_than_it_may(seed):
    """And is never empty."""
    for make in (http_rubbish, zmtp_rubbish):
        rubbish = make(random.Random(seed), 2.0)
        assert rubbish.pieces
        assert rubbish.pause * len(rubbish.pieces) <= 2.0 + 1e-9


def test_frames_are_made_from_real_ones():
    """Which the parsers take; among what is made of them are some that they take and some that they do not."""
    me, there = EngineId("me"), EngineId("there")
    for frame in real_frames("init", me, there):
        codec.handshakes().decode(frame)
    for frame in real_frames("alloc", me, there):
        codec.from_sender().decode(frame)
    for frame in real_frames("notify", me, there):
        notification.decode(frame)
    forms = {frame_rubbish(random.Random(seed), real_frames("alloc", me, there))[0] for seed in range(200)}
    assert {"real", "mutated", "truncated", "oversized", "random", "empty"} <= forms
