"""A scheduler of vLLM whose tokens a step can be changed between two loads, so that one server serves every setting.

    KVBELT_STEP_LIMIT=FILE vllm serve … --scheduler-cls benchmarks.gpu.step_limit.StepLimitScheduler

Whenever a request comes and no other is there, the number in FILE becomes the most tokens that a step may have, as
``--max-num-batched-tokens`` says at the start; the file beside it that ends in ``.taken`` then holds the number in
force. If FILE is missing or empty, that is what the server was started with. CUDA graphs and buffers stay as they are.
"""

import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class StepLimitScheduler(AsyncScheduler):  # type: ignore[misc] # vllm has no types here
    """vLLM's, with a limit that is read while it is idle."""

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._file = Path(os.environ["KVBELT_STEP_LIMIT"])
        self._largest = self.max_num_scheduled_tokens

    def add_request(self, request: Any) -> None:
        """Read the limit before the first request of a load."""
        if not self.requests:
            told = self._file.read_text() if self._file.exists() else ""
            self.max_num_scheduled_tokens = min(int(told or self._largest), self._largest)
            self._file.with_suffix(".taken").write_text(str(self.max_num_scheduled_tokens))
        super().add_request(request)
