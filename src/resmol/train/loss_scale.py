"""The loss scale of float16: what the loss is multiplied by, so that small gradients do not become zero.

float16 has no number between 0 and 6e-8 and none above 65,504. A gradient is a sum that is linear in the loss, so
training multiplies the loss by a scale and divides the update by it again (Micikevicius et al. 2018, section 3.2). When
a gradient overflows, the step updates nothing and the scale is halved; after many good steps it is doubled.

Rule and constants are those of ``torch.amp.GradScaler``. That class would read all gradients twice more, to look for
infinity and to divide: here the norm that clipping needs shows an overflow, and the fused update divides anyway. Every
rank gets the norm of the same summed gradients, so all of them decide the same without asking each other.
"""

from __future__ import annotations

from resmol.config.run_config import RunConfig
from resmol.run.checkpoint_manifest import LossScale

GROWTH = BACKOFF = 2.0
GROWTH_INTERVAL = 2000  # good steps
SMALLEST = 1.0  # an overflow at this scale is one without any: the model has diverged


def after_step(scale: LossScale, *, skipped: bool) -> LossScale:
    """Return the scale of the next step."""
    if skipped:
        smaller = max(SMALLEST, scale.scale / BACKOFF)
        return LossScale(scale=smaller, skipped_steps=scale.skipped_steps + 1)
    grows = scale.good_steps + 1 == GROWTH_INTERVAL
    changes = {"scale": scale.scale * GROWTH, "good_steps": 0} if grows else {"good_steps": scale.good_steps + 1}
    return scale.model_copy(update=changes)


def factor_of_sum(scale: LossScale, config: RunConfig) -> float:
    """Return what the *summed* loss of a micro-batch is multiplied by.

    That is the scale divided by the tokens of a micro-batch, rounded down to a power of two, so that scaling changes no
    bit of a gradient that float16 can hold.
    """
    tokens = config.batch.micro_batch_size * config.data.seq_len
    return float(scale.scale / 2 ** (tokens.bit_length() - 1))
