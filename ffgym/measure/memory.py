"""Peak memory of a model at work, measured in a fresh process of its own.

In a process that has held other models before, an allocator keeps what it has once been given, and the figure says
more about the past than about the model. ``python -m ffgym.measure.memory PROBE`` is that process: it takes a probe as
JSON and prints what it measured as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ffgym.errors import FFGymError, ModelError

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryProbe:
    """What the process does: `load` a model, prefill ``batch`` prompts of ``length`` tokens, decode a few tokens."""

    name: str
    revision: str | None
    dtype: str
    device: str
    threads: int
    batch: int
    length: int


@dataclass(frozen=True)
class Memory:
    """What a process needed."""

    # "resident" (the process's resident set: weights, activations, cache, and what the allocator holds) or "cuda" (what
    # torch's allocator had handed out)
    kind: str
    before: int  # bytes before the model was loaded: Python and the libraries; 0 on CUDA
    loaded: int  # bytes once the model was loaded and had run on one token
    peak: int  # most bytes at any moment while it ran

    @property
    def net_loaded(self) -> int:
        """Bytes that came with loading the model."""
        return self.loaded - self.before

    @property
    def net_peak(self) -> int:
        """Bytes that the model and its work needed at the peak."""
        return self.peak - self.before


def measure_memory(probe: MemoryProbe) -> Memory | None:
    """Run a probe in a fresh process.

    Returns:
        ``None`` on systems that do not say what a process needs once its model is loaded.

    Raises:
        ModelError: the process died, e.g. because memory ran out.
    """
    command = [sys.executable, "-m", "ffgym.measure.memory", json.dumps(asdict(probe))]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines()
        if done.returncode < 0:  # by the system, so that what it said last is not why
            reason = f"it was ended by signal {-done.returncode}"
        else:
            reason = said[-1] if said else f"it ended with exit status {done.returncode}"
        raise ModelError(
            f"the process that measures the memory of {probe.name!r} failed: {reason}",
            hint="It may have run out of memory: use smaller --batch-sizes or --prompt-lengths.",
        )
    measured = json.loads(lines[-1])
    return None if measured is None else Memory(**measured)


def _run(probe: MemoryProbe) -> Memory | None:
    """Run the probe in this process, which has done nothing else."""
    import torch

    import ffgym.models  # noqa: F401 - its memory counts as taken before loading
    from ffgym.measure.speed import Workload, generate, prompt
    from ffgym.models.loading import load
    from ffgym.models.placement import devices_of

    torch.set_num_threads(probe.threads)
    process = psutil.Process()
    before = int(process.memory_info().rss)
    loaded = load(probe.name, revision=probe.revision, dtype=probe.dtype, device=probe.device)
    generate(loaded.model, prompt(loaded.model, Workload(1, 1)))
    _release()
    if loaded.device.type == "cuda":
        devices = devices_of(loaded.model)
        held = sum(torch.cuda.memory_allocated(device) for device in devices)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        generate(loaded.model, prompt(loaded.model, Workload(probe.batch, probe.length)))
        return Memory("cuda", 0, held, sum(torch.cuda.max_memory_allocated(device) for device in devices))
    if loaded.device.type != "cpu":
        return None  # resident memory says nothing of memory on an accelerator
    settled = int(process.memory_info().rss)
    try:
        CLEAR.write_text("5", encoding="ascii")  # the peak starts anew, proc_pid_clear_refs(5): loading may need more
    except OSError:
        return None
    generate(loaded.model, prompt(loaded.model, Workload(probe.batch, probe.length)))
    return Memory("resident", before, settled, _peak())


def _release() -> None:
    """Give back what is free, so that loading leaves no trace; glibc keeps it otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _peak() -> int:
    """Most bytes of this process that were in memory since the peak was started anew."""
    status = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024


if __name__ == "__main__":
    try:
        outcome = _run(MemoryProbe(**json.loads(sys.argv[1])))
    except FFGymError as failed:
        sys.exit(failed.message)  # the parent reads one line
    print(json.dumps(None if outcome is None else asdict(outcome)))
