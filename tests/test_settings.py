"""Settings, TLS and draining: what a process does with how it is told to run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from control_plane.settings import Settings as ControlSettings
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from data_plane.settings import Settings as DataSettings
from protos import wire
from protos.inference.v1 import inference_pb2_grpc
from tests.certificates import Authority
from tests.processes import ROOT, control_plane, data_plane, free_port, wait_until_serving
from tests.stack import Stack, failure, led, request, running_engine, running_replica, running_stack

SIZES = EngineSizes(16, 128, 0, 8, 256, 1024)


def run(module: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a plane that is expected to end by itself."""
    base = {key: value for key, value in os.environ.items() if "QUIRE" not in key}
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        env=base | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_flags_beat_environment_beats_yaml_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "quire.yaml"
    file.write_text("chunk_tokens: 11\nsteps_in_flight: 3\nmax_waiting_requests: 5\n")
    code = (
        "from pydantic_settings import CliApp\n"
        "from control_plane.settings import Settings\n"
        "s = CliApp.run(Settings)\n"
        "print(s.chunk_tokens, s.steps_in_flight, s.max_waiting_requests, s.drain_seconds)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--config", str(file), "--chunk-tokens", "99"],
        env=os.environ | {"QUIRE_STEPS_IN_FLIGHT": "4", "QUIRE_CHUNK_TOKENS": "50"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["99", "4", "5", "30.0"], result.stderr


@pytest.mark.parametrize("module", ["control_plane", "data_plane"])
def test_wrong_settings_are_refused_with_a_sentence(module: str, tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text("lissen: 127.0.0.1:1\n")
    for flags, part in (
        (("--config", str(tmp_path / "none.yaml")), "there is no file"),
        (("--config", str(typo)), "lissen"),
        (("--log-level", "loud"), "log-level"),
        (("--tls-certificate", "x.pem"), "together"),
    ):
        result = run(module, *flags)
        assert result.returncode != 0
        assert part in result.stderr.replace("_", "-"), result.stderr
        assert "Traceback" not in result.stderr


def test_access_that_means_nothing_is_refused_at_start(tmp_path: Path) -> None:
    broken = tmp_path / "access.yaml"
    broken.write_text("callers: [{name: a, token_sha256: hunter2, roles: [read]}]")
    digits = "callers[0].token_sha256: must be the 64 hex digits of a token's SHA-256"
    for module, flags, part in (
        ("control_plane", ("--access", str(broken)), f"{broken}: {digits}"),
        ("control_plane", ("--access", "/nowhere"), "/nowhere: No such file"),
        ("control_plane", ("--anonymous-roles", "generate,root"), "there is no role 'root', only"),
        ("control_plane", ("--anonymous-roles", "relay"), "relay is no role for callers"),
        ("control_plane", ("--redis-ca", str(broken)), "redis-ca is for a redis-url that begins"),
        ("data_plane", ("--leader-names", "a,b"), "leader-names needs tls-ca"),
    ):
        result = run(module, *flags)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith("setting ") and part in result.stderr, result.stderr
        assert "hunter2" not in result.stderr


def test_passwords_are_never_shown() -> None:
    settings = ControlSettings(
        redis_password="hunter2",  # type: ignore[arg-type]
        redis_url="redis://user:hunter2@127.0.0.1:1",
    )
    assert settings.redis_password is not None
    assert settings.redis_password.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r} {settings}"


def test_health_alone_in_plain_text(tmp_path: Path) -> None:
    """Both planes with TLS everywhere else, as probes see them."""
    authority = Authority(tmp_path)
    files, own = _flags(authority.issue("engine")), _flags(authority.issue("control"))
    engine_health, control_health = free_port(), free_port()

    def listen(port: int) -> tuple[str, str]:
        return "--health-listen", f"127.0.0.1:{port}"

    engine_flags = (*files, *listen(engine_health), "--leader-names", "control")
    with data_plane(tmp_path / "engine.log", *engine_flags) as engine:
        wait_until_serving(engine_health, lambda: None)
        control_flags = (*own, *listen(control_health))
        with control_plane(tmp_path / "control.log", [engine.port], *control_flags) as control:
            # Serving means that the engine is led.
            wait_until_serving(control_health, lambda: None)
            for port in (engine.port, control.port):
                with pytest.raises(AssertionError, match="nothing serves"):
                    wait_until_serving(port, lambda: None, 0.5)
            control.signal(signal.SIGTERM)
            assert control.wait() == 0
        engine.signal(signal.SIGTERM)
        assert engine.wait() == 0
        assert "Traceback" not in engine.log() + control.log()


def _flags(tls: wire.Tls) -> list[str]:
    pairs = ("--tls-certificate", tls.certificate), ("--tls-key", tls.key), ("--tls-ca", tls.ca)
    return [str(word) for pair in pairs for word in pair]


def test_half_a_tls_configuration_is_an_error() -> None:
    for settings in (ControlSettings, DataSettings):
        with pytest.raises(ValidationError, match="together"):
            settings(tls_ca=Path("ca.pem"))


def test_mutual_tls_on_every_connection(llama: Model, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    own, client = authority.issue("quire"), authority.issue("client")
    files = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_ca": own.ca}

    async def call(port: int, tls: wire.Tls | None) -> int:
        async with wire.channel(f"127.0.0.1:{port}", tls) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return len([response async for response in stub.Generate(request([20, 21], 3))])

    async def main() -> None:
        engine = Engine(llama, SIZES)
        async with running_engine(engine, None, tls=own) as (_, port):
            async with running_replica([port], **files) as replica:
                await led(replica)
                assert await call(replica.ports[0], client) >= 3
                for other in (None, stranger.issue("intruder")):
                    error = await failure(call(replica.ports[0], other))
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
            async with running_replica([port]) as without:
                await asyncio.sleep(0.3)
                assert without.router.leaders[0].facts is None

    asyncio.run(main())


def test_draining_says_so_and_finishes_what_runs(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, drain_seconds=20) as stack:
            message = request(list(range(20, 50)), 400)
            message.stopping.ignore_eos = True
            running = asyncio.create_task(stack.generate(message))
            async with asyncio.timeout(5):
                while not stack.replica.generations.all_running():
                    await asyncio.sleep(0)
            stopping = asyncio.create_task(stack.replica.stop())
            await asyncio.sleep(0)
            error = await failure(stack.generate(request([20], 2)))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "draining" in str(error.details())
            assert await _health(stack) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert len((await running).ids) == 400
            await stopping

    asyncio.run(main())


@pytest.mark.parametrize("wanted", [False, True])
def test_reflection_is_by_opt_in(llama: Model, wanted: bool) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def names(stack: Stack) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(stack.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([question]))
        answer = await anext(aiter(call))
        return {service.name for service in answer.list_services_response.service}

    async def main() -> None:
        async with running_stack(llama, reflection=wanted) as stack:
            if wanted:
                assert "quire.inference.v1.InferenceService" in await names(stack)
                newer = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
                error = await failure(stack.channel.stream_stream(newer)(iter([b""])).read())
                assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            else:
                error = await failure(names(stack))
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(main())


async def _health(stack: Stack) -> int:
    stub = health_pb2_grpc.HealthStub(stack.channel)
    async with asyncio.timeout(2):
        while True:
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                return int(answer.status)
            await asyncio.sleep(0.02)
