"""Who may do what: certificates, tokens, roles and tenants, over real connections."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.access import (
    Access,
    AccessError,
    Caller,
    Role,
    UnknownCaller,
    anonymous_roles,
    read_access,
)
from control_plane.admin_client import AdminClient
from control_plane.authorisation import ROLES
from control_plane.client import CallError, Client, generate_text
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from protos.admin.v1 import admin_pb2
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.certificates import Authority
from tests.processes import ROOT
from tests.stack import Answer, Stack, failure, led, request, running_engine, running_replica
from tests.stack import running_stack as running_open_stack

SIZES = EngineSizes(16, 128, 0, 8, 256, 1024)
PROMPT = list(range(40, 110))
ADMIN = "/quire.admin.v1.AdminService/"
SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in ((pb, "InferenceService"), (admin_pb2, "AdminService"))
]


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def token_caller(name: str, *roles: str, **fields: str) -> dict[str, object]:
    """A caller whose token is its name and "-token"."""
    return {"name": name, "token_sha256": digest(f"{name}-token"), "roles": list(roles)} | fields


def certificate_caller(certificate: str, *roles: str, **fields: str) -> dict[str, object]:
    return {"name": certificate, "certificate": certificate, "roles": list(roles)} | fields


def write(path: Path, *callers: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"callers": list(callers)}))
    return path


def shows(caller: str, **more: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with a caller's token."""
    named = tuple((key.replace("_", "-"), value) for key, value in more.items())
    return (*wire.bearer(f"{caller}-token"), *named)


@asynccontextmanager
async def running_stack(model: Model, **settings: Any) -> AsyncIterator[Stack]:
    """One with the anonymous roles of the default."""
    async with running_open_stack(model, **({"anonymous_roles": "generate"} | settings)) as stack:
        yield stack


async def generate(
    stub: Any, message: pb.GenerateRequest, metadata: tuple[tuple[str, str], ...] = ()
) -> Answer:
    answer = Answer()
    async for response in stub.Generate(message, timeout=30, metadata=metadata):
        answer.add(response)
    return answer


def reason(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    (info,) = wire.error_details(error)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return info.reason, dict(info.metadata)


# The file.

GOOD = token_caller("search", "generate")


@pytest.mark.parametrize(
    ("callers", "sentence"),
    [
        ([GOOD, token_caller("search", "read", token_sha256=digest("x"))], "the same name"),
        ([GOOD, GOOD | {"name": "b"}], "callers[0] and callers[1] have the same token_sha256"),
        (
            [certificate_caller("a", "read"), certificate_caller("a", "read", name="b")],
            "the same certificate",
        ),
        ([GOOD | {"roles": ["admin"]}], "callers[0].roles: there is no role 'admin', only"),
        ([GOOD | {"roles": []}], "callers[0].roles: list should have at least 1 item"),
        ([GOOD | {"roles": "read"}], "callers[0].roles: input should be a valid list"),
        ([GOOD | {"certificate": "x"}], "callers[0]: must have either token_sha256 or certificate"),
        ([{"name": "a", "roles": ["read"]}], "must have either token_sha256 or certificate"),
        ([GOOD | {"token_sha256": "secret"}], "token_sha256: must be the 64 hex digits"),
        ([GOOD | {"token_sha256": digest("")}], "token_sha256: is that of no token at all"),
        ([GOOD | {"token_sha256": 12}], "token_sha256: input should be a valid string"),
        ([GOOD | {"name": "a b"}], "callers[0].name: must be 1 to 128 printable ASCII"),
        ([GOOD | {"tenant": ""}], "callers[0].tenant: must be 1 to 128 printable ASCII"),
        ([GOOD | {"rolls": ["read"]}], "callers[0].rolls: extra inputs are not permitted"),
        ([{"roles": ["read"], "certificate": "x"}], "callers[0].name: field required"),
    ],
)
def test_mistakes_in_the_file_are_one_clear_sentence(
    tmp_path: Path, callers: list[dict[str, object]], sentence: str
) -> None:
    path = write(tmp_path / "access.yaml", *callers)
    with pytest.raises(AccessError) as raised:
        read_access(path)
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("text", ["callers: [secret", "secret: \x00", "[" * 5000, "- secret", ""])
def test_what_is_no_access_file_is_not_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(text)
    with pytest.raises(AccessError) as raised:
        read_access(path)
    assert "secret" not in str(raised.value)
    with pytest.raises(AccessError, match="No such file"):
        read_access(tmp_path / "none.yaml")


def test_what_callers_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "access.yaml",
        GOOD | {"token_sha256": digest("search-token").upper()},
        certificate_caller("ops.example", "write", tenant="operators"),
        certificate_caller("other.example", "read"),
    )
    access = Access(path, anonymous_roles("generate"))
    search = Caller("search", "search", frozenset({Role.GENERATE}))
    assert access.identify(["search-token"], []) == search
    # The token goes before the certificate.
    assert access.identify(["search-token"], ["ops.example"]) == search
    roles = frozenset({Role.READ, Role.WRITE})
    operators = Caller("ops.example", "operators", roles)
    assert access.identify([], ["x", "ops.example"]) == operators
    nobody = Caller("", "", frozenset({Role.GENERATE}))
    assert access.identify([], ["x"]) == access.identify([], []) == nobody
    for tokens, names in (
        (["wrong"], []),
        ([""], []),
        (["wrong"], ["ops.example"]),
        (["search-token", "search-token"], []),
        ([], ["ops.example", "other.example"]),
    ):
        with pytest.raises(UnknownCaller):
            access.identify(tokens, names)


def test_anonymous_roles() -> None:
    assert anonymous_roles("") == anonymous_roles(" , ") == frozenset()
    assert anonymous_roles("generate, write") == {Role.GENERATE, Role.WRITE, Role.READ}
    for wrong in ("relay", "generate,admin"):
        with pytest.raises(ValueError, match="role"):
            anonymous_roles(wrong)


def test_the_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Kubernetes does it: the name is a link to a file below a link that is replaced."""
    for index, caller in enumerate(("first", "second")):
        (tmp_path / f"data{index}").mkdir()
        write(tmp_path / f"data{index}" / "access.yaml", token_caller(caller, "read"))
    (tmp_path / "data").symlink_to(tmp_path / "data0")
    path = tmp_path / "access.yaml"
    path.symlink_to(tmp_path / "data" / "access.yaml")

    def switch(target: str) -> None:
        (tmp_path / "new").symlink_to(tmp_path / target)
        os.replace(tmp_path / "new", tmp_path / "data")

    access = Access(path, frozenset())
    access.refresh()
    assert access.identify(["first-token"], []).name == "first"
    switch("data1")
    assert access.identify(["first-token"], []).name == "first"
    access.refresh()
    assert access.identify(["second-token"], []).name == "second"
    with pytest.raises(UnknownCaller):
        access.identify(["first-token"], [])
    (tmp_path / "data1" / "access.yaml").write_text("callers: secret")
    switch("nowhere")
    for broken in ("nowhere", "data1"):
        caplog.clear()
        switch(broken)
        for _ in range(3):
            access.refresh()
        assert access.identify(["second-token"], []).name == "second"
        (record,) = caplog.records
        assert record.levelname == "ERROR" and "secret" not in record.message
    switch("data0")
    access.refresh()
    assert access.identify(["first-token"], []).name == "first"


# The table.


def test_every_method_of_both_apis_has_a_role() -> None:
    for service in SERVICES:
        for method in service.methods:
            assert ROLES.get(f"/{service.full_name}/{method.name}"), method.name
    anybody = {method for method, roles in ROLES.items() if not roles}
    assert anybody == {f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch")}
    assert all(Role.GENERATE not in roles for method, roles in ROLES.items() if ADMIN in method)


def admin_methods() -> Iterator[str]:
    for method in SERVICES[1].methods:
        yield method.name
    yield from (name.removeprefix(ADMIN) for name in ROLES if name.startswith(ADMIN))


async def raw(
    channel: grpc.aio.Channel, method: str, *metadata: tuple[str, str]
) -> grpc.StatusCode:
    """What a method answers to bytes that are no message of anything."""
    try:
        await channel.unary_unary(method)(b"\xff\xff", metadata=metadata, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_methods_are_denied_by_default(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = grpc.StatusCode.PERMISSION_DENIED

    async def main() -> None:
        async with running_stack(llama, reflection=True) as stack:
            for method in dict.fromkeys(admin_methods()):
                assert await raw(stack.admin_channel, ADMIN + method) is denied, method
            # Nobody knows of them, or not here.
            for channel in (stack.channel, stack.admin_channel):
                for method in ("/x/y", ADMIN + "Nothing", "/grpc.channelz.v1.Channelz/GetServers"):
                    assert await raw(channel, method) is denied
                assert await raw(channel, "/quire.engine.v1.EngineService/Lead") is denied
            error = await failure(stack.admin.ListEngines(admin_pb2.ListEnginesRequest()))
            assert reason(error) == ("ROLE_MISSING", {"role": "read"})
            assert error.details() == "the caller has no role read"
            # A method that is open but not there, and bytes that are no message.
            inference = "/quire.inference.v1.InferenceService/"
            unimplemented = grpc.StatusCode.UNIMPLEMENTED
            assert await raw(stack.admin_channel, inference + "Cancel") is unimplemented
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            assert await raw(stack.channel, inference + "Cancel") is invalid
            # What goes wrong in a handler is nobody's business.
            monkeypatch.setattr(stack.replica.frontend, "_generations", "secret")
            error = await failure(stack.stub.Cancel(pb.CancelRequest(request_id="x")))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert re.fullmatch("internal error [0-9a-f]{12}", str(error.details()))
            monkeypatch.undo()
            health = health_pb2_grpc.HealthStub(stack.admin_channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert len((await stack.generate(request(PROMPT, 3))).ids) == 3

    asyncio.run(main())


def test_anonymous_callers_have_the_roles_that_they_are_given(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, anonymous_roles="") as stack:
            error = await failure(stack.generate(request(PROMPT, 3)))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert reason(error) == ("ROLE_MISSING", {"role": "generate"})
            error = await failure(stack.stub.Cancel(pb.CancelRequest(request_id="x")))
            assert reason(error) == ("ROLE_MISSING", {"role": "generate"})
        async with running_stack(llama, anonymous_roles="read") as stack:
            assert (await stack.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
            missing = await raw(stack.admin_channel, ADMIN + "DrainEngine")
            assert missing is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(main())


# Tokens.


def test_tokens(llama: Model, llama_directory: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "access.yaml",
        token_caller("search", "generate"),
        token_caller("reader", "read"),
        token_caller("writer", "write"),
    )

    async def refused(call: Any, code: grpc.StatusCode) -> CallError:
        with pytest.raises(CallError) as raised:
            await call
        assert raised.value.code is code
        return raised.value

    async def main() -> None:
        unknown, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
        stack_of = running_stack(llama, directory=llama_directory, access=path)
        async with stack_of as stack:
            admin = f"127.0.0.1:{stack.replica.ports[1]}"
            for token, code in (("search", denied), ("wrong", unknown), ("", denied)):
                async with AdminClient(admin, token=f"{token}-token" if token else "") as client:
                    error = await refused(client.engines(), code)
                    known = code is denied
                    assert error.reason == ("ROLE_MISSING" if known else "UNKNOWN_CALLER")
            for token in ("reader", "writer"):
                async with AdminClient(admin, token=f"{token}-token") as client:
                    assert len(await client.engines()) == 1
            write_method = ADMIN + "RegisterPrefix"
            assert await raw(stack.admin_channel, write_method, *shows("reader")) is denied
            # Whoever shows a token is not anonymous, also where the anonymous may.
            async with Client(stack.address, token="search-token") as client:
                assert await client.text("a b", max_tokens=3)
                error = await refused(client.cancel("none"), grpc.StatusCode.NOT_FOUND)
            for token, code in (("wrong", unknown), ("reader", denied)):
                async with Client(stack.address, token=f"{token}-token") as client:
                    await refused(client.text("a b", max_tokens=3), code)
                    await refused(client.cancel("none"), code)
            for header in ("Basic search-token", "search-token", "Bearer", "Bearer ", ""):
                call = generate(stack.stub, request(PROMPT, 3), (("authorization", header),))
                assert (await failure(call)).code() is unknown
            twice = (*shows("search"), *shows("reader"))
            assert (
                await failure(generate(stack.stub, request(PROMPT, 3), twice))
            ).code() is unknown
            call = generate(
                stack.stub, request(PROMPT, 3), (("authorization", "bEARER search-token"),)
            )
            assert len((await call).ids) == 3
            answer = await asyncio.to_thread(
                generate_text, "a b", stack.address, token="search-token", max_tokens=3
            )
            assert answer
            # The file changes while the stack runs.
            write(path, token_caller("other", "generate"))
            os.utime(path, ns=(1, 1))
            async with Client(stack.address, token="other-token") as client:
                async with asyncio.timeout(5):
                    while not await _works(client):
                        await asyncio.sleep(0.05)
            async with Client(stack.address, token="search-token") as client:
                await refused(client.text("a b", max_tokens=3), unknown)

    asyncio.run(main())
    for token in ("a b", "ä", "a\n"):
        with pytest.raises(ValueError, match="printable"):
            Client(token=token)


def quire(*arguments: str, token: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with QUIRE_TOKEN and no other setting in its environment."""
    environment = {key: value for key, value in os.environ.items() if "QUIRE" not in key}
    code = "from control_plane.cli.commands import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment | {"QUIRE_TOKEN": token},
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


async def _works(client: Client) -> bool:
    try:
        return bool(await client.text("a b", max_tokens=3))
    except CallError as error:
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
        return False


# Tenants.


def test_tenants_share_no_prefixes(llama: Model, tmp_path: Path) -> None:
    path = write(
        tmp_path / "access.yaml",
        token_caller("search", "generate"),
        token_caller("ads", "generate"),
        token_caller("ads-batch", "generate", tenant="ads"),
    )

    async def main() -> None:
        async with running_stack(llama, access=path) as stack:

            async def cached(*metadata: tuple[str, str]) -> int:
                answer = await generate(stack.stub, request(PROMPT, 3), metadata)
                return answer.accepted.cached_token_count

            assert await cached() == 0
            assert await cached(*shows("search")) == 0
            assert await cached(*shows("search")) == 64
            assert await cached(*shows("ads")) == 0
            assert await cached(*shows("ads-batch")) == 64
            assert await cached() == 64

    asyncio.run(main())


def test_a_request_id_is_its_tenants_own(llama: Model, tmp_path: Path) -> None:
    path = write(
        tmp_path / "access.yaml",
        token_caller("search", "generate"),
        token_caller("ads", "generate"),
    )
    message = request(PROMPT, 300, request_id="mine")
    message.stopping.ignore_eos = True

    async def main() -> None:
        async with running_stack(llama, access=path) as stack:
            call = stack.stub.Generate(message, metadata=shows("search"))
            accepted = await call.read()
            assert accepted.accepted.request_id == "mine"
            generation = stack.replica.generations.running(("search", "mine"))
            assert generation is not None
            # What others hear of an id that runs is what they hear of one that nobody has.
            answers = []
            for request_id in ("mine", "none"):
                for metadata in (shows("ads"), ()):
                    cancel = pb.CancelRequest(request_id=request_id)
                    error = await failure(stack.stub.Cancel(cancel, metadata=metadata))
                    answers.append((error.code(), error.details(), reason(error)))
            assert len({str(answer) for answer in answers}) == 1
            assert answers[0][0] is grpc.StatusCode.NOT_FOUND
            # The same request under the same id: a generation of their own, from its beginning.
            for metadata in (shows("ads"), ()):
                other = stack.stub.Generate(message, metadata=metadata)
                first = await other.read()
                assert first.accepted.cached_token_count == 0
                assert generation.subscriber_count == 1
                other.cancel()
            # Another request under the same id is not said to be different.
            different = request(PROMPT[::-1], 3, request_id="mine")
            assert len((await generate(stack.stub, different, shows("ads"))).ids) == 3
            error = await failure(generate(stack.stub, different, shows("search")))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert not generation.finished
            # Its own tenant joins it, and cancels it.
            joined = stack.stub.Generate(message, metadata=shows("search"))
            assert (await joined.read()).accepted.request_id == "mine"
            assert generation.subscriber_count == 2
            cancel = pb.CancelRequest(request_id="mine")
            await stack.stub.Cancel(cancel, metadata=shows("search"))
            while not (event := await call.read()).HasField("finished"):
                pass
            assert event.finished.reason == pb.FINISH_REASON_CANCELLED
            joined.cancel()
            # What has ended is kept for its own tenant only.
            done = request(PROMPT, 5, request_id="done", received_token_counts=[5])
            whole = request(PROMPT, 5, request_id="done")
            whole.stopping.ignore_eos = done.stopping.ignore_eos = True
            await generate(stack.stub, whole, shows("search"))
            assert stack.replica.generations.get(("search", "done")) is not None
            assert stack.replica.generations.get(("ads", "done")) is None
            assert (await generate(stack.stub, done, shows("search"))).ids == []
            await stack.idle()

    asyncio.run(main())


def test_a_new_leader_knows_whose_a_request_is(llama: Model, tmp_path: Path) -> None:
    path = write(
        tmp_path / "access.yaml",
        token_caller("search", "generate"),
        token_caller("ads", "generate"),
    )
    message = request(PROMPT, 900, request_id="mine")
    message.stopping.ignore_eos = True

    async def main() -> None:
        async with running_engine(Engine(llama, SIZES), None) as (_, port):
            async with running_replica([port], access=path) as former:
                await led(former)
                async with wire.channel(f"127.0.0.1:{former.ports[0]}") as channel:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    # Kept, since a call that nobody holds is cancelled.
                    call = stub.Generate(message, metadata=shows("search"))
                    await call.read()
                    await former.stop()
            async with running_replica([port], access=path) as replica:
                await led(replica)
                assert replica.generations.running(("search", "mine")) is not None
                async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    cancel = pb.CancelRequest(request_id="mine")
                    error = await failure(stub.Cancel(cancel, metadata=shows("ads")))
                    assert error.code() is grpc.StatusCode.NOT_FOUND
                    await stub.Cancel(cancel, metadata=shows("search"))

    asyncio.run(main())


def test_a_relay_names_the_tenant_and_nobody_else_does(llama: Model, tmp_path: Path) -> None:
    path = write(
        tmp_path / "access.yaml",
        token_caller("search", "generate"),
        token_caller("replica", "relay"),
        token_caller("both", "relay", "generate"),
    )

    async def main() -> None:
        async with running_stack(llama, access=path) as stack:

            async def cached(*metadata: tuple[str, str]) -> int:
                answer = await generate(stack.stub, request(PROMPT, 3), metadata)
                return answer.accepted.cached_token_count

            async def refused(*metadata: tuple[str, str]) -> str:
                error = await failure(cached(*metadata))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                name, more = reason(error)
                assert name == "ROLE_MISSING"
                return more["role"]

            for_search = {"quire_tenant": "search", "quire_relay": "1"}
            assert await cached(*shows("search")) == 0
            assert await cached(*shows("replica", **for_search)) == 64
            assert await cached(*shows("both", **for_search)) == 64
            for_nobody = {"quire_tenant": "", "quire_relay": "1"}
            assert await cached(*shows("replica", **for_nobody)) == 0
            assert await cached() == 64
            # For itself a relay has no role; with one, it is a tenant like others.
            assert await refused(*shows("replica")) == "generate"
            assert await refused(*shows("replica", quire_relay="1")) == "generate"
            assert await refused(*shows("replica", quire_tenant="search")) == "relay"
            assert await refused(*shows("both", quire_tenant="search")) == "relay"
            assert await cached(*shows("both")) == 0
            # Others may only say what is true.
            other = {"quire_tenant": "replica", "quire_relay": "1"}
            assert await refused(*shows("search", **other)) == "relay"
            assert await refused(("quire-tenant", "search"), ("quire-relay", "1")) == "relay"
            assert await cached(*shows("search", **for_search)) == 64
            assert await cached(("quire-tenant", ""), ("quire-relay", "1")) == 64
            for tenants in (["a", "b"], ["a b"], ["x" * 129]):
                metadata = [("quire-tenant", tenant) for tenant in tenants]
                call = cached(*shows("replica", quire_relay="1"), *metadata)
                assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
            # Likewise of the admin API: it asks for a caller of its own.
            question = admin_pb2.ListEnginesRequest()
            error = await failure(stack.admin.ListEngines(question, metadata=shows("replica")))
            assert reason(error) == ("ROLE_MISSING", {"role": "read"})
            call = stack.admin.ListEngines(question, metadata=shows("replica", **for_search))
            assert len((await call).engines) == 1

    asyncio.run(main())


# Certificates.


def lead_call(channel: grpc.aio.Channel) -> Any:
    return engine_pb2_grpc.EngineServiceStub(channel).Lead()


async def claims(port: int, tls: wire.Tls | None) -> bool:
    """Whether an engine grants its leadership to this peer."""
    async with wire.channel(f"127.0.0.1:{port}", tls) as channel:
        call = lead_call(channel)
        await call.write(engine_pb2.LeadRequest(claim=engine_pb2.Claim()))
        answer = await call.read()
        call.cancel()
        return answer is not grpc.aio.EOF and answer.HasField("granted")


def test_only_those_who_may_lead_use_an_engine(
    llama: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    authority = Authority(tmp_path)
    stranger = Authority(tmp_path / "elsewhere", "stranger")
    own = authority.issue("engine")
    leaders = [
        authority.issue("control-plane"),
        authority.issue("a", "other.example", "control.example"),
        authority.issue("b", "spiffe://quire/control"),
    ]
    names = frozenset({"control-plane", "control.example", "spiffe://quire/control"})
    frontend = authority.issue("frontend", "frontend.example", "spiffe://quire/frontend")

    async def main() -> None:
        engine = running_engine(Engine(llama, SIZES), None, tls=own, leaders=names)
        async with engine as (_, port):
            for tls in leaders:
                assert await claims(port, tls)
            async with wire.channel(f"127.0.0.1:{port}", frontend) as channel:
                stub = engine_pb2_grpc.EngineServiceStub(channel)
                error = await failure(stub.Describe(engine_pb2.DescribeRequest()))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert "certificate has no name that may lead" in str(error.details())
                error = await failure(stub.GetTokenizer(engine_pb2.GetTokenizerRequest()).read())
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                # Refused without a word of its own.
                assert await failure(lead_call(channel).read())
                assert await raw(channel, "/x/y") is grpc.StatusCode.PERMISSION_DENIED
            error = await failure(claims(port, frontend))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            expired = authority.issue("control-plane-of-old", "control.example", expired=True)
            for other in (None, wire.Tls(ca=own.ca), stranger.issue("control-plane"), expired):
                error = await failure(claims(port, other))
                assert error.code() is grpc.StatusCode.UNAVAILABLE

            def files(tls: wire.Tls) -> dict[str, object]:
                return {"tls_certificate": tls.certificate, "tls_key": tls.key, "tls_ca": tls.ca}

            async with running_replica([port], **files(leaders[0])) as replica:
                await led(replica)
            async with running_replica([port], **files(frontend)):
                await asyncio.sleep(0.5)
            (said,) = [each for each in caplog.records if "does not let" in each.message]
            assert "has no name that may lead" in said.message
        async with running_engine(Engine(llama, SIZES), None, tls=own) as (_, port):
            assert await claims(port, frontend)

    asyncio.run(main())


def test_callers_are_known_by_their_certificates(llama: Model, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("quire")
    path = write(
        tmp_path / "access.yaml",
        certificate_caller("search.example", "generate"),
        certificate_caller("spiffe://quire/ops", "write"),
        certificate_caller("by-common-name", "read"),
        token_caller("batch", "generate", tenant="search.example"),
    )
    files = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_ca": own.ca}
    listens = {"access": path, "anonymous_roles": "", "health_listen": "127.0.0.1:0"}

    async def main() -> None:
        async with running_engine(Engine(llama, SIZES), None, tls=own) as (_, port):
            async with running_replica([port], **files, **listens) as replica:
                await led(replica)
                inference, admin = (f"127.0.0.1:{number}" for number in replica.ports)
                search = authority.issue("search", "search.example")
                async with wire.channel(inference, search) as channel:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    await generate(stub, request(PROMPT, 3))
                    # A token goes before the certificate.
                    answer = await generate(stub, request(PROMPT, 3), shows("batch"))
                    assert answer.accepted.cached_token_count == 64
                    error = await failure(generate(stub, request(PROMPT, 3), shows("wrong")))
                    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                for name, tls in (
                    ("read", search),
                    ("read", authority.issue("unknown")),
                    ("", authority.issue("x", "spiffe://quire/ops")),
                    ("", authority.issue("by-common-name")),
                ):
                    async with AdminClient(admin, tls=tls) as client:
                        if not name:
                            assert len(await client.engines()) == 1
                            continue
                        with pytest.raises(CallError) as raised:
                            await client.engines()
                        assert raised.value.code is grpc.StatusCode.PERMISSION_DENIED
                several = authority.issue("by-common-name", "search.example")
                async with AdminClient(admin, tls=several) as client:
                    with pytest.raises(CallError) as raised:
                        await client.engines()
                    assert raised.value.code is grpc.StatusCode.UNAUTHENTICATED
                # Probes need no certificate, and get nothing but health.
                async with wire.channel(f"127.0.0.1:{replica.health_port}") as channel:
                    health = health_pb2_grpc.HealthStub(channel)
                    await _serving(health)
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    error = await failure(generate(stub, request(PROMPT, 3)))
                    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
                    replica.frontend.draining = True
                    await _serving(health, health_pb2.HealthCheckResponse.NOT_SERVING)

    asyncio.run(main())


async def _serving(health: Any, wanted: int = health_pb2.HealthCheckResponse.SERVING) -> None:
    async with asyncio.timeout(5):
        while (await health.Check(health_pb2.HealthCheckRequest())).status != wanted:
            await asyncio.sleep(0.02)


def test_tokens_over_tls_without_certificates_of_clients(
    llama: Model, llama_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    authority = Authority(tmp_path)
    stranger = Authority(tmp_path / "elsewhere", "stranger")
    own = authority.issue("quire")
    path = write(tmp_path / "access.yaml", token_caller("search", "generate"))
    files = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_ca": own.ca}

    async def text(address: str, tls: wire.Tls | None, token: str = "search-token") -> str:
        async with Client(address, token=token, tls=tls, retry_seconds=0) as client:
            return await client.text("a b", max_tokens=3)

    async def main() -> None:
        settings = {"access": path, "anonymous_roles": "", "client_certificates": False} | files
        names = frozenset({"quire"})
        engine = running_engine(Engine(llama, SIZES), llama_directory, tls=own, leaders=names)
        async with engine as (_, port):
            async with running_replica([port], **settings) as replica:
                await led(replica)
                address = f"127.0.0.1:{replica.ports[0]}"
                for tls, sentence in (
                    (None, f"{address} hangs up; it may ask for TLS, or for a certificate"),
                    (wire.Tls(), f"no TLS with {address}: .*CERTIFICATE_VERIFY_FAILED.*"),
                    (wire.Tls(ca=stranger.ca), f"no TLS with {address}: .*VERIFY_FAILED.*"),
                ):
                    with pytest.raises(CallError) as raised:
                        await text(address, tls)
                    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
                    assert re.fullmatch(sentence, raised.value.sentence)
                    with pytest.raises(CallError) as raised:
                        async with Client(address, tls=tls) as client:
                            await client.wait_connected(0.2)
                    assert re.fullmatch(sentence, raised.value.sentence)
                assert await text(address, wire.Tls(ca=own.ca))
                (tmp_path / "token").write_text("search-token\n")
                token_file = ("--token-file", str(tmp_path / "token"))
                ask = ("generate", "--address", address, "--tls-ca", str(own.ca), "--raw", "a b")
                for more, token, status in (
                    (token_file, "", 0),
                    ((), "search-token", 0),
                    (token_file, "wrong", 0),
                    ((), "wrong", 1),
                    ((), "a b", 2),
                    (("--tls-key", str(own.key)), "", 2),
                ):
                    answer = await asyncio.to_thread(quire, *ask, *more, token=token)
                    assert answer.returncode == status, answer.stderr
                    assert answer.stderr.startswith("error: ") is bool(status)
                assert "not known" in (await asyncio.to_thread(quire, *ask, token="wrong")).stderr
                # One that is not asked for is not believed either.
                with pytest.raises(CallError) as raised:
                    await text(address, authority.issue("search"), "")
                assert raised.value.code is grpc.StatusCode.PERMISSION_DENIED
                for token, code in (
                    ("wrong", grpc.StatusCode.UNAUTHENTICATED),
                    ("", grpc.StatusCode.PERMISSION_DENIED),
                ):
                    with pytest.raises(CallError) as raised:
                        await text(address, wire.Tls(ca=own.ca), token)
                    assert raised.value.code is code

    asyncio.run(main())
