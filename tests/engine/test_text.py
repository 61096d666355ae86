"""Text comes in pieces that, joined, are the whole text; no piece changes later."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvbelt.engine.text import Decoder, Detokenizer, Places, StopChecker
from tests.engine.support import EOS, byte_tokenizer

BYTES = Decoder(byte_tokenizer())

#: Text with characters of one to four bytes.
texts = st.text(alphabet=st.sampled_from("ab \n\u00e9\u4f60\u597d\U0001f600\ufffd"), max_size=12)


def detokenize(decoder: Decoder, prompt: list[int], ids: list[int], *, skip: bool = True) -> list[str]:
    """The pieces, with the flush at the end."""
    detokenizer = Detokenizer(decoder, prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(prompt=texts, answer=texts)
def test_characters_of_many_tokens_come_whole(prompt: str, answer: str) -> None:
    """A character appears when its last byte has come; nothing incomplete is given out."""
    pieces = detokenize(BYTES, list(prompt.encode()), list(answer.encode()))
    assert "".join(pieces) == answer
    if "\ufffd" not in answer:
        assert all("\ufffd" not in piece for piece in pieces)


@given(prompt=texts, ids=st.lists(st.integers(0, 255), max_size=24))
def test_any_bytes_decode_as_a_whole_would(prompt: str, ids: list[int]) -> None:
    """The pieces of invalid UTF-8 are the same as decoding all at once."""
    assert "".join(detokenize(BYTES, list(prompt.encode()), ids)) == bytes(ids).decode(errors="replace")


@given(text=texts.filter(bool), cut=st.integers(0, 3))
def test_a_prompt_that_ends_inside_a_character_is_continued(text: str, cut: int) -> None:
    """The token that completes a character of the prompt gives out the character."""
    data = text.encode()
    last = len(text[-1].encode())
    kept = len(data) - min(cut, last - 1)
    pieces = detokenize(BYTES, list(data[:kept]), list(data[kept:]))
    assert "".join(pieces) == (text[-1] if kept < len(data) else "")


def test_special_tokens_are_skipped_or_shown() -> None:
    """skip_special_tokens decides, and the text after them is unchanged."""
    ids = [97, EOS, 98]
    assert "".join(detokenize(BYTES, [120], ids)) == "ab"
    assert "".join(detokenize(BYTES, [120], ids, skip=False)) == "a<eos>b"


def test_an_incomplete_end_is_flushed() -> None:
    """Half a character at the very end is given out as the replacement character."""
    assert detokenize(BYTES, [97], list("\u4f60".encode())[:2]) == ["", "", "\ufffd"]


def test_words_of_a_sentencepiece_tokenizer_keep_their_spaces() -> None:
    """A tokenizer that drops the space at a text's start keeps it inside, also right after a prompt."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁sat": 4}
    inner = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))  # noqa: S106
    inner.decoder = decoders.Metaspace()
    decoder = Decoder(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert detokenize(decoder, [1], [2, 3, 4]) == [" cat", "s", " sat", ""]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_demo_models_tokenizer(demo_model: Path, data: st.DataObject) -> None:
    """For any tokens of a real tokenizer, the joined pieces are the text after the prompt's."""
    decoder = demo_decoder(demo_model)
    token = st.integers(0, 49151)
    prompt = data.draw(st.lists(token, min_size=1, max_size=8))
    ids = data.draw(st.lists(token, max_size=12))
    before = decoder.decode(prompt, skip_special_tokens=True)
    if before.endswith("\ufffd"):
        return  # a prompt that ends inside a character: its own test
    whole = decoder.decode(prompt + ids, skip_special_tokens=True)
    assert before + "".join(detokenize(decoder, prompt, ids)) == whole


_decoders: dict[Path, Decoder] = {}


def demo_decoder(folder: Path) -> Decoder:
    """The decoder, loaded once."""
    if folder not in _decoders:
        _decoders[folder] = Decoder(AutoTokenizer.from_pretrained(folder))
    return _decoders[folder]


def whole_stop(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The plain definition: character by character, the first complete stop string ends the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


ab = st.text(alphabet="ab", max_size=14)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(text=ab, stops=stops, include=st.booleans(), cuts=st.lists(st.integers(0, 14), max_size=6))
def test_stop_strings_however_the_text_comes(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    """The result is the definition's, whatever the pieces."""
    checker = StopChecker(stops, include=include)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    given_out = "".join(checker.push(text[a:b]) for a, b in itertools.pairwise(bounds))
    if checker.found is None:
        given_out += checker.flush()
    expected, stop = whole_stop(text, stops, include=include)
    assert given_out == expected
    assert checker.found == stop


@given(text=ab, stops=stops)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    """Held text begins a stop string, and all other text is given out."""
    checker = StopChecker(stops, include=False)
    given_out = "".join(checker.push(character) for character in text)
    if checker.found is None:
        assert text.startswith(given_out)
        held = text[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_before_min_tokens_does_not_count() -> None:
    """Only a match that ends in checked text counts."""
    checker = StopChecker(["ab"], include=False)
    assert checker.push("ab", checking=False) + checker.push("xa", checking=False) == "abx"
    assert checker.push("b") == ""
    assert checker.found == "ab"


@pytest.mark.parametrize("skip", [True, False])
def test_nothing_but_special_tokens(skip: bool) -> None:
    """An answer of special tokens alone is empty, or their names."""
    assert "".join(detokenize(BYTES, [EOS], [EOS, EOS], skip=skip)) == ("" if skip else "<eos><eos>")


def test_a_sentencepiece_token_has_its_bytes():
    """A space in front, a byte of its own, an added token, and an id without a token."""
    vocab = {"<unk>": 0, "\u2581word": 1, "<0xF0>": 2, "<s>": 3}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    decoder = Decoder(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>"))  # noqa: S106
    assert [decoder.token(token_id).data for token_id in (1, 2, 3, 4)] == [b" word", b"\xf0", b"<s>", b""]
    assert decoder.token(2).text == "bytes:\\xf0"
    assert (decoder.token(1).special, decoder.token(3).special) == (False, True)


@given(text=texts, cut=st.integers(0, 48))
def test_each_token_begins_where_its_character_does(text: str, cut: int) -> None:
    """Also where the prompt ends within a character; what the prompt carries over and the answer are the text."""
    data = text.encode()
    prompt, answer = data[:cut], data[cut:]
    places = Places(BYTES, list(prompt))
    offsets = [places.push(bytes([byte])) for byte in answer]
    begun = len(prompt.decode(errors="ignore"))
    assert offsets == [len(data[: cut + i].decode(errors="ignore")) - begun for i in range(len(answer))]
    assert (places.carried + answer).decode() == text[begun:]
