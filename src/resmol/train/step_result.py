"""What an optimizer step did, as the ledger records it, and which of it another execution must give again."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from resmol.run.ledger import Record, float_bits

# A step that is executed again must give these again, bit for bit; what comes first decides what comes after it.
REPRODUCIBLE_FIELDS = ("windows", "tokens", "lr", "loss_bits", "grad_norm_bits", "fingerprint")
REPRODUCIBLE_IN_FLOAT16 = ("loss_scale", *REPRODUCIBLE_FIELDS)
LATER_FIELDS = ("fingerprint",)  # a record of an earlier day has none


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did, under the names of the ledger's ``step`` record.

    Attributes:
        step: Its number, from 1.
        loss: Nats, a mean over all tokens of the step.
        grad_norm: The norm of the mean gradient, before clipping; None where it overflowed float16 at this loss scale.
        lr: The learning rate of the update.
        tokens: Targets of the step over all ranks.
        tokens_seen: Targets of this step and all before it.
        windows_seen: Windows of this step and all before it.
        windows: The digest of the step's window ids.
        epoch: Passes over the data that are done after this step.
        fingerprint: Of weights and moments after the step, or of the part whose turn it is (`run/fingerprint.py`).
        loss_scale: That of float16; None in another arithmetic.
        sources_seen: In a mixture, windows of each source in this step and all before it.
        sources_tokens: In a mixture, targets of the step in each source.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    tokens_seen: int
    windows_seen: int
    windows: str
    epoch: float
    fingerprint: str
    loss_scale: float | None = None
    sources_seen: tuple[int, ...] = ()
    sources_tokens: tuple[int, ...] = ()

    @property
    def skipped(self) -> bool:
        """Whether the gradient overflowed, so that the step updated nothing."""
        return self.grad_norm is None

    def to_record(self) -> Record:
        """Return the fields of the ledger's record, without the time that the step took."""
        norm_bits = None if self.grad_norm is None else float_bits(self.grad_norm)
        fields = {name: value for name, value in asdict(self).items() if value != ()}
        record = {**fields, "loss_bits": float_bits(self.loss), "grad_norm_bits": norm_bits}
        if self.loss_scale is None:
            del record["loss_scale"]
            return record
        return {**record, "skipped": self.skipped}


def first_difference(one: Record, other: Record) -> str | None:
    """Return the first of the reproducible fields in which two executions of a step differ, or None if none does.

    Args:
        one: As the ledger has it; what it lacks of `LATER_FIELDS` is not compared.
        other: Another execution.
    """
    names = [name for name in REPRODUCIBLE_IN_FLOAT16 if name in one or name not in LATER_FIELDS]
    return next((name for name in names if one.get(name) != other.get(name)), None)
