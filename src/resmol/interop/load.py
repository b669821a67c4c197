"""Load a model for inference from a run, checkpoint, Hugging Face folder, GGUF file, Hub id or package.

Loaded weights cannot enter training: training does not import this module, and they require no gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckpointError, DataError, ResmolError, UsageError
from resmol.inference.completion import Completion, TextStreamer, complete_batches
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.gguf_names import gguf_tensors
from resmol.interop.hf_folder import WeightFiles, cross_check, surplus_names, weight_names
from resmol.interop.model_ref import ModelRef
from resmol.interop.model_tokenizer import model_tokenizer, named_tokenizer
from resmol.interop.resolve import Source, resolve
from resmol.interop.surplus import check_surplus
from resmol.model.flops import total_parameters
from resmol.model.linear import default_matmul_backend, set_matmul_backend
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import weight_tensors
from resmol.run.checkpoint_load import load_tensors
from resmol.run.checkpoint_manifest import AVERAGED, WEIGHTS, list_checkpoints
from resmol.run.directory import RunDir
from resmol.run.tensor_files import stored_tensor
from resmol.system.safetensors_header import Header, read_header
from resmol.system.user_paths import user_path
from resmol.system.wording import counted
from resmol.train.devices import find_device

Precision = Literal["float32", "bfloat16"]
MAX_LOADS = 20  # of a run that prunes what is being read, where the file system has no locks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model that can generate.

    Attributes:
        model: The model, in evaluation mode, without gradients.
        source: Where its weights come from, with their sha256 and their run.
        find_tokenizer: Returns the tokenizer; `tokenizer` calls it once, when it is first needed.
    """

    model: CausalLM
    source: Source
    find_tokenizer: Callable[[], Tokenizer]

    def __repr__(self) -> str:
        return f"LoadedModel({self.source.kind} {self.source.path}, {total_parameters(self.config):,} parameters)"

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return (self.config.eos_token_id,) if self.source.ends is None else self.source.ends

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            DataError: It is not found, or its vocabulary is larger than the model's; `NetworkError`: it could not be
                downloaded.
        """
        tokenizer = self.find_tokenizer()
        _check_rows(tokenizer, self.config.vocab_size)
        return tokenizer

    def stream(
        self,
        prompt: str,
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        on_token: Callable[[int], None] = lambda _token: None,
        with_logprobs: bool = False,
    ) -> TextStreamer:
        """Return the continuation of ``prompt`` as an iterator over pieces of text, never half a character.

        Its `TextStreamer.completion` has the token ids, the reason of its end, and the times of prefill and decoding.

        Args:
            prompt: The text to go on from; an empty one begins a document.
            sampling: How to choose tokens.
            stop: The text ends before the first of these strings.
            on_token: Called with every token, also one that completes no character.
            with_logprobs: Keep the tokens' log-probabilities as well.

        Raises:
            UsageError: The prompt fills the context, or a stop string is empty.
        """
        return TextStreamer(
            self.model, self.tokenizer, prompt, sampling, stop=stop, ends=self.ends, on_token=on_token,
            with_logprobs=with_logprobs,
        )  # fmt: skip

    def generate(self, prompt: str, *, stop: Sequence[str] = (), **sampling: Any) -> str:
        """Return the continuation of ``prompt``, without the prompt.

        Args:
            prompt: The text to go on from; an empty one begins a document.
            stop: The text ends before the first of these strings.
            sampling: Fields of `SamplingParams`: max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty.

        Raises:
            UsageError: An unknown or impossible option, or a prompt that fills the context.
        """
        return "".join(self.stream(prompt, _options(sampling), stop=stop))

    def complete(self, prompt: str, *, stop: Sequence[str] = (), **sampling: Any) -> Completion:
        """Return the continuation with token ids, log-probabilities, the reason of its end, and timings.

        Arguments and errors are those of `generate`.
        """
        stream = self.stream(prompt, _options(sampling), stop=stop, with_logprobs=True)
        for _ in stream:
            pass
        return stream.completion()

    def complete_batch(
        self, prompts: Sequence[str], *, stop: Sequence[str] = (), batch_size: int = 8, **sampling: Any
    ) -> list[Completion]:
        """Return what `complete` returns for each of several prompts, ``batch_size`` decoded together, which is faster.

        Each draws with a random generator of its own that begins at the seed, so that its text does not depend on its
        neighbours; see `generate.decode_batch` for the effect of rounding. Timings are those of its batch.

        Raises:
            UsageError: An unknown or impossible option, or a prompt that fills the context; the message says which.
        """
        options = _options(sampling)
        batches = complete_batches(
            self.model, self.tokenizer, prompts, options, stop=stop, ends=self.ends, batch_size=batch_size,
            with_logprobs=True,
        )  # fmt: skip
        return [completion for batch in batches for completion in batch]


def _options(sampling: dict[str, Any]) -> SamplingParams:
    if unknown := sampling.keys() - SamplingParams.__dataclass_fields__.keys():
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise UsageError(f"{min(unknown)} is not a sampling option", fix=f"choose from: {known}")
    return SamplingParams(**sampling)


def load_model(
    source: str | Path | ModelRef,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
) -> LoadedModel:
    """Load a model for evaluation and generation, never for training.

    Args:
        source: A run directory (its newest whole checkpoint), a checkpoint, a Hugging Face folder
            (safetensors, also in shards), a GGUF file, a Hub id, or ``pypi``: the real SmolLM2-135M-Instruct
            of a published package. A `ModelRef` names other weights of a run: averaged ones, the best checkpoint's.
        tokenizer: A tokenizer, the path of a tokenizer.json or its folder, or a Hub id. By default the model's own,
            found when used.
        device: Where to compute; by default a CUDA device if there is one.
        precision: Of the weights and all that is computed with them; bfloat16 takes half the memory.

    Raises:
        CheckpointError: The weights are damaged, do not fit their configuration, are not finite, or a pickle.
        ConfigError: The configuration describes a model that resmol does not implement.
        DataError: There is nothing of that name; `NetworkError` when it could not be downloaded.
        UsageError: A choice of weights is made where there is none.
    """
    checkpoints = RunDir(user_path(ModelRef.of(source).source)).checkpoints
    for _ in range(MAX_LOADS):
        before = list_checkpoints(checkpoints)
        try:
            model, found = _filled(source, device, precision)
            break
        except ResmolError:
            if list_checkpoints(checkpoints) == before:  # else the run pruned what was being read: no locks there
                raise
    else:
        raise CheckpointError(
            f"{source} removed {MAX_LOADS} checkpoints while they were read",
            fix="try again when it has ended, or let it keep more: --set checkpoint.keep_last=10",
        )
    return LoadedModel(model, found, _tokenizer_choice(tokenizer, found))


def _filled(
    source: str | Path | ModelRef, device: str | torch.device | None, precision: Precision
) -> tuple[CausalLM, Source]:
    """Return the model that ``source`` names, in evaluation mode; a run that is being trained waits with pruning it."""
    with ExitStack() as hold:
        found = resolve(source, hold=hold)
        config = _require_weights(found)
        model = CausalLM.empty(config).to(device or find_device("auto"))
        _fill(model, found)
    model.to(getattr(torch, precision)).eval().requires_grad_(requires_grad=False)
    set_matmul_backend(model, default_matmul_backend())
    return model, found


def _tokenizer_choice(given: Tokenizer | str | Path | None, source: Source) -> Callable[[], Tokenizer]:
    if given is None:
        return lambda: model_tokenizer(source)
    if isinstance(given, Tokenizer):
        return lambda: given
    return lambda: named_tokenizer(given, source)


def _check_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a vocabulary that is larger than the model's; added tokens may be too many, as long as no text has them.

    Raises:
        DataError: A token of the vocabulary itself has no row in the embedding.
    """
    if tokenizer.vocab_size <= rows:
        return
    without = {token: tokenizer.spelling(token) for token in range(rows, tokenizer.vocab_size)}
    named = [name for name in without.values() if name is not None]
    if without.keys() - tokenizer.added_tokens.keys():
        raise DataError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, and the model {rows}",
            fix="put the model's own tokenizer.json beside its weights, or name it with --tokenizer PATH",
        )
    logger.warning(
        f"the model has {rows} rows and none for {counted(len(named), 'added token')} ({', '.join(named[:3])}); "
        "a text that holds one is refused"
    )


# --- weights -------------------------------------------------------------------------------------------------


def _require_weights(source: Source) -> ModelConfig:
    """Return the architecture of a source whose weights can be loaded; refuse the others."""
    if source.kind == "run":
        raise CheckpointError(f"{source.path} has no checkpoint yet", fix=f"train it: resmol train {source.path}")
    if source.weights is None:
        raise DataError(
            f"{source.path} is a configuration without weights",
            fix="name a run, a checkpoint, a Hugging Face folder, a GGUF file, a Hub id or pypi",
        )
    if source.config is None:
        raise DataError(
            f"{source.path} holds weights without a configuration",
            fix="name the folder that holds them and their config.json",
        )
    if isinstance(source.weights, GGUFHeader):  # compared with its own metadata when it is read
        return source.config
    failed = [check for check in cross_check(source.config, source.weights.tensors) if not check.passed]
    if failed:
        problems = "".join(f"\n  - {check.name}: {check.measured}" for check in failed)
        raise CheckpointError(
            f"the weights in {source.path} do not fit its config.json:{problems}",
            fix="fetch or export the model again; `resmol inspect` shows both sides",
        )
    return source.config


def _fill(model: CausalLM, source: Source) -> None:
    """Read the weights into a model of their architecture (`CheckpointError` on NaN, infinity or damage)."""
    if source.checkpoint is not None:
        load_tensors(source.checkpoint, AVERAGED if source.averaged else WEIGHTS, weight_tensors(model))
    elif isinstance(source.weights, GGUFHeader):
        values = gguf_tensors(source.weights, model.config)
        _copy_into(model, ((name, torch.from_numpy(array)) for name, array in values), source.path)
    elif source.weights is not None:
        _fill_from_safetensors(model, source.weights, source.path)


def _fill_from_safetensors(model: CausalLM, weights: WeightFiles, origin: Path) -> None:
    """Read the weights, and then compare what the files say twice."""
    names = weight_names(model.config, weights.tensors)
    headers = {path: read_header(path) for path in weights.files}
    places = {name: path for path, header in headers.items() for name in header.tensors}

    def stored(name: str) -> Tensor:
        return _stored(places[name], name, headers[places[name]])

    _copy_into(model, ((name, stored(other)) for name, other in names.items()), origin)
    for name in sorted(surplus_names(model.config, weights.tensors)):
        check_surplus(model, name, stored(name), str(places[name]))


def _stored(path: Path, name: str, header: Header) -> Tensor:
    try:
        return stored_tensor(path, name, header)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="fetch or export the model again") from None


def _copy_into(model: CausalLM, tensors: Iterable[tuple[str, Tensor]], origin: Path) -> None:
    """Fill all of ``model``; names and shapes were compared before (`CheckpointError` on NaN or infinity)."""
    targets = weight_tensors(model)
    with torch.no_grad():
        for name, tensor in tensors:
            targets.pop(name).copy_(tensor)
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{origin} holds NaN or infinity in {name}",
                    fix="these weights are of no use; take another copy",
                )
    assert not targets, f"{origin} left {sorted(targets)} unfilled"
