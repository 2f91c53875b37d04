"""The command line: real processes, as a user starts them."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control_plane.cli.child import Child
from control_plane.cli.commands import main
from control_plane.cli.local_stack import (
    LocalStack,
    StackError,
    StackSettings,
    demo_model,
    is_free,
    split_flags,
)
from data_plane import load_progress

GOLDEN = json.loads((demo_model() / "golden.json").read_text())
SYSTEM = (demo_model() / "system_prompt.txt").read_text().strip()
QUIRE = [sys.executable, "-c", f"from {main.__module__} import main; main()"]
READY_SECONDS = 60


class Quire:
    """One command whose processes all carry a mark, by which they are found wherever they are."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._mark = f"TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
        # Redis sockets and logs of this command only.
        self.temporary = cwd
        environment |= {name: value, "TMPDIR": str(cwd), "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [*QUIRE, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.output = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Waits until the output so far has a match."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + READY_SECONDS
        while (found := re.search(pattern, self.output)) is None:
            assert time.monotonic() < deadline, self.output
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, self.output
                self.output += data.decode()
        return found

    def end(self) -> int:
        """Waits for its end and returns the exit status."""
        rest, _ = self.process.communicate(timeout=READY_SECONDS)
        self.output += rest.decode()
        return self.process.returncode

    def processes(self) -> dict[int, str]:
        """The command lines of all that live, by process id."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                marked = self._mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            # Redis writes its title over its environment; its socket is in it.
            if marked or str(self.temporary) in command:
                found[int(folder.name)] = command
        return found

    def pid_of(self, words: str) -> int:
        (pid,) = [pid for pid, command in self.processes().items() if words in command]
        return pid

    def wait_gone(self, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Quire]]:
    started: list[Quire] = []

    def start(*arguments: str) -> Quire:
        started.append(Quire(*arguments, cwd=tmp_path))
        return started[-1]

    yield start
    for quire in started:
        quire.process.kill()
        quire.process.communicate()
        quire.wait_gone()


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
    return subprocess.run(
        [*QUIRE, *arguments], env=environment, input=text, capture_output=True, text=True,
        timeout=READY_SECONDS,
    )  # fmt: skip


def test_demo(start: Callable[..., Quire]) -> None:
    demo = start("demo")
    assert demo.end() == 0, demo.output
    for entry in GOLDEN:
        assert entry["question"] in demo.output
        assert entry["text"].split(". ")[0].split(":")[0] in " ".join(demo.output.split())
    hits = re.search(r"prefix-cache hits: (\d+) of 6 requests", demo.output)
    assert hits is not None and int(hits[1]) == 5
    assert "1 prefix with hits" in demo.output
    assert "1 engine" in demo.output
    assert demo.processes() == {}
    assert list(demo.temporary.iterdir()) == []


def test_a_stack_and_the_commands_that_ask_it(start: Callable[..., Quire]) -> None:
    free = "127.0.0.1:0"
    up = start("up", "--listen", free, "--admin-listen", free, "--", "--block-size", "32")
    ready = up.read_until(r"Serving at (\S+), the admin API at (\S+)\. Ask it:[^$]*Ctrl-C")
    address, admin = ready[1], ready[2]
    assert len(up.processes()) == 4, "the command, Redis, and two planes"

    arguments = ("generate", "--address", address, "--temperature", "0", "--system", SYSTEM)
    for entry in GOLDEN[:2]:
        answer = run(*arguments, entry["question"])
        assert (answer.returncode, answer.stdout) == (0, entry["text"] + "\n"), answer.stderr
    # 10 blocks of 32 tokens.
    assert "320 of 339 (94 %) tokens from the prefix cache" in answer.stderr

    answer = run(*arguments, "-n", "2", "--json", "-", text=GOLDEN[0]["question"])
    values = json.loads(answer.stdout)
    assert values["cached_token_count"] > 0
    assert [sample["text"] for sample in values["samples"]] == [GOLDEN[0]["text"]] * 2
    assert values["samples"][0]["token_ids"] == GOLDEN[0]["output_token_ids"]
    assert values["samples"][0]["finish_reason"] == "stop"
    answer = run("generate", "--address", address, "--raw", "--max-tokens", "3", "-n2", "A")
    assert re.fullmatch(r"\[1\] .*\n\[2\] .*\n", answer.stdout, re.S)

    (engine,) = json.loads(run("engines", "--json", "--address", admin).stdout)
    assert (engine["state"], engine["block_size_tokens"]) == ("led", 32)
    assert engine["prefix_hit_token_count"] > 0
    listed = json.loads(run("prefixes", "--json", "--address", admin).stdout)
    assert listed[0]["token_count"] == 320 and listed[0]["hit_count"] > 0
    assert re.fullmatch("[0-9a-f]{32}", listed[0]["prefix_hash"])
    assert json.loads(run("prefixes", "--json", "--address", admin, "--engine", "x").stdout) == []
    assert json.loads(run("sequences", "--json", "--address", admin).stdout) == []
    for command in ("engines", "prefixes", "sequences"):
        assert run(command, "--address", admin).returncode == 0

    refused = run("generate", "--address", address, "--temperature", "-1", "x")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: sampling.temperature: ")

    # Redis holds hints only: the stack goes on without it, and without nothing else.
    os.kill(up.pid_of("redis-server"), signal.SIGKILL)
    assert run("generate", "--address", address, "--max-tokens", "3", "x").returncode == 0
    up.process.send_signal(signal.SIGINT)
    assert up.end() == 0, up.output
    assert up.processes() == {}
    assert list(up.temporary.iterdir()) == []


def test_children_die_with_a_killed_parent(start: Callable[..., Quire]) -> None:
    free = "127.0.0.1:0"
    up = start("up", "--listen", free, "--admin-listen", free)
    up.read_until("data plane: starting")
    assert len(up.processes()) == 3
    up.process.kill()
    up.wait_gone()


def test_stopped_while_it_starts(start: Callable[..., Quire]) -> None:
    demo = start("demo")
    demo.read_until("data plane: starting")
    demo.process.send_signal(signal.SIGTERM)
    assert demo.end() == 130
    assert demo.processes() == {}


def test_a_dead_plane_ends_the_stack_with_its_reason(start: Callable[..., Quire]) -> None:
    free = "127.0.0.1:0"
    up = start("up", "--listen", free, "--admin-listen", free, "--model", "/nowhere")
    assert up.end() == 1
    assert "error: the data plane ended with exit status 2" in up.output
    assert re.search(r"cannot serve: .*/nowhere", up.output)
    log = re.search(r"whole log: (\S+)", up.output)
    assert log is not None and "/nowhere" in Path(log[1]).read_text()
    assert up.processes() == {}


@pytest.mark.parametrize("command", [["generate", "x"], ["prefixes"], ["engines"], ["sequences"]])
def test_nothing_answers(command: list[str]) -> None:
    answer = run(*command, "--address", "127.0.0.1:1")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == "error: nothing answers at 127.0.0.1:1\n"


def test_an_address_that_is_taken_or_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not is_free(address)
        answer = run("up", "--listen", address)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr == f"error: cannot listen on {address}: Address already in use\n"
    answer = run("up", "--listen", "7401")
    assert "error: '7401' is no address" in answer.stderr


def test_loading_is_told_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_progress, "EVERY_SECONDS", 0)
    caplog.set_level("INFO")
    bar = load_progress._bar(tuple, ({1: "a", 2: "b"}.items(),), {"desc": "Loading weights"})
    assert dict(bar) == {1: "a", 2: "b"}
    assert caplog.messages == [f"loading weights: {percent} %" for percent in (0, 50, 100)]
    assert load_progress._bar(tuple, ((1, 2),), {}) == (1, 2)

    async def is_ready() -> bool:
        return False

    child = Child("plane", [], tmp_path / "log", is_ready=is_ready, address="")
    assert (child.doing(), child.percent()) == ("", None)
    child.log.write_text("2026-01-02 03:04:05,678 INFO data_plane.x: loading weights: 50 %\n")
    assert (child.doing(), child.percent()) == ("loading weights: 50 %", 50)


@pytest.mark.parametrize(
    ("admin_listen", "flags", "variables", "roles"),
    [
        ("127.0.0.1:0", (), {}, ["generate,read,write"]),
        ("localhost:0", (), {}, ["generate,read,write"]),
        # Whoever reaches an admin API from outside, or says who may use it, is no guest at home.
        ("0.0.0.0:0", (), {}, []),
        ("127.0.0.1:0", ("--access", "x"), {}, []),
        ("127.0.0.1:0", ("--access=x",), {}, []),
        ("127.0.0.1:0", (), {"QUIRE_ACCESS": "x"}, []),
        ("127.0.0.1:0", (), {"QUIRE_ANONYMOUS_ROLES": "read"}, []),
        ("127.0.0.1:0", ("--anonymous-roles", "read"), {}, ["generate,read,write", "read"]),
    ],
)
def test_all_roles_are_for_a_stack_at_home_only(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    admin_listen: str,
    flags: tuple[str, ...],
    variables: dict[str, str],
    roles: list[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = LocalStack(
        StackSettings(admin_listen=admin_listen, flags=flags)
    ).control_plane.command
    # The last one counts.
    pairs = itertools.pairwise(command)
    assert [value for flag, value in pairs if flag == "--anonymous-roles"] == roles


def test_each_plane_gets_its_settings() -> None:
    flags = ["--block-size", "32", "--chunk-tokens=64", "--no-check-invariants", "--log-level", "x"]
    shared = ["--no-check-invariants", "--log-level", "x"]
    data, control = split_flags(flags)
    assert data == ["--block-size", "32", *shared]
    assert control == ["--chunk-tokens=64", *shared]
    with pytest.raises(StackError, match="belongs to no setting"):
        split_flags(["32"])
    with pytest.raises(StackError, match="without TLS"):
        split_flags(["--tls-key", "x"])
