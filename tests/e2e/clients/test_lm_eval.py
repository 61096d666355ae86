"""lm-eval: a task of log-likelihoods."""

import json
import os
from pathlib import Path

import lm_eval
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

ROWS = [{"question": "The sky is", "choices": ["blue", "a very green cat"], "answer": 0} for _ in range(2)]


def test_a_task_of_loglikelihoods(url: str, model: str, tmp_path: Path) -> None:
    """A task from a local file; prompts are echoed with their log probabilities, as text and as ids."""
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    task = {
        "task": "sky",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    found = []
    for ids in (True, False):
        asking = LocalCompletionsAPI(
            model=model,
            base_url=url + "/completions",
            tokenizer=os.environ["KVBELT_CLIENTS_MODEL"],
            tokenizer_backend="huggingface",
            tokenized_requests=ids,
            max_retries=1,
        )
        results = lm_eval.simple_evaluate(
            asking, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )
        found.append([response for sample in results["samples"]["sky"] for response in sample["filtered_resps"]])
    assert found[0] == found[1]
    assert all(likelihood < 0 for likelihood, _ in found[0])
