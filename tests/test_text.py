"""Prompts to tokens, and tokens to text: incremental, cut at stop strings, resumable anywhere."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from control_plane.text import SampleText, StopMatch
from control_plane.tokenizer import PromptError, PromptTokenizer

CORPUS = [
    "Hello world, hello there. The pages of a quire are gathered and folded.",
    "日本語のテキスト、中文文本。 한국어 emoji 😀😃 👩‍👩‍👧 e\u0301 naïve café Ωmega",
]
SAMPLES = [
    "",
    "Hello world",
    "😀😃 👩‍👩‍👧 flags 🇫🇷",
    "e\u0301e\u0301 naïve a\u0308",
    "日本語 中文 ᚠᛇᚻ ไทย",
    " leading  and   double spaces \n\ttabs\n",
    "a literal \ufffd stays \ufffd",
    "\ufffd",
]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}
    {%- if message.role == 'break' %}{% break %}{% endif %}
    {%- generation %}[{{ message.role }}] {{ message.content | tojson }}{% endgeneration %}
{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("日本", special=False)])
    return tokenizer


def llama_like(strip: bool = True) -> Tokenizer:
    """As Llama 2's: SentencePiece's space, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *"abcdefghijklmnopqrstuvwxyzHT.,日", "▁H", "el", "lo", "▁w", "or", "ld"]
    merges = [("▁", "H"), ("▁", "▁"), ("e", "l"), ("l", "o"), ("▁", "w"), ("o", "r"), ("l", "d")]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefgHelo wrd"), ("▁He", -1)]
    tokenizer = Tokenizer(models.Unigram([(t, float(s)) for t, s in vocabulary], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "hello", "world", "##s", "##ing", "a", ".", ",", "do", "n't"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def no_decoder() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))


def prompt_tokenizer(tokenizer: Tokenizer, template: str | None = None) -> PromptTokenizer:
    parts = tokenizer.to_str().encode(), template, {"bos_token": "<s>"}
    return PromptTokenizer.from_parts(*parts)


TOKENIZERS = {
    "byte level": prompt_tokenizer(byte_level()),
    "llama": prompt_tokenizer(llama_like()),
    "gemma": prompt_tokenizer(llama_like(strip=False)),
    "metaspace": prompt_tokenizer(metaspace()),
    "word piece": prompt_tokenizer(word_piece()),
    "no decoder": prompt_tokenizer(no_decoder()),
}
BYTES = TOKENIZERS["byte level"]
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def stream(
    tokenizer: PromptTokenizer, ids: list[int], stops: tuple[str, ...] = ()
) -> tuple[list[str], StopMatch | None]:
    """The deltas of one sample, the last one with what finishing releases."""
    text, deltas, match = SampleText(tokenizer, stops), [], None
    for count, token_id in enumerate(ids, start=1):
        match = text.push(token_id)
        deltas.append(text.between(text.visible_end(count - 1), text.visible_end(count)))
        if match:
            return deltas, match
    shown = text.visible_end(len(ids))
    match = text.finish()
    deltas.append(text.between(shown, text.visible_end(len(ids))))
    assert text.text == "".join(deltas)
    return deltas, match


def cut(whole: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Reads character by character, as a person would."""
    for end in range(len(whole) + 1):
        found = [stop for stop in stops if whole[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.sampled_from(SAMPLES)))
def test_deltas_of_any_text_add_up_to_the_decoded_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    deltas, _ = stream(tokenizer, ids)
    assert "".join(deltas) == tokenizer.decode(ids)
    if name == "byte level":
        assert "".join(deltas) == text
        # Nothing but whole characters of the text is ever shown, so no U+FFFD of our making.
        assert "".join(deltas).count("\ufffd") == text.count("\ufffd")


@every_tokenizer
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 345), max_size=14))
def test_deltas_of_any_tokens_add_up_to_the_decoded_whole(name: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    assert "".join(stream(tokenizer, ids)[0]) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_as_the_library_does(data: st.DataObject) -> None:
    tricky = st.sampled_from(
        [0x41, 0x80, 0xBF, 0xC0, 0xE0, 0xA0, 0xED, 0xF0, 0x9F, 0x98, 0xF4, 0xFF]
    )
    values = data.draw(st.lists(tricky | st.integers(0, 255), max_size=12))
    llama = TOKENIZERS["llama"]
    ids = [3 + value for value in values]
    assert "".join(stream(llama, ids)[0]) == llama.decode(ids)
    alphabet = {BYTES._texts.piece(i): i for i in range(330)}
    ids = [alphabet[bytes([value])] for value in values]
    whole = "".join(stream(BYTES, ids)[0])
    assert whole == BYTES.decode(ids) == bytes(values).decode(errors="replace")


def test_a_character_split_over_tokens_is_shown_whole() -> None:
    alphabet = {BYTES._texts.piece(i): i for i in range(330)}
    ids = [alphabet[bytes([value])] for value in "a😀é".encode()]
    assert stream(BYTES, ids)[0] == ["a", "", "", "", "😀", "", "é", ""]
    assert stream(BYTES, ids[:4])[0] == ["a", "", "", "", "\ufffd"]


def test_text_held_back_is_bounded_for_endless_invalid_bytes() -> None:
    alphabet = {BYTES._texts.piece(i): i for i in range(330)}
    text = SampleText(BYTES, ())
    for count in range(1, 50):
        text.push(alphabet[b"\xe4"])
        assert text.visible_end(count) == count - 1


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 345), max_size=16),
    stops=st.lists(
        st.sampled_from(["a", "el", "l", "lo w", "ab", "bc", "abc", " ", "\ufffd", "d. a"])
    ),
    split=st.integers(0, 16),
)
def test_stop_strings_cut_the_text_wherever_tokens_end(
    name: str, ids: list[int], stops: list[str], split: int
) -> None:
    tokenizer, stops = TOKENIZERS[name], tuple(stops)
    expected, stop = cut(tokenizer.decode(ids), stops)
    deltas, match = stream(tokenizer, ids, stops)
    assert "".join(deltas) == expected
    assert match == (StopMatch(stop, len(expected)) if stop else None)
    # A replay of the first tokens knows what was shown, and the rest follows exactly.
    resumed, split = SampleText(tokenizer, stops), min(split, len(deltas) - 1, len(ids))
    for token_id in ids[:split]:
        resumed.push(token_id)
    assert resumed.text.startswith("".join(deltas[:split])) or match
    assert resumed.between(0, resumed.visible_end(split)) == "".join(deltas[:split])


@settings(max_examples=300, deadline=None)
@given(
    whole=st.text("ab", max_size=24),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_overlapping_stop_strings(whole: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS["gemma"]
    ids = [token for letter in whole for token in tokenizer.encode(letter)[1:]]
    assert tokenizer.decode(ids) == whole
    deltas, match = stream(tokenizer, ids, tuple(stops))
    expected, stop = cut(whole, tuple(stops))
    assert ("".join(deltas), match.stop_string if match else None) == (expected, stop)
    # Shown before the end: everything but what may begin a stop string, and not less.
    for count in range(1, len(deltas) - 1):
        text = whole[:count]
        held = max(
            (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        assert "".join(deltas[:count]) == text[: len(text) - held]


def test_a_finished_sample_takes_no_more() -> None:
    text = SampleText(BYTES, ("o w",))
    ids = BYTES.encode("Hello world")
    for token_id in ids:
        if match := text.push(token_id):
            break
    assert match == StopMatch("o w", 4) and text.text == "Hell"
    assert text.finish() == match and text.visible_end(text.token_count) == 4
    with pytest.raises(RuntimeError):
        text.push(ids[0])


def test_without_a_tokenizer_the_text_is_empty() -> None:
    text = SampleText(None, ("a",))
    assert [text.push(token_id) for token_id in (1, 2)] == [None, None]
    text.finish()
    assert text.text == "" and [text.visible_end(k) for k in range(3)] == [0, 0, 0]


def test_cost_per_token_does_not_grow() -> None:
    ids = (BYTES.encode("Hello there, 日本語 😀 and so on. ") * 4000)[:60_000]
    text, seconds = SampleText(BYTES, ("never this", "nor that")), []
    for start in range(0, 60_000, 20_000):
        begin = time.perf_counter()
        for count, token_id in enumerate(ids[start : start + 20_000], start=start):
            text.push(token_id)
            text.between(text.visible_end(count), text.visible_end(count + 1))
        seconds.append(time.perf_counter() - begin)
    assert seconds[2] < 5 * seconds[0] + 0.2


def test_prompts_get_special_tokens_and_are_never_cut() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    ours = prompt_tokenizer(tokenizer)
    assert ours.decode(ours.encode("Hello world, hello there")) == "Hello world, hello there"
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 0)])
    ours = prompt_tokenizer(tokenizer, "{{ bos_token }}x")
    assert ours.encode("x")[0] == 0 and ours.encode_chat([("user", "y")]) == ours.encode("x")


def test_chat_template() -> None:
    ours = prompt_tokenizer(byte_level(), TEMPLATE)
    messages = [("system", "be brief <&>"), ("user", "hé"), ("break", "x"), ("user", "y")]
    expected = '<s>[system] "be brief <&>"[user] "hé"[assistant]'
    ids = ours.encode_chat(messages)
    assert ids[0] == 0 and ours.decode(ids) == expected.removeprefix("<s>")
    with pytest.raises(PromptError, match="no critics") as caught:
        ours.encode_chat([("critic", "boo")])
    assert caught.value.field == "chat.messages"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content + 1 }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_fail_are_prompt_errors(template: str | None) -> None:
    ours = prompt_tokenizer(byte_level(), template)
    with pytest.raises(PromptError) as caught:
        ours.encode_chat([("user", "hi")])
    assert caught.value.field.startswith("chat") and str(caught.value)
    assert ours.encode("text still works")


def test_what_is_no_tokenizer_is_refused() -> None:
    for content in (b"", b"{}", b"\xff"):
        with pytest.raises(ValueError, match="tokenizer"):
            PromptTokenizer.from_parts(content, None, {})
    tokenizer = byte_level()
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="CTC"):
        prompt_tokenizer(tokenizer)


def test_chat_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    ours = prompt_tokenizer(byte_level(), TEMPLATE)
    messages = [("system", "S  "), ("user", json.dumps({"a": "<日>"}))]
    rows = [{"role": role, "content": content} for role, content in messages]
    expected = theirs.apply_chat_template(
        rows, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert ours.encode_chat(messages) == expected
