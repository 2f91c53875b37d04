"""Token ids of a client's prompt, whichever form it has. Knows pb2."""

from __future__ import annotations

import asyncio

from control_plane.tokenizer import PromptError, PromptTokenizer
from protos import wire
from protos.inference.v1 import inference_pb2 as pb

# Longer prompts, in characters or tokens, are worked on beside the event loop.
LONG_PROMPT = 16_384


async def tokenise(message: pb.GenerateRequest, tokenizer: PromptTokenizer | None) -> list[int]:
    """Returns the token ids of a validated message's prompt.

    Raises:
        RpcError: the model cannot take a prompt of this form, or this one.
    """
    form = message.WhichOneof("prompt")
    if form == "token_ids":
        return list(message.token_ids.ids)
    if tokenizer is None:
        raise wire.bad_field(form or "prompt", "this model has no tokenizer; send token_ids")
    try:
        if form == "text":
            if len(message.text) > LONG_PROMPT:
                return await asyncio.to_thread(tokenizer.encode, message.text)
            return tokenizer.encode(message.text)
        turns = [(turn.role, turn.content) for turn in message.chat.messages]
        if sum(len(content) for _, content in turns) > LONG_PROMPT:
            return await asyncio.to_thread(tokenizer.encode_chat, turns)
        return tokenizer.encode_chat(turns)
    except PromptError as error:
        raise wire.bad_field(error.field, str(error)) from error
