"""Clients that know nothing of retries, for tests in which processes come and go."""

from __future__ import annotations

import asyncio

import grpc

from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.processes import Process
from tests.stack import Answer, request


class Load:
    """Plain gRPC calls: streams whose tokens must come without a gap, a repeat or an error.

    Attributes:
        ports: where calls go, one after the other; what a load balancer would have found ready.
    """

    def __init__(self, *ports: int) -> None:
        self.ports = list(ports)
        self.answers: dict[str, Answer] = {}
        self.messages: dict[str, pb.GenerateRequest] = {}
        self.prompt_tokens = 0
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._count = 0

    async def call(self, message: pb.GenerateRequest, port: int = 0) -> Answer:
        self._count += 1
        port = port or self.ports[self._count % len(self.ports)]
        if port not in self._channels:
            self._channels[port] = wire.channel(f"127.0.0.1:{port}")
        stub = inference_pb2_grpc.InferenceServiceStub(self._channels[port])
        answer = self.answers[str(self._count)] = Answer()
        self.messages[str(self._count)] = message
        self.prompt_tokens += len(message.token_ids.ids)
        async for response in stub.Generate(message, timeout=120):
            assert not (
                answer.usage or (response.HasField("accepted") and answer.accepted.engine_id)
            )
            answer.add(response)
        assert answer.usage is not None
        return answer

    def message(self, max_tokens: int, samples: int = 1) -> pb.GenerateRequest:
        """One with a prompt like no other, and without a request id."""
        number = self._count + 1
        prompt = [number % 300 + 20, number // 300 + 20, *range(20, 40 + number % 30)]
        message = request(prompt, max_tokens, output=pb.Output(sample_count=samples))
        message.stopping.ignore_eos = True
        if number % 2:
            message.sampling.MergeFrom(pb.Sampling(temperature=1, seed=number))
        return message

    async def loop(self, over: asyncio.Event, max_tokens: int = 60) -> None:
        """One client that always has a call running."""
        while not over.is_set():
            answer = await self.call(self.message(max_tokens))
            assert len(answer.ids) == max_tokens

    async def check(self, port: int, most_unlike: int = 0) -> None:
        """Compares every answer with the one that an undisturbed call gets.

        Args:
            most_unlike: samples that may differ, where so many tokens were computed again that
                rounding may have changed a draw. A token that is lost or repeated changes all.
        """
        calls = [self.call_again(message, port) for message in self.messages.values()]
        unlike = []
        for number, again in zip(self.messages, await asyncio.gather(*calls), strict=True):
            given = self.answers[number]
            assert again.finished.keys() == given.finished.keys()
            for sample, tokens in again.tokens.items():
                if (tokens, again.texts[sample]) != (given.tokens[sample], given.texts[sample]):
                    pairs = zip(tokens, given.tokens[sample], strict=False)
                    equal = [one == other for one, other in pairs]
                    unlike.append((number, sample, (*equal, False).index(False), len(tokens)))
        assert len(unlike) <= most_unlike, unlike

    async def call_again(self, message: pb.GenerateRequest, port: int) -> Answer:
        async with wire.channel(f"127.0.0.1:{port}") as channel:
            answer = Answer()
            async for each in inference_pb2_grpc.InferenceServiceStub(channel).Generate(message):
                answer.add(each)
            return answer

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


async def prefilled(engine: Process) -> int:
    """Tokens that went through the model as prompts: more than were sent are computed again."""
    async with wire.channel(f"127.0.0.1:{engine.port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        answer = await stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
        assert answer.counters.refused_plan_count == 0
        return int(answer.counters.prefill_token_count)
