"""Where two answers differ, and whether that is more than the reference differs from itself. Pure.

Everything must be equal but the last digits of log probabilities, which differ between batch shapes. Where a model
computes with rounding that depends on the batch (bf16, GPUs), two tokens that are nearly as likely may change places,
and all after them differs. So the reference is asked twice, alone and in company. If it is always the same, a
difference is a difference. If not, generated content may differ as often as the reference does from itself: Fisher's
exact test on the two counts decides. Anything else (status, usage of the prompt, form) may never differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Any

from kvbelt.ops.verify.answers import Answer

#: Of log probabilities, in float32.
TOLERANCE = 2e-3
#: A larger share of differences than the reference's own is called one if chance makes it as rarely as this.
SIGNIFICANCE = 0.01

#: What a model generates, or follows from it. All else is fixed by the request.
_GENERATED = frozenset(
    {
        "text", "content", "reasoning", "reasoning_content", "tool_calls", "token_ids", "logprobs", "prompt_logprobs",
        "finish_reason", "stop_reason", "completion_tokens", "total_tokens", "keys",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    field: str  #: ``choices.text``
    got: Any
    expected: Any

    @property
    def generated(self) -> bool:
        return not _GENERATED.isdisjoint(self.field.split("."))

    @property
    def how_far(self) -> str:
        """In numbers, if they say something."""
        if isinstance(self.got, float) and isinstance(self.expected, float):
            return f"by {abs(self.got - self.expected):.2g}"
        if isinstance(self.got, list) and isinstance(self.expected, list):
            same = _common(self.got, self.expected)
            return f"equal up to {same} of {len(self.expected)}"
        if isinstance(self.got, str) and isinstance(self.expected, str):
            return f"equal up to character {_common(self.got, self.expected)} of {len(self.expected)}"
        return ""


def _common(one: Any, other: Any) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def differences(
    got: Answer, expected: Answer, tolerance: float = TOLERANCE, *, cached: bool = False
) -> list[Difference]:
    """``cached``: the prompts may be in other prefix caches, so how much of them was found says nothing."""
    if got.status != expected.status:
        return [Difference("status", _status(got), _status(expected))]
    found = _walk("", got.said, expected.said, tolerance)
    return [one for one in found if not (cached and one.field.startswith("usage.prompt_tokens_details"))]


def _status(answer: Answer) -> str:
    return str(answer.status) if answer.status == 200 else f"{answer.status}: {message_of(answer.said)}"


def message_of(said: Any) -> str:
    """Of an error's body."""
    error = said.get("error", said) if isinstance(said, dict) else said
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _walk(place: str, got: Any, expected: Any, tolerance: float) -> Iterator[Difference]:
    if isinstance(got, dict) and isinstance(expected, dict):
        for key in sorted(got.keys() | expected.keys()):
            inner = f"{place}.{key}" if place else key
            if key in got and key in expected:
                yield from _walk(inner, got[key], expected[key], tolerance)
            else:
                yield Difference(inner, got.get(key, "(missing)"), expected.get(key, "(missing)"))
    elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected) and _deep(expected):
        for one, other in zip(got, expected, strict=True):
            yield from _walk(place, one, other, tolerance)
    elif isinstance(got, float) and isinstance(expected, float):
        if abs(got - expected) > tolerance:
            yield Difference(place, got, expected)
    elif type(got) is not type(expected) or got != expected:
        yield Difference(place, got, expected)


def _deep(items: list[Any]) -> bool:
    return any(isinstance(item, dict | list | float) for item in items)


def noise_explains(subject: tuple[int, int], reference: tuple[int, int]) -> bool:
    """Whether the subject differs no more often than the reference from itself.

    Args:
        subject: answers that differ, and answers.
        reference: likewise, of a second answer of the reference from its first.
    """
    return reference[0] > 0 and _fisher(*subject, *reference) >= SIGNIFICANCE


def _fisher(differ: int, of: int, own: int, own_of: int) -> float:
    """One-sided: how likely are ``differ`` or more of the subject's, if both differ equally often."""
    total, asked = differ + own, of + own_of
    if asked == 0:
        return 1.0
    ways = sum(comb(of, k) * comb(own_of, total - k) for k in range(differ, min(of, total) + 1))
    return ways / comb(asked, total)
