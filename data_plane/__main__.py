"""The data-plane process: ``python -m data_plane --help``."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, NoReturn

import torch
import uvloop
from grpc_health.v1 import health_pb2
from prometheus_client import start_http_server
from pydantic import ValidationError
from pydantic_settings import CliApp
from torch.distributed.distributed_c10d import Store

from data_plane.calibrate import find_scales
from data_plane.compiled import reason_of
from data_plane.device import Device, device_of
from data_plane.engine import Engine, EngineSizes
from data_plane.follower import follow
from data_plane.kv_scales import KV_DTYPE, KVScales
from data_plane.load_progress import pulse, shown
from data_plane.memory import cache_bytes
from data_plane.metrics.activity import Activity
from data_plane.metrics.families import registry_of
from data_plane.model import Model, ModelError, ModelFacts, load_model
from data_plane.ranks import (
    BUILD_FACTOR,
    EXIT_BAD_MODEL,
    EXIT_WORKER_FAILED,
    Loss,
    Place,
    RankLost,
    Ranks,
)
from data_plane.service import EngineService, ServiceTimes, leaders_only, stable_engine_id
from data_plane.settings import Settings
from data_plane.step_runner import default_buckets
from data_plane.tensor_parallel import ALONE, TensorGroup
from data_plane.tokenizer_files import TokenizerFiles, read_tokenizer
from data_plane.worker import Worker
from protos import logs, wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc

log = logging.getLogger("data_plane")

CPU_KV_MEMORY_MIB = 512
# With a client's stop ids they must fit a row of the scheduler's slot table.
MAX_EOS_TOKEN_IDS = 48
# For the last step to end, and for other ranks to do so, when the engine is told to.
STOP_SECONDS = 5.0
# For streams to be told why an engine ends that cannot go on.
FAILURE_SECONDS = 0.5
_WATCH_SECONDS = 0.1
_SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name


class SettingsError(Exception):
    """Settings that contradict each other or the model; one sentence."""


# What building an engine raises for a model or settings that cannot be served.
REFUSALS = (ModelError, SettingsError, ValueError)


def block_bytes(settings: Settings, facts: ModelFacts) -> int:
    """Returns the bytes of a block on this rank."""
    dtype = KV_DTYPE if settings.kv_dtype == "fp8" else facts.dtype
    per_token = 2 * facts.layer_count * facts.local_kv_head_count * facts.head_size * dtype.itemsize
    return per_token * settings.block_size


def engine_sizes(
    settings: Settings, facts: ModelFacts, kv_bytes: int, group: TensorGroup
) -> EngineSizes:
    """Turns memory into counts, the same on all ranks.

    Raises:
        SettingsError: there is too little.
    """
    per_block = block_bytes(settings, facts)
    count = group.minimum(settings.blocks or kv_bytes // per_block)
    if count < 1:
        raise SettingsError(
            f"the {kv_bytes >> 20} MiB for the block pool hold no block of {per_block} bytes"
        )
    length = settings.max_model_length or facts.max_model_length
    return EngineSizes(
        block_size=settings.block_size,
        block_count=count,
        host_block_count=group.minimum((settings.swap_memory_mib << 20) // per_block),
        slot_count=settings.max_slots,
        step_tokens=settings.max_step_tokens,
        max_length=length,
    )


def check_settings(settings: Settings, facts: ModelFacts) -> None:
    """Raises SettingsError where settings contradict each other or the model."""
    if settings.kv_scales and settings.kv_dtype != "fp8":
        raise SettingsError(f"kv-scales {settings.kv_scales} is for kv-dtype fp8")
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


def check_room(settings: Settings, facts: ModelFacts, sizes: EngineSizes, device: Device) -> None:
    """Raises SettingsError where a GPU has no room for the blocks; a CPU's pages come when used."""
    if not device.asynchronous:
        return
    wanted, (free, _) = sizes.block_count * block_bytes(settings, facts), device.memory()
    if wanted > free:
        raise SettingsError(
            f"{sizes.block_count} blocks take {wanted >> 20} MiB, "
            f"and {free >> 20} MiB of the device's memory are free"
        )


def _decisive(settings: Settings) -> int:
    """A number for the settings that decide what ranks do together, and in which order."""
    own = {"model", "listen", "engine_id", "threads", "device", "config", "kv_scales"}
    own |= {"metrics_port", "log_format"}
    # Of the engine API, which rank 0 alone has.
    own |= {"health_listen", "tls_certificate", "tls_key", "tls_ca"}
    text = settings.model_dump_json(exclude=own)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def kv_memory(
    settings: Settings, model: Model, device: Device, scales: KVScales | None, buckets: list[int]
) -> int:
    """Returns the bytes of device memory for the block pool."""
    if settings.kv_memory_mib or not device.asynchronous:
        return (settings.kv_memory_mib or CPU_KV_MEMORY_MIB) << 20
    return cache_bytes(
        model,
        device,
        share=settings.memory_share,
        block_size=settings.block_size,
        step_tokens=settings.max_step_tokens,
        slot_count=settings.max_slots,
        max_length=settings.max_model_length or model.facts.max_model_length,
        buckets=buckets,
        scales=scales,
    )


def compiles_layers(settings: Settings, device: torch.device, group: TensorGroup) -> bool:
    """Whether layers are to be compiled."""
    wanted = settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")
    if wanted and group.size > 1:
        log.info("the layers run eagerly: those of several ranks are not compiled")
        return False
    return wanted


def capture_graphs(engine: Engine, group: TensorGroup) -> None:
    """Captures the graphs of decodes; where that cannot be, the log says why.

    Of several ranks it must be: others may have captured them, and would pad what this one does
    not.
    """
    try:
        engine.capture(partial(shown, what="capturing graphs"))
    except Exception as error:
        if group.size > 1:
            raise
        log.warning("decodes run without graphs: %s", reason_of(error))


def build_engine(
    settings: Settings, place: Place | None = None, store: Store | None = None
) -> Engine:
    """Loads the model, warms it up, and allocates its KV cache; on the thread that will run it.

    Args:
        place, store: of one of several ranks, and where all of them meet.

    Raises:
        ModelError: the model cannot be served.
        ScaleError: a file of scales does not fit the model.
        SettingsError: settings do not fit together.
        ValueError: there is no such device.
    """
    place = place or Place()
    torch.set_num_threads(settings.threads or max(torch.get_num_threads() // place.local_size, 1))
    device = place.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    group = ALONE
    if store is not None:
        group = TensorGroup.join(place.rank, place.size, store, device)
        if not group.agrees(_decisive(settings)):
            raise SettingsError("ranks have different settings")
    log.info("loading %s on %s", settings.model, device)
    compiled = compiles_layers(settings, device, group)
    model = load_model(
        settings.model,
        dtype=settings.dtype,
        packed=not compiled,
        load_format=settings.load_format,
        device=device,
        name=settings.served_model_name or None,
        group=group,
    )
    pulse.beat()
    check_settings(settings, model.facts)
    scales = None
    if settings.kv_dtype == "fp8":
        gather = group.gather_columns if group.size > 1 else None
        whole = find_scales(model, settings.model, settings.kv_scales, gather)
        scales = whole.of_rank(group.rank, group.size)
        if not group.agrees(int(whole.digest[:14], 16)):
            raise SettingsError("ranks have different kv-scales")
    if compiled:
        model.compile(scales, settings.block_size, partial(shown, what="compiling layers"))
    model.warm_up(scales, settings.block_size)
    pulse.beat()
    place_of_steps = device_of(device)
    graphed = settings.graphs and place_of_steps.asynchronous
    buckets = default_buckets(settings.max_slots) if graphed else []
    kv_bytes = kv_memory(settings, model, place_of_steps, scales, buckets)
    sizes = engine_sizes(settings, model.facts, kv_bytes, group)
    check_room(settings, model.facts, sizes, place_of_steps)
    log.info("allocating %d blocks of %d tokens", sizes.block_count, sizes.block_size)
    engine = Engine(
        model, sizes, kv_scales=scales, buckets=buckets, check=settings.check_invariants
    )
    pulse.beat()
    engine.warm_up(partial(shown, what="compiling kernels"))
    capture_graphs(engine, group)
    engine.rehearse()
    group.minimum(0)  # Waits for all: the engine is ready when every rank is.
    return engine


async def serve(
    settings: Settings,
    worker: Worker,
    engine: Engine,
    tokenizer: TokenizerFiles | None,
    ranks: Ranks,
) -> int:
    """Serves until SIGTERM, SIGINT, or the failure of a worker or a rank; returns the status."""
    server = wire.server(leaders_only(settings.leaders))
    service = EngineService(
        engine,
        worker,
        tokenizer,
        engine_id=settings.engine_id or stable_engine_id(settings.listen),
        times=ServiceTimes(settings.leader_timeout_seconds, settings.resident_grace_seconds),
        ranks=ranks,
    )
    engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
    health = wire.add_health(server)
    if settings.reflection:
        wire.add_reflection(server, [_SERVICE])
    port = wire.listen(server, settings.listen, settings.tls)
    await server.start()
    probed = None
    if settings.health_listen:
        probed, _ = await wire.serve_health(settings.health_listen, health)
    if settings.metrics_port:
        host = settings.listen.rpartition(":")[0].strip("[]")
        start_http_server(settings.metrics_port, host, registry_of(engine, service))
    activity = asyncio.create_task(Activity(engine).report())
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
    asked = partial(_asked_to_stop, stopping, ranks)
    loss = await _watch(worker, ranks, asked, settings.hung_step_seconds)
    activity.cancel()
    await health.enter_graceful_shutdown()
    if loss is None and settings.drain_seconds:
        log.info("draining for %g s at most", settings.drain_seconds)
        drain = asyncio.create_task(service.drain(settings.drain_seconds))
        loss = await _watch(worker, ranks, drain.done, settings.hung_step_seconds)
        drain.cancel()
    grace = settings.stop_grace_seconds
    if loss is not None:
        service.fail(loss.sentence)
        grace = min(grace, FAILURE_SECONDS)
    await service.stop()
    await server.stop(grace)
    if probed is not None:
        await probed.stop(0)
    if loss is not None:
        log.critical("the engine failed: %s", loss.sentence)
        return loss.status
    worker.submit(ranks.stop)
    if not worker.stop(STOP_SECONDS):
        log.critical("the engine failed: its worker does not end")
        return EXIT_WORKER_FAILED
    return 0


def _asked_to_stop(stopping: asyncio.Event, ranks: Ranks) -> bool:
    return stopping.is_set() or ranks.asked_to_stop.is_set()


async def _watch(
    worker: Worker, ranks: Ranks, is_over: Callable[[], bool], hung_seconds: float
) -> Loss | None:
    """Waits until `is_over`; says why if the engine cannot go on before that.

    It can go on as long as its worker ends one job after the other, or has none.
    """
    while not is_over():
        if ranks.lost.done():
            return ranks.lost.result()
        if worker.failed is not None:
            own = Loss(f"its worker failed: {worker.failed!r}", EXIT_WORKER_FAILED)
            return await asyncio.to_thread(ranks.cause) or own
        if worker.stuck_seconds > hung_seconds:
            return Loss(f"one step takes more than {hung_seconds:g} s", EXIT_WORKER_FAILED)
        await asyncio.sleep(_WATCH_SECONDS)
    # What starts the ranks of several nodes also stops all of them when one has died.
    return await asyncio.to_thread(ranks.cause) if ranks.in_trouble else None


def _lead(settings: Settings, place: Place, ranks: Ranks) -> int:
    """Serves an engine as rank 0; returns the exit status."""
    began = time.monotonic()
    try:
        tokenizer = read_tokenizer(settings.model)
        ranks.gather(place)
        worker = Worker()
        worker.start()
        building = worker.submit(partial(build_engine, settings, place, ranks.store))
        patience = BUILD_FACTOR * settings.hung_step_seconds
        engine = _result(building, ranks, patience)
        engine.load_seconds = time.monotonic() - began
    except REFUSALS as error:
        print(f"cannot serve: {error}", file=sys.stderr)
        return EXIT_BAD_MODEL
    except RankLost as error:
        print(f"cannot serve: {error}", file=sys.stderr)
        return error.loss.status
    return uvloop.run(serve(settings, worker, engine, tokenizer, ranks))


def _result(building: Future[Engine], ranks: Ranks, patience: float) -> Engine:
    """Waits for the engine.

    Args:
        patience: seconds in which some rank must get on, if there are several.

    Raises:
        RankLost: another rank has gone meanwhile, without which it is never built, or hangs.
    """
    either: tuple[Future[Any], ...] = (building, ranks.lost)
    while not wait(either, _WATCH_SECONDS, FIRST_COMPLETED).done:
        if not ranks.alone and (loss := ranks.stalled(pulse.count, patience)):
            raise RankLost(loss)
    error = building.exception() if building.done() else None
    if not building.done() or (error is not None and not isinstance(error, REFUSALS)):
        cause = ranks.cause()
        if cause is not None:
            raise RankLost(cause) from error
    return building.result()


def _leave(status: int) -> NoReturn:
    """Ends the process at once: a thread may be in a collective or a kernel that never ends."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _refused(name: str, sentence: str) -> int:
    print(f"setting {name}: {sentence}", file=sys.stderr)
    return EXIT_BAD_MODEL


def main() -> int:
    try:
        settings = CliApp.run(Settings)
        wanted = "tensor_parallel" in settings.model_fields_set
        place = Place.of(settings.tensor_parallel if wanted else None, os.environ)
    except ValidationError as error:
        first = error.errors()[0]
        return _refused(".".join(str(part) for part in first["loc"]) or "tls", first["msg"])
    except ValueError as error:
        return _refused("tensor_parallel", str(error))
    mark = f"[{place.rank}]" if place.rank else ""
    engine_id = settings.engine_id or stable_engine_id(settings.listen)
    fields = {"engine": engine_id, "rank": place.rank}
    logs.configure(settings.log_level, settings.log_format, mark, **fields)
    warnings.simplefilter("ignore")
    if place.rank:
        build = partial(build_engine, settings, place)
        _leave(follow(place, build, REFUSALS, settings.hung_step_seconds, STOP_SECONDS))
    ranks, status = Ranks(), EXIT_WORKER_FAILED
    try:
        status = _lead(settings, place, ranks)
    except Exception:
        log.critical("the engine cannot be built", exc_info=True)
    finally:
        ranks.end(0 if status else STOP_SECONDS)
    if place.size > 1 or status == EXIT_WORKER_FAILED:
        _leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
