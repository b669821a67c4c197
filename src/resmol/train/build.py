"""Build what a run works with: its data and tokenizer, model and optimizer, batches, compiled blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch._functorch.config

from resmol.config.run_config import RunConfig
from resmol.data.beginnings import first_words
from resmol.data.loader import Loader, count_windows
from resmol.data.mixture import MixtureOrder
from resmol.data.resolve import Text, open_or_prepare, recorded_folder, stored_folder
from resmol.data.shards import Dataset, TokenStream, verify_shards
from resmol.data.sources import RunData, datasets_of, open_recorded
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.errors import ConfigError, DataError
from resmol.model.linear import set_matmul_backend
from resmol.model.llama import CausalLM
from resmol.run.directory import RunDir
from resmol.run.mixture_place import MixturePlace
from resmol.system.atomic_io import file_sha256, remove_directory
from resmol.system.wording import counted
from resmol.train.averaging import WeightAverage
from resmol.train.compiler import require_compiler
from resmol.train.optimizer import build_optimizer
from resmol.train.parallel import Runtime
from resmol.train.sharding import sharded_model
from resmol.train.step import TrainState
from resmol.train.supply import check_supply
from resmol.train.vocabulary import check_vocabulary, log_vocabulary

logger = logging.getLogger(__name__)

ANY_PROMPT = "The"  # where the text has no word that could begin a sample
ACTIVATION_MEMORY_BUDGET = 0.9  # share of the activations that the compiler would keep by default


def open_run_data(
    run: RunDir, config: RunConfig, text: Text | None, tokenizer: Tokenizer | None
) -> tuple[RunData, Tokenizer]:
    """Open the data of a run, verified, and its tokenizer; text is prepared if that was not done before.

    Args:
        run: The run directory; its copy of the tokenizer is taken where ``tokenizer`` is None.
        config: The configuration that both must fit.
        text: A prepared folder, or text to prepare; None reads what the configuration names.
        tokenizer: The tokenizer that the user named; None looks in the usual places.

    Raises:
        ConfigError: The data was made with another tokenizer, or the tokenizer does not fit the model; or a source of
            a mixture is exhausted before the last step.
        DataError: Data or tokenizer is missing or corrupt, or the text fills no window.
    """
    begun = run.has_begun()
    found = tokenizer or _own_tokenizer(run, config, begun=begun)
    check_vocabulary(config, found.vocab_size, found.eos_id)
    if not begun:
        log_vocabulary(config, found)
    data: RunData
    made: Path | None = None  # by this start
    if config.data.source is not None:
        data = open_recorded(run, config.data)
    else:
        path = config.data.path
        folder = recorded_folder(run, path) if text is None else stored_folder(run, path)
        first = folder == run.data and not begun
        data = open_or_prepare(folder, text, found, replace=first)
        made = folder if first and text is not None else None
    for source, dataset in datasets_of(data).items():
        verify_shards(dataset)
        _check_fit(dataset, config)
        _check_length(dataset, config, source, made)
    if not begun:
        check_supply(config, mixture_order(config, data))
    return data, found


def _own_tokenizer(run: RunDir, config: RunConfig, *, begun: bool) -> Tokenizer:
    """Return the run's copy of its tokenizer, unless it is that of another start that failed."""
    own = run.tokenizer.is_file() and (begun or file_sha256(run.tokenizer) == config.tokenizer.sha256)
    return load_tokenizer(run.tokenizer if own else None, sha256=config.tokenizer.sha256)


def _check_fit(dataset: Dataset, config: RunConfig) -> None:
    if dataset.tokenizer_sha256 != config.tokenizer.sha256:
        raise ConfigError(
            f"the data was made with tokenizer {dataset.tokenizer_sha256[:12]}; this run is configured for "
            f"{config.tokenizer.sha256[:12]}",
            fix="prepare the text again with the run's tokenizer; or start a new run with that of the data: "
            "--tokenizer PATH",
        )
    check_vocabulary(config, dataset.vocab_size, dataset.eos_id)


def _check_length(dataset: Dataset, config: RunConfig, source: str, made: Path | None) -> None:
    """Refuse text that fills no window (`DataError`), and remove the folder that was made of it: too little to keep."""
    try:
        make_loader(config, dataset.train)
    except DataError as error:
        if made is not None:
            remove_directory(made)
        raise DataError(f"{source}: {error.what}" if source else error.what, fix=error.fix) from None


def choose_prompt(config: RunConfig, data: RunData, tokenizer: Tokenizer) -> RunConfig:
    """Return a configuration whose samples continue words of the run's own text, unless it says what they continue."""
    if config.sampling.prompt:
        return config
    words = first_words(next(iter(datasets_of(data).values())), tokenizer, 1) or [ANY_PROMPT]
    return config.replace({"sampling.prompt": words[0]})


def new_state(config: RunConfig, runtime: Runtime) -> TrainState:
    """Return a model with its initial weights, and an optimizer and an average that have seen nothing."""
    model = _new_model(config, runtime)
    set_matmul_backend(model, "onednn" if config.runtime.matmul_backend == "onednn" else "mkl")
    model.model.activation_checkpointing = config.runtime.activation_checkpointing == "on"
    optimizer = build_optimizer(model, config.optimizer, config.batch.global_batch_tokens)
    average = WeightAverage(model, config.averaging) if config.averaging.fraction else None
    return TrainState(model, optimizer, average)


def _new_model(config: RunConfig, runtime: Runtime) -> CausalLM:
    if runtime.mesh is not None:
        return sharded_model(config, runtime.mesh, runtime.device, runtime.autocast_dtype)
    model = CausalLM.empty(config.model, attention=config.runtime.attention)
    model.init_weights(config.train.seed)
    return model.to(runtime.device)


def make_loader(
    config: RunConfig,
    stream: TokenStream | Sequence[TokenStream],
    order: MixtureOrder | None = None,
    names: Sequence[str] = (),
) -> Loader:
    """Return the batches of a token stream, or of the sources of a mixture, cut and shuffled as configured."""
    return Loader(
        stream,
        seq_len=config.data.seq_len,
        micro_batch_size=config.batch.micro_batch_size,
        grad_accum_steps=config.grad_accum_steps,
        seed=config.data.seed,
        eos_id=config.model.eos_token_id,
        document_mask=config.data.document_mask,
        order=order,
        names=names,
        recut=config.data.recut,
    )


def mixture_order(
    config: RunConfig, data: RunData, step: int = 0, place: MixturePlace | None = None
) -> MixtureOrder | None:
    """Return the order of the windows of a mixture; None for data that is none.

    Args:
        config: Stages, seed and batch.
        data: The sources.
        step: Steps that are done.
        place: Where the run stands in the mixture after them.
    """
    if isinstance(data, Dataset):
        return None
    assert config.data.stage is not None, "a mixture has stages"
    sizes = [count_windows(stream, config.data.seq_len) for stream in data.train]
    stages, names = config.data.stage, tuple(data.datasets)
    return MixtureOrder(names, sizes, config.data.seed, stages, config.windows_per_step, step=step, place=place)


def train_loader(config: RunConfig, data: RunData, state: TrainState) -> Loader:
    """Return the batches of the steps after ``state``."""
    return make_loader(config, data.train, mixture_order(config, data, state.step, state.mixture))


def make_val_loader(config: RunConfig, held_out: TokenStream | Sequence[TokenStream]) -> Loader | None:
    """Return the batches of the held-out split, or None where it is shorter than a window.

    Of a mixture, these are the sources whose held-out text fills one.
    """
    streams = [held_out] if isinstance(held_out, TokenStream) else held_out
    names = [source.name for source in config.data.source or ()] or [""]
    long_enough = {name: one for name, one in zip(names, streams, strict=True) if len(one) > config.data.seq_len}
    if long_enough:
        return make_loader(config, list(long_enough.values()), names=[name for name in long_enough if name])
    if config.evaluation.every:
        length = counted(sum(len(stream) for stream in streams), "held-out token")
        logger.info(f"evaluation: none, since {length} cannot fill a window of {config.data.seq_len}")
    return None


def compile_blocks(model: CausalLM, config: RunConfig) -> None:
    """Compile the transformer block, in place, if ``runtime.compile`` is on; names and weights stay.

    Raises `ConfigError` where torch.compile does not work.

    The compiler may keep less than all activations for the backward pass: it then recomputes norms and SwiGLU, whose
    inputs it reads anyway and which need no matmul. A smaller budget would make it repeat matmuls.
    """
    require_compiler(config, model.lm_head.weight.device.type)
    if config.runtime.compile == "on":
        torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
        for layer in model.model.layers:
            layer.compile(dynamic=False)
