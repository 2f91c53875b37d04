"""What Generate promises, over real gRPC against a real tiny model."""

from __future__ import annotations

import asyncio
import math
import random
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from data_plane.model import Model
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from tests.stack import Answer, failure, request, running_stack
from tests.test_waiting import held

PROMPT = list(range(20, 53))


def sampled(
    prompt: list[int], seed: int, max_tokens: int = 24, **fields: object
) -> pb.GenerateRequest:
    message = request(prompt, max_tokens, **fields)
    message.sampling.MergeFrom(pb.Sampling(temperature=1.2, top_p=0.95, top_k=80, seed=seed))
    message.stopping.ignore_eos = True
    return message


def test_seeded_request_is_the_same_alone_in_a_crowd_and_after_a_restart(llama: Model) -> None:
    rng = random.Random(5)
    crowd = [
        sampled([rng.randrange(8, 384) for _ in range(rng.randrange(1, 90))], seed=i)
        for i in range(32)
    ]
    ours = sampled(PROMPT, seed=77, max_tokens=40)

    async def main() -> None:
        async with running_stack(llama) as stack:
            alone = await stack.generate(ours)
            among = (await stack.together([*crowd[:16], ours, *crowd[16:]]))[16]
            assert len(set(alone.ids)) > 5
            assert among.ids == alone.ids
            again = sampled(PROMPT, seed=78, max_tokens=40)
            assert (await stack.generate(again)).ids != alone.ids
            await stack.idle()
        async with running_stack(llama, chunk_tokens=8, block_count=40) as stack:
            after = (await stack.together([*crowd, ours]))[32]
            assert after.ids == alone.ids
            assert stack.loop.scheduler.totals.preemptions > 0
            await stack.idle()

    asyncio.run(main())


def test_four_samples_share_the_prompt_and_copy_on_write(llama: Model) -> None:
    message = sampled(PROMPT, seed=3, max_tokens=60, output=pb.Output(sample_count=4))

    async def main() -> None:
        async with running_stack(llama) as stack:
            answer = Answer()
            seen = set()
            async for response in stack.stub.Generate(message):
                answer.add(response)
                scheduler = stack.loop.scheduler
                slots = [s.slot for g in scheduler.groups for s in g.sequences if s.slot >= 0]
                if len(slots) == 4 and scheduler.slots.decoding[slots].all():
                    # 33 tokens are two full blocks and one token: ceil((s + a) / 16) blocks each,
                    # of which floor(s / 16) are shared.
                    written = int(scheduler.slots.computed[slots[0]])
                    used = scheduler.pool.used_count
                    assert used == 2 + 4 * (math.ceil(written / 16) - 2)
                    seen.add(written)
                await stack.check_conserved()
            assert len(seen) > 10
            assert stack.engine.counters.prefill_token_count == 33
            assert [len(answer.tokens[i]) for i in range(4)] == [60] * 4
            assert len({tuple(answer.tokens[i]) for i in range(4)}) == 4
            await stack.idle()
            # Sample 0 of n is the same as the only sample of 1.
            message.output.sample_count = 1
            assert (await stack.generate(message)).ids == answer.tokens[0]

    asyncio.run(main())


def test_a_prompt_is_shared_in_the_step_that_computes_it(llama: Model) -> None:
    prompt = list(range(20, 84))

    async def main() -> None:
        async with running_stack(llama) as stack:
            alone = await stack.generate(request([*prompt, 90], 12))
        async with running_stack(llama) as stack:
            answers = await stack.together([request([*prompt, 90 + i % 2], 12) for i in range(8)])
            assert all(answer.ids == alone.ids for answer in answers[::2])
            # Each of them runs its own last token; nearly all share the four blocks before it.
            assert stack.engine.counters.prefill_token_count < 3 * len(prompt)
            await stack.idle()

    asyncio.run(main())


def test_text_chat_and_ids_agree(llama: Model, llama_directory: Path) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            tokenizer = stack.replica.router.leaders[0].tokenizer
            assert tokenizer is not None
            text = "the quick brown fox and a being"
            by_text = await stack.generate(request(text, 20))
            by_ids = await stack.generate(request(tokenizer.encode(text), 20))
            assert by_text.ids == by_ids.ids
            assert by_text.text == tokenizer.decode(by_text.ids)
            message = request([1], 20)
            message.chat.messages.add(role="user", content="hello")
            chat = await stack.generate(message)
            rendered = tokenizer.encode_chat([("user", "hello")])
            assert chat.ids == (await stack.generate(request(rendered, 20))).ids
            assert chat.accepted.prompt_token_count == len(rendered)

    asyncio.run(main())


def test_stop_strings_and_stop_ids(llama: Model, llama_directory: Path) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            free = request("some text to go on from", 60)
            free.stopping.ignore_eos = True
            whole = await stack.generate(free)
            assert whole.finished[0].reason == pb.FINISH_REASON_LENGTH
            # A stop string that spans token borders.
            at = len(whole.text) // 2
            stop = whole.text[at : at + 6]
            cut = whole.text[: whole.text.index(stop)]
            stopped = pb.GenerateRequest()
            stopped.CopyFrom(free)
            stopped.stopping.stop_strings.append(stop)
            answer = await stack.generate(stopped)
            assert answer.text == cut
            assert answer.finished[0].reason == pb.FINISH_REASON_STOP
            assert answer.finished[0].stop_string == stop
            by_id = pb.GenerateRequest()
            by_id.CopyFrom(free)
            by_id.stopping.stop_token_ids.append(whole.ids[9])
            answer = await stack.generate(by_id)
            assert answer.ids == whole.ids[: whole.ids.index(whole.ids[9]) + 1]
            assert answer.finished[0].stop_token_id == whole.ids[9]
            by_id.stopping.min_tokens = 20
            assert len((await stack.generate(by_id)).ids) >= 20
            await stack.idle()

    asyncio.run(main())


def test_logprobs_are_those_of_the_model(llama: Model, llama_directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = list(range(30, 90))

    async def main() -> Answer:
        async with running_stack(llama, chunk_tokens=16) as stack:
            await stack.generate(request(prompt, 2))  # Fills the prefix cache.
            output = pb.Output(logprob_count=3, prompt_logprob_count=2)
            answer = await stack.generate(request(prompt, 12, output=output))
            assert answer.accepted.cached_token_count == 0
            await stack.idle()
            return answer

    answer = asyncio.run(main())
    model = AutoModelForCausalLM.from_pretrained(llama_directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer.ids])).logits[0]
    reference = logits.log_softmax(-1)
    assert len(answer.prompt_logprobs) == len(prompt) - 1
    entries = answer.prompt_logprobs + answer.logprobs[0]
    for position, (token, entry) in enumerate(zip((prompt + answer.ids)[1:], entries, strict=True)):
        row = reference[position]
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        count = 2 if position < len(prompt) - 1 else 3
        assert list(entry.top_token_ids) == row.topk(count).indices.tolist()
        assert entry.rank == 1 + int((row > row[token]).sum())


def test_resume_gives_exactly_the_rest(llama: Model, llama_directory: Path) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            message = sampled(PROMPT, seed=9, max_tokens=30, request_id="again")
            whole = await stack.generate(message)
            for count in (0, 1, 7, 29, 30):
                resumed = pb.GenerateRequest()
                resumed.CopyFrom(message)
                resumed.received_token_counts.append(count)
                rest = await stack.generate(resumed)
                assert rest.ids == whole.ids[count:]
                assert whole.text.endswith(rest.text)
                assert rest.finished[0].token_count == 30
            # Found among the finished ones, so nothing was computed again.
            assert stack.engine.counters.prefill_token_count == len(PROMPT)

    asyncio.run(main())


def test_same_id_joins_and_a_different_request_is_refused(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            message = sampled(PROMPT, seed=1, max_tokens=200, request_id="one")
            both = await stack.together([message, message])
            assert both[0].ids == both[1].ids
            assert len(both[0].ids) == 200
            assert stack.engine.counters.prefill_token_count == len(PROMPT)
            running = asyncio.create_task(stack.generate(message))
            other = sampled(PROMPT, seed=2, max_tokens=200, request_id="two")
            busy = asyncio.create_task(stack.generate(other))
            async with asyncio.timeout(5):
                while stack.replica.generations.running(("", "two")) is None:
                    await asyncio.sleep(0)
            error = await failure(stack.generate(sampled(PROMPT, seed=3, request_id="two")))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert (await running).ids == both[0].ids
            assert len((await busy).ids) == 200

    asyncio.run(main())


@pytest.mark.parametrize("way", ["cancel", "hang up", "deadline"])
def test_blocks_are_free_within_two_steps(
    llama: Model, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with running_stack(llama, block_count=1024) as stack:
            loop, cancelled_at = stack.loop, []
            release = loop.release
            monkeypatch.setattr(
                loop, "release", lambda gone: (cancelled_at.append(loop.step), release(gone))
            )
            # Sixteen samples of 900 tokens take longer than any deadline that is short to wait for.
            samples = pb.Output(sample_count=16)
            message = sampled(PROMPT, seed=1, max_tokens=900, request_id="long", output=samples)
            call = stack.stub.Generate(message, timeout=1.5 if way == "deadline" else None)
            async for response in call:
                if response.delta.token_ids:
                    break
            assert loop.scheduler.pool.used_count > 0
            if way == "cancel":
                await stack.stub.Cancel(pb.CancelRequest(request_id="long"))
                events = [response async for response in call]
                assert events[-2].finished.reason == pb.FINISH_REASON_CANCELLED
            elif way == "hang up":
                call.cancel()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stack_read_all(call)
                assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            async with asyncio.timeout(5):
                while not cancelled_at:
                    await asyncio.sleep(0)
            # The pool has them at once; the engine hears of it with the next plan, behind those in
            # flight, and nothing runs after it.
            assert loop.scheduler.pool.used_count == 0
            await stack.idle()
            assert loop.step - cancelled_at[0] <= 1

    asyncio.run(main())


def test_without_max_tokens_the_pool_sets_the_limit(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, block_count=6) as stack:
            message = request([20, 21, 22], 1, output=pb.Output(sample_count=2))
            message.stopping.ClearField("max_tokens")
            message.stopping.ignore_eos = True
            answer = await stack.generate(message)
            # Three blocks of 16 for each sample; the last token's key is never written.
            assert [len(answer.tokens[index]) for index in range(2)] == [46, 46]

    asyncio.run(main())


async def stack_read_all(call: grpc.aio.UnaryStreamCall) -> None:  # type: ignore[type-arg]
    async for _ in call:
        pass


BAD: list[tuple[str, dict[str, object], str, str]] = [
    ("no prompt", {"clear": "prompt"}, "prompt", "missing"),
    ("empty text", {"text": ""}, "text", "empty"),
    ("empty ids", {"token_ids": pb.TokenIds()}, "token_ids.ids", "empty"),
    ("unknown id", {"token_ids": pb.TokenIds(ids=[384])}, "token_ids.ids", "384"),
    ("negative id", {"token_ids": pb.TokenIds(ids=[-1])}, "token_ids.ids", "-1"),
    ("too long", {"stopping": pb.Stopping(max_tokens=1022)}, "stopping.max_tokens", "1024"),
    ("n", {"output": pb.Output(sample_count=17)}, "output.sample_count", "16"),
    ("logprobs", {"output": pb.Output(logprob_count=21)}, "output.logprob_count", "20"),
    ("stops", {"stopping": pb.Stopping(stop_strings=["x"] * 17)}, "stopping.stop_strings", "16"),
    (
        "empty stop",
        {"stopping": pb.Stopping(stop_strings=[""])},
        "stopping.stop_strings[0]",
        "empty",
    ),
    (
        "stop ids",
        {"stopping": pb.Stopping(stop_token_ids=range(17))},
        "stopping.stop_token_ids",
        "16",
    ),
    (
        "bias size",
        {"sampling": pb.Sampling(logit_bias=dict.fromkeys(range(301), 1.0))},
        "sampling.logit_bias",
        "300",
    ),
    ("bias id", {"sampling": pb.Sampling(logit_bias={999: 1.0})}, "sampling.logit_bias", "384"),
    (
        "bias nan",
        {"sampling": pb.Sampling(logit_bias={5: math.nan})},
        "sampling.logit_bias[5]",
        "100",
    ),
    ("temperature", {"sampling": pb.Sampling(temperature=-1)}, "sampling.temperature", "100"),
    ("nan", {"sampling": pb.Sampling(temperature=math.nan)}, "sampling.temperature", "nan"),
    ("top p", {"sampling": pb.Sampling(top_p=0.0)}, "sampling.top_p", "(0, 1]"),
    ("top p nan", {"sampling": pb.Sampling(top_p=math.nan)}, "sampling.top_p", "nan"),
    ("top k", {"sampling": pb.Sampling(top_k=-1)}, "sampling.top_k", "384"),
    ("min p", {"sampling": pb.Sampling(min_p=1.5)}, "sampling.min_p", "1"),
    ("penalty", {"sampling": pb.Sampling(presence_penalty=11)}, "sampling.presence_penalty", "10"),
    ("max tokens", {"stopping": pb.Stopping(max_tokens=0)}, "stopping.max_tokens", "1"),
    ("min tokens", {"stopping": pb.Stopping(min_tokens=17)}, "stopping.min_tokens", "16"),
    ("received", {"received_token_counts": [1, 2]}, "received_token_counts", "1"),
    ("priority", {"priority": 101}, "priority", "100"),
    ("no waiting", {"max_waiting_time": timedelta()}, "max_waiting_time", "(0, 86400] s"),
    ("long", {"max_waiting_time": timedelta(days=1, seconds=1)}, "max_waiting_time", "86401 s"),
    ("past", {"max_waiting_time": Duration(seconds=-2)}, "max_waiting_time", "-2 s"),
    ("nanos", {"max_waiting_time": Duration(seconds=2, nanos=-1)}, "max_waiting_time.nanos", "-1"),
    ("request id", {"request_id": "x" * 129}, "request_id", "128"),
    ("request id chars", {"request_id": "a b"}, "request_id", "ASCII"),
    ("chat", {"chat": pb.Chat()}, "chat.messages", "1"),
    (
        "role",
        {"chat": pb.Chat(messages=[pb.ChatMessage(content="x")])},
        "chat.messages[0].role",
        "empty",
    ),
]


def test_bad_input_names_field_and_limit_and_disturbs_nothing(
    llama: Model, llama_directory: Path
) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            bystander = asyncio.create_task(stack.generate(sampled(PROMPT, seed=1, max_tokens=300)))
            for name, fields, field, part in BAD:
                message = request([1, 2, 3], 16)
                if "clear" in fields:
                    message.ClearField("prompt")
                else:
                    message.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]
                    if fields.get("text") == "":
                        message.text = ""
                    if "token_ids" in fields:
                        message.token_ids.CopyFrom(fields["token_ids"])  # type: ignore[arg-type]
                error = await failure(stack.generate(message))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (name, error.details())
                (detail,) = wire.error_details(error)
                assert isinstance(detail, error_details_pb2.BadRequest)
                violation = detail.field_violations[0]
                assert violation.field == field, name
                assert part in violation.description, (name, violation.description)
            assert len((await bystander).ids) == 300
            await stack.idle()

    asyncio.run(main())


def test_invalid_utf8_names_the_field(llama: Model, llama_directory: Path) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            good = pb.GenerateRequest(
                chat=pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(role="rrrr")])
            ).SerializeToString()
            call = stack.channel.unary_stream(
                "/quire.inference.v1.InferenceService/Generate",
                request_serializer=bytes,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            error = await failure(stack_read_all(call(good.replace(b"rrrr", b"r\xff\xfer"))))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            (detail,) = wire.error_details(error)
            assert isinstance(detail, error_details_pb2.BadRequest)
            assert detail.field_violations[0].field == "chat.messages[1].role"
            error = await failure(stack_read_all(call(b"\xff\xff\xff")))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_refusals_of_model_pool_and_queue(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(
            llama, block_count=8, slot_count=1, max_waiting_requests=1
        ) as stack:
            error = await failure(stack.generate(request(PROMPT, 8, model="other")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            error = await failure(stack.generate(request(PROMPT, 200)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "pool" in str(error.details())
            text = await failure(stack.generate(request("no tokenizer here")))
            assert "token_ids" in str(text.details())
            long = sampled(PROMPT, seed=1, max_tokens=90)
            scheduler, tasks = stack.loop.scheduler, []
            # However long the calls take to come, the first has not ended by then.
            with held(stack.worker):
                async with asyncio.timeout(30):
                    tasks.append(asyncio.create_task(stack.generate(long)))
                    while scheduler.running_count < 1:
                        await asyncio.sleep(0.002)
                    tasks.append(asyncio.create_task(stack.generate(long)))
                    while scheduler.waiting_count < 1:
                        await asyncio.sleep(0.002)
                error = await failure(stack.generate(long))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            info, detail = wire.error_details(error)
            assert isinstance(info, error_details_pb2.ErrorInfo) and info.reason == "QUEUE_FULL"
            assert isinstance(detail, error_details_pb2.RetryInfo)
            assert detail.retry_delay.ToMilliseconds() > 0
            for task in tasks:
                assert len((await task).ids) == 90

    asyncio.run(main())


def test_no_engine_is_unavailable() -> None:
    from tests.stack import running_replica

    async def main() -> None:
        async with running_replica([1]) as replica:
            channel = wire.channel(f"127.0.0.1:{replica.ports[0]}")
            from protos.inference.v1 import inference_pb2_grpc

            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request([1]))
            error = await failure(stack_read_all(call))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            await channel.close()

    asyncio.run(main())
