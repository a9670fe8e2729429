"""Releases that lie elsewhere: under s3://BUCKET/PREFIX, or on the Hugging Face Hub as ORG/NAME or ORG/NAME@REVISION.

The libraries for it (boto3 with crc32c; huggingface_hub) are imported where such an address is used, and only then.
Credentials and tokens are found by these libraries in their own places; nothing here reads or writes one. Of a
repository only the files of a release are fetched, and none of them is code.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.model.release import CARD, CONFIG, CONTRACT, PROGRAM, WEIGHTS, ReleaseError

HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
HALF = (CARD, CONTRACT, WEIGHTS, PROGRAM)  # what a killed export may have left on S3, beside eval/
OWN = (".gitattributes",)  # what the Hub itself puts into a new repository
LISTED = 8  # files in an error message


def is_s3(address: str | Path) -> bool:
    """Whether this is an s3:// address."""
    return str(address).startswith("s3://")


def is_hub(address: str | Path) -> bool:
    """Whether this names a repository of the Hub: ORG/NAME, and nothing of that name is here.

    Where a folder ORG is here, ORG/NAME is a mistyped path and never looked for on the network; ORG/NAME@main is.
    """
    text = str(address)
    match = isinstance(address, str) and HUB.fullmatch(text)
    return bool(match) and not Path(text).exists() and ("@" in text or not Path(text).parent.exists())


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """The release at an s3:// address or in a repository, as a local folder while the block lasts.

    Raises:
        ReleaseError: it cannot be had; the message says why and what to do.
    """
    if not is_s3(address):
        yield _from_hub(address)
        return
    with TemporaryDirectory() as folder:
        _from_s3(address, Path(folder))
        yield Path(folder)


def _from_s3(address: str, folder: Path) -> None:
    store = _store(address)
    from shards.store import AbsentError, StoreError

    for name in (CONFIG, CONTRACT, WEIGHTS):  # the small ones first: they tell whether it is a release
        try:
            with store.reading(name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 16 << 20)
        except AbsentError as error:
            raise ReleaseError(f"{address} is no release: it lacks {name} ({error})") from error
        except StoreError as error:
            raise ReleaseError(str(error)) from error


def _store(address: str) -> Any:
    try:
        from shards.store import open_store

        return open_store(address)
    except ImportError as error:
        raise ReleaseError(f"{address} needs boto3 and crc32c ({error}): pip install boto3 crc32c") from error


def occupied(address: str) -> str:
    """Why no release can be put at an s3:// address; empty where one can: nothing is there, or half of one."""
    names = _store(address).list()
    half = CONFIG not in names and all(name in HALF or name.startswith("eval/") for name in names)
    return "" if half else f"{address} is not empty: it holds {_some(names)}; choose another address"


def put(folder: Path, address: str) -> None:
    """Copy a release folder to an s3:// address, config.json last: without that it is none."""
    store = _store(address)
    for name in store.list():  # of a killed export
        store.remove(name)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    for name in sorted(names, key=lambda name: name == CONFIG):
        store.put(name, folder / name)


def check_free(address: str) -> None:
    """Make sure that a release can be pushed to a repository without replacing anything.

    Raises:
        ReleaseError: something is there, which the message names, or the Hub does not answer or knows no login.
    """
    name, revision = _parts(address)
    with _explained(address):
        api = _library().HfApi()
        api.whoami()
        if not api.repo_exists(name):
            return
        if revision:
            refs = api.list_repo_refs(name)
            found = [ref.name for ref in (*refs.branches, *refs.tags)]
            if revision in found:
                raise ReleaseError(f"{name} has {revision} already, beside {_some(found)}; choose another revision")
        elif files := [file for file in api.list_repo_files(name) if file not in OWN]:
            raise ReleaseError(
                f"{name} is not empty: it holds {_some(files)}. Choose another name, or write hub={name}@REVISION to "
                "put the release into a new branch, which leaves these as they are"
            )


def push(folder: Path, address: str) -> str:
    """Put a release into a repository as one commit. A new repository is private; its owner can open it on its page.

    Args:
        folder: the release.
        address: ORG/NAME, which is absent or empty; or ORG/NAME@REVISION, a branch that is made for it.

    Returns:
        Address of the commit.

    Raises:
        ReleaseError: as `check_free`, or it cannot be written.
    """
    check_free(address)
    name, revision = _parts(address)
    with _explained(address):
        api = _library().HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision)
        message = "Release written by mcf export"
        try:
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message=message, delete_patterns="*"
            )
        except BaseException:
            if revision:  # so that the same command can be given again
                api.delete_branch(name, branch=revision)
            raise
    return str(commit)


def _from_hub(address: str) -> Path:
    name, revision = _parts(address)
    with _explained(address):
        files = [WEIGHTS, CONFIG, CONTRACT, CARD]
        folder = Path(_library().snapshot_download(name, revision=revision, allow_patterns=files))
    if not (folder / CONFIG).is_file():
        raise ReleaseError(f"{address} is no release: the repository lacks {CONFIG}")
    _check_hash(folder / WEIGHTS, address)
    return folder


def _check_hash(path: Path, address: str) -> None:
    """Compare a large file with its sha256, by which the Hub's cache calls the file that it links to."""
    wanted = path.resolve().name
    if not path.is_file() or not re.fullmatch("[0-9a-f]{64}", wanted):
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise ReleaseError(f"{address}: {path} is damaged: its sha256 is not {wanted}; remove it and open again")


def _parts(address: str) -> tuple[str, str | None]:
    match = HUB.fullmatch(address)
    if not match:
        raise ReleaseError(f"{address!r} is no repository of the Hub; write ORG/NAME or ORG/NAME@REVISION")
    return match["name"], match["revision"]


def _library(module: str = "huggingface_hub") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReleaseError(
            f"the Hugging Face Hub needs huggingface_hub ({error}): pip install huggingface_hub"
        ) from error


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """The Hub's errors as ours: what was asked for, what is wrong, what to do."""
    errors = _library("huggingface_hub.errors")
    reasons = (
        (errors.GatedRepoError, "its owner has to grant access; ask for it on its page"),
        (errors.RepositoryNotFoundError, "no such folder here, and on the Hub no such repository, or a private one "
         "that your login may not see: `hf auth login`, or HF_TOKEN"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached, and its cache here lacks this release"),
        (errors.LocalTokenNotFoundError, "no login found: `hf auth login`, or HF_TOKEN"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (errors.HFValidationError, "no valid name; write ORG/NAME or ORG/NAME@REVISION"),
        (errors.HfHubHTTPError, "the Hub refused; if it says 401 or 403, log in with a token that may write there"),
        (OSError, "the Hub cannot be reached"),
        (ValueError, "the Hub does not take it"),
    )  # fmt: skip
    try:
        yield
    except ReleaseError:
        raise
    except Exception as error:
        for kind, reason in reasons:
            if isinstance(error, kind):
                raise ReleaseError(f"{address}: {reason} ({_line(error)})") from error
        if "httpx" in type(error).__module__:  # refused connections, timeouts
            raise ReleaseError(f"{address}: the Hub cannot be reached ({_line(error)})") from error
        raise


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
