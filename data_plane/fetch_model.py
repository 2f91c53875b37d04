"""Fetches a model from a hub into a directory, where an engine finds it afterwards.

``python -m data_plane.fetch_model --repository OWNER/NAME --revision COMMIT --into DIR`` fetches
what an engine reads and nothing else, above all no pickles and no code. The hub is that of Hugging
Face, or what speaks like it at HF_ENDPOINT; HF_TOKEN is shown to it where it is set.

A file has its name only when it is whole, and the directory counts as a model only when it has
the marker, which is written last. So a fetch that was interrupted goes on with the files that are
missing, and one that was not asks the hub nothing.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from protos import logs

log = logging.getLogger("data_plane.fetch_model")

MARKER = ".fetched.json"
# Another try would end in the same way.
EXIT_REFUSED = 2
# The hub did not answer for as long as it was waited for.
EXIT_UNAVAILABLE = 69
# The volume is full, or cannot be written.
EXIT_VOLUME = 74

PATIENCE_SECONDS = 600.0
_PAUSE_SECONDS = 5.0
_EVERY_SECONDS = 10.0
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Configuration, tokenizer, chat templates. Nothing of these is ever executed.
_DESCRIPTIONS = (".json", ".jinja", ".txt", "tokenizer.model")
_COMMIT = re.compile("[0-9a-f]{40}")
# Answers after which a hub may say something else: too early, too many, and its own failures.
_PASSING = {408, 425, 429}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class FetchError(Exception):
    """Why a model cannot be fetched, in a sentence, and the exit status that says so."""

    def __init__(self, sentence: str, status: int = EXIT_REFUSED) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, slots=True)
class Source:
    """A repository at one of its commits, whose files never change."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository} at {self.revision[:12]}"


def fetch(source: Source, directory: Path, *, sole: bool, patience_seconds: float) -> None:
    """Makes the directory hold the model, if it does not already.

    Args:
        sole: the volume around the directory is for one engine: other revisions beside it go first.
        patience_seconds: how long to try on while nothing arrives.

    Raises:
        FetchError: it cannot be had.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(directory.parent):
            if is_complete(source, directory):
                log.info("%s is in %s already", source, directory)
                return
            if sole:
                _remove_others(directory)
            _remove_fragments(directory)
            _patiently(source, directory, patience_seconds)
    except OSError as error:
        raise FetchError(f"the volume cannot be written: {error}", EXIT_VOLUME) from error


def is_complete(source: Source, directory: Path) -> bool:
    """Whether all files of that source are there, by the marker and their sizes."""
    try:
        marker = json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return False
    same = (marker["repository"], marker["revision"]) == (source.repository, source.revision)
    return same and not _missing(directory, marker["files"])


def _patiently(source: Source, directory: Path, patience_seconds: float) -> None:
    """Tries until it succeeds, cannot succeed, or has brought nothing for too long."""
    arrived, since = _bytes_in(directory), time.monotonic()
    while True:
        try:
            return _try(source, directory)
        # Networks, hubs and the libraries in between have no common way to say that they failed.
        except Exception as error:
            if final := _verdict(error, source):
                raise final from error
            now = _bytes_in(directory)
            if now > arrived:
                arrived, since = now, time.monotonic()
            reason = f"{type(error).__name__}: {_first_line(error)}"
            if time.monotonic() - since >= patience_seconds:
                raise FetchError(
                    f"the hub at {constants.ENDPOINT} cannot be reached: {reason}", EXIT_UNAVAILABLE
                ) from error
            log.warning("the hub cannot be reached, trying again: %s", reason)
            time.sleep(_PAUSE_SECONDS)


def _try(source: Source, directory: Path) -> None:
    """Brings what is missing, and writes the marker."""
    tree = HfApi().list_repo_tree(source.repository, revision=source.revision)
    files = (entry for entry in tree if isinstance(entry, RepoFile))
    sizes = {file.path: file.size for file in files if _is_plain(file.path)}
    for name in _missing(directory, sizes):
        (directory / name).unlink(missing_ok=True)
    if not {_SINGLE, _INDEX} & sizes.keys():
        raise FetchError(f"{source} has no safetensors: neither {_SINGLE} nor {_INDEX}")
    names = [name for name in sizes if name.endswith(_DESCRIPTIONS)]
    _download(source, directory, names)
    # Beside the weights that an engine reads, others may lie, in other shapes.
    weights = [_SINGLE] if _SINGLE in sizes else _indexed(source, directory)
    if absent := set(weights) - sizes.keys():
        raise FetchError(f"{_INDEX} of {source} names {min(absent)}, which is not there")
    wanted = {name: sizes[name] for name in (*names, *weights)}
    _check_room(source, directory, wanted)
    with _progress(directory, sum(wanted.values())):
        _download(source, directory, weights)
    if missing := _missing(directory, wanted):
        raise OSError(f"{missing[0]} is not as long as the hub says")
    _mark(source, directory, wanted)


def _indexed(source: Source, directory: Path) -> list[str]:
    """The files of weights that the index names."""
    try:
        names = set(json.loads((directory / _INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FetchError(f"{_INDEX} of {source} is none: {_first_line(error)}") from error
    for name in names:
        if not (isinstance(name, str) and name.endswith(".safetensors") and _is_plain(name)):
            raise FetchError(f"{_INDEX} of {source} names {name!r}, which is no safetensors file")
    return sorted(names)


def _is_plain(name: str) -> bool:
    """Whether a name is one of the directory's own, and none that is hidden, as the marker is."""
    return "/" not in name and not name.startswith(".")


def _download(source: Source, directory: Path, names: Iterable[str]) -> None:
    snapshot_download(
        source.repository,
        revision=source.revision,
        local_dir=directory,
        allow_patterns=[glob.escape(name) for name in names],
    )


def _mark(source: Source, directory: Path, sizes: Mapping[str, int]) -> None:
    """Writes the marker, once everything else is on the disk itself."""
    content = {"repository": source.repository, "revision": source.revision, "files": dict(sizes)}
    draft = directory / f"{MARKER}.draft"
    draft.write_text(json.dumps(content, indent=1) + "\n")
    for path in (*(directory / name for name in sizes), draft):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    draft.replace(directory / MARKER)


# What is in the directory.


def _missing(directory: Path, sizes: Mapping[str, int]) -> list[str]:
    """Files that are not there, or not as long as they should be."""

    def size(name: str) -> int:
        path = directory / name
        return path.stat().st_size if path.is_file() else -1

    return [name for name, expected in sizes.items() if size(name) != expected]


def _bytes_in(directory: Path) -> int:
    """What has arrived; a file that is written from several ends counts as far as it has blocks."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.stat(os.path.join(folder, name))
            except FileNotFoundError:
                continue
            total += min(status.st_size, status.st_blocks * 512)
    return total


def _remove_others(directory: Path) -> None:
    for path in directory.parent.iterdir():
        if path != directory and path.is_dir() and _COMMIT.fullmatch(path.name):
            log.info("removing %s, which no engine needs any more", path)
            shutil.rmtree(path)


def _remove_fragments(directory: Path) -> None:
    """Removes what an interrupted fetch has left, which the library does not go on with."""
    for path in directory.glob(".cache/huggingface/download/**/*.incomplete"):
        path.unlink(missing_ok=True)


def _check_room(source: Source, directory: Path, sizes: Mapping[str, int]) -> None:
    needed = sum(sizes[name] for name in _missing(directory, sizes))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FetchError(
            f"{source} needs {_gb(needed)} GB more, and the volume has {_gb(free)} GB left",
            EXIT_VOLUME,
        )


@contextmanager
def _one_at_a_time(volume: Path) -> Iterator[None]:
    """Lets one process write where engines share a volume; the others find it done."""
    with (volume / ".fetching.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that fetches into %s", volume)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s has no locks, so that each engine fetches: %s", volume, error.strerror)
        yield


@contextmanager
def _progress(directory: Path, total: int) -> Iterator[None]:
    """Says in the log how much has arrived, now and then and at the end."""
    began, left = time.monotonic(), threading.Event()

    def say() -> None:
        done = min(_bytes_in(directory), total)
        share = 100 * done // total if total else 100
        log.info("fetching: %s of %s GB, %d %%", _gb(done), _gb(total), share)

    def run() -> None:
        say()
        while not left.wait(_EVERY_SECONDS):
            say()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
    log.info("fetched %s GB in %.0f s", _gb(total), time.monotonic() - began)


# What can go wrong.


def _verdict(error: BaseException, source: Source) -> FetchError | None:
    """The sentence about an error that another try would not mend; None if one might."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FetchError):
            return cause
        if sentence := _refusal(cause, source):
            return FetchError(sentence)
        if sentence := _volume_trouble(cause):
            return FetchError(sentence, EXIT_VOLUME)
        cause = cause.__cause__
    return None


def _refusal(error: BaseException, source: Source) -> str | None:
    """What the hub refuses for good."""
    shown = "the token that was shown" if os.environ.get("HF_TOKEN") else "callers without a token"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        return f"{source.repository} is gated, and does not admit {shown}"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repository} has no revision {source.revision}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no {source.repository}, or hides it from {shown}"
    if isinstance(error, HFValidationError):
        return f"{source.repository!r} is no name of a repository"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the model is not there yet"
    if status in (401, 403):
        return f"the hub does not let {shown} read {source.repository} ({status})"
    if 400 <= status < 500 and status not in _PASSING:
        return f"the hub answers {status} for {source.repository}: {_first_line(error)}"
    return None


def _volume_trouble(error: BaseException) -> str | None:
    """What the volume refuses; hf_xet tells errors of the system in words alone."""
    number, path = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number in _FULL or f"os error {errno.ENOSPC}" in str(error):
        return "the volume is full: it must hold the whole model"
    # A network may answer with the same numbers, but has no path.
    if number in _CLOSED and path is not None:
        return f"the volume cannot be written: {error}"
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


# The program.


def _commit(text: str) -> str:
    if not _COMMIT.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no full commit of 40 hexadecimal digits; branches and tags change"
        )
    return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_plane.fetch_model", description="Fetches a model from a hub."
    )
    add = parser.add_argument
    add("--repository", required=True, help="OWNER/NAME")
    add("--revision", required=True, type=_commit, help="a full commit of it")
    add("--into", required=True, type=Path, help="directory of this revision alone")
    add("--sole", action="store_true", help="remove other revisions beside the directory first")
    add(
        "--patience-seconds",
        type=float,
        default=PATIENCE_SECONDS,
        help="how long to try on while nothing arrives",
    )
    add("--log-format", choices=("text", "json"), default="text")
    return parser.parse_args()


def _stop(number: int, _: object) -> None:
    """Ends at once: threads of a transfer end by themselves only when it does."""
    os._exit(128 + number)


def main() -> int:
    arguments = _arguments()
    # The first process of a container has no other way to be told to end.
    signal.signal(signal.SIGTERM, _stop)
    # Others' lines quote addresses that are as good as passwords for a while.
    logs.configure("error", arguments.log_format)
    log.setLevel("INFO")
    logging.getLogger("huggingface_hub").setLevel("ERROR")
    warnings.simplefilter("ignore")
    disable_progress_bars()
    source = Source(arguments.repository, arguments.revision)
    try:
        fetch(
            source,
            arguments.into,
            sole=arguments.sole,
            patience_seconds=arguments.patience_seconds,
        )
    except FetchError as error:
        print(f"cannot fetch: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
