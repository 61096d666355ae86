"""docs/vllm.md has the table of features, and a test shows each."""

import ast

import pytest
from tools.draw_vllm_features import FEATURES, Feature, page_with_table

from tests.docs.pages import DOCS, ROOT


def test_the_table_is_what_is_drawn() -> None:
    """``python -m tools.draw_vllm_features docs/vllm.md`` changes nothing."""
    page = (DOCS / "vllm.md").read_text(encoding="utf-8")
    assert page == page_with_table(page)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_is_shown_by_a_test(feature: Feature) -> None:
    file, _, name = feature.shown_by.partition("::")
    tree = ast.parse((ROOT / "tests" / "vllm" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
