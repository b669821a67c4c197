"""How fast a training step could be on devices that are not here, from counted operations and bytes: a prediction.

A step is a list of parts, each with its floating-point operations and the bytes that it reads and writes. A part takes
as long as the slower of the two, at a share of what the device's data sheet says; the parts do not overlap. The shares
are assumptions, stated beside the result: they are what well-kept PyTorch programs reach on models of this size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from resmol.bench.comparison import markdown_table
from resmol.config.model_config import ModelConfig
from resmol.config.run_config import RunConfig
from resmol.model.flops import parameter_counts, total_parameters, training_flops_per_token, training_memory
from resmol.system.tables import text_table

MATMUL_SHARE = 0.6  # of the peak of matrix products: widths of 500 to 2000 fill a device's units less than large ones
MEMORY_SHARE = 0.8  # of the memory's bandwidth: what a long copy reaches
LINK_SHARE = 0.8
ROOM_SHARE = 0.85  # of the memory, to be filled: the count is an estimate
KERNELS_OF_BLOCK, LAUNCH_SECONDS = 40, 5e-6  # compiled, forward and backward; a processor starts one after the other
HALF = 2  # bytes of bfloat16 and float16
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Device:
    """What a data sheet says of an accelerator.

    Attributes:
        name: What it is called.
        flops: Dense operations a second in bfloat16 or float16, accumulated in float32.
        bandwidth: Bytes a second of its memory.
        memory: Its bytes.
        link: Bytes a second to the other devices of a machine, in one direction.
        precision: The arithmetic that `auto` chooses.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    precision: str = "bfloat16"


DEVICES = (
    Device("T4", 65e12, 320e9, 16e9, 16e9, "float16"),
    Device("RTX 4090", 165e12, 1008e9, 24e9, 32e9),
    Device("A100 80 GB", 312e12, 2039e9, 80e9, 300e9),
    Device("H100 SXM", 989e12, 3350e9, 80e9, 450e9),
    Device("H200", 989e12, 4800e9, 141e9, 450e9),
)


@dataclass(frozen=True)
class Part:
    """A part of a step on one device: its floating-point operations, and the bytes that it reads and writes."""

    flops: int
    bytes: int

    def seconds(self, device: Device) -> float:
        """Return how long it takes at the assumed shares of the device's peaks."""
        return max(
            self.flops / (device.flops * MATMUL_SHARE),
            self.bytes / (device.bandwidth * MEMORY_SHARE),
        )


def step_parts(config: ModelConfig, tokens: int, seq_len: int, micro_batches: int) -> dict[str, Part]:
    """Count the parts of a training step in bfloat16 or float16 with float32 weights, on one device.

    A backward pass multiplies, reads and writes twice as much as its forward pass. Products read their operands and
    write their results. What lies between them is fused into one pass over its inputs and outputs: norms and
    residuals (of the float32 residual stream), the rotation, SwiGLU. The logits are passed over six times, the
    gradients' and the weights' casts once for each micro-batch, and AdamW reads four numbers and writes three.

    Args:
        config: The architecture.
        tokens: Tokens of the step on this device.
        seq_len: Tokens of a window.
        micro_batches: Of the step on this device.
    """
    counts, parameters = parameter_counts(config), total_parameters(config)
    width, inner = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    layers, output = config.num_hidden_layers, config.vocab_size * config.hidden_size
    matrices = counts["attention"] + counts["mlp"]
    attention = training_flops_per_token(config, seq_len) - 6 * (matrices + output)
    products = HALF * (9 * width + 2 * key_value + 3 * inner)
    between = 20 * width + HALF * (4 * width + 2 * (width + key_value) + 3 * inner)
    return {
        "products of the blocks": Part(6 * matrices * tokens, 3 * products * layers * tokens),
        "attention": Part(attention * tokens, 3 * HALF * (2 * width + 2 * key_value) * layers * tokens),
        "norms, rotation, SwiGLU": Part(0, 3 * between * layers * tokens),
        "output layer": Part(6 * output * tokens, 0),
        "softmax of the loss": Part(0, 6 * HALF * config.vocab_size * tokens),
        "casts of weights and gradients": Part(0, micro_batches * parameters * (4 + 2 + 2 + 4)),
        "gradient norm and AdamW": Part(0, parameters * (4 + 28)),
    }


@dataclass(frozen=True)
class Speed:
    """A prediction for a number of devices of one kind.

    Attributes:
        device: Its name.
        devices: How many share the step.
        precision: Of the products.
        step_seconds: Of one optimizer step.
        tokens_per_second: Of all devices together.
        mfu: Model FLOPs utilization, of the peak of all devices.
        ceiling: Tokens a second if every part reached the device's peaks.
        exposed_seconds: Of the gradients' all-reduce, which the backward pass does not hide.
    """

    device: str
    devices: int
    precision: str
    step_seconds: float
    tokens_per_second: float
    mfu: float
    ceiling: float
    exposed_seconds: float


def predict_speed(config: RunConfig, device: Device, devices: int = 1) -> Speed:
    """Predict the speed of data parallelism over some devices of a machine, each with the configured step.

    Gradients cross the link in a ring, in float32, while the backward pass computes: what takes longer than that is
    exposed. A step cannot be shorter than its kernels take to be started.
    """
    model, seq_len = config.model, config.data.seq_len
    tokens = config.batch.global_batch_tokens
    parts = step_parts(model, tokens, seq_len, config.grad_accum_steps)
    computing = sum(part.seconds(device) for part in parts.values())
    ideal = sum(max(part.flops / device.flops, part.bytes / device.bandwidth) for part in parts.values())
    update = parts["gradient norm and AdamW"].seconds(device)
    crossing = 4 * total_parameters(model) * 2 * (devices - 1) / devices / (device.link * LINK_SHARE)
    exposed = max(0.0, crossing - (computing - update) * 2 / 3)
    launches = KERNELS_OF_BLOCK * model.num_hidden_layers * LAUNCH_SECONDS * config.grad_accum_steps
    seconds = max(computing, launches) + exposed
    flops = training_flops_per_token(model, seq_len) * tokens
    return Speed(
        device=device.name,
        devices=devices,
        precision=device.precision,
        step_seconds=seconds,
        tokens_per_second=devices * tokens / seconds,
        mfu=flops / seconds / device.flops,
        ceiling=devices * tokens / ideal,
        exposed_seconds=exposed,
    )


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that a device holds.

    Attributes:
        windows: Windows in a forward pass; 0 where not even one fits.
        recomputed: Whether that takes activation checkpointing.
    """

    windows: int
    recomputed: bool

    def __str__(self) -> str:
        return f"{self.windows}{' *' if self.recomputed else ''}" if self.windows else "no"


def largest_fit(config: RunConfig, memory: float, devices: int) -> Fit:
    """Return the largest power of two of windows that fits, with weights and moments sharded over the devices (fsdp).

    Activation checkpointing counts where without it not one window fits.
    """
    for recomputed in (False, True):
        windows = 0
        while _needed(config, max(1, 2 * windows), devices, recomputed) <= ROOM_SHARE * memory and windows < 1024:
            windows = max(1, 2 * windows)
        if windows:
            return Fit(windows, recomputed)
    return Fit(0, recomputed=False)


def _needed(config: RunConfig, windows: int, devices: int, recomputed: bool) -> int:
    parts = training_memory(
        config.model,
        windows,
        config.data.seq_len,
        config.runtime.loss_chunk_tokens,
        activation_checkpointing=recomputed,
        low_precision=True,
        averaging=config.averaging.fraction > 0,
        shards=devices,
    )
    return sum(parts.values())


@dataclass(frozen=True)
class Prediction:
    """Speed on one and on eight devices of each kind, and what fits into memory."""

    config: RunConfig
    speeds: Sequence[Speed]
    parts: Mapping[str, Part]
    fits: Mapping[float, Sequence[Fit]]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that ``--json`` prints."""
        return {
            "preset": self.config.name,
            "tokens_a_step_of_each_device": self.config.batch.global_batch_tokens,
            "seq_len": self.config.data.seq_len,
            "assumed_shares": {"matmul": MATMUL_SHARE, "memory": MEMORY_SHARE, "link": LINK_SHARE},
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "speeds": [asdict(speed) for speed in self.speeds],
            "largest_micro_batch": {
                f"{memory / 1e9:.0f} GB": {str(count): asdict(fit) for count, fit in zip(COUNTS, fits, strict=True)}
                for memory, fits in self.fits.items()
            },
        }

    def render(self, console: Console) -> None:
        """Print the tables, and what they assume."""
        for title, head, rows in self._tables():
            console.print(_table(title, head, rows))
            console.print()
        console.print(self._assumptions(), markup=False, highlight=False)

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        tables = ["\n".join([f"**{title}**", "", *markdown_table(head, rows)]) for title, head, rows in self._tables()]
        return "\n\n".join([*tables, self._assumptions()])

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        tokens, steps = self.config.batch.global_batch_tokens, self.config.train.steps
        size = f"{self.config.name}, {tokens:,} tokens a step, windows of {self.config.data.seq_len:,}"
        speeds = [
            [
                f"{speed.devices} x {speed.device}" if speed.devices > 1 else speed.device,
                speed.precision,
                f"{1000 * speed.step_seconds:,.0f} ms",
                f"{speed.tokens_per_second:,.0f}",
                f"{speed.mfu:.0%}",
                f"{speed.ceiling:,.0f}",
                f"{speed.step_seconds * steps / 60:,.0f} min",
            ]
            for speed in self.speeds
        ]
        head = ["device", "precision", "step", "tokens/s", "MFU", "ceiling", f"{steps:,} steps"]
        fits = [[f"{memory / 1e9:.0f} GB", *(str(fit) for fit in fits)] for memory, fits in self.fits.items()]
        windows = f"Windows of {self.config.data.seq_len:,} in a micro-batch, at most (sharded by fsdp)"
        devices = ["memory", *(f"{count} device{'s' * (count > 1)}" for count in COUNTS)]
        return [(f"Predicted, not measured: {size}", head, speeds), (windows, devices, fits)]

    @staticmethod
    def _assumptions() -> str:
        return (
            f"Counted operations at {MATMUL_SHARE:.0%} of a device's peak, bytes at {MEMORY_SHARE:.0%} of its "
            "bandwidth, whichever is slower.\n"
            "ceiling: both at 100 %. Several devices take the step each. *: with activation checkpointing."
        )


def predict(config: RunConfig) -> Prediction:
    """Predict speed and room on the known devices, of a step that each device takes as configured."""
    speeds = [predict_speed(config, device) for device in DEVICES]
    eight = predict_speed(config, next(device for device in DEVICES if device.name == "H100 SXM"), 8)
    tokens = config.batch.global_batch_tokens
    return Prediction(
        config,
        [*speeds, eight],
        step_parts(config.model, tokens, config.data.seq_len, config.grad_accum_steps),
        {
            memory: [largest_fit(config, memory, count) for count in COUNTS]
            for memory in sorted({device.memory for device in DEVICES})
        },
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = text_table(title, *head)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table
