"""Operators' commands: against real planes and Redis, and what they show of any answer."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from control_plane.admin import Admin
from control_plane.admin_client import AdminClient, Row, _row
from control_plane.cli.cells import Cells, Kind, joined, plain, printable, scaled, shares
from control_plane.cli.commands import app
from control_plane.cli.engine_view import FREE, PINNED, USED, block_map_view, engines_view
from control_plane.cli.explain_view import explanation_view, sentence
from control_plane.cli.views import prefixes_table, registered_table, sequences_table
from control_plane.client import Client
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc
from tests.cli_page import PAGE, commands, fill, option_tables
from tests.processes import control_plane, data_plane, free_port
from tests.redis_server import RedisServer
from tests.test_cli import QUIRE, run

SYSTEM = "You are the support desk of a small shop that sells maps and globes. " * 2
SECRET = "zebra"
WIDTH = 100


@dataclass(frozen=True)
class Planes:
    """Two engines with the same tokenizer and a replica that leads them."""

    address: str
    admin: str

    def quire(self, *arguments: str, text: str = "", status: int = 0) -> str:
        """Runs a command in this process; returns what it printed."""
        variables = {"QUIRE_ADMIN_ADDRESS": self.admin, "COLUMNS": str(WIDTH)}
        result = CliRunner().invoke(app, arguments, input=text, env=variables)
        assert result.exit_code == status, (result.output, result.exception)
        if status:
            assert re.fullmatch(r"error: .+\n", result.stderr), result.stderr
            return result.stderr
        assert result.stderr == ""
        if "--json" not in arguments:
            assert max(map(len, result.stdout.splitlines()), default=0) <= WIDTH
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.quire(*arguments, "--json"))

    def generate(self, prompt: Any, model: str = "tiny-llama", **options: Any) -> None:
        async def main() -> None:
            async with Client(self.address) as client:
                fields = {"max_tokens": 2, "temperature": 0.0} | options
                async for _ in client.generate(prompt, model=model, **fields):  # type: ignore[misc]
                    pass

        asyncio.run(main())


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def planes(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planes]:
    folder = tmp_path_factory.mktemp("planes")
    common = ("--model", str(llama_directory), "--blocks", "128", "--swap-memory-mib", "1")
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        engines = [
            stack.enter_context(
                data_plane(
                    folder / f"{name}.log", *common, "--engine-id", name,
                    "--served-model-name", model, "--dtype", dtype,
                )
            )
            for name, model, dtype in (
                ("e0", "tiny-llama", "float32"),
                ("e1", "in-short", "bfloat16"),
            )
        ]  # fmt: skip
        admin = f"127.0.0.1:{free_port()}"
        # Enough time for a machine that is doing other things as well.
        flags = ("--admin-listen", admin, "--redis-url", redis.url, "--index-timeout-ms", "1000")
        for engine in engines:
            engine.ready(150)
        ports = [engine.port for engine in engines]
        control = control_plane(folder / "control.log", ports, *flags)
        stack.enter_context(control)
        control.ready(150)
        found = Planes(f"127.0.0.1:{control.port}", admin)
        until(lambda: {row["state"] for row in found.json("engines")} == {"led"}, 60)
        yield found


def chat(user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


# Against running planes.


def test_prefixes_are_listed_with_what_they_save(planes: Planes) -> None:
    prompt = list(range(40, 140))
    for _ in range(3):
        planes.generate(prompt)
    first = planes.json("prefixes", "--limit", "1")
    assert len(first) == 1
    assert (first[0]["token_count"], first[0]["hit_count"]) == (96, 2)
    assert first[0]["saved_token_count"] == 192 and first[0]["model"] == "tiny-llama"
    assert first[0]["holders"] == [{"engine_id": "e0", "reference_count": 0}]
    assert re.fullmatch("[0-9a-f]{32}", first[0]["prefix_hash"])
    assert planes.json("prefixes", "--engine", "e1") == []
    shown = planes.quire("prefixes")
    assert f" {first[0]['prefix_hash'][:12]} " in shown and "model" not in shown
    assert re.search(r"96 +2 +192 +\d+ s ago +no tenant +e0 \(0\)", shown)
    planes.generate(prompt, "in-short")
    planes.generate(prompt, "in-short")
    both = planes.quire("prefixes")
    assert "2 prefixes with hits" in both
    assert re.search(r"tiny-llama +96 ", both) and re.search(r"in-short +96 +1 ", both)
    assert [row["model"] for row in planes.json("prefixes", "--engine", "e1")] == ["in-short"]


def test_a_registered_prefix_from_registering_to_forgetting(planes: Planes, tmp_path: Path) -> None:
    file = tmp_path / "desk.txt"
    file.write_text(SYSTEM + "\n")
    shown = planes.quire("prefixes", "register", "desk", "--file", str(file))
    assert shown.startswith("desk is registered\n")
    (row,) = planes.json("prefixes", "registered")
    # The newline that editors write is no part of a system message.
    assert (row["text"], row["form"], row["pinned"]) == (SYSTEM, "system", False)
    shared = row["engines"][0]["shared_token_count"]
    assert shared >= 32 and [each["engine_id"] for each in row["engines"]] == ["e0", "e1"]

    shown = planes.quire("prefixes", "warm", "desk", "--wait")
    assert f"e0: {shared} of {shared} tokens, warm" in shown
    assert f"e1: {shared} of {shared} tokens, warm" in shown
    assert "every engine holds desk" in shown
    assert planes.json("prefixes", "warm", "desk", "--wait")["name"] == "desk"
    shown = planes.quire("prefixes", "pin", "desk")
    assert "desk is pinned" in shown and "system, pinned" in shown
    assert sum(row["pinned_block_count"] for row in planes.json("engines")) == 2 * shared // 16
    assert re.search(rf"{shared // 16} pinned", planes.quire("engines"))
    planes.generate(chat("hello"))
    listed = planes.quire("prefixes")
    assert re.search(rf"desk +tiny-llama +{shared} +1 +{shared} +\d s ago +all tenants +e0", listed)
    assert re.search(r"\n +pinned", listed)

    explained = planes.quire("prefixes", "explain", "--system", SYSTEM, "hi", "--model", "in-short")
    assert f"registered prefix desk: {shared} tokens shared by all tenants" in explained
    file.write_text(SYSTEM)
    arguments = ("--model", "in-short", "--system-file", str(file), "hi", "--json")
    assert json.loads(planes.quire("prefixes", "explain", *arguments))["cached_token_count"] >= (
        shared
    )
    assert planes.json("prefixes", "unpin", "desk")["pinned"] is False
    assert "is not registered any more" in planes.quire("prefixes", "unregister", "desk")
    assert planes.quire("prefixes", "registered").startswith("0 registered prefixes")


def test_registering_text_that_is_no_use_says_so(planes: Planes, tmp_path: Path) -> None:
    shown = planes.quire(
        "prefixes", "register", "short", "--plain", "--pin", "--file", "-", text="Hi\n"
    )
    assert "fills no block of 16 tokens" in shown and "plain, pinned" in shown
    assert planes.json("prefixes", "registered")[0]["text"] == "Hi"
    error = planes.quire("prefixes", "warm", "short", "--wait", status=1)
    assert error.startswith("error: short is not warm on e0 (fills no block of 16 tokens) and e1")
    assert planes.quire("prefixes", "unregister", "short", "--json") == "{}\n"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for arguments, words in (
        (("register", "x", "-f", str(tmp_path / "none")), "No such file or directory"),
        (("register", "x", "-f", str(tmp_path / "binary")), "is no text in UTF-8"),
        (("register", "a b", "-f", "-"), "name: must be 1 to 63 letters"),
        (("pin", "nobody"), "no prefix is registered as 'nobody'"),
        (("unpin", "nobody"), "nobody"),
        (("warm", "nobody"), "nobody"),
        (("unregister", "nobody"), "nobody"),
        (("--json", "registered"), "write --json after registered"),
        (("--address", "x:1", "pin", "y"), "write --address after pin"),
    ):
        assert words in planes.quire("prefixes", *arguments, text="text", status=1)


def test_explaining_prompts(planes: Planes) -> None:
    prompt = f"{SECRET} stripes and the quick brown fox " * 6
    arguments = ("prefixes", "explain", "--raw", "--model", "tiny-llama", prompt)
    before = planes.json(*arguments)
    assert before["cached_token_count"] == 0 and before["spans"][0]["outcome"] == "never_seen"
    whole = before["prompt_token_count"]
    full = whole // 16 * 16
    planes.generate(prompt, request_id="asked")
    planes.generate(prompt, request_id="again")
    shown = planes.quire(*arguments)
    percent = round(100 * full / whole)
    assert shown.startswith(f"{full} of {whole} prompt tokens cached ({percent} %)\n")
    assert f"now, of tiny-llama on e0, blocks of 16 tokens\n\n{'#' * (full // 16)}" in shown
    assert re.search(rf"# +blocks 0-{full // 16 - 1} +{full} tokens +cached on e0", shown)
    if whole % 16:
        assert "fills no block: only full blocks of 16 tokens are cached" in shown
    # The same from standard input, and of a request.
    assert planes.quire(*arguments[:-1], "-", text=prompt) == shown
    asked = planes.quire("prefixes", "explain", "--request-id", "asked")
    assert re.search(r"request asked, \d+ s ago, of tiny-llama on e0", asked)
    assert "never seen before" in asked and "." * (full // 16) in asked
    again = planes.quire("prefixes", "explain", "--request-id", "again")
    assert re.search(rf"foretold by the index: \d+ tokens, found: {full}\n", again)
    assert planes.quire("prefixes", "explain", "--request-id", "again", "--tenant", "") == again
    unknown = planes.quire(
        "prefixes", "explain", "--request-id", "again", "--tenant", "red", status=1
    )
    assert "this request is not known" in unknown
    as_json = planes.json("prefixes", "explain", "--request-id", "again")
    assert as_json["request_id"] == "again" and as_json["spans"][0]["engine_ids"] == ["e0"]
    # Whoever may ask for another model, or as a tenant.
    elsewhere = planes.quire("prefixes", "explain", "--raw", "--model", "in-short", prompt)
    assert "cached for model tiny-llama only" in elsewhere
    tenant = planes.quire(*arguments, "--tenant", "red")
    assert "for tenant red" in tenant and "cached for callers without a tenant only" in tenant
    # Until something else needs the room.
    for turn in range(3):
        planes.generate([(at * 7 + turn) % 300 + 40 for at in range(1000)])
    gone = planes.quire(*arguments)
    assert re.search(r"e +blocks .+ evicted \d+ s ago", gone)
    for text in (shown, asked, again, elsewhere, tenant, gone, json.dumps(as_json)):
        assert SECRET not in text


def test_explaining_needs_to_know_what(planes: Planes) -> None:
    for arguments, words in (
        ((), "say what to explain: a prompt, or --request-id"),
        (("x", "--request-id", "y"), "leave out PROMPT"),
        (("x", "--raw", "--system", "y"), "only one of"),
        (("x", "--system-file", "/nowhere"), "cannot read /nowhere"),
        (("--request-id", "y"), "is not known, or too long ago"),
        (("x",), "model"),
        (("x", "--model", "none"), "none"),
    ):
        assert words in planes.quire("prefixes", "explain", *arguments, status=1)


def test_engines_blocks_and_sequences_while_one_runs(planes: Planes) -> None:
    prompt = list(range(50, 150))

    async def main() -> None:
        async with Client(planes.address) as client:
            options = {"max_tokens": 800, "ignore_eos": True, "sample_count": 2, "seed": 1}
            events = client.generate(prompt, model="tiny-llama", request_id="long", **options)
            async for _ in events:
                pass

    async def cancel() -> None:
        async with Client(planes.address) as client:
            await client.cancel("long")

    running = threading.Thread(target=lambda: asyncio.run(main()))
    running.start()
    until(lambda: len(planes.json("sequences", "--engine", "e0")) == 2)
    rows = planes.json("sequences", "--engine", "e0")
    shown, engines = planes.quire("sequences"), planes.quire("engines")
    map_of = planes.json("blocks", "e0")
    asyncio.run(cancel())
    running.join()
    assert [row["sample"] for row in rows] == [0, 1]
    assert rows[0]["request_id"] == "long" and rows[0]["state"] in ("prefill", "decode")
    assert re.search(r"long +0 +e0 +(prefill|decode) +100 ", shown) and "priority" not in shown
    assert planes.json("sequences", "--engine", "e1") == []

    assert engines.startswith("2 engines\n")
    assert re.search(r"e0  tiny-llama at \S+, led by this replica, epoch 1", engines)
    assert re.search(r"blocks +u[ucp.]{19} +128 of 16 tokens: [1-9]\d* used", engines)
    assert re.search(r"swap +\.{20} +\d+ blocks in host memory: 0 used", engines)
    assert re.search(r"prompts +c*\.+ +[\d,]+ tokens: \d+ cached \(\d+ %\)", engines)
    assert re.search(r"steps +[qmfs]{20} +\d+, mean [\d.]+ ms: queue", engines)
    assert re.search(r"requests +[12] running, 0 swapped, 0 waiting; 0 preempted", engines)

    assert map_of["engine_id"] == "e0" and len(map_of["states"]) == 128
    assert {"shared", "used"} <= set(map_of["states"]) and set(map_of["host_states"]) == {"free"}
    shown = planes.quire("blocks", "e0")
    assert shown.startswith("128 blocks of e0\n 0 ") and "blocks in host memory" in shown
    line = "".join(each.split()[1] for each in shown.splitlines()[1:3])
    assert len(line) == 128 and set(line) <= set(".cpus")
    assert f"c cached {line.count('c')} (" in shown
    error = planes.quire("blocks", status=1)
    assert error == "error: there are 2 engines, so name one: e0, e1\n"
    assert "'e9'" in planes.quire("blocks", "e9", status=1)


@pytest.mark.skipif("DrainEngine" not in vars(Admin), reason="the servicer has no DrainEngine yet")
def test_draining_a_real_engine(planes: Planes) -> None:
    assert "engine e1 gets no new requests: 0 running" in planes.quire("drain", "e1")
    assert "draining: it gets no new requests" in planes.quire("engines")
    assert planes.json("drain", "e1", "--resume")["draining"] is False
    assert "e9" in planes.quire("drain", "e9", status=1)


def test_a_process_with_a_terminal_shows_colours_and_without_one_letters(planes: Planes) -> None:
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)

    def on_a_terminal(*arguments: str, **variables: str) -> str:
        leader, follower = pty.openpty()
        command = [*QUIRE, *arguments, "--address", planes.admin]
        with subprocess.Popen(command, env=environment | variables, stdout=follower) as process:
            os.close(follower)
            output = b""
            try:
                while data := os.read(leader, 65536):
                    output += data
            except OSError:
                pass  # The other side is closed.
        os.close(leader)
        assert process.returncode == 0
        return output.decode()

    coloured = on_a_terminal("blocks", "e0")
    assert "\x1b[9" in coloured and ("█" in coloured or "░" in coloured)
    for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines():
        assert len(line) <= 80
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal("blocks", "e0", NO_COLOR="1"))
    assert "█" not in uncoloured and re.search(r"0 [.cpus]{64}", uncoloured)
    # Progress is rewritten in its place, and gone at the end.
    planes.quire("prefixes", "register", "desk", "--file", "-", text=SYSTEM)
    shown = on_a_terminal("prefixes", "warm", "desk", "--wait")
    assert "e0  " in shown and "every engine holds desk" in shown.rpartition("\x1b[2K")[2]
    planes.quire("prefixes", "unregister", "desk")
    answer = run("blocks", "e0", "--address", planes.admin)
    assert answer.returncode == 0 and "\x1b" not in answer.stdout
    answer = run("blocks", "--json", "--address", planes.admin)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: there are 2 engines")


@pytest.mark.parametrize(
    "arguments",
    [
        ["engines"],
        ["blocks"],
        ["blocks", "e0", "--json"],
        ["sequences"],
        ["drain", "e0"],
        ["prefixes"],
        ["prefixes", "registered"],
        ["prefixes", "register", "x", "--file", "-"],
        ["prefixes", "unregister", "x"],
        ["prefixes", "pin", "x"],
        ["prefixes", "unpin", "x"],
        ["prefixes", "warm", "x", "--wait"],
        ["prefixes", "explain", "x"],
        ["prefixes", "explain", "--request-id", "x"],
    ],
    ids=" ".join,
)
def test_nothing_answers(arguments: list[str]) -> None:
    error = Planes("", "127.0.0.1:1").quire(*arguments, text="x", status=1)
    assert error == "error: nothing answers at 127.0.0.1:1\n"


# Against a servicer of the test's own.


class Drained(admin_pb2_grpc.AdminServiceServicer):
    """Knows one engine, and nothing but how to drain it."""

    def __init__(self) -> None:
        self.asked: list[pb.DrainEngineRequest] = []
        self.tokens: list[Any] = []

    async def DrainEngine(
        self, message: pb.DrainEngineRequest, context: wire.Context
    ) -> pb.DrainEngineResponse:
        self.asked.append(message)
        self.tokens.append(dict(context.invocation_metadata() or ()).get("authorization"))
        engine = pb.Engine(
            engine_id=message.engine_id, draining=not message.resume, running_sequence_count=3
        )
        return pb.DrainEngineResponse(engine=engine)

    async def ListSequences(
        self, message: pb.ListSequencesRequest, context: wire.Context
    ) -> pb.ListSequencesResponse:
        await asyncio.sleep(60)
        return pb.ListSequencesResponse()


@pytest.fixture
def drained() -> Iterator[tuple[Planes, Drained]]:
    """Serves in a thread, for commands have an event loop of their own."""
    servicer, started, ended = Drained(), threading.Event(), asyncio.Event()
    ports: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        server = wire.server()
        admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
        ports.append(wire.listen(server, "127.0.0.1:0", None))
        await server.start()
        loops.append(asyncio.get_running_loop())
        started.set()
        await ended.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(10)
    yield Planes("", f"127.0.0.1:{ports[0]}"), servicer
    loops[0].call_soon_threadsafe(ended.set)
    thread.join()


def test_drain_and_resume(drained: tuple[Planes, Drained], monkeypatch: pytest.MonkeyPatch) -> None:
    planes, servicer = drained
    shown = planes.quire("drain", "e0")
    assert shown == "engine e0 gets no new requests: 3 running, 0 swapped, 0 waiting\n"
    assert "engine e0 gets requests again" in planes.quire("drain", "e0", "--resume")
    assert planes.json("drain", "e0")["draining"] is True
    assert [message.resume for message in servicer.asked] == [False, True, False]
    monkeypatch.setenv("QUIRE_TOKEN", "abc")
    planes.quire("drain", "e0")
    assert servicer.tokens == [None] * 3 + ["Bearer abc"]
    # What this replica is too old for, or too slow.
    error = planes.quire("engines", status=1)
    assert error == f"error: the service at {planes.admin} has no ListEngines in its admin API\n"
    monkeypatch.setattr("control_plane.admin_client.TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(AdminClient._ask, "__defaults__", (0.2,))
    assert "no answer from" in planes.quire("sequences", status=1)


# What is shown of any answer.


def drawn(view: RenderableType, width: int = WIDTH, coloured: bool = False) -> str:
    output = StringIO()
    system = {"color_system": "truecolor", "force_terminal": True} if coloured else {}
    Console(file=output, width=width, **system).print(view)  # type: ignore[arg-type]
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert coloured or max(map(len, lines)) <= width
    return "\n".join(lines)


def the_row(message: Any) -> Row:
    return _row(message)


EXPLANATION = the_row(
    pb.Explanation(request_id="r", engine_id="e0", block_size_tokens=16, prompt_token_count=50)
)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"outcome": "HIT", "engine_ids": ["e0", "e1"]}, "cached on e0 and e1"),
        ({"outcome": "NEVER_SEEN"}, "never seen before"),
        ({"outcome": "EVICTED", "evicted_seconds_before": 12}, "evicted 12 s before the request"),
        ({"outcome": "EVICTED", "evicted_seconds_before": 180}, "evicted 3 min before the request"),
        ({"outcome": "OTHER_ENGINE", "engine_ids": ["e0"]}, "held only by engine e0"),
        (
            {"outcome": "OTHER_ENGINE", "engine_ids": ["e0", "e1", "e2"]},
            "held only by engines e0, e1 and e2",
        ),
        ({"outcome": "OTHER_TENANT", "tenant": "red"}, "cached for tenant red only"),
        ({"outcome": "OTHER_TENANT"}, "cached for callers without a tenant only"),
        ({"outcome": "OTHER_MODEL", "model": "in-short"}, "cached for model in-short only"),
        ({"outcome": "AFTER_A_MISS", "engine_ids": ["e0"]}, "held by e0, but not what comes "),
        ({"outcome": "NOT_FULL"}, "fills no block: only full blocks of 16 tokens are cached"),
        ({"outcome": "NOT_USED", "engine_ids": ["e0"]}, "asked for log-probabilities of its "),
    ],
)
def test_every_outcome_has_a_sentence(fields: dict[str, Any], said: str) -> None:
    span = pb.BlockSpan(**fields | {"outcome": f"LOOKUP_OUTCOME_{fields['outcome']}"})
    assert said in sentence(the_row(span), EXPLANATION)


def test_outcomes_are_all_known_and_new_ones_do_no_harm() -> None:
    for value in pb.LookupOutcome.values()[1:]:
        assert "older" not in sentence(the_row(pb.BlockSpan(outcome=value)), EXPLANATION)
    span = the_row(pb.BlockSpan(block_count=3, token_count=48, outcome=99))
    assert "99: this command is older than the service" in drawn(
        explanation_view(EXPLANATION | {"spans": [span]})
    )


def test_long_prompts_have_a_bar_that_fits() -> None:
    spans = [
        pb.BlockSpan(block_count=6000, token_count=96_000, outcome="LOOKUP_OUTCOME_HIT"),
        pb.BlockSpan(
            first_block=6000, block_count=2000, token_count=32_000, outcome="LOOKUP_OUTCOME_EVICTED"
        ),
    ]
    row = the_row(
        pb.Explanation(prompt_token_count=128_000, cached_token_count=96_000, spans=spans)
    )
    shown = drawn(explanation_view(row))
    assert shown.startswith("96,000 of 128,000 prompt tokens cached (75 %)")
    assert f"\n{'#' * 75}{'e' * 25}\na cell is 80 blocks" in shown
    assert "blocks 6,000-7,999  32,000 tokens" in shown
    many = [pb.BlockSpan(block_count=1, token_count=16, outcome=1 + at % 2) for at in range(50)]
    assert "and 10 more stretches; --json has all" in drawn(
        explanation_view(the_row(pb.Explanation(spans=many)))
    )
    assert "█" in drawn(explanation_view(row), coloured=True)


def test_block_maps_fit_and_show_what_most_blocks_of_a_cell_are() -> None:
    words = ["used"] * 50_000 + ["shared"] * 10 + ["free"] * 49_990
    view = block_map_view({"engine_id": "e0", "states": words, "host_states": []})
    lines = drawn(view).splitlines()
    assert lines[0] == "100,000 blocks of e0" and len(lines) <= 28
    assert ". free 49,990 (50 %)   u used 50,000 (50 %)   s shared 10 (0 %)" in lines
    assert lines[-1] == "a cell is 64 blocks, shown as most of them are"
    for width in (40, 80, 200):
        cells = "".join(re.findall(r"^ *[\d,]+ ([.cpus]+)$", drawn(view, width), re.M))
        assert set(cells) == {"u", "."} and abs(cells.count("u") - cells.count(".")) <= 2
    small = block_map_view(
        {"engine_id": "e0", "states": ["pinned", "new"], "host_states": ["used"]}
    )
    assert "0 p.\n" in drawn(small) and "1 blocks in host memory" in drawn(small)
    colours = drawn(small, coloured=True)
    assert "\x1b[35m█" in colours and "░" in colours


def test_bars_are_divided_fairly_and_show_what_is_there_at_all() -> None:
    assert shares({}, 10) == [] == shares({USED: 0}, 10)
    for counts in ([1, 999], [500, 500], [1, 1, 998], [333, 333, 333], [7, 0, 13], [1e-9, 1.0]):
        kinds = dict(zip((USED, PINNED, FREE), counts, strict=False))
        bar = shares(kinds, 24)
        assert len(bar) == 24
        for kind, count in kinds.items():
            assert (kind in bar) == (count > 0)
            assert abs(bar.count(kind) - 24 * count / sum(counts)) < 2.1
    assert len(shares({USED: 1, PINNED: 1, FREE: 1}, 2)) == 3
    assert scaled([USED, FREE, FREE, USED, USED], 2, [FREE, USED]) == [USED, USED, USED]


def test_what_comes_from_elsewhere_is_shown_as_text_only() -> None:
    assert printable("a\x1b[31mb\nc") == "a�[31mb\nc"
    row = the_row(pb.Sequence(request_id="[red]x[/red]\x1b[2J", engine_id="e0", priority=3))
    shown = drawn(sequences_table([row]), coloured=True)
    assert "[red]x[/red]�[2J" in shown and "\x1b[2J" not in shown and "priority" in shown
    assert str(plain("[b]")) == "[b]" and joined([]) == ""
    assert drawn(Cells([Kind("x", "x", "red")] * 3)) == "xxx"


def test_engines_in_every_state() -> None:
    rows = [
        the_row(pb.Engine(address="127.0.0.1:1", state="ENGINE_STATE_CONNECTING")),
        the_row(
            pb.Engine(
                engine_id="e1", model="m", address="a:1", state="ENGINE_STATE_FOLLOWED",
                leader_address="b:2", block_count=64,
            )
        ),
        the_row(
            pb.Engine(
                engine_id="e3", model="m", address="a:3", state="ENGINE_STATE_FOLLOWED",
                leader_address="b:2", epoch=7, block_count=64, block_size_tokens=16,
                used_block_count=64,
            )
        ),
        the_row(
            pb.Engine(
                engine_id="e2", model="m", state="ENGINE_STATE_LED", epoch=3, draining=True,
                last_failure="rank 2 was ended by signal 9", last_failure_age_seconds=7300,
                block_count=64, block_size_tokens=16, free_block_count=64,
            )
        ),
    ]  # fmt: skip
    shown = drawn(engines_view(rows))
    assert "?  ? at 127.0.0.1:1, connecting" in shown
    # Its leader did not answer.
    assert "e1  m at a:1, led by b:2\n" in shown
    assert "e3  m at a:3, led by b:2, epoch 7\n" in shown
    assert "  draining: it gets no new requests" in shown
    assert "  lost 2 h ago: rank 2 was ended by signal 9" in shown
    for nothing in ("no swap space", "none yet"):
        assert shown.count(nothing) == 2


def test_registered_prefixes_in_every_state() -> None:
    def on(name: str, held: int, known: bool = True, **fields: Any) -> pb.RegisteredPrefixEngine:
        return pb.RegisteredPrefixEngine(
            engine_id=name, held_token_count=held, known=known, **fields
        )

    prefix = pb.RegisteredPrefix(
        name="desk",
        form=pb.PREFIX_FORM_SYSTEM,
        pinned=True,
        declared=True,
        hit_count=1234,
        saved_token_count=56789,
        engines=[
            on("e0", 32, shared_token_count=32),
            on("e1", 16, shared_token_count=32),
            on("e2", 0, shared_token_count=32, warming=True),
            on("e3", 0, shared_token_count=32, problem="cannot be pinned: 100 of 64 blocks"),
            on("e4", 0, shared_token_count=32),
            on("e5", 0),
            on("far", 0, known=False, shared_token_count=32),
        ],
    )
    rows = [the_row(prefix), the_row(pb.RegisteredPrefix(name="alone"))]
    shown = drawn(registered_table(rows))
    for line in (
        r"system, pinned, from a file +e1",
        r"desk +1,234 +56,789 +e0 +32 of 32 +warm",
        r"e1 +16 of 32 +warm in part",
        r"e2 +0 of 32 +is being computed",
        r"e3 +0 of 32 +cannot be pinned: 100 of",
        r"e4 +0 of 32 +not there",
        r"e5 +0 of 0 +is not tokenised yet",
        r"far +\? of 32 +not known",
        r"alone +0 +0",
    ):
        assert re.search(line, shown), line


def test_prefixes_of_tenants_and_those_that_are_gone() -> None:
    rows = [
        the_row(pb.Prefix(prefix_hash=bytes(16), tenant="red", token_count=48, idle_seconds=200)),
        the_row(pb.Prefix(prefix_hash=bytes(16), name="desk", shared=True, pinned=True)),
    ]
    shown = drawn(prefixes_table(rows))
    assert re.search(r"000000000000 +48 +0 +0 +3 min ago +tenant red +nowhere: evicted", shown)
    assert re.search(r"desk .*all tenants", shown)


def test_the_page_of_commands_is_whole() -> None:
    text = PAGE.read_text()
    assert fill(text, option_tables()) == text, "python -m tests.cli_page --options"
    for name in commands():
        assert f"quire {name}" in text
    assert all(
        len(content) > 20 for content in re.findall(r"begin: .+? -->\n(.*?)<!--", text, re.S)
    )
