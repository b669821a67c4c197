"""Publish an export on the Hugging Face Hub: the verified files and no others, compared again after they arrived.

All files arrive in one commit, so a broken connection leaves the repository unchanged or complete. The Hub's client
finds the token by itself (environment or login): it is no argument here and in no message.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from resmol.errors import CheckFailed, NetworkError, ResmolError, UsageError
from resmol.interop.description import CARD
from resmol.interop.export.card_words import NO_WORDS, CardWords
from resmol.interop.export.hf import LICENCE
from resmol.interop.export.manifest import ExportedFile, ExportManifest, parse_manifest, verify_export
from resmol.interop.export.publish_errors import explained, login
from resmol.interop.export.training_record import WEIGHTS_LICENCE
from resmol.run.checkpoint_manifest import MANIFEST, MAX_JSON_BYTES
from resmol.system.hub_download import require_answer
from resmol.system.untrusted_text import without_password
from resmol.system.user_paths import user_path
from resmol.system.wording import counted
from resmol.version import __version__

logger = logging.getLogger(__name__)

MAX_GIT_BYTES = 64_000_000  # the Hub keeps larger files, and binary ones, outside of git
UNTOUCHED = "the repository exists, and no file of it was changed"
MADE_BY_THE_HUB = {CARD, ".gitattributes"}  # what a repository holds that was created in the browser


@dataclass(frozen=True)
class Plan:
    """The files to publish and their destination; nothing was sent yet.

    Attributes:
        folder: The export.
        repo_id: ``owner/name``.
        repo_type: ``model`` or ``space``.
        manifest: The export's manifest, with the owner's words sealed in it.
        files: Everything that is sent: the files of the manifest, and the manifest itself.
        own: Name -> content of what is sent otherwise than it lies in the folder: card and manifest with own words.
        blobs: Git's hash of those that are small enough to be kept in git itself.
    """

    folder: Path
    repo_id: str
    repo_type: str
    manifest: ExportManifest
    files: dict[str, ExportedFile]
    own: dict[str, bytes]
    blobs: dict[str, str]

    @property
    def card(self) -> str | None:
        """The card as it is sent; None where there is none."""
        if CARD not in self.files:
            return None
        return (self.own[CARD] if CARD in self.own else (self.folder / CARD).read_bytes()).decode()

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files.values())

    @property
    def url(self) -> str:
        """The page of the repository."""
        prefix = "spaces/" if self.repo_type == "space" else ""
        return f"{without_password(constants.ENDPOINT)}/{prefix}{self.repo_id}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "folder": str(self.folder),
            "repo": self.repo_id,
            "type": self.repo_type,
            "url": self.url,
            "bytes": self.bytes,
            "files": {name: file.model_dump() for name, file in self.files.items()},
            "checks": [check.model_dump() for check in self.manifest.checks],
            "card": self.card,
        }


@dataclass(frozen=True)
class Published:
    """The outcome of a publication.

    Attributes:
        url: The page of the repository.
        commit: The commit that holds exactly what was verified.
        sent: Files that were new or different; empty when there was nothing to do.
        removed: Files of an earlier export that this one does not have.
        foreign: Files of the repository that no export wrote; they were left alone.
        private: Whether only the owner sees it.
    """

    url: str
    commit: str
    sent: Sequence[str]
    removed: Sequence[str]
    foreign: Sequence[str]
    private: bool

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass
class _Progress:
    """The known state of the repository, for the message of an error."""

    state: str = "nothing was sent"
    advice: str = ""


@dataclass(frozen=True)
class _Remote:
    """The present state of a repository."""

    commit: str
    private: bool
    files: dict[str, Any] = field(default_factory=dict)


def plan_publication(folder: Path, repo_id: str, *, space: bool, words: CardWords = NO_WORDS) -> Plan:
    """Check everything that can be checked without the network.

    Args:
        folder: An export.
        repo_id: ``owner/name``.
        space: Whether it becomes a Space.
        words: What its owner says about it; they are sealed into what is sent, and the folder stays as it is.

    Raises:
        UsageError: No valid repository id, or the folder is not of this kind; the words contradict the export.
        CheckFailed: The folder is not a verified export, or was changed since; `DataError`: there is none.
    """
    folder = user_path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is not the name of a repository: {error}", fix="e.g. --repo me/nano") from None
    if repo_id.count("/") != 1:
        raise UsageError(f"{repo_id!r} does not say whose repository it is", fix="name it OWNER/NAME, e.g. me/nano")
    manifest = verify_export(folder)
    if manifest.kind == "space" and not space:
        raise UsageError(f"{folder} is a Space", fix="add --space, so that it becomes one")
    if space and manifest.kind != "space":
        raise UsageError(f"{folder} is no Space, and --space is given", fix="leave --space out, or export a Space")
    manifest, own = _with_words(folder, manifest, words)
    files = {**manifest.files, MANIFEST: _facts(manifest.to_bytes())}
    blobs = {
        name: _git_blob(own.get(name, folder / name)) for name, file in files.items() if file.bytes <= MAX_GIT_BYTES
    }
    return Plan(folder, repo_id, "space" if space else "model", manifest, files, own, blobs)


def _with_words(folder: Path, manifest: ExportManifest, words: CardWords) -> tuple[ExportManifest, dict[str, bytes]]:
    """Return the manifest of an export with its owner's words, and the files that differ from those in the folder."""
    if words == NO_WORDS or CARD not in manifest.files:
        return manifest, {}
    if words.license not in (None, WEIGHTS_LICENCE) and manifest.kind != "space" and LICENCE in manifest.files:
        raise UsageError(
            f"--license is {words.license}, and {folder / LICENCE} holds the text of {WEIGHTS_LICENCE}",
            fix=f"export again with --license {words.license}",
        )
    card = words.lay_over((folder / CARD).read_text(encoding="utf-8")).encode()
    title = {"title": words.title} if words.title is not None else {}
    changed = manifest.model_copy(
        update={"files": {**manifest.files, CARD: _facts(card)}, "facts": {**manifest.facts, **title}}
    )
    return changed, {CARD: card, MANIFEST: changed.to_bytes()}


def _facts(content: bytes) -> ExportedFile:
    return ExportedFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def publish_export(plan: Plan, *, private: bool = False, overwrite: bool = False) -> Published:
    """Create or update the repository, and compare the files that arrived with the verified ones.

    Args:
        plan: From `plan_publication`.
        private: A new repository is private; an existing public one is refused.
        overwrite: Also replace files in a repository that resmol did not publish.

    Raises:
        UsageError: No token, or one that may not do this; a repository that is not ours or not private.
        NetworkError: The Hub is out of reach or the connection broke; the message has the state of the repository.
        CheckFailed: What arrived is not what was sent.
    """
    if constants.HF_HUB_OFFLINE:
        raise NetworkError("HF_HUB_OFFLINE is set, so nothing can be published", fix="unset it and repeat the command")
    if get_token() is None:
        raise UsageError("no token for the Hub was found", fix=login(plan.repo_id))
    require_answer(
        constants.ENDPOINT, constants.ENDPOINT, "check the connection and repeat the command: nothing was sent"
    )
    progress = _Progress()
    with _quiet_client(), _explained(plan, progress):
        return _publish(HfApi(), plan, progress, private=private, overwrite=overwrite)


def _publish(api: HfApi, plan: Plan, progress: _Progress, *, private: bool, overwrite: bool) -> Published:
    logger.info(f"publishing {plan.folder} as {api.whoami()['name']}: {plan.url}")
    before = _look(api, plan)
    if before is None:
        progress.state = "it is not known whether the repository was created; it holds no file of this export"
        sdk = "gradio" if plan.repo_type == "space" else None
        api.create_repo(plan.repo_id, repo_type=plan.repo_type, private=private or None, exist_ok=True, space_sdk=sdk)
        progress.state = UNTOUCHED
        before = _look(api, plan) or _Remote("", private)
    elif private and not before.private:
        raise UsageError(
            f"{plan.repo_id} exists and is public, and --private is given",
            fix="make it private in its settings on the Hub first, or leave --private out",
        )
    different = _different(plan, before)
    previous = _previous_manifest(api, plan, before)
    removed = sorted((previous.files.keys() if previous else set()) & before.files.keys() - plan.files.keys())
    taken = [name for name in different if name in before.files and name not in MADE_BY_THE_HUB]
    if previous is None and taken and not overwrite:
        raise UsageError(
            f"{plan.repo_id} holds files that resmol did not publish and would replace: {', '.join(taken[:5])}",
            fix="choose another name; or add --overwrite (the Hub keeps the old commits)",
        )
    commit = before.commit
    if different or removed:
        commit = _commit(api, plan, progress, before, different, removed)
    foreign = sorted(before.files.keys() - plan.files.keys() - set(removed) - MADE_BY_THE_HUB)
    return Published(plan.url, commit, different, removed, foreign, before.private)


def _commit(
    api: HfApi,
    plan: Plan,
    progress: _Progress,
    before: _Remote,
    different: list[str],
    removed: list[str],
) -> str:
    """Send files and make one commit of them; return it after a comparison with the manifest."""
    progress.state = UNTOUCHED
    if find_spec("hf_xet") and not constants.HF_HUB_DISABLE_XET:
        progress.advice = "; if a proxy or mirror is in the way of xet, HF_HUB_DISABLE_XET=1 may help"
    size = sum(plan.files[name].bytes for name in different)
    logger.info(f"sending {len(different)} of {counted(len(plan.files), 'file')}, {size / 1e6:,.1f} MB")
    add = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=plan.own.get(name, plan.folder / name))
        for name in different
    ]
    api.preupload_lfs_files(plan.repo_id, add, repo_type=plan.repo_type, free_memory=False)
    progress.state = "it is not known whether the last commit arrived; if it did, it is whole"
    progress.advice = ""
    delete = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed]
    done = api.create_commit(
        plan.repo_id,
        [*add, *delete],
        repo_type=plan.repo_type,
        commit_message=f"Publish export {plan.manifest.sha256[:12]} (resmol {__version__})",
        parent_commit=before.commit or None,
    )
    progress.state = f"commit {done.oid} was made, and not yet compared with what was verified"
    logger.info("comparing what arrived with what was verified")
    arrived = _look(api, plan, revision=done.oid)
    wrong = _different(plan, arrived) if arrived else ["it is gone"]
    if wrong:
        raise CheckFailed(
            f"commit {done.oid} of {plan.repo_id} is not what was verified: {', '.join(wrong[:5])}",
            fix="repeat the command; if it fails again, look for a .gitignore or .gitattributes in the repository",
        )
    return str(done.oid)


def _look(api: HfApi, plan: Plan, revision: str | None = None) -> _Remote | None:
    """Return the repository's state, or None when there is none (or none that this token may see)."""
    try:
        info: Any = api.repo_info(plan.repo_id, repo_type=plan.repo_type, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    return _Remote(info.sha or "", bool(info.private), {file.rfilename: file for file in info.siblings or ()})


def _different(plan: Plan, remote: _Remote) -> list[str]:
    """Return the files that the repository lacks or has otherwise: by sha256, or by git's hash where git keeps them."""
    return [name for name in plan.files if not _same(plan, name, remote.files.get(name))]


def _same(plan: Plan, name: str, remote: Any) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None:
        return (remote.lfs.size, remote.lfs.sha256) == (plan.files[name].bytes, plan.files[name].sha256)
    return (remote.size, remote.blob_id) == (plan.files[name].bytes, plan.blobs.get(name))


def _git_blob(content: bytes | Path) -> str:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _previous_manifest(api: HfApi, plan: Plan, remote: _Remote) -> ExportManifest | None:
    """Return the manifest of the export that resmol published there before, if any."""
    found = remote.files.get(MANIFEST)
    if found is None or not found.size or found.size > MAX_JSON_BYTES:
        return None
    path = api.hf_hub_download(plan.repo_id, MANIFEST, repo_type=plan.repo_type, revision=remote.commit)
    return parse_manifest(Path(path).read_bytes())


@contextmanager
def _explained(plan: Plan, progress: _Progress) -> Iterator[None]:
    try:
        yield
    except ResmolError:
        raise
    except Exception as error:  # the client's errors come from several libraries, and differ between its versions
        raise explained(error, plan.repo_id, progress.state, progress.advice) from error


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's log: it names addresses, which may carry a password or a signature."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
