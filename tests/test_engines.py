"""Several engines, dying engines, and what operators see of them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from control_plane.generation import Generation
from control_plane.plan import Outcome
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model, load_model
from protos import wire
from protos.admin.v1 import admin_pb2
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.processes import free_port
from tests.stack import (
    Answer,
    failure,
    led,
    request,
    running_engine,
    running_replica,
    running_stack,
)

SIZES = EngineSizes(16, 256, 0, 32, 256, 1024)


def long_request(start: int, **fields: object) -> pb.GenerateRequest:
    message = request(list(range(start, start + 40)), 600, **fields)
    message.stopping.ignore_eos = True
    return message


async def collect(
    stub: inference_pb2_grpc.InferenceServiceStub,
    message: pb.GenerateRequest,
    begun: asyncio.Event | None = None,
) -> Answer:
    answer = Answer()
    async for response in stub.Generate(message):
        answer.add(response)
        if begun is not None and len(answer.ids) >= 3:
            begun.set()
    return answer


async def _undisturbed(model: Model, messages: list[pb.GenerateRequest]) -> list[list[int]]:
    async with running_stack(model, block_count=512) as stack:
        return [answer.ids for answer in await stack.together(messages)]


def test_requests_of_a_dead_engine_go_on_elsewhere(llama: Model) -> None:
    messages = [long_request(10 + i, request_id=f"r{i}") for i in range(6)]

    async def main() -> None:
        expected = await _undisturbed(llama, messages)
        ports = [free_port(), free_port()]
        engines = [Engine(llama, SIZES, check=True) for _ in ports]
        async with AsyncExitStack() as first, AsyncExitStack() as rest:
            await first.enter_async_context(
                running_engine(engines[0], None, f"127.0.0.1:{ports[0]}")
            )
            await rest.enter_async_context(
                running_engine(engines[1], None, f"127.0.0.1:{ports[1]}")
            )
            replica = await rest.enter_async_context(running_replica(ports))
            await led(replica)
            channel = await rest.enter_async_context(wire.channel(f"127.0.0.1:{replica.ports[0]}"))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            events = [asyncio.Event() for _ in messages]
            running = [
                asyncio.create_task(collect(stub, message, event))
                for message, event in zip(messages, events, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in events))
            assert all(engine.state.resident_slots().size for engine in engines)
            await first.aclose()
            answers = await asyncio.gather(*running)
            assert [answer.ids for answer in answers] == expected
            assert all(answer.finished[0].reason == pb.FINISH_REASON_LENGTH for answer in answers)

    asyncio.run(main())


def test_a_request_that_saw_two_engines_die_is_failed(llama: Model) -> None:
    async def main() -> None:
        port = free_port()
        async with running_replica([port]) as replica:
            async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                running: asyncio.Task[Answer] | None = None
                for life in range(3):
                    engine = Engine(llama, SIZES, check=True)
                    async with running_engine(engine, None, f"127.0.0.1:{port}"):
                        await led(replica)
                        if running is None:
                            running = asyncio.create_task(collect(stub, long_request(10)))
                        if life == 2:
                            answer = await running
                            break
                        async with asyncio.timeout(10):
                            while not engine.state.resident_slots().size:
                                await asyncio.sleep(0.001)
                            await asyncio.sleep(0.05)
                assert answer.finished[0].reason == pb.FINISH_REASON_ERROR
                assert "twice" in answer.finished[0].message

    asyncio.run(main())


def test_the_engine_that_holds_the_prefix_is_chosen(llama: Model) -> None:
    async def main() -> None:
        ports = [free_port(), free_port()]
        async with AsyncExitStack() as stack:
            for port in ports:
                engine = Engine(llama, SIZES, check=True)
                await stack.enter_async_context(
                    running_engine(engine, None, f"127.0.0.1:{port}", engine_id=f"e{port}")
                )
            replica = await stack.enter_async_context(running_replica(ports))
            await led(replica)
            channel = await stack.enter_async_context(wire.channel(f"127.0.0.1:{replica.ports[0]}"))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            prompts = [list(range(10 * i, 10 * i + 64)) for i in range(1, 6)]
            await asyncio.gather(*(collect(stub, request(prompt, 2)) for prompt in prompts))
            pools = [leader.loop.scheduler.pool for leader in replica.router.leaders if leader.loop]
            assert all(pool.cached_count for pool in pools)
            for prompt in prompts:
                answer = await collect(stub, request(prompt, 2))
                assert answer.accepted.cached_token_count == 64

    asyncio.run(main())


def test_operators_see_engines_sequences_blocks_and_prefixes(llama: Model) -> None:
    shared = list(range(20, 68))

    async def main() -> None:
        async with running_stack(llama) as stack:
            for tail in range(3):
                await stack.generate(request([*shared, 100 + tail], 4))
            running = asyncio.create_task(stack.generate(long_request(200, request_id="watched")))
            async with asyncio.timeout(5):
                while not (
                    sequences := (await stack.admin.ListSequences(admin_pb2.ListSequencesRequest()))
                ).sequences:
                    await asyncio.sleep(0.005)
            sequence = sequences.sequences[0]
            assert (sequence.request_id, sequence.prompt_token_count) == ("watched", 40)
            table = await stack.admin.GetBlockTable(
                admin_pb2.GetBlockTableRequest(request_id="watched")
            )
            assert len(table.blocks) >= 3
            assert all(entry.reference_count == 1 for entry in table.blocks)
            engines = (await stack.admin.ListEngines(admin_pb2.ListEnginesRequest())).engines
            (engine,) = engines
            assert engine.state == admin_pb2.ENGINE_STATE_LED
            counts = engine.free_block_count + engine.cached_block_count + engine.used_block_count
            assert counts == engine.block_count == 512
            assert engine.prefix_hit_token_count == 96
            prefixes = (await stack.admin.ListPrefixes(admin_pb2.ListPrefixesRequest())).prefixes
            (prefix,) = prefixes
            assert (prefix.token_count, prefix.hit_count, prefix.saved_token_count) == (48, 2, 96)
            assert len(prefix.prefix_hash) == 16
            assert [holder.engine_id for holder in prefix.holders] == ["engine-test"]
            error = await failure(
                stack.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(request_id="none"))
            )
            assert error.code() is grpc.StatusCode.NOT_FOUND
            for bad in ({"page_size": -1}, {"page_size": 1001}, {"page_token": "x"}):
                error = await failure(
                    stack.admin.ListEngines(admin_pb2.ListEnginesRequest(**bad))  # type: ignore[arg-type]
                )
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await stack.idle()

    asyncio.run(main())


def test_pages_cover_everything_once(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            tasks = [
                asyncio.create_task(stack.generate(long_request(10 + i, request_id=f"r{i}")))
                for i in range(7)
            ]
            async with asyncio.timeout(10):
                while len(stack.replica.generations.all_running()) < 7:
                    await asyncio.sleep(0)
            names, token = [], ""
            while True:
                page = await stack.admin.ListSequences(
                    admin_pb2.ListSequencesRequest(page_size=3, page_token=token)
                )
                assert len(page.sequences) <= 3
                names += [sequence.request_id for sequence in page.sequences]
                if not (token := page.next_page_token):
                    break
            assert sorted(names) == [f"r{i}" for i in range(7)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_metrics_say_what_happened(llama: Model) -> None:
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    async def main() -> None:
        async with running_stack(llama) as stack:
            answers = [await stack.generate(request(list(range(20, 70)), 4)) for _ in range(3)]
            await failure(stack.generate(request([999], 4)))
            text = generate_latest(stack.replica.metrics.registry).decode()
            samples = {
                (sample.name, tuple(sample.labels.values())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            cached = sum(answer.usage.cached_token_count for answer in answers if answer.usage)
            assert samples[("quire_prefix_hit_tokens_total", ("engine-test",))] == cached == 96
            assert samples[("quire_prompt_tokens_total", ("engine-test",))] == 150
            assert samples[("quire_requests_rejected_total", ("INVALID_ARGUMENT",))] == 1
            assert samples[("quire_index_up", ())] == 0

    asyncio.run(main())


def test_unlike_engines_under_one_name_never_mix(llama: Model) -> None:
    """Blocks of 16 and of 32 tokens: hashes for one say nothing on the other."""
    prompts = [[20 + i, *range(30, 90)] for i in range(8)]
    sizes = (SIZES, EngineSizes(32, 128, 0, 32, 256, 512))

    async def main() -> None:
        expected = await _undisturbed(llama, [request(prompt, 6) for prompt in prompts])
        async with AsyncExitStack() as stack:
            ports = []
            for each in sizes:
                engine = Engine(llama, each, check=True)
                name = f"blocks-of-{each.block_size}"
                _, port = await stack.enter_async_context(
                    running_engine(engine, None, engine_id=name)
                )
                ports.append(port)
            replica = await stack.enter_async_context(running_replica(ports))
            await led(replica)
            channel = await stack.enter_async_context(wire.channel(f"127.0.0.1:{replica.ports[0]}"))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            used = set()
            for _ in range(2):
                calls = [collect(stub, request(prompt, 6)) for prompt in prompts]
                answers = await asyncio.gather(*calls)
                assert [answer.ids for answer in answers] == expected
                used |= {answer.accepted.engine_id for answer in answers}
            assert used == {"blocks-of-16", "blocks-of-32"}

    asyncio.run(main())


def test_several_models_must_be_named(llama: Model, llama_directory: Path) -> None:
    other = load_model(llama_directory, dtype="float32", name="other")

    async def main() -> None:
        async with AsyncExitStack() as stack:
            ports = []
            for model in (llama, other):
                _, port = await stack.enter_async_context(
                    running_engine(Engine(model, SIZES), None)
                )
                ports.append(port)
            replica = await stack.enter_async_context(running_replica(ports))
            await led(replica)
            channel = await stack.enter_async_context(wire.channel(f"127.0.0.1:{replica.ports[0]}"))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            error = await failure(collect(stub, request([20], 2)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "other, tiny-llama" in str(error.details())
            assert (await collect(stub, request([20], 2, model="other"))).usage is not None

    asyncio.run(main())


def test_an_unusable_tokenizer_leaves_token_ids(
    llama: Model, llama_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text('{"no": "tokenizer"}')

    async def main() -> None:
        async with running_stack(llama, directory=tmp_path) as stack:
            assert (await stack.generate(request([20, 21], 3))).usage is not None
            error = await failure(stack.generate(request("text", 3)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_an_id_chosen_by_the_server_can_be_joined(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            whole = await stack.generate(long_request(30))
            again = long_request(30, request_id=whole.accepted.request_id)
            again.received_token_counts.append(590)
            assert (await stack.generate(again)).ids == whole.ids[590:]

    asyncio.run(main())


def test_an_exception_in_one_stream_ends_that_stream_only(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [long_request(10 + i, request_id=f"r{i}") for i in range(4)]
    push = Generation.push

    def poisoned(self: Generation, index: int, token: int, *rest: object) -> bool:
        if self.request.request_id == "r2" and len(self.samples[0].token_ids) == 20:
            raise RuntimeError("planted")
        return push(self, index, token, *rest)  # type: ignore[arg-type]

    async def main() -> None:
        expected = await _undisturbed(llama, messages)
        monkeypatch.setattr(Generation, "push", poisoned)
        async with running_stack(llama) as stack:
            answers = await stack.together(messages)
            assert stack.replica.router.leaders[0].epoch == 1
            await stack.idle()
        for index, answer in enumerate(answers):
            if index == 2:
                assert answer.finished[0].reason == pb.FINISH_REASON_ERROR
                assert answer.finished[0].message.startswith("internal error")
                assert answer.ids == expected[2][:20]
            else:
                assert answer.ids == expected[index]

    asyncio.run(main())


def test_a_cancel_while_the_engine_is_away_frees_the_id(llama: Model) -> None:
    async def main() -> None:
        port = free_port()
        async with running_replica([port]) as replica:
            async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                begun = asyncio.Event()
                message = long_request(10, request_id="same")
                async with running_engine(Engine(llama, SIZES), None, f"127.0.0.1:{port}"):
                    await led(replica)
                    running = asyncio.create_task(collect(stub, message, begun))
                    await begun.wait()
                running.cancel()
                async with asyncio.timeout(5):
                    while replica.generations.all_running():
                        await asyncio.sleep(0.01)
                async with running_engine(Engine(llama, SIZES), None, f"127.0.0.1:{port}"):
                    await led(replica)
                    other = request([30, 31], 4, request_id="same")
                    assert (await collect(stub, other)).usage is not None
                    assert len((await collect(stub, message)).ids) == 600

    asyncio.run(main())


def test_a_lost_result_loses_no_prompt_logprob(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = request(list(range(20, 120)), 4, output=pb.Output(prompt_logprob_count=0))

    async def main() -> None:
        async with running_stack(llama, chunk_tokens=16) as stack:
            whole = await stack.generate(message)
            loop, seen = stack.loop, []

            def once(outcome: Outcome) -> None:
                seen.append(outcome)
                if outcome.prompt_logprobs and len(seen) > 1:
                    raise RuntimeError("planted")

            monkeypatch.setattr(loop, "_deliver", once)
            again = await stack.generate(message)
            assert stack.loop is not loop
            assert len(again.prompt_logprobs) == len(whole.prompt_logprobs) == 99
            assert again.ids == whole.ids

    asyncio.run(main())


def test_streams_are_let_go_when_their_engine_stays_away(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control_plane.leader.GONE_SECONDS", 1.2)

    async def main() -> None:
        port = free_port()
        async with running_replica([port]) as replica:
            async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                begun = asyncio.Event()
                async with running_engine(Engine(llama, SIZES), None, f"127.0.0.1:{port}"):
                    await led(replica)
                    running = asyncio.create_task(collect(stub, long_request(10), begun))
                    await begun.wait()
                error = await failure(running)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert not replica.generations.all_running()

    asyncio.run(main())


def test_a_fault_of_the_loop_ends_neither_replica_nor_requests(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step loop fails once in the middle; it leads again and nothing is lost."""
    message = long_request(30)

    async def main() -> None:
        (expected,) = await _undisturbed(llama, [message])
        async with running_stack(llama) as stack:
            running = asyncio.create_task(stack.generate(message))
            async with asyncio.timeout(10):
                while stack.loop.step < 20:
                    await asyncio.sleep(0)
            loop = stack.loop
            monkeypatch.setattr(loop, "_deliver", lambda outcome: 1 / 0)
            assert (await running).ids == expected
            assert stack.loop is not loop

    asyncio.run(main())


def test_cancel_of_the_unknown_is_not_found(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            error = await failure(stack.stub.Cancel(pb.CancelRequest(request_id="nobody")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            error = await failure(stack.stub.Cancel(pb.CancelRequest()))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())
