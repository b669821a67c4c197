"""Write the record of a run into its export: ``training/`` with ledger, curves, claims, certificate and anchors."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.audit.certificate import current_certificate
from resmol.audit.claims import read_claims
from resmol.audit.plots import curve_images
from resmol.audit.run_data import recorded_data
from resmol.config.run_config import RunConfig
from resmol.data.builtin_corpora import SHAKESPEARE
from resmol.data.shards import Manifest
from resmol.errors import CheckFailed
from resmol.interop.description import Description
from resmol.interop.resolve import Source
from resmol.run.checkpoint_manifest import checkpoint_name
from resmol.run.directory import RunDir
from resmol.run.ledger import LedgerContent, Record, effective_steps, read_ledger, select

WEIGHTS_LICENCE = "apache-2.0"  # its text is in templates/


@dataclass(frozen=True)
class RunRecord:
    """The run of the checkpoint that was exported.

    Attributes:
        name: The name of its directory.
        config: Its resolved configuration, without the path of the data.
        ledger: The copied ledger.
        step: The step of the checkpoint.
        data: The manifest of its data; None where the data is missing or was changed since.
        certificate: The certificate of the copied ledger, if there is one.
        curves: Title -> name of the picture.
    """

    name: str
    config: RunConfig
    ledger: LedgerContent
    step: int
    data: Manifest | None
    certificate: dict[str, Any] | None
    curves: dict[str, str]

    @property
    def description(self) -> Description:
        """What it is called, and what is known of its licence."""
        return describe_run(self.name, self.data)

    @property
    def steps(self) -> list[Record]:
        """The steps that made these weights, without those that were rewound."""
        return [record for number, record in effective_steps(self.ledger.records).items() if number <= self.step]

    def newest(self, kind: str) -> list[Record]:
        """Return evaluations or samples of these steps, newest first, one for each step."""
        by_step = {r["step"]: r for r in self.ledger.records if r["kind"] == kind and r["step"] <= self.step}
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def stretches(self) -> list[tuple[int, int]]:
        """Return the first and the last step of each process that made these weights."""
        resumes = (record["next_step"] for record in select(self.ledger.records, "resume"))
        firsts = sorted({1, *(step for step in resumes if step <= self.step)})
        return list(zip(firsts, [*(first - 1 for first in firsts[1:]), self.step], strict=True))


def recorded(run: RunDir | None) -> RunDir | None:
    """Return the run if it has its configuration and its ledger, else None."""
    return run if run is not None and run.exists() and run.ledger.is_file() else None


def write_record(source: Source, folder: Path) -> RunRecord:
    """Copy the record of a checkpoint's run into an existing, empty folder, and return it.

    The configuration loses the paths of this machine, ``data.path`` and those of sources; its digest in the ledger does
    not cover them. The ledger is copied once, whole lines only, and everything that the export says about the run comes
    from the copy: the run may go on meanwhile.

    Args:
        source: The checkpoint whose weights are exported; its run is `recorded`.
        folder: ``training/`` of the export.

    Raises:
        LedgerTampered: The chain is broken, so the record proves nothing.
        CheckFailed: The ledger recorded another checkpoint for this step: it is not the record of these weights.
    """
    run, stored = source.run, source.settings
    assert run is not None, "a checkpoint without a run has no record"
    assert stored is not None, "a run has a configuration"
    config = stored.replace(_paths_beside_the_record(stored))
    copy = RunDir(folder)
    copy.config.write_text(config.to_toml(), encoding="utf-8", newline="\n")
    copy.ledger.write_bytes(run.ledger.read_bytes())
    content = read_ledger(copy.ledger)
    with copy.ledger.open("r+b") as file:
        file.truncate(content.length)
    step = source.step or 0
    saved = {r["checkpoint"]: r["manifest_sha256"] for r in select(content.records, "save")}
    if saved.get(checkpoint_name(step), source.sha256) != source.sha256:
        raise CheckFailed(
            f"{source.path} is not the checkpoint that the ledger of {run.path} recorded for step {step}",
            fix="export a checkpoint of this run, or move this one out of it to export it without a record",
        )
    certificate = current_certificate(run)
    if certificate is not None and certificate["ledger"]["head"] == content.head:
        copy.certificate.write_bytes(run.certificate.read_bytes())
    else:
        certificate = None
    for anchor in run.anchors.glob("line-*"):
        shutil.copytree(anchor, copy.anchors / anchor.name)
    if claims := read_claims(run):
        copy.evidence.mkdir()
        copy.claims_file.write_text(json.dumps({"checks": claims}, indent=1) + "\n", encoding="utf-8", newline="\n")
    pictures = {}
    for title, png in curve_images(content.records).items():
        pictures[title] = f"{title.lower().replace(' ', '-')}.png"
        (folder / pictures[title]).write_bytes(png)
    dataset = recorded_data(run, stored)
    data = None if dataset is None else dataset.manifest
    return RunRecord(run.path.resolve().name, config, content, step, data, certificate, pictures)


def _paths_beside_the_record(config: RunConfig) -> dict[str, Any]:
    """Return the changes after which a configuration names no path of this machine: ``data/NAME`` for a source."""
    if config.data.source is None:
        return {"data.path": ""}
    return {"data.source": [{**source.model_dump(), "path": f"../data/{source.name}"} for source in config.data.source]}


def describe_run(name: str, data: Manifest | None) -> Description:
    """Return what a run's model is called, with the licence of weights that saw nothing but the built-in plays.

    Under which licence weights of other text may be passed on, only their owner can know.
    """
    plays = data is not None and {item.name for item in data.source.inputs} == {SHAKESPEARE}
    return Description(name, ("en",), WEIGHTS_LICENCE) if plays else Description(name)
