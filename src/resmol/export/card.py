"""The model card: what the record of the run says, and nothing else."""

from __future__ import annotations

import jinja2

from resmol import __version__
from resmol.config_files import load_config
from resmol.flops import total_parameters
from resmol.ledger import effective_steps, read_ledger, select
from resmol.load import LoadedModel
from resmol.rundir import RunDir

SMOLLM2_TOKENS = 2_000_000_000_000  # what the published model saw (its model card)


def model_card(loaded: LoadedModel, dtype: str, run: RunDir | None) -> str:
    """Return ``README.md`` of an export.

    Args:
        loaded: The model.
        dtype: The type of the weights in the file.
        run: The run that it is a checkpoint of; a model from elsewhere gets a short card.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("resmol"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown, not a page; samples stand in a code block that they cannot end
    )  # fmt: skip
    return environment.get_template("model_card.md.j2").render(
        version=__version__,
        config=loaded.config,
        parameters=total_parameters(loaded.config),
        dtype=dtype,
        provenance=loaded.provenance,
        run=_facts(run, loaded.provenance.step) if run is not None else None,
    )


def _facts(run: RunDir, step: int | None) -> dict[str, object]:
    """Collect what the ledger recorded up to the checkpoint's step."""
    content = read_ledger(run.ledger)
    steps = [record for number, record in effective_steps(content.records).items() if step is None or number <= step]
    evaluations = [r for r in select(content.records, "eval") if step is None or r["step"] <= step]
    samples = [r for r in select(content.records, "sample") if step is None or r["step"] <= step]
    environments = [r["environment"] for r in content.records if r["kind"] in ("start", "resume")]
    return {
        "name": run.path.resolve().name,
        "config": load_config(run.config),
        "last": steps[-1] if steps else None,
        "share": steps[-1]["tokens_seen"] / SMOLLM2_TOKENS if steps else 0.0,
        "evaluation": evaluations[-1] if evaluations else None,
        "sample": {k: str(samples[-1][k]).replace("```", "'''") for k in ("prompt", "text")} if samples else None,
        "environment": environments[-1],
        "head": content.head,
        "lines": len(content.records),
        "fingerprint": next(select(content.records, "start"))["data_fingerprint"],
        "resumes": sum(1 for _ in select(content.records, "resume")),
    }
