"""Judge the loss that a module computes itself from labels: which shift it has, and who is to shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from resmol.checks import Check
from resmol.errors import CheckFailed
from resmol.verify.parity import GUARDS, Baseline, tolerance
from resmol.verify.third_party.third_party_model import ThirdPartyModel

# Hugging Face's models shift what has these names themselves; `targets` and `y` come shifted, as in nanoGPT.
SHIFTED_INSIDE = ("labels", "label", "label_ids", "lm_labels")
ROW = "loss from labels"


@torch.no_grad()
def own_loss(module: ThirdPartyModel, base: Baseline) -> list[Check]:
    """Compare the loss from labels with that of the module's own logits; no check where it takes no labels."""
    name = module.label_argument
    if not name:
        return []
    guards = GUARDS["loss"]
    try:
        loss, logits = module.loss(base.ids, base.ids), module(base.ids).double()
    except CheckFailed as error:
        return [Check(ROW, False, error.what, error.fix, guards)]
    if loss is None:
        return [Check(ROW, True, f"not judged: given `{name}`, it returns no loss", "a scalar in its output", guards)]
    found, right = float(loss), _loss_at(logits, base.ids, 1)
    allowed = tolerance(base.reference_errors["loss"], right, base.precision)
    expected = f"{right:.4f} +- {allowed:.1e}: the mean cross-entropy of position t's logits with label t + 1"
    if abs(found - right) <= allowed:
        note = "" if name in SHIFTED_INSIDE else f"; it shifts `{name}` itself: give it the ids as they are"
        return [Check(ROW, True, f"{found:.4f}, error {abs(found - right):.1e}{note}", expected, guards)]
    reason = _which(logits, base.ids, found)
    if reason == _NEVER and name not in SHIFTED_INSIDE:
        shifted = f"{found:.4f}; it does not shift `{name}`: give it the ids shifted by one, as nanoGPT does"
        return [Check(ROW, True, shifted, "the mean cross-entropy of position t's logits with label t", guards)]
    if reason == _NEVER:
        reason += f", unless your data are shifted; then call the argument targets instead of {name}"
    return [Check(ROW, False, f"{found:.4f} instead of {right:.4f}: {reason}", expected, guards)]


_NEVER = "labels are never shifted: it learns to copy"


def _which(logits: Tensor, ids: Int[Tensor, "B T"], loss: float) -> str:
    """Return in words which of the known wrong losses this is."""
    tokens = ids[:, 1:].numel()
    wrong_losses = {
        _NEVER: _loss_at(logits, ids, 0),
        "labels are shifted twice: it learns token t + 2": _loss_at(logits, ids, 2),
        "labels are shifted the other way: it learns the token before": _loss_at(logits, ids, -1),
        "it is a sum, not a mean": _loss_at(logits, ids, 1) * tokens,
        "it is a sum, and labels are never shifted": _loss_at(logits, ids, 0) * ids.numel(),
        "the mean is taken over positions without a label too": _loss_at(logits, ids, 1) * tokens / ids.numel(),
    }
    near = [what for what, value in wrong_losses.items() if abs(value - loss) <= 1e-4 * abs(value)]
    return near[0] if near else "none of the usual losses"


def _loss_at(logits: Tensor, ids: Int[Tensor, "B T"], shift: int) -> float:
    """Return the mean cross-entropy of position t's logits with token t + shift."""
    length = ids.shape[1]
    kept = logits[:, max(0, -shift) : length - max(0, shift)].flatten(0, 1)
    return float(F.cross_entropy(kept, ids[:, max(0, shift) : length - max(0, -shift)].flatten()))
