"""Metrics and logs of both planes: true sums, names that fit, counters that never fall."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families

from control_plane.engine_link import LinkLost
from control_plane.metrics import activity as control_activity
from control_plane.metrics.counters import MAX_PREFIXES, MAX_TENANTS, OTHER, Counters
from control_plane.metrics.histogram import Histogram
from control_plane.prefix_index import EngineLife
from control_plane.server import Replica
from data_plane.engine import Engine, EngineSizes
from data_plane.metrics.activity import Activity as EngineActivity
from data_plane.metrics.families import registry_of
from data_plane.model import Model
from protos import logs, wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from protos.logs import without_values
from tests.processes import control_plane, data_plane, free_port
from tests.stack import (
    Answer,
    Stack,
    failure,
    led,
    request,
    running_replica,
    running_stack,
    serving_engine,
)

SIZES = EngineSizes(16, 256, 0, 32, 256, 1024)
SHARED = list(range(40, 90))
ENGINE, MODEL = {"engine": "engine-test"}, {"model": "tiny-llama"}


def every_kind(count: int = 12) -> list[pb.GenerateRequest]:
    """Requests that share the beginnings of their prompts, of all kinds that count differently."""
    messages = []
    for i in range(count):
        message = request(SHARED[: 20 + 3 * i] + [10 + i] * 20, 40)
        message.stopping.ignore_eos = True
        if i % 4 == 1:
            message.output.sample_count = 3
            message.sampling.MergeFrom(pb.Sampling(temperature=1, seed=i))
        elif i % 4 == 2:
            message.output.prompt_logprob_count = 1
        elif i % 4 == 3:
            message.beam_search.width = 2
        messages.append(message)
    return messages


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(name, labels)
    assert found is not None, (name, labels)
    return found


def total(registry: CollectorRegistry, name: str) -> float:
    """The sum over all labels."""
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    )


def cumulative(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Everything that must not fall."""
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def usage(answers: Iterable[Answer], field: str) -> int:
    return sum(getattr(answer.usage, field) for answer in answers)


def check_sums(registry: CollectorRegistry, answers: list[Answer]) -> None:
    """What is counted is what clients were told."""
    for name, field in (
        ("quire_prompt_tokens_total", "prompt_token_count"),
        ("quire_prefix_hit_tokens_total", "cached_token_count"),
        ("quire_tenant_prefix_hit_tokens_total", "cached_token_count"),
        ("quire_generated_tokens_total", "output_token_count"),
        ("quire_request_prompt_tokens_sum", "prompt_token_count"),
        ("quire_request_output_tokens_sum", "output_token_count"),
    ):
        assert total(registry, name) == usage(answers, field), name
    for name in ("quire_time_to_first_token_seconds", "quire_queue_time_seconds",
                 "quire_request_seconds", "quire_requests_finished"):  # fmt: skip
        suffix = "_total" if name.endswith("finished") else "_count"
        assert total(registry, name + suffix) == len(answers), name


def gaps(messages: list[pb.GenerateRequest], answers: list[Answer]) -> int:
    """Times between tokens that requests without beams have."""
    return sum(
        len(tokens) - 1
        for message, answer in zip(messages, answers, strict=True)
        if not message.beam_search.width
        for tokens in answer.tokens.values()
    )


@pytest.mark.parametrize(
    ("preemption", "host_blocks", "blocks"),
    [("auto", 0, 256), ("swap", 200, 30), ("recompute", 0, 30)],
)
def test_counters_are_the_sums_of_what_clients_were_told(
    llama: Model, preemption: str, host_blocks: int, blocks: int
) -> None:
    async def main() -> None:
        messages = every_kind()
        async with running_stack(
            llama,
            block_count=blocks,
            host_block_count=host_blocks,
            preemption=preemption,
            vllm_metrics=True,
        ) as stack:
            answers = await stack.together(messages)
            answers += [await stack.generate(message) for message in messages]
            await stack.idle()
            registry = stack.replica.metrics.registry
            check_sums(registry, answers)
            assert usage(answers, "cached_token_count") > 0
            assert (total(registry, "quire_preemptions_total") > 0) == (blocks == 30)
            assert (total(registry, "quire_swapped_bytes_total") > 0) == (preemption == "swap")
            queried = usage(
                [
                    answer
                    for message, answer in zip(2 * messages, answers, strict=True)
                    if not message.output.HasField("prompt_logprob_count")
                ],
                "prompt_token_count",
            )
            assert total(registry, "quire_prefix_query_tokens_total") == queried
            # One that was taken off and computed again has waited, too.
            counted = value(registry, "quire_inter_token_seconds_count", **MODEL)
            assert counted == gaps(2 * messages, answers)
            check_aliases(registry)
            engines = stack.replica.router.leaders[0]
            assert engines.loop is not None
            assert engines.loop.counters.hit_tokens == usage(answers, "cached_token_count")

    asyncio.run(main())


def check_aliases(registry: CollectorRegistry) -> None:
    """The vllm: families against ours, for one engine."""
    name = {"model_name": "tiny-llama"}
    for theirs, ours in (
        ("vllm:prefix_cache_queries_total", "quire_prefix_query_tokens_total"),
        ("vllm:prefix_cache_hits_total", "quire_prefix_hit_tokens_total"),
        ("vllm:num_preemptions_total", "quire_preemptions_total"),
        ("vllm:prompt_tokens_total", "quire_prompt_tokens_total"),
        ("vllm:generation_tokens_total", "quire_generated_tokens_total"),
        ("vllm:kv_cache_usage_perc", "quire_kv_usage_ratio"),
    ):
        assert value(registry, theirs, **name) == total(registry, ours), theirs
    for state in ("running", "waiting"):
        ours = value(registry, "quire_requests", state=state, **ENGINE)
        assert value(registry, f"vllm:num_requests_{state}", **name) == ours
    for theirs, ours in (
        ("vllm:time_to_first_token_seconds", "quire_time_to_first_token_seconds"),
        ("vllm:inter_token_latency_seconds", "quire_inter_token_seconds"),
        ("vllm:time_per_output_token_seconds", "quire_inter_token_seconds"),
        ("vllm:request_time_per_output_token_seconds", "quire_time_per_output_token_seconds"),
        ("vllm:e2e_request_latency_seconds", "quire_request_seconds"),
        ("vllm:request_queue_time_seconds", "quire_queue_time_seconds"),
        ("vllm:request_prompt_tokens", "quire_request_prompt_tokens"),
        ("vllm:request_generation_tokens", "quire_request_output_tokens"),
    ):
        for suffix in ("_count", "_sum"):
            assert value(registry, theirs + suffix, **name) == value(
                registry, ours + suffix, **MODEL
            ), theirs
    for theirs, ours in (("stop", "stop"), ("length", "length"), ("abort", "cancelled")):
        assert value(
            registry, "vllm:request_success_total", finished_reason=theirs, **name
        ) == value(registry, "quire_requests_finished_total", reason=ours, **MODEL)
    assert total(registry, "vllm:cache_config_info") == 1


def test_gauges_follow_what_runs_and_waits(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, slot_count=1, vllm_metrics=True) as stack:
            registry = stack.replica.metrics.registry
            long = [request([20 + i] * 40, 900) for i in range(3)]
            for message in long:
                message.stopping.ignore_eos = True
            running = [asyncio.create_task(stack.generate(message)) for message in long]
            async with asyncio.timeout(10):
                while not stack.loop.scheduler.running_count or stack.loop.request_count < 3:
                    await asyncio.sleep(0.001)
            assert value(registry, "quire_requests", state="running", **ENGINE) == 1
            assert value(registry, "quire_requests", state="waiting", **ENGINE) == 2
            assert value(registry, "quire_queue_tokens", **ENGINE) == 80
            assert 0 < value(registry, "quire_queue_oldest_seconds", **ENGINE) < 10
            used = value(registry, "quire_blocks", state="used", **ENGINE)
            assert used > 0
            assert value(registry, "quire_kv_usage_ratio", **ENGINE) == pytest.approx(used / 512)
            assert value(registry, "quire_leader_epoch", **ENGINE) == 1
            check_aliases(registry)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await stack.idle()
            finished = total(registry, "quire_requests_finished_total")
            assert finished == 3
            assert (
                value(registry, "quire_requests_finished_total", reason="cancelled", **MODEL) == 3
            )
            assert value(registry, "quire_draining") == 0
            stack.replica.frontend.draining = True
            assert value(registry, "quire_draining") == 1
            await failure(stack.generate(request(SHARED, 1)))
            assert value(registry, "quire_requests_rejected_total", code="UNAVAILABLE") == 1

    asyncio.run(main())


def test_tokens_past_a_stop_string_are_not_counted(llama: Model, llama_directory: Path) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            sampling = pb.Sampling(temperature=1, seed=3)
            stopping = pb.Stopping(stop_strings=list("aeiou"))
            output = pb.Output(sample_count=4)
            messages = [
                request(f"number {i}", 60, sampling=sampling, stopping=stopping, output=output)
                for i in range(12)
            ]
            answers = await stack.together(messages)
            reasons = [end.reason for answer in answers for end in answer.finished.values()]
            assert pb.FINISH_REASON_STOP in reasons
            check_sums(stack.replica.metrics.registry, answers)

    asyncio.run(main())


def long_messages(count: int) -> list[pb.GenerateRequest]:
    messages = []
    for i in range(count):
        message = request(SHARED + [100 + i] * 8, 400, request_id=f"long-{i}")
        message.stopping.ignore_eos = True
        if i % 3 == 2:
            message.output.sample_count = 2
        messages.append(message)
    return messages


async def until_all_run(stack_loops: Iterable[Any], count: int) -> None:
    async with asyncio.timeout(20):
        while sum(loop.scheduler.running_count for loop in stack_loops) < count:
            await asyncio.sleep(0.001)


def test_no_counter_falls_when_a_replica_leads_anew(llama: Model) -> None:
    """The stream breaks under running requests, the same replica takes the engine over."""

    async def main() -> None:
        async with running_stack(llama, vllm_metrics=True) as stack:
            registry = stack.replica.metrics.registry
            answers = [await stack.generate(request(SHARED, 4))]
            messages = long_messages(6)
            running = asyncio.create_task(stack.together(messages))
            await until_all_run([stack.loop], 8)
            before, loop = cumulative(registry), stack.loop

            def lose(_: object) -> None:
                raise LinkLost("a test cut it")

            loop._apply = lose  # type: ignore[method-assign]
            last = before
            async with asyncio.timeout(60):
                while not running.done():
                    now = cumulative(registry)
                    assert last.keys() <= now.keys()
                    fallen = [key for key, count in last.items() if now[key] < count]
                    assert not fallen
                    last = now
                    await asyncio.sleep(0.005)
            answers += await running
            await stack.idle()
            assert stack.loop is not loop
            assert value(registry, "quire_leaderships_total", **ENGINE) == 2
            assert value(registry, "quire_leadership_losses_total", **ENGINE) == 1
            assert value(registry, "quire_leader_epoch", **ENGINE) == 2
            check_sums(registry, answers)
            after = cumulative(registry)
            steps = ("quire_steps_total", "[('engine', 'engine-test')]")
            assert after[steps] > before[steps]

    asyncio.run(main())


def test_what_an_engine_lost_is_not_counted_again(llama: Model) -> None:
    """It comes back empty, and goes on with what ran there."""

    async def main() -> None:
        port, messages = free_port(), long_messages(6)
        async with AsyncExitStack() as first, AsyncExitStack() as rest:
            address = f"127.0.0.1:{port}"
            engine = Engine(llama, SIZES, check=True)
            _, worker, _ = await first.enter_async_context(serving_engine(engine, None, address))
            replica = await rest.enter_async_context(running_replica([port]))
            await led(replica)
            stack = Stack(engine, worker, replica)
            rest.push_async_callback(stack.channel.close)
            rest.push_async_callback(stack.admin_channel.close)
            answers = [await stack.generate(request(SHARED, 4))]
            running = asyncio.create_task(stack.together(messages))
            await until_all_run([stack.loop], 8)
            await asyncio.sleep(0.1)
            before = cumulative(replica.metrics.registry)
            await first.aclose()
            again = serving_engine(Engine(llama, SIZES, check=True), None, address)
            await rest.enter_async_context(again)
            answers += await running
            registry = replica.metrics.registry
            check_sums(registry, answers)
            now = cumulative(registry)
            assert all(now[key] >= count for key, count in before.items())
            assert value(registry, "quire_leadership_losses_total", **ENGINE) == 1
            assert value(registry, "quire_recomputed_tokens_total", **ENGINE) > 0

    asyncio.run(main())


def test_hits_are_counted_once_when_another_replica_takes_over(llama: Model) -> None:
    async def ask(replica: Replica, message: pb.GenerateRequest, answer: Answer) -> None:
        again = pb.GenerateRequest()
        again.CopyFrom(message)
        samples = message.output.sample_count or 1
        again.received_token_counts.extend(len(answer.tokens.get(i, [])) for i in range(samples))
        answer.finished.clear()
        async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            try:
                async for response in stub.Generate(again):
                    answer.add(response)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            except asyncio.CancelledError:
                assert answer.usage is None

    async def main() -> None:
        messages = long_messages(6)
        early, answers = Answer(), [Answer() for _ in messages]
        engine = Engine(llama, SIZES, check=True)
        async with serving_engine(engine, None) as (_, _, port):
            async with running_replica([port]) as first:
                await led(first)
                await ask(first, request(SHARED, 4, request_id="early"), early)
                pairs = list(zip(messages, answers, strict=True))
                tasks = [asyncio.create_task(ask(first, *pair)) for pair in pairs]
                loops = [leader.loop for leader in first.router.leaders if leader.loop]
                await until_all_run(loops, 8)
                while not all(answer.tokens for answer in answers):
                    await asyncio.sleep(0.001)
                await first.stop()
                await asyncio.gather(*tasks)
            async with running_replica([port]) as second:
                await led(second)
                await asyncio.gather(*(ask(second, *pair) for pair in pairs))
                registries = [each.metrics.registry for each in (first, second)]
                hits = [total(each, "quire_prefix_hit_tokens_total") for each in registries]
                prompts = [total(each, "quire_prompt_tokens_total") for each in registries]
                told = [early, *answers]
                assert hits == [usage(told, "cached_token_count"), 0] and hits[0] > 0
                assert prompts == [usage(told, "prompt_token_count"), 0]
                # Whoever ends a request counts its end.
                ended = [total(each, "quire_requests_finished_total") for each in registries]
                assert ended == [1, len(messages)]

    asyncio.run(main())


def test_hints_that_were_wrong_are_counted(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            registry, blocks = stack.replica.metrics.registry, 3

            async def lookup(_: str, lives: list[EngineLife], __: bytes) -> dict[EngineLife, int]:
                return dict.fromkeys(lives, blocks)

            monkeypatch.setattr(stack.replica.index, "lookup", lookup)
            await stack.generate(request(SHARED, 2))
            assert value(registry, "quire_index_stale_hints_total", **ENGINE) == 1
            assert value(registry, "quire_prefix_expected_tokens_total", **ENGINE) == 48
            assert value(registry, "quire_prefix_hit_tokens_total", **ENGINE) == 0
            await stack.generate(request(SHARED, 2))
            assert value(registry, "quire_index_stale_hints_total", **ENGINE) == 1
            assert value(registry, "quire_prefix_expected_tokens_total", **ENGINE) == 96
            assert value(registry, "quire_prefix_hit_tokens_total", **ENGINE) == 48
            # Nobody looks up a prompt whose log-probabilities are wanted.
            await stack.generate(request(SHARED, 2, output=pb.Output(prompt_logprob_count=1)))
            assert value(registry, "quire_index_stale_hints_total", **ENGINE) == 1

    asyncio.run(main())


def test_names_are_bounded(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            names = iter([f"tenant-{i}" for i in range(MAX_TENANTS + 8)] * 2)
            stack.replica.frontend._tenant_of = lambda _: next(names)
            answers = [
                await stack.generate(request(SHARED, 1)) for _ in range(2 * MAX_TENANTS + 16)
            ]
            registry = stack.replica.metrics.registry
            check_sums(registry, answers)
            family = next(
                family
                for family in registry.collect()
                if family.name == "quire_tenant_prefix_hit_tokens"
            )
            by_tenant = {sample.labels["tenant"]: sample.value for sample in family.samples}
            # The second time each of them finds what it has left, and nothing of the others'.
            named = {f"tenant-{i}": 48 for i in range(MAX_TENANTS)}
            assert by_tenant == {**named, OTHER: 8 * 48}

    asyncio.run(main())
    counters = Counters()
    for i in range(MAX_PREFIXES + 5):
        counters.prefixes.of(f"prefix-{i}").add(20, 16)
    shares = counters.prefixes.all()
    assert len(shares) == MAX_PREFIXES + 1 and shares[OTHER].hit_tokens == 5 * 16
    assert "" not in shares and shares["prefix-0"].requests == 1


def test_a_histogram_counts_as_prometheus_does() -> None:
    one, many = Histogram((1.0, 2.0, 5.0)), Histogram((1.0, 2.0, 5.0))
    values = [0.5, 1.0, 1.5, 2.0, 5.0, 7.0]
    for each in values:
        one.observe(each)
    many.observe_all(np.array([*values, np.nan]))
    many.observe_all(np.array([np.nan]))
    assert one.cumulative() == many.cumulative() == [2, 4, 5, 6]
    assert one.sum == many.sum == sum(values)


# What is scraped.

UNITS = ("seconds", "bytes", "ratio", "tokens")
NO_UNITS = re.compile(
    r"(_|^)(ms|us|ns|milli\w*|micro\w*|minutes|hours|kib|mib|gib|kb|mb|gb|percent|perc|pct)(_|$)"
)
TYPES = re.compile(r"(_|^)(counter|gauge|histogram|summary|metric)(_|$)")
SUFFIXES = ("_total", "_count", "_sum", "_bucket", "_created", "_info")


def check_name(family: Metric) -> None:
    """The conventions of Prometheus and OpenMetrics."""
    name, theirs = family.name, family.name.startswith("vllm:")
    assert re.fullmatch(r"(quire_|vllm:)[a-z][a-z0-9_]*[a-z0-9]", name), name
    assert "__" not in name and not TYPES.search(name), name
    assert theirs or not NO_UNITS.search(name), name
    assert theirs or not name.endswith(SUFFIXES), name
    assert family.type in ("counter", "gauge", "histogram", "info"), name
    assert family.documentation.endswith("."), name
    for unit in UNITS[:3]:
        # A base unit is the last word, before what the type adds.
        assert f"_{unit}_" not in name, name
    if family.type == "histogram":
        assert theirs or name.endswith(UNITS), name
    for sample in family.samples:
        for label in sample.labels:
            assert re.fullmatch(r"[a-z][a-z_]*", label), (name, label)
            assert not label.startswith("__"), (name, label)
            assert (label == "le") == sample.name.endswith("_bucket") or label != "le"


def check_exposition(registry: CollectorRegistry) -> None:
    families = list(registry.collect())
    assert len({family.name for family in families}) == len(families)
    for family in families:
        check_name(family)
        labels = {
            tuple(sorted(sample.labels)) for sample in family.samples if "le" not in sample.labels
        }
        assert len(labels) <= 1, family.name
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    assert len(samples) == sum(len(family.samples) for family in families)
    for parsed in (
        text_string_to_metric_families(generate_latest(registry).decode()),
        # Without it, the library writes a colon as an underscore here, and here only.
        parser.text_string_to_metric_families(
            exposition.generate_latest(registry, escaping=exposition.ALLOWUTF8).decode()
        ),
    ):
        found = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in parsed
            for sample in family.samples
        }
        assert found.keys() == samples.keys()


def test_both_planes_follow_the_conventions(llama: Model) -> None:
    async def main() -> None:
        engine = Engine(llama, SIZES, buckets=[8], check=True)
        engine.capture()
        async with AsyncExitStack() as rest:
            service, worker, port = await rest.enter_async_context(serving_engine(engine, None))
            replica = await rest.enter_async_context(running_replica([port], vllm_metrics=True))
            await led(replica)
            stack = Stack(engine, worker, replica)
            rest.push_async_callback(stack.channel.close)
            rest.push_async_callback(stack.admin_channel.close)
            answers = await stack.together(every_kind())
            replica.metrics.counters.prefixes.of("greeting").add(20, 16)
            replica.metrics.counters.tenants.of("somebody").add(20, 16)
            await failure(stack.generate(request([], 1)))
            await stack.idle()
            check_exposition(replica.metrics.registry)
            registry = registry_of(engine, service)
            check_exposition(registry)
            check_engine(registry, engine, usage(answers, "output_token_count"))

    asyncio.run(main())


def check_engine(registry: CollectorRegistry, engine: Engine, output_tokens: int) -> None:
    assert value(registry, "quire_engine_steps_total") == engine.counters.step_count > 0
    decoded = value(registry, "quire_engine_tokens_total", kind="decode")
    assert decoded == engine.counters.decode_token_count > output_tokens / 2
    states = ("free", "cached", "used")
    counts = [value(registry, "quire_engine_blocks", state=state) for state in states]
    assert sum(counts) == SIZES.block_count and counts[1] > 0 and counts[2] == 0
    assert value(registry, "quire_engine_sequences", state="resident") == 0
    assert value(registry, "quire_engine_led") == 1 and value(registry, "quire_engine_epoch") == 1
    bucketed = total(registry, "quire_engine_bucket_steps_total")
    unpadded = value(registry, "quire_engine_unpadded_steps_total")
    # A step may do no more than move or release.
    assert bucketed > 0 and bucketed + unpadded <= engine.counters.step_count
    assert value(registry, "quire_engine_bucket_padding_rows_total") > 0
    assert value(registry, "quire_engine_step_seconds_total", phase="forward") > 0
    weights = value(registry, "quire_engine_weight_bytes")
    assert weights == sum(each.nbytes for each in engine.model._module.parameters()) + sum(
        each.nbytes for each in engine.model._module.buffers()
    )
    per_block = engine.cache.bytes_per_block
    assert value(registry, "quire_engine_kv_cache_bytes") == SIZES.block_count * per_block


def test_an_engine_counts_swaps_and_refusals(llama: Model) -> None:
    async def main() -> None:
        sizes = EngineSizes(16, 30, 200, 64, 256, 1024)
        engine = Engine(llama, sizes, check=True)
        async with AsyncExitStack() as rest:
            service, worker, port = await rest.enter_async_context(serving_engine(engine, None))
            replica = await rest.enter_async_context(running_replica([port], preemption="swap"))
            await led(replica)
            stack = Stack(engine, worker, replica)
            rest.push_async_callback(stack.channel.close)
            rest.push_async_callback(stack.admin_channel.close)
            messages = every_kind(8) + every_kind(8)
            running = asyncio.create_task(stack.together(messages))
            registry = registry_of(engine, service)
            async with asyncio.timeout(30):
                while not value(registry, "quire_engine_host_blocks", state="used"):
                    await asyncio.sleep(0.001)
            await running
            await stack.idle()
            control = replica.metrics.registry
            for direction in ("out", "in"):
                for name in ("blocks", "bytes"):
                    theirs = value(
                        registry, f"quire_engine_swapped_{name}_total", direction=direction
                    )
                    ours = f"quire_swapped_{name}_total"
                    assert theirs > 0
                    assert theirs == value(control, ours, direction=direction, **ENGINE)
            assert value(registry, "quire_engine_host_blocks", state="used") == 0
            step = stack.loop.scheduler._step
            stack.loop.scheduler._step = step + 7  # A plan that is out of order.
            answer = await stack.generate(request(SHARED, 4))
            assert len(answer.ids) == 4
            refused = value(registry, "quire_engine_plans_refused_total", reason="OUT_OF_ORDER")
            assert refused == engine.counters.refused_plan_count == 1
            assert value(registry, "quire_engine_epoch") == 2

    asyncio.run(main())


# Logs.


def test_a_busy_replica_says_so_and_an_idle_one_does_not(
    llama: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_activity, "EVERY_SECONDS", 0.02)
    caplog.set_level(logging.INFO)

    def lines(module: str) -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == f"{module}.metrics.activity"]

    async def main() -> None:
        async with running_stack(llama) as stack:
            own = EngineActivity(stack.engine)
            await asyncio.sleep(0.1)
            own.line()
            assert not lines("control_plane") and not lines("data_plane")
            answers = await stack.together(long_messages(4))
            await stack.idle()
            await asyncio.sleep(0.1)
            said = len(lines("control_plane"))
            assert said > 0
            own.line()
            own.line()
            assert len(lines("data_plane")) == 1
            await asyncio.sleep(0.1)
            assert len(lines("control_plane")) == said
            busiest = max(vars(record)["running"] for record in lines("control_plane"))
            assert busiest == len(answers)
            rates = [vars(record)["output_tokens_per_second"] for record in lines("control_plane")]
            assert max(rates) > 0
            (engine_line,) = lines("data_plane")
            assert vars(engine_line)["decode_tokens_per_second"] > 0

    asyncio.run(main())


def objects(log: str) -> Iterator[dict[str, Any]]:
    for line in log.splitlines():
        # What gRPC's core says comes from no logger of Python's.
        if not re.match(r"[IWE]\d{4} ", line):
            yield json.loads(line)


# Prometheus 3's.
PROMETHEUS_ASKS = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6"


def scrape(port: int, accept: str) -> str:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return str(answer.read().decode())


def test_processes_serve_metrics_and_log_objects(llama_directory: Path, tmp_path: Path) -> None:
    secret = "the quick brown fox is nobody's business"
    form = ("--log-format", "json", "--log-level", "debug")
    ports = [free_port(), free_port()]

    async def ask(port: int) -> None:
        async with wire.channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            named = request(secret, 8, request_id="asked-1")
            async for _ in stub.Generate(named):
                pass
            bad = request(secret, 8, request_id="asked-2", sampling=pb.Sampling(top_p=7))
            error = await failure(stub.Generate(bad).read())
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            # No name for a line of a log.
            await failure(stub.Generate(request(secret, 8, request_id="two\nlines")).read())

    model = ("--model", str(llama_directory), "--engine-id", "engine-json")
    with data_plane(tmp_path / "e", *model, *form, "--metrics-port", str(ports[0])) as engine:
        engine.ready()
        flags = (*form, "--metrics-port", str(ports[1]), "--vllm-metrics")
        with control_plane(tmp_path / "c", [engine.port], *flags) as control:
            control.ready()
            asyncio.run(ask(control.port))
            for port, name in zip(ports, ("quire_engine_steps", "quire_steps"), strict=True):
                plain = scrape(port, "text/plain")
                names = {family.name for family in text_string_to_metric_families(plain)}
                assert name in names and "quire_build_info" in names
                opened = scrape(port, PROMETHEUS_ASKS)
                assert name in {
                    family.name for family in parser.text_string_to_metric_families(opened)
                }
            for text in (plain, opened):
                assert "vllm:num_requests_running{model_name=" in text
        told = list(objects(control.log()))
        engine_told = list(objects(engine.log()))
    assert secret not in control.log() and secret not in engine.log()
    for entry in (*told, *engine_told):
        assert {"time", "level", "logger", "message"} <= entry.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    (end,) = [entry for entry in told if entry.get("request_id") == "asked-1"]
    assert end["level"] == "debug" and end["engine"] == "engine-json"
    assert end["output_tokens"] == 8 and end["seconds"] > 0 and end["tenant"] == ""
    assert end["cached_tokens"] == 0
    (bad,) = [entry for entry in told if entry.get("request_id") == "asked-2"]
    assert bad["level"] == "info" and bad["code"] == "INVALID_ARGUMENT"
    assert bad["reason"] == "sampling.top_p"
    assert "two\nlines" not in control.log()
    assert [entry for entry in told if entry.get("epoch") == 1 and "leads" in entry["message"]]
    assert [entry for entry in engine_told if entry.get("epoch") == 1]
    assert {entry["engine"] for entry in engine_told} == {"engine-json"}


def test_a_log_line_is_an_object_with_its_exception() -> None:
    words = " ".join(["a", "prompt"])
    try:
        try:
            raise KeyError(words)
        except KeyError as error:
            raise ValueError(words) from error
    except ValueError as error:
        record = logging.makeLogRecord(
            {"name": "here", "levelname": "ERROR", "msg": "failed %d", "args": (3,),
             "exc_info": (type(error), error, error.__traceback__), "request_id": "r1"}
        )  # fmt: skip
        quiet = without_values(error)
    entry = json.loads(logs.JsonFormatter({"rank": 1}).format(record))
    assert (entry["message"], entry["request_id"], entry["rank"]) == ("failed 3", "r1", 1)
    assert entry["exception"].startswith("Traceback")
    told = logging.makeLogRecord({"msg": "error 1", "exception": quiet})
    assert logs.TextFormatter("%(message)s").format(told) == f"error 1\n{quiet}"
    assert json.loads(logs.JsonFormatter().format(told))["exception"] == quiet
    assert words not in quiet and words in entry["exception"]
    assert quiet.endswith("KeyError") and "ValueError\nwhich came after:" in quiet
    assert "test_metrics.py" in quiet
