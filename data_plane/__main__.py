"""The data-plane process: ``python -m data_plane --help``."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import warnings
from functools import partial

import torch
import uvloop
from grpc_health.v1 import health_pb2
from pydantic import ValidationError
from pydantic_settings import CliApp

from data_plane.engine import Engine, EngineSizes
from data_plane.load_progress import log_weight_loading
from data_plane.model import Model, ModelError, load_model
from data_plane.service import EngineService, ServiceTimes, stable_engine_id
from data_plane.settings import Settings
from data_plane.tokenizer_files import TokenizerFiles, read_tokenizer
from data_plane.worker import Worker
from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc

log = logging.getLogger("data_plane")

EXIT_BAD_MODEL = 2
# With a client's stop ids they must fit a row of the scheduler's slot table.
MAX_EOS_TOKEN_IDS = 48
# The device worker failed: its memory cannot be trusted, a fresh process can.
EXIT_WORKER_FAILED = 70
_SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name


class SettingsError(Exception):
    """Settings that contradict each other or the model; one sentence."""


def engine_sizes(settings: Settings, model: Model) -> EngineSizes:
    """Turns memory settings into counts.

    Raises:
        SettingsError: they do not fit together.
    """
    facts = model.facts
    per_token = 2 * facts.layer_count * facts.kv_head_count * facts.head_size * facts.dtype.itemsize
    per_block = per_token * settings.block_size
    count = settings.blocks or (settings.kv_memory_mib << 20) // per_block
    if count < 1:
        raise SettingsError(
            f"kv-memory-mib {settings.kv_memory_mib} holds no block of {per_block} bytes"
        )
    if settings.max_step_tokens < settings.max_slots:
        raise SettingsError(
            f"max-step-tokens {settings.max_step_tokens} is below max-slots {settings.max_slots}"
        )
    if len(facts.eos_token_ids) > MAX_EOS_TOKEN_IDS:
        raise SettingsError(
            f"the model names {len(facts.eos_token_ids)} end-of-sequence ids; "
            f"at most {MAX_EOS_TOKEN_IDS} are served"
        )
    length = settings.max_model_length or facts.max_model_length
    if length > facts.max_model_length:
        raise SettingsError(
            f"max-model-length {length} exceeds the model's own {facts.max_model_length}"
        )
    return EngineSizes(
        block_size=settings.block_size,
        block_count=count,
        host_block_count=(settings.swap_memory_mib << 20) // per_block,
        slot_count=settings.max_slots,
        step_tokens=settings.max_step_tokens,
        max_length=length,
    )


def build_engine(settings: Settings) -> Engine:
    """Loads the model, warms it up, and allocates its KV cache; on the thread that will run it.

    Raises:
        ModelError: the model cannot be served.
        SettingsError: settings do not fit together.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("loading %s on %s", settings.model, device)
    model = load_model(
        settings.model,
        dtype=settings.dtype,
        load_format=settings.load_format,
        device=device,
        name=settings.served_model_name or None,
    )
    sizes = engine_sizes(settings, model)
    log.info("allocating %d blocks of %d tokens", sizes.block_count, sizes.block_size)
    model.warm_up()
    return Engine(model, sizes, check=settings.check_invariants)


async def serve(
    settings: Settings, worker: Worker, engine: Engine, tokenizer: TokenizerFiles | None
) -> int:
    """Serves until SIGTERM or SIGINT, or until the worker fails; returns the exit status."""
    server = wire.server()
    service = EngineService(
        engine,
        worker,
        tokenizer,
        engine_id=settings.engine_id or stable_engine_id(settings.listen),
        times=ServiceTimes(settings.leader_timeout_seconds, settings.resident_grace_seconds),
    )
    engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
    health = wire.add_health(server)
    if settings.reflection:
        wire.add_reflection(server, [_SERVICE])
    port = wire.listen(server, settings.listen, settings.tls)
    await server.start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    for name in ("", _SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    sizes = engine.sizes
    log.info(
        "serving %s on port %d: %d blocks of %d tokens, %d slots",
        engine.model.facts.name, port, sizes.block_count, sizes.block_size, sizes.slot_count,
    )  # fmt: skip
    failed = await _watch(worker, stopping, settings.hung_step_seconds)
    await health.enter_graceful_shutdown()
    await service.stop()
    await server.stop(settings.stop_grace_seconds)
    if failed:
        log.critical("the engine's worker is gone: %s", failed)
        return EXIT_WORKER_FAILED
    worker.stop()
    return 0


async def _watch(worker: Worker, stopping: asyncio.Event, hung_seconds: float) -> str:
    """Waits for the stop signal; returns a sentence if the worker failed or hangs before that."""
    while not stopping.is_set():
        if worker.failed is not None:
            return repr(worker.failed)
        if worker.stuck_seconds > hung_seconds:
            return f"one step takes more than {hung_seconds:g} s"
        try:
            async with asyncio.timeout(0.25):
                await stopping.wait()
        except TimeoutError:
            continue
    return ""


def main() -> int:
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "tls"
        print(f"setting {name}: {first['msg']}", file=sys.stderr)
        return EXIT_BAD_MODEL
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        log_weight_loading()
    try:
        tokenizer = read_tokenizer(settings.model)
        worker = Worker()
        worker.start()
        engine = worker.submit(partial(build_engine, settings)).result()
    except (ModelError, SettingsError, ValueError) as error:
        print(f"cannot serve: {error}", file=sys.stderr)
        return EXIT_BAD_MODEL
    return uvloop.run(serve(settings, worker, engine, tokenizer))


if __name__ == "__main__":
    sys.exit(main())
