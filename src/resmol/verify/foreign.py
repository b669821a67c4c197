"""Somebody else's implementation, checked with the same yardstick, and told what it does wrong."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from resmol.checks import Check
from resmol.errors import CheckFailed
from resmol.flops import total_parameters
from resmol.hf_config import ModelConfig
from resmol.model import CausalLM
from resmol.verify.adopt import Adopted, adopt
from resmol.verify.diagnose import diagnose
from resmol.verify.norms import check_norm, norm_weight
from resmol.verify.observe import next_token_loss, observe, reference_forward
from resmol.verify.parity import GREEDY_TOKENS, GUARDS, Baseline, arithmetic, baseline, errors, ids_for
from resmol.verify.twins import compare_late, fill, narrow, shallow, small

# Long enough for positions above 256 and 2048; attention that is written out needs T x T numbers for each head.
LATE_LENGTH, LATE_LENGTH_AT_FULL_SIZE = 4096, 320
DIAGNOSIS_TOKENS, DIAGNOSIS_TOKENS_AT_FULL_SIZE = 320, 48

Factory = Callable[[ModelConfig], nn.Module]
