"""Rows of text as tables."""

import pytest

from experiments import tabular


def test_columns_are_aligned_all_but_the_last():
    assert tabular.text([("a", "bcd", "e"), ("fgh", "i", "jk")]) == "a    bcd  e\nfgh  i    jk"


def test_markdown_sets_numbers_to_the_right():
    shown = tabular.markdown([("case", "ms"), ("forward", "3")], words=["case"])
    assert shown == "| case | ms |\n| --- | ---: |\n| forward | 3 |"


@pytest.mark.parametrize(
    ("cell", "escaped"),
    [
        ("learned * table", r"learned \* table"),
        ("a|b", r"a\|b"),
        ("self_attention", "self_attention"),
        ("_a_", r"\_a\_"),
    ],
)
def test_what_markdown_would_read_is_escaped(cell: str, escaped: str):
    assert tabular.escape(cell) == escaped
