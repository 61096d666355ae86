"""Questions, and rubbish."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvbelt.ops.chaos.questions import RequestMix, Sizes, make_questions
from kvbelt.ops.chaos.rubbish import frame_rubbish, http_rubbish, real_frames, zmtp_rubbish
from kvbelt.wire import codec, notification
from kvbelt.wire.ids import EngineId

SIZES = Sizes(longest=600, characters=1.0)


def test_questions_are_of_every_kind():
    """There are chats and completions, greedy and seeded, short and long ones, shared prefixes, and single tokens."""
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
    """Then every question is a completion; a seed always gives the same questions."""
    assert not any(question.chat for question in make_questions(3, 40, SIZES, model="m", chats=False))
    assert make_questions(3, 9, SIZES, model="m", chats=True) == make_questions(3, 9, SIZES, model="m", chats=True)


def test_manners_vary():
    """Requests are streamed and whole; some have short deadlines; some clients disconnect."""
    chance = random.Random(1)
    question = make_questions(3, 1, SIZES, model="m", chats=False)[0]
    mix = RequestMix(hasty=0.2)
    patient = [mix.request(chance, question, "r") for _ in range(200)]
    assert {request.stream for request in patient} == {True, False}
    assert any(request.deadline < 2 for request in patient)
    assert all(request.leave_after is None for request in patient)
    assert any(mix.request(chance, question, "r", leaving=True).leave_after is not None for _ in range(50))
    assert "stream_options" in next(request for request in patient if request.stream).body()


@given(seed=st.integers(0, 1 << 32))
def test_rubbish_takes_no_longer_than_it_may(seed):
    """It also is never empty."""
    for make in (http_rubbish, zmtp_rubbish):
        rubbish = make(random.Random(seed), 2.0)
        assert rubbish.pieces
        assert rubbish.pause * len(rubbish.pieces) <= 2.0 + 1e-9


def test_frames_are_made_from_real_ones():
    """Parsers accept the real frames, and some but not all frames made from them."""
    me, there = EngineId("me"), EngineId("there")
    for frame in real_frames("init", me, there):
        codec.handshakes().decode(frame)
    for frame in real_frames("alloc", me, there):
        codec.from_sender().decode(frame)
    for frame in real_frames("notify", me, there):
        notification.decode(frame)
    forms = {frame_rubbish(random.Random(seed), real_frames("alloc", me, there))[0] for seed in range(200)}
    assert {"real", "mutated", "truncated", "oversized", "random", "empty"} <= forms
