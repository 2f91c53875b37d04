"""Fetching a model from a hub: what comes, what does not, interruptions, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_plane.fetch_model import (
    EXIT_REFUSED,
    EXIT_UNAVAILABLE,
    EXIT_VOLUME,
    MARKER,
    Source,
    _verdict,
)
from data_plane.weights import Checkpoint
from tests.hub import COMMIT, Hub, serving
from tests.models import add_tokenizer, tiny_model
from tests.processes import ROOT, free_port

REPOSITORY = "tests/tiny-llama"
OTHER = "f" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny-llama"))


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with serving() as hub:
        # None of these may ever come: what is unpickled or imported runs, and the rest is no use.
        hub.add(REPOSITORY, model, pytorch__model_bin=b"pickle", modeling_py=b"import os")
        more = {"original/model.safetensors": b"x", "consolidated.safetensors": b"x"}
        more |= {"README.md": b"x", MARKER: b"{}"}
        hub.repositories[REPOSITORY] |= more
        yield hub


def command(directory: Path, *flags: str, repository: str = REPOSITORY) -> list[str]:
    named = ["--repository", repository, "--revision", COMMIT, "--into", str(directory)]
    return [sys.executable, "-m", "data_plane.fetch_model", *named, *flags]


def environment(url: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_HOME": "/proc/nothing", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | home | {"HF_ENDPOINT": url} | more


def run(
    hub: Hub, directory: Path, *flags: str, repository: str = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, *flags, repository=repository),
        env=environment(hub.url, **variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess[str], status: int = EXIT_REFUSED) -> str:
    """The one sentence."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    (sentence,) = re.findall("^cannot fetch: (.+)$", done.stderr, re.M)
    return str(sentence)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def test_what_an_engine_reads_comes_once_and_nothing_else(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "volume" / COMMIT
    done = run(hub, directory)
    assert done.returncode == 0, done.stderr
    assert names(directory) == names(model)
    for path in model.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
    total = sum(path.stat().st_size for path in model.iterdir())
    assert f"of {total / 1e9:.2f} GB, " in done.stderr and " GB in " in done.stderr
    assert Checkpoint(directory).tensors
    # A complete one is not fetched again: the hub is not even asked.
    asked = len(hub.asked)
    again = run(hub, directory)
    assert (again.returncode, len(hub.asked)) == (0, asked)
    assert "already" in again.stderr


def test_the_log_can_be_json(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path / COMMIT, "--log-format", "json")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["logger"] for line in lines} == {"data_plane.fetch_model"}
    assert any(line["message"].startswith("fetching: ") for line in lines)


def shard(hub: Hub, model: Path) -> None:
    """Makes the weights two files with an index."""
    files = hub.repositories[REPOSITORY]
    whole = files.pop("model.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files |= {"model-1.safetensors": whole, "model-2.safetensors": whole[:5000] * 2}
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def test_of_several_weights_those_of_the_index_come(hub: Hub, model: Path, tmp_path: Path) -> None:
    shard(hub, model)
    directory = tmp_path / COMMIT
    assert run(hub, directory).returncode == 0
    found = {path.name for path in directory.glob("*.safetensors")}
    assert found == {"model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_fetch_goes_on_and_is_never_taken_for_complete(
    hub: Hub, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    shard(hub, model)
    hub.held = "model-2.safetensors"
    directory = tmp_path / COMMIT
    with subprocess.Popen(command(directory), env=environment(hub.url), cwd=ROOT) as process:
        wait(lambda: (directory / "model-1.safetensors").exists() and hub.held in hub.fetched())
        process.send_signal(number)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + signal.SIGTERM)
    assert not (directory / MARKER).exists() and not (directory / hub.held).exists()
    hub.release.set()
    before = len(hub.fetched())
    assert run(hub, directory).returncode == 0
    # What was whole has stayed.
    assert hub.fetched()[before:] == ["model-2.safetensors"]
    assert (directory / MARKER).exists()
    assert not list(directory.rglob("*.incomplete"))


def test_a_connection_that_breaks_is_gone_on_with_from_where_it_was(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.broken = "model.safetensors"
    directory = tmp_path / COMMIT
    assert run(hub, directory).returncode == 0
    assert hub.fetched().count("model.safetensors") == 2
    assert (directory / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()


def test_a_file_that_was_cut_is_fetched_again(hub: Hub, model: Path, tmp_path: Path) -> None:
    directory = tmp_path / COMMIT
    assert run(hub, directory).returncode == 0
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert run(hub, directory).returncode == 0
    assert (directory / "model.safetensors").stat().st_size == (
        model / "model.safetensors"
    ).stat().st_size


def test_of_those_who_share_a_volume_one_fetches(hub: Hub, tmp_path: Path) -> None:
    hub.held = "model.safetensors"
    directory = tmp_path / COMMIT
    first = subprocess.Popen(command(directory), env=environment(hub.url), cwd=ROOT)
    wait(lambda: hub.held in hub.fetched())
    second = subprocess.Popen(
        command(directory), env=environment(hub.url), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert second.stderr is not None
    assert "waiting for another process" in second.stderr.readline()
    hub.release.set()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    second.stderr.close()
    assert hub.fetched().count("model.safetensors") == 1


def test_other_revisions_go_only_from_an_engines_own_volume(hub: Hub, tmp_path: Path) -> None:
    other, own = tmp_path / OTHER, tmp_path / "lost+found"
    for path in (other, own):
        path.mkdir()
        (path / "file").write_text("x")
    assert run(hub, tmp_path / COMMIT).returncode == 0
    assert other.exists()
    (tmp_path / COMMIT / MARKER).unlink()
    assert run(hub, tmp_path / COMMIT, "--sole").returncode == 0
    assert not other.exists() and own.exists()


def test_a_token_opens_what_is_closed(hub: Hub, tmp_path: Path) -> None:
    hub.tokens[REPOSITORY] = "hf_right"
    assert run(hub, tmp_path / COMMIT, HF_TOKEN="hf_right").returncode == 0
    for gated, words in ((False, "does not let"), (True, "is gated, and does not admit")):
        hub.gated = {REPOSITORY} if gated else set()
        sentence = refused(run(hub, tmp_path / "b", HF_TOKEN="hf_wrong"))
        assert words in sentence and "the token that was shown" in sentence
        assert "hf_wrong" not in sentence
    assert "is gated, and does not admit callers without" in refused(run(hub, tmp_path / "c"))
    assert not (tmp_path / "c" / MARKER).exists()


def test_what_there_is_not_is_refused_at_once(hub: Hub, model: Path, tmp_path: Path) -> None:
    directory = tmp_path / COMMIT
    sentence = refused(run(hub, directory, repository="tests/nothing"))
    assert sentence == "the hub has no tests/nothing, or hides it from callers without a token"
    assert "no revision" in refused(run(hub, directory, "--revision", OTHER))
    assert "no name of a repository" in refused(run(hub, directory, repository="a/b/c"))
    hub.status = 410
    assert "answers 410" in refused(run(hub, directory))
    hub.status = 0
    files = hub.repositories[REPOSITORY]
    del files["model.safetensors"]
    assert "has no safetensors" in refused(run(hub, directory))
    for index, words in (
        (b"[]", "is none"),
        (b'{"weight_map": {"a": "b.safetensors"}}', "names b.safetensors, which is not there"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "which is no safetensors file"),
    ):
        files["model.safetensors.index.json"] = index
        assert words in refused(run(hub, tmp_path / str(len(index))))
    branch = run(hub, directory, "--revision", "main")
    assert branch.returncode == 2 and "no full commit" in branch.stderr
    assert not (directory / MARKER).exists()


def test_a_hub_that_is_away_is_waited_for_and_at_last_given_up(hub: Hub, tmp_path: Path) -> None:
    def start(url: str, name: str, *flags: str) -> subprocess.Popen[str]:
        words, variables = command(tmp_path / name / COMMIT, *flags), environment(url)
        return subprocess.Popen(words, env=variables, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    nowhere = f"http://127.0.0.1:{free_port()}"
    hub.status = 408
    with start(nowhere, "a", "--patience-seconds", "0") as given_up, start(hub.url, "b") as waiting:
        assert given_up.stderr and waiting.stderr
        assert "trying again" in waiting.stderr.readline()
        hub.status = 0
        assert waiting.wait(60) == 0
        assert given_up.wait(60) == EXIT_UNAVAILABLE
        assert f"cannot fetch: the hub at {nowhere} cannot be reached: " in given_up.stderr.read()
    assert "HF_HUB_OFFLINE is set" in refused(run(hub, tmp_path / COMMIT, HF_HUB_OFFLINE="1"))


def test_a_volume_that_cannot_hold_it_is_said_so(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    closed = refused(run(hub, Path("/proc/nothing") / COMMIT), EXIT_VOLUME)
    assert "cannot be written" in closed
    hub.repositories[REPOSITORY]["model.safetensors"] = _Vast(b"x")
    assert "GB more, and the volume has" in refused(run(hub, tmp_path / COMMIT), EXIT_VOLUME)


def test_what_the_system_says_is_told_apart() -> None:
    source = Source(REPOSITORY, COMMIT)
    full = _verdict(OSError(errno.ENOSPC, "No space left on device"), source)
    # As hf_xet has it, in words alone, and under another error.
    of_xet = RuntimeError("Data processing error: No space left on device (os error 28)")
    of_xet.__cause__ = ValueError()
    wrapped = RuntimeError("cannot")
    wrapped.__cause__ = of_xet
    closed = _verdict(OSError(errno.EROFS, "Read-only file system", "/model/a"), source)
    for verdict, words in (
        (full, "the volume is full"),
        (_verdict(wrapped, source), "the volume is full"),
        (closed, "cannot be written: "),
    ):
        assert verdict is not None and words in str(verdict) and verdict.status == EXIT_VOLUME
    # A network that refuses a connection has the same number, and may let it through later.
    refused = ConnectionError("no connection")
    refused.__cause__ = PermissionError(errno.EPERM, "Operation not permitted")
    assert _verdict(refused, source) is None


class _Vast(bytes):
    """Content that is as long as no volume."""

    def __len__(self) -> int:
        return 1 << 60
