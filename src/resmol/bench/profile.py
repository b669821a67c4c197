"""`resmol bench train --trace FILE`: a few training steps under torch.profiler, as a Chrome trace and a table."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from resmol.config.run_config import RunConfig
from resmol.data.shards import open_dataset
from resmol.train.autotune import check_memory, resolve_auto
from resmol.train.build import compile_blocks, make_loader, new_state
from resmol.train.loop import train_step
from resmol.train.parallel import Runtime, open_runtime

OPERATORS = 25


def trace_training(config: RunConfig, data: str, file: Path, *, steps: int, warmup: int) -> str:
    """Profile training steps in this process; nothing is measured beside it, since watching slows what is watched.

    Args:
        config: What to train.
        data: A prepared folder.
        file: Gets the trace, for chrome://tracing or ui.perfetto.dev.
        steps: Steps to watch.
        warmup: Steps before them, which compile and fill the allocator.

    Returns:
        A table of the most expensive operators.
    """
    settled, _ = resolve_auto(config)
    check_memory(settled)
    with open_runtime(settled) as runtime:
        state = new_state(settled, runtime)
        loader = make_loader(settled, open_dataset(Path(data)).train)
        compile_blocks(state.model, settled)

        def step() -> None:
            train_step(state, loader.step(state.step + 1), settled, runtime)

        for _ in range(warmup):
            step()
        with profile(activities=_activities(runtime), record_shapes=True) as watched:
            for _ in range(steps):
                step()
    watched.export_chrome_trace(str(file))
    on = "cuda" if runtime.device.type == "cuda" else "cpu"
    return str(watched.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=OPERATORS))


def _activities(runtime: Runtime) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if runtime.device.type == "cuda" else [])]
