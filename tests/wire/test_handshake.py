"""The comparison of two sides: the first difference, with both values."""

import msgspec
import pytest

from kvbelt.wire.handshake import first_difference
from tests.wire.support import FIT, LAYOUT


def test_equal_sides_fit():
    assert first_difference(FIT, FIT) is None


def test_a_model_is_its_fingerprint():
    """One model under two names fits; two models under one name do not, and both are shown."""
    assert first_difference(FIT, msgspec.structs.replace(FIT, model="another/folder")) is None
    difference = first_difference(FIT, msgspec.structs.replace(FIT, fingerprint="g"))
    assert difference == ("model", "m (fingerprint f)", "m (fingerprint g)")


@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol", 2), ("tp_size", 2), ("tp_rank", 1), ("hash_scheme", "sha"), ("channel", "mooncake")],
)
def test_every_field_is_compared(field, value):
    """The difference has both values."""
    difference = first_difference(FIT, msgspec.structs.replace(FIT, **{field: value}))
    assert difference == (field, str(getattr(FIT, field)), str(value))


@pytest.mark.parametrize("field", [name for name in LAYOUT.__struct_fields__ if name != "dtype"])
def test_every_field_of_the_layout_is_compared(field):
    """The difference has the field's own name."""
    changed = msgspec.structs.replace(LAYOUT, **{field: "other" if field == "order" else 99})
    difference = first_difference(FIT, msgspec.structs.replace(FIT, layout=changed))
    assert difference.field == f"layout.{field}"


def test_a_dtype_is_named_before_what_follows_from_it():
    """A user sets the dtype, and not the block size in bytes."""
    changed = msgspec.structs.replace(LAYOUT, dtype="bfloat16", block_bytes=768)
    difference = first_difference(FIT, msgspec.structs.replace(FIT, layout=changed))
    assert str(difference) == "dtype: ours float32, theirs bfloat16"
