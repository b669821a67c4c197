"""`resmol bench train --trace FILE`: a few training steps under torch.profiler, as a Chrome trace and a table."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile

from resmol.config.run_config import RunConfig
from resmol.data.shards import open_dataset
from resmol.system.user_paths import user_path
from resmol.train.autotune import check_memory, resolve_auto
from resmol.train.build import compile_blocks, make_loader, new_state
from resmol.train.devices import profiler_activities
from resmol.train.parallel import open_runtime
from resmol.train.step import train_step

OPERATORS = 25


def trace_training(config: RunConfig, data: str, file: Path, *, steps: int, warmup: int) -> str:
    """Profile training steps in this process; profiling slows them, so nothing else is measured.

    Args:
        config: What to train.
        data: A prepared folder.
        file: Gets the trace, for chrome://tracing or ui.perfetto.dev.
        steps: Steps to profile.
        warmup: Steps before them, which compile and warm up the allocator.

    Returns:
        A table of the most expensive operators.
    """
    file = user_path(file)
    resolved, _ = resolve_auto(config)
    check_memory(resolved)
    with open_runtime(resolved) as runtime:
        state = new_state(resolved, runtime)
        loader = make_loader(resolved, open_dataset(Path(data)).train)
        compile_blocks(state.model, resolved)

        def step() -> None:
            train_step(state, loader.step_after(state.windows_seen), resolved, runtime)

        for _ in range(warmup):
            step()
        activities = profiler_activities(runtime.device)
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(steps):
                step()
    profiler.export_chrome_trace(str(file))
    kind = "cpu" if len(activities) == 1 else "device"
    return str(profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=OPERATORS))
