"""What a run reads: one prepared folder, or the folders of a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from resmol.config.data_config import DataConfig
from resmol.data.loader import count_windows
from resmol.data.resolve import recorded_folder
from resmol.data.shards import Dataset, Manifest, Split, TokenStream, open_dataset
from resmol.errors import DataError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record


@dataclass(frozen=True)
class Mixture:
    """The prepared folders of a mixture, all of one tokenizer.

    Attributes:
        datasets: Name of a source -> its folder, in the order of the configuration.
    """

    datasets: Mapping[str, Dataset]

    @property
    def train(self) -> tuple[TokenStream, ...]:
        """The tokens to train on, of each source."""
        return tuple(dataset.train for dataset in self.datasets.values())

    @property
    def val(self) -> tuple[TokenStream, ...]:
        """The held-out tokens of each source; some may be empty."""
        return tuple(dataset.val for dataset in self.datasets.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the sources in their order."""
        joined = "\n".join(dataset.fingerprint for dataset in self.datasets.values())
        return hashlib.sha256(joined.encode("ascii")).hexdigest()

    @property
    def manifest(self) -> Manifest:
        """What is recorded about all sources together: their shards, inputs and counts."""
        manifests = [dataset.manifest for dataset in self.datasets.values()]
        counts = ("documents", "empty_documents", "text_bytes", "replacements", "duplicates", "val_in_train")
        source = manifests[0].source.model_copy(
            update={"inputs": tuple(one for manifest in manifests for one in manifest.source.inputs)}
            | {name: sum(getattr(manifest.source, name) for manifest in manifests) for name in counts}
        )
        return manifests[0].model_copy(
            update={
                "train": Split.of([shard for manifest in manifests for shard in manifest.train.shards]),
                "val": Split.of([shard for manifest in manifests for shard in manifest.val.shards]),
                "source": source,
            }
        )

    def facts(self, seq_len: int) -> list[Record]:
        """Return what the ledger records of each source: name, fingerprint and windows."""
        return [
            {"name": name, "fingerprint": dataset.fingerprint, "windows": count_windows(dataset.train, seq_len)}
            for name, dataset in self.datasets.items()
        ]


RunData = Dataset | Mixture


def datasets_of(data: RunData) -> Mapping[str, Dataset]:
    """Return the folders by the names of their sources; the only folder of a run without a mixture has no name."""
    return {"": data} if isinstance(data, Dataset) else data.datasets


def open_recorded(run: RunDir, data: DataConfig) -> RunData:
    """Open what a run was trained on, where it is or has moved to with the run; no token is read.

    Args:
        run: The run directory.
        data: The section of its configuration.

    Raises:
        DataError: A folder is not there, is no prepared one, or sources of a mixture have different tokenizers.
    """
    if data.source is None:
        return open_dataset(recorded_folder(run, data.path))
    folders = {source.name: recorded_folder(run, source.path, source.name) for source in data.source}
    datasets = {name: open_dataset(folder) for name, folder in folders.items()}
    first, *others = datasets
    for name in others:
        if datasets[name].tokenizer_sha256 != datasets[first].tokenizer_sha256:
            raise DataError(
                f"the sources {first} and {name} were prepared with different tokenizers "
                f"({datasets[first].tokenizer_sha256[:12]} and {datasets[name].tokenizer_sha256[:12]})",
                fix="prepare both with the same one: resmol prepare OUT --input TEXT --tokenizer PATH",
            )
    return Mixture(datasets)
