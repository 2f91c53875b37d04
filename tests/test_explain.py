"""Every kind of miss, made to happen on real engines, and what the operator is told about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from control_plane.prefixes.explain import Chain, HeldNow, LookupOutcome, Question, explain
from control_plane.prefixes.history import BlockHistory
from control_plane.server import Replica
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model, load_model
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.redis_server import RedisServer
from tests.stack import (
    Answer,
    Stack,
    failure,
    led,
    request,
    running_engine,
    running_replica,
    running_stack,
)

SIZES = EngineSizes(
    block_size=16, block_count=64, host_block_count=0, slot_count=8, step_tokens=256, max_length=512
)
PROMPT = list(range(40, 90))  # Three full blocks and two tokens.
HIT, NEVER, NOT_FULL = (
    pb.LOOKUP_OUTCOME_HIT,
    pb.LOOKUP_OUTCOME_NEVER_SEEN,
    pb.LOOKUP_OUTCOME_NOT_FULL,
)


async def explained(stack: Stack, request_id: str) -> pb.Explanation:
    answer = await stack.admin.ExplainRequest(pb.ExplainRequestRequest(request_id=request_id))
    return answer.explanation


async def foreseen(admin: admin_pb2_grpc.AdminServiceStub, **fields: object) -> pb.Explanation:
    ids = inference_pb2.TokenIds(ids=PROMPT)
    message = pb.ExplainPromptRequest(token_ids=ids, **fields)  # type: ignore[arg-type]
    return (await admin.ExplainPrompt(message)).explanation


def outcomes(explanation: pb.Explanation) -> list[tuple[int, int, int]]:
    """Checks that the spans cover the prompt; returns (outcome, blocks, tokens) of each."""
    first = 0
    for span in explanation.spans:
        assert span.first_block == first
        first += span.block_count
    assert sum(span.token_count for span in explanation.spans) == explanation.prompt_token_count
    return [(span.outcome, span.block_count, span.token_count) for span in explanation.spans]


def salted_by_metadata(replica: Replica) -> None:
    def tenant(context: wire.Context) -> str:
        return str(dict(context.invocation_metadata() or ()).get("tenant", ""))

    replica.frontend._tenant_of = tenant


async def send(channel: grpc.aio.Channel, message: object, tenant: str = "") -> Answer:
    answer = Answer()
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    async for response in stub.Generate(message, metadata=[("tenant", tenant)], timeout=60):
        answer.add(response)
    return answer


def test_never_seen_then_hit_and_the_tokens_that_fill_no_block(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            await stack.generate(request(PROMPT, 2, request_id="first"))
            await stack.generate(request(PROMPT, 2, request_id="second"))
            first, second = await explained(stack, "first"), await explained(stack, "second")
            assert outcomes(first) == [(NEVER, 3, 48), (NOT_FULL, 1, 2)]
            assert outcomes(second) == [(HIT, 3, 48), (NOT_FULL, 1, 2)]
            assert (first.cached_token_count, second.cached_token_count) == (0, 48)
            assert second.engine_id == "engine-test" == second.spans[0].engine_ids[0]
            assert second.age_seconds > 0 and second.block_size_tokens == 16
            now = await foreseen(stack.admin)
            assert outcomes(now) == outcomes(second) and now.request_id == ""
            error = await failure(explained(stack, "third"))
            assert error.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_evicted(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, block_count=8, host_block_count=0) as stack:
            await stack.generate(request(PROMPT, 2))
            # Takes seven blocks of eight: what was cached gives way, the prompt's end first.
            await stack.generate(request(list(range(200, 300)), 2))
            await stack.generate(request(PROMPT, 2, request_id="again"))
            again = await explained(stack, "again")
            assert again.cached_token_count == 16
            assert outcomes(again) == [
                (HIT, 1, 16),
                (pb.LOOKUP_OUTCOME_EVICTED, 2, 32),
                (NOT_FULL, 1, 2),
            ]
            assert 0 < again.spans[1].evicted_seconds_before < 60

    asyncio.run(main())


def test_another_tenants(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            salted_by_metadata(stack.replica)
            await send(stack.channel, request(PROMPT, 2), "red")
            await send(stack.channel, request(PROMPT, 2, request_id="x"), "blue")
            found = await explained(stack, "x")
            assert found.tenant == "blue"
            assert outcomes(found) == [(pb.LOOKUP_OUTCOME_OTHER_TENANT, 3, 48), (NOT_FULL, 1, 2)]
            assert found.spans[0].tenant == "red"
            green = await foreseen(stack.admin, tenant="green")
            assert green.spans[0].outcome == pb.LOOKUP_OUTCOME_OTHER_TENANT
            red = await foreseen(stack.admin, tenant="red")
            assert outcomes(red)[0] == (HIT, 3, 48)

    asyncio.run(main())


def test_computed_in_whole_for_its_log_probabilities(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            await stack.generate(request(PROMPT, 2))
            output = inference_pb2.Output(prompt_logprob_count=1)
            await stack.generate(request(PROMPT, 2, request_id="scored", output=output))
            found = await explained(stack, "scored")
            assert outcomes(found) == [(pb.LOOKUP_OUTCOME_NOT_USED, 3, 48), (NOT_FULL, 1, 2)]

    asyncio.run(main())


@asynccontextmanager
async def two_engines(*models: Model, **settings: object) -> AsyncIterator[Replica]:
    async with AsyncExitStack() as stack:
        ports = []
        for number, model in enumerate(models):
            engine = running_engine(Engine(model, SIZES, check=True), None, engine_id=f"e{number}")
            ports.append((await stack.enter_async_context(engine))[1])
        replica = await stack.enter_async_context(running_replica(ports, **settings))
        await led(replica)
        yield replica


def test_only_on_another_engine(llama: Model) -> None:
    async def main() -> None:
        async with two_engines(llama, llama) as replica:
            first, second = (leader.loop for leader in replica.router.leaders)
            assert first is not None and second is not None
            async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                await send(channel, request(PROMPT, 2))
                # So much is to do on the engine that holds it that the other one costs less.
                first.scheduler.queue.tokens += 10_000
                answer = await send(channel, request(PROMPT, 2, request_id="x"))
                assert answer.accepted.engine_id == "e1"
            async with wire.channel(f"127.0.0.1:{replica.ports[1]}") as channel:
                admin = admin_pb2_grpc.AdminServiceStub(channel)
                message = pb.ExplainRequestRequest(request_id="x")
                found = (await admin.ExplainRequest(message)).explanation
                assert outcomes(found) == [
                    (pb.LOOKUP_OUTCOME_OTHER_ENGINE, 3, 48),
                    (NOT_FULL, 1, 2),
                ]
                assert list(found.spans[0].engine_ids) == ["e0"]

    asyncio.run(main())


def test_for_another_model(llama: Model, llama_directory: Path) -> None:
    other = load_model(llama_directory, dtype="bfloat16", name="in-short")

    async def main() -> None:
        async with two_engines(llama, other) as replica:
            async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                await send(channel, request(PROMPT, 2, model="in-short"))
            async with wire.channel(f"127.0.0.1:{replica.ports[1]}") as channel:
                admin = admin_pb2_grpc.AdminServiceStub(channel)
                found = await foreseen(admin, model="tiny-llama")
                assert found.model == "tiny-llama"
                assert outcomes(found) == [
                    (pb.LOOKUP_OUTCOME_OTHER_MODEL, 3, 48),
                    (NOT_FULL, 1, 2),
                ]
                assert found.spans[0].model == "in-short"
                error = await failure(foreseen(admin))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                error = await failure(foreseen(admin, model="none"))
                assert error.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_on_an_engine_that_another_replica_leads(llama: Model) -> None:
    """The index knows what its blocks are, for as long as Redis answers."""

    async def main(server: RedisServer) -> None:
        settings = {"redis_url": server.url, "index_timeout_ms": 1000}
        async with (
            running_engine(Engine(llama, SIZES), None, engine_id="mine") as (_, mine),
            running_engine(Engine(llama, SIZES), None, engine_id="theirs") as (_, theirs),
            running_replica([theirs], **settings) as other,
            wire.channel(f"127.0.0.1:{other.ports[0]}") as channel,
        ):
            await led(other)
            await send(channel, request(PROMPT, 2))
            await send(channel, request(PROMPT, 2))
            async with (
                running_replica([mine, theirs], **settings) as replica,
                wire.channel(f"127.0.0.1:{replica.ports[1]}") as operators,
            ):
                admin = admin_pb2_grpc.AdminServiceStub(operators)
                async with asyncio.timeout(10):
                    while True:
                        error: object = None
                        try:
                            found = await foreseen(admin)
                            if found.cached_token_count:
                                break
                        except grpc.aio.AioRpcError as lost:
                            error = lost.code()
                        assert error in (None, grpc.StatusCode.UNAVAILABLE)
                        await asyncio.sleep(0.05)
                assert found.engine_id == "theirs"
                assert outcomes(found)[0] == (HIT, 3, 48)

    with RedisServer() as server:
        asyncio.run(main(server))


@pytest.mark.parametrize(
    ("fields", "field"),
    [({}, "prompt"), ({"text": "x"}, "text"), ({"token_ids": {"ids": [-1]}}, "token_ids")],
)
def test_prompts_that_cannot_be_explained(
    llama: Model, fields: dict[str, object], field: str
) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            message = pb.ExplainPromptRequest(**fields)  # type: ignore[arg-type]
            error = await failure(stack.admin.ExplainPrompt(message))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in str(error.details())

    asyncio.run(main())


# The rules themselves.


def test_history_answers_for_any_moment() -> None:
    history = BlockHistory(limit=2)
    a, b, c, d = b"a", b"b", b"c", b"d"
    history.begin([a], 10)
    history.note([b, c, d], [], 20)
    assert history.held_at(a, 5) and not history.held_at(b, 15) and history.held_at(b, 25)
    history.note([], [b], 30)
    assert history.held_at(b, 25) and not history.held_at(b, 35)
    assert history.evicted_before(b, 35) == 30 and history.evicted_before(b, 25) is None
    history.note([b], [], 40)
    assert history.evicted_before(b, 45) is None and history.evicted_before(b, 35) == 30
    history.note([], [c, d], 50)
    # Only the last two that went are remembered.
    assert history.evicted_before(c, 60) == history.evicted_before(d, 60) == 50
    assert not history.held_at(b, 35) and history.evicted_before(b, 35) is None
    # A new leadership: what is not there any more went meanwhile; what is, has been there.
    history.begin([d], 70)
    assert history.held_at(d, 1) and history.evicted_before(b, 80) == 70


def test_a_block_behind_a_gap_is_said_to_be_there() -> None:
    hashes = [bytes([n]) for n in range(4)]
    engines = {"own": HeldNow({hashes[0], hashes[2], hashes[3]}), "far": HeldNow({hashes[1]})}
    spans = explain(Question(64, 16, hashes, 16, "own", engines, at=0))
    assert [(span.outcome, span.block_count) for span in spans] == [
        (LookupOutcome.HIT, 1),
        (LookupOutcome.OTHER_ENGINE, 1),
        (LookupOutcome.AFTER_A_MISS, 2),
    ]


def test_models_with_other_block_sizes_are_compared_by_tokens() -> None:
    hashes = [bytes([n]) for n in range(4)]
    theirs = [b"x", b"y"]
    chain = Chain(theirs, [HeldNow({b"x"})], block_size=32, model="other")
    spans = explain(Question(64, 16, hashes, 0, "own", {}, at=0, models=lambda: [chain]))
    assert [(span.outcome, span.block_count, span.model) for span in spans] == [
        (LookupOutcome.OTHER_MODEL, 2, "other"),
        (LookupOutcome.NEVER_SEEN, 2, ""),
    ]


def test_an_eviction_elsewhere_and_a_restart_are_told_apart() -> None:
    a, b = b"a", b"b"
    own, far = BlockHistory(), BlockHistory()
    for history, digest in ((own, a), (far, b)):
        history.begin([], 0)
        history.note([digest], [], 1)
    own.begin([], 5, restarted=True)
    far.note([], [b], 6)
    question = Question(32, 16, [a, b], 0, "own", {"own": own, "far": far}, at=9)
    spans = explain(question)
    assert [(span.outcome, span.engine_ids, span.evicted_at) for span in spans] == [
        (LookupOutcome.RESTARTED, ("own",), 5),
        (LookupOutcome.EVICTED, ("far",), 6),
    ]


def test_ids_are_a_tenants_own_and_what_was_refused_is_not_remembered(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, max_waiting_tokens=100, slot_count=1) as stack:
            salted_by_metadata(stack.replica)
            await send(stack.channel, request(PROMPT, 2, request_id="x"), "red")
            await send(stack.channel, request(PROMPT, 2, request_id="x"), "blue")
            for tenant in ("red", "blue"):
                message = pb.ExplainRequestRequest(request_id="x", tenant=tenant)
                found = (await stack.admin.ExplainRequest(message)).explanation
                assert found.tenant == tenant
            assert (await explained(stack, "x")).tenant == "blue"
            message = pb.ExplainRequestRequest(request_id="x", tenant="green")
            error = await failure(stack.admin.ExplainRequest(message))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            running = asyncio.create_task(stack.generate(request(PROMPT, 200)))
            waiting = asyncio.create_task(stack.generate(request([*PROMPT] * 3, 2)))
            async with asyncio.timeout(10):
                while stack.loop.scheduler.waiting_count < 1:
                    await asyncio.sleep(0.005)
            late = request(PROMPT, 2, request_id="late")
            error = await failure(stack.generate(late))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            error = await failure(explained(stack, "late"))
            assert "not known" in str(error.details())
            for task in (running, waiting):
                task.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)

    asyncio.run(main())
