"""Draws the table of vLLM's features into its page.

python -m tools.draw_vllm_features docs/vllm.md

A row stands here only with the test that shows it. Tests compare the page with this table, and import each test.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

_BEGIN, _END = "<!-- drawn: python -m tools.draw_vllm_features docs/vllm.md -->\n", "<!-- end of what is drawn -->\n"

CROSSES, WHOLE, REFUSED = "crosses exactly", "served whole", "refused at start"

#: Versions with whose real servers the test has passed; a refusal needs none.
ALL, NEWEST, UNIT, NOT_TRIED = "0.27.1, 0.31, 0.32", "0.32", "any", "not tried"


@dataclass(frozen=True, slots=True)
class Feature:
    name: str
    outcome: str
    tried: str  #: with which vLLM
    shown_by: str  #: ``file::test``, from ``tests/vllm/``


FEATURES = (
    Feature(
        "completions and chats, one by one", CROSSES, ALL, "test_serving.py::test_twenty_prompts_one_after_another"
    ),
    Feature("eight at a time", CROSSES, ALL, "test_serving.py::test_twenty_prompts_eight_at_a_time"),
    Feature("streams", CROSSES, ALL, "test_serving.py::test_streamed_text_is_the_same"),
    Feature(
        "prefix caching: what decode holds does not travel",
        CROSSES,
        ALL,
        "test_serving.py::test_a_shared_prefix_travels_once",
    ),
    Feature(
        "KV in host memory on the prefill side",
        CROSSES,
        ALL,
        "test_mixed_storage.py::test_forgotten_prompts_are_loaded",
    ),
    Feature(
        "prompts and answers in host memory on the decode side",
        CROSSES,
        NEWEST,
        "test_mixed_storage.py::test_a_decode_server_finds_the_turn_before",
    ),
    Feature(
        "seeds, `n`, penalties, stop strings, tools, structured outputs", CROSSES, ALL, "test_options.py::test_options"
    ),
    Feature("logprobs", CROSSES, ALL, "test_options.py::test_logprobs"),
    Feature(
        "speculative decoding by `ngram` or `suffix`",
        CROSSES,
        NEWEST,
        "test_serving.py::test_decode_servers_accept_drafts",
    ),
    Feature("EAGLE on both sides", CROSSES, NEWEST, "test_serving_drafts.py::test_twenty_prompts"),
    Feature(
        "a draft model on the decode side alone",
        CROSSES,
        NEWEST,
        "test_serving_drafts.py::test_twenty_prompts",
    ),
    Feature(
        "reasoning parsers", CROSSES, NEWEST, "test_parsed_chats.py::test_a_streamed_chat_is_parsed_as_by_one_server"
    ),
    Feature(
        "images, audio and video in chats", CROSSES, NOT_TRIED, "test_prompts.py::test_media_share_nothing_and_are_told"
    ),
    Feature("LoRA adapters", CROSSES, NEWEST, "test_lora.py::test_an_adapter_of_both_sides_crosses"),
    Feature(
        "different tensor-parallel degrees",
        CROSSES,
        NEWEST,
        "test_serving_degrees.py::test_prompts_through_the_proxy",
    ),
    Feature(
        "pipelines, also different ones", CROSSES, NEWEST, "test_serving_degrees.py::test_kv_arrives_from_every_rank"
    ),
    Feature(
        "`MultiConnector` with `OffloadingConnector` beside kvbelt",
        CROSSES,
        NEWEST,
        "test_beside.py::test_what_the_other_connector_loads_is_sent",
    ),
    Feature(
        "a LoRA adapter that one side lacks", WHOLE, NEWEST, "test_lora.py::test_an_adapter_of_one_side_is_served_whole"
    ),
    Feature(
        "different adapters under one name",
        WHOLE,
        NEWEST,
        "test_lora.py::test_different_adapters_of_one_name_share_no_kv",
    ),
    Feature("several prompts in one request", WHOLE, ALL, "test_options.py::test_options"),
    Feature(
        "prompt embeddings, `prompt_logprobs`, `max_tokens: 0`",
        WHOLE,
        NEWEST,
        "test_fields.py::test_an_answer_has_plain_vllm_s_fields",
    ),
    Feature("KV that does not come", WHOLE, ALL, "test_serving_failures.py::test_unknown_transfer_is_recomputed"),
    Feature(
        "KV that does not come inside `MultiConnector`",
        WHOLE,
        NEWEST,
        "test_beside.py::test_kv_that_never_comes_is_computed",
    ),
    Feature(
        "drafts that leave other things than KV (`extract_hidden_states`)",
        REFUSED,
        UNIT,
        "test_refusals.py::test_other_ways_of_drafting_are_refused",
    ),
    Feature(
        "several engines behind one port",
        REFUSED,
        UNIT,
        "test_refusals.py::test_several_engines_behind_one_port_are_refused",
    ),
    Feature(
        "`MultiConnector` without `recompute`",
        REFUSED,
        UNIT,
        "test_refusals.py::test_inside_a_multi_connector_the_outer_policy_must_recompute",
    ),
    Feature(
        "KV layouts in which a block holds all layers",
        REFUSED,
        UNIT,
        "test_versions.py::test_a_layout_fits_if_a_block_of_a_layer_is_one_run",
    ),
)


def table() -> str:
    rows = [f"| {one.name} | {one.outcome} | {one.tried} |" for one in FEATURES]
    return "\n".join(["| feature | what becomes of it | vLLM |", "|---|---|---|", *rows, ""])


def page_with_table(page: str) -> str:
    """Raises ValueError: the page has no place for the table."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the page lacks {_BEGIN!r} or {_END!r}")
    return f"{before}{begin}\n{table()}\n{end}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page_with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
