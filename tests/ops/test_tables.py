"""Tables in text."""

from kvbelt.ops.tables import table


def test_numbers_stand_to_the_right_and_words_to_the_left():
    """Columns are as wide as their widest cell; None is an empty cell."""
    assert table(["what", "n", "s"], [("a", 1200, 0.5), ("long one", 3, None)]) == [
        "| what     |     n |    s |",
        "|----------|------:|-----:|",
        "| a        | 1,200 | 0.50 |",
        "| long one |     3 |      |",
    ]


def test_a_table_without_rows_is_its_head():
    """A table without rows has only its head."""
    assert table(["a"], []) == ["| a   |", "|-----|"]
