"""Mixed storage, the worker's half: one thread copies blocks to host memory and back.

Rules:

1. Copies are made in the order of the calls; ``host_scheduler`` relies on it.
2. A place whose copy has failed, or was given up, is *spoiled* until another copy into it succeeds. A load from it is
   reported as failed, and vLLM computes the block.
"""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvbelt.vllm.host_memory import CpuHostMemory, CudaHostMemory
from kvbelt.vllm.step_messages import HostCopy

log = logging.getLogger(__name__)


class HostWorker:
    """All copies of one worker process. The public methods are the model runner's thread's."""

    def __init__(self, memory: CpuHostMemory | CudaHostMemory) -> None:
        self._memory = memory
        self.num_places = memory.num_places
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-host")
        self._changed = threading.Condition()
        # All below: under _changed.
        self._keeping: dict[str, set[HostCopy]] = {}  # by request, copies that are not done; no set is empty
        self._given_up: set[HostCopy] = set()  # of these, the ones whose blocks have been taken away
        self._spoiled: set[int] = set()
        self._newly_spoiled: set[int] = set()
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()

    def restore(self, command: HostCopy) -> None:
        """Begin to fill the blocks. The request is reported as loaded at the end."""
        self._thread.submit(self._restore, command)

    def keep(self, command: HostCopy, mark: Any) -> None:
        """Copy the blocks once the device has passed the mark."""
        with self._changed:
            self._keeping.setdefault(command.request_id, set()).add(command)
        self._thread.submit(self._keep, command, mark)

    def reads(self, request_id: str) -> bool:
        """Whether a copy from this request's blocks is not done."""
        with self._changed:
            return request_id in self._keeping

    def give_up(self, request_id: str, seconds: float) -> bool:
        """Wait until the request's blocks are no longer read, because it loses them. False: they still are."""
        with self._changed:
            if self._changed.wait_for(lambda: request_id not in self._keeping, seconds):
                return True
            self._given_up |= self._keeping[request_id]
            return False

    def take_loaded(self) -> tuple[set[str], set[int]]:
        """Requests whose loads have ended since the last call, and those of their blocks that were not filled."""
        with self._changed:
            loaded, self._loaded = self._loaded, set()
            bad, self._bad_blocks = self._bad_blocks, set()
        return loaded, bad

    def take_spoiled(self) -> frozenset[int]:
        """Places that have been spoiled since the last call."""
        with self._changed:
            spoiled, self._newly_spoiled = frozenset(self._newly_spoiled), set()
        return spoiled

    def close(self) -> None:
        """Complete the copy under way, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._memory.close()

    # The thread.

    def _keep(self, command: HostCopy, mark: Any) -> None:
        whole = True
        try:
            self._memory.keep(command.block_ids, command.places, mark)
        except Exception:
            whole = False
            # A device that fails will fail vLLM as well; a block that is not kept is merely computed again.
            log.exception("request %s: its blocks could not be copied to host memory", command.request_id)
        with self._changed:
            if whole and command not in self._given_up:
                self._spoiled.difference_update(command.places)
            else:
                self._spoiled.update(command.places)
                self._newly_spoiled.update(command.places)
            self._given_up.discard(command)
            keeping = self._keeping[command.request_id]
            keeping.remove(command)
            if not keeping:
                del self._keeping[command.request_id]
            self._changed.notify_all()

    def _restore(self, command: HostCopy) -> None:
        with self._changed:
            bad = {
                block for block, place in zip(command.block_ids, command.places, strict=True) if place in self._spoiled
            }
        try:
            self._memory.restore(command.block_ids, command.places)
        except Exception:
            log.exception("request %s: its blocks could not be loaded from host memory", command.request_id)
            bad = set(command.block_ids)
        with self._changed:
            self._loaded.add(command.request_id)
            self._bad_blocks |= bad
