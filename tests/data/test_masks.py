"""Which tokens are trained: a table of chat templates times conversations, each exact or refused with a reason."""

import random

import pytest
from conversations import (
    CALL,
    CONVERSATIONS,
    FITS,
    TEMPLATES,
    Message,
    Template,
    calls,
    chat,
    chatml,
    encoder,
    pieces_of,
)
from tokens import ASK, CHATML, byte_tokenizer

from posttrain.blocks.data.encoding.encoders import supervised
from posttrain.blocks.data.rows.messages import Refused

PAIRS = [(name, kind) for name in TEMPLATES for kind in CONVERSATIONS if name in FITS.get(kind, TEMPLATES)]


@pytest.mark.parametrize(
    ("name", "reply", "trained"),
    [
        ("chatml", "<think>\n\n</think>\n\n4", "4<|im_end|>"),
        ("chatml", "<think>\n2+2\n</think>\n\n4", "<think>\n2+2\n</think>\n\n4<|im_end|>"),
        ("chatml", "4 <think></think>", "4 <think></think><|im_end|>"),
        ("qwq (the prompt opens the thinking)", "4", "4<|im_end|>"),
    ],
)
def test_a_thought_that_is_empty_need_not_be_trained(name: str, reply: str, trained: str) -> None:
    template = TEMPLATES[next(found for found in TEMPLATES if found.startswith(name))]
    assert pieces_of(encoder(template, ignore_empty_think=True), chat("x", reply))[1] == trained
    plain = pieces_of(encoder(template), chat("x", reply))[1]
    assert plain.endswith(trained)
    changed = encoder(template).fingerprint() != encoder(template, ignore_empty_think=True).fingerprint()
    assert changed


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_trained_tokens_are_exactly_the_replies(name: str, kind: str) -> None:
    template, messages = TEMPLATES[name], CONVERSATIONS[kind]
    expected = template.expected(messages)
    text, trained, ids = pieces_of(encoder(template), messages)
    assert text == "".join(piece for piece, _ in expected)
    assert trained == "".join(piece for piece, reply in expected if reply)
    bos = encoder(template).renderer.tokenizer.bos_token_id
    assert (ids == bos).sum() == text.startswith("<s>")


BROKEN = {
    "cuts the text": (CHATML.replace("m.content", "m.content[:3]"), "cuts the text|changes or inspects"),
    "writes it twice": (CHATML.replace("m.content +", "m.content + '|' + m.content +") + ASK, "more than once"),
    "ends no turn": (CHATML.replace("<|im_end|>", "") + ASK, "never learn to stop"),
    "ends all but the last turn": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK,
        "never learn to stop",
    ),
    "leaves replies out": ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content + eos_token }}{% endif %}{% endfor %}", "leaves out a message"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "is not Jinja's friend": ("{{ messages[99].content.strip() }}", "refuses the conversation"),
    "looks inside": ("{% for m in messages %}{{ (m.content | length) ~ m.content + '<|im_end|>' }}{% endfor %}", "changes or inspects"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_hides_the_reply_is_refused(name: str) -> None:
    jinja, reason = BROKEN[name]
    with pytest.raises(Refused, match=reason):
        pieces_of(encoder(Template(jinja, chatml)), CONVERSATIONS["one turn"])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("x", "stop <|im_end|> now"), "control token <|im_end|>"),
        (chat("x <|im_start|>assistant\nyes<|im_end|>", "y"), "control token <|im_start|>"),
        (chat("x", "a \ue000 b"), "U\\+E000"),
        (chat("x \ud800 y", "yes"), "half of a UTF-16 surrogate pair"),
        (chat("x", ""), "a message of role 'assistant' is empty"),
        (chat("x"), "no message has a trained role"),
        ([], "the conversation is empty"),
        ([{"role": "user", "content": None}], "content of a message of role 'user' is null"),
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'"),
        ([{"role": "user", "content": 7}], "int, not text"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_refused(messages: list[Message], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        pieces_of(encoder(TEMPLATES["chatml"]), messages)


def test_other_roles_can_be_trained() -> None:
    _, trained, _ = pieces_of(encoder(TEMPLATES["chatml"], train_on=["user", "assistant"]), chat("a", "b"))
    assert trained == "a<|im_end|>b<|im_end|>"


def test_a_tool_call_needs_a_generation_prompt_to_tell_where_it_begins() -> None:
    template = Template(TEMPLATES["qwen 2.5 (tool calls)"].jinja.replace(ASK, ""), calls)
    with pytest.raises(Refused, match="where the reply begins cannot be told"):
        pieces_of(encoder(template), CONVERSATIONS["a tool call without text"])


ATOMS = [
    "a", "yes", "x", " ", "\n", "  ", "\n\n", "<think>", "</think>", "</", "<", "{{", "漢", "😀", "é", "\u200d", '"', "\\",
    "</tool_call>", "<tool_response>", "assistant", "assistant\n", "model\n", "[/INST]", "[INST]", "ASSISTANT: ", "|",
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_give_exact_spans_or_a_refusal(name: str) -> None:
    chance = random.Random(name)

    def text() -> str:
        return "".join(chance.choice(ATOMS) for _ in range(chance.randint(1, 6)))

    template, exact = TEMPLATES[name], 0
    made = encoder(template)
    for _ in range(150):
        messages = chat(*(text() for _ in range(chance.choice([2, 4, 6]))), system=chance.choice([None, text()]))
        if name in FITS["reasoning"]:
            for message in messages if name in FITS["reasoning in two turns"] else messages[-1:]:
                if message["role"] == "assistant" and chance.random() < 0.5:
                    message["reasoning_content"] = text()
        try:
            full, trained, _ = pieces_of(made, messages)
        except Refused:
            continue
        expected = template.expected(messages)
        if full == "".join(piece for piece, _ in expected):  # the hand-written rendering knows no odd tags
            assert trained == "".join(piece for piece, reply in expected if reply), messages
            exact += 1
    assert exact > 90


def test_the_edges_of_spans_are_those_that_all_offsets_give() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {letter: number for number, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz?")}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    chance = random.Random(0)
    for backend in (bpe, byte_tokenizer().backend_tokenizer):
        for _ in range(300):
            text = "".join(chance.choice(["a", "B", " ", "é", "ﬁ", "漢", "😀", "\n", "zz"]) for _ in range(12))
            start, end = sorted(chance.sample(range(len(text) + 1), 2))
            encoding = backend.encode(text, add_special_tokens=False)
            overlap = [begin < end and start < stop and begin < stop for begin, stop in encoding.offsets]
            assert supervised(encoding, [(start, end)]).tolist() == overlap, (text, start, end)


MORE_BROKEN = {
    "shows a reply's beginning in a title": ("{{ messages[-1].content[:2] }}" + CHATML + ASK, "changes or inspects"),
    "glm (a role ends the turn before)": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "never learn to stop",
    ),
    "writes JSON in ASCII": ("{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}", "changes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_BROKEN)
def test_a_template_that_rewrites_the_reply_is_refused(name: str) -> None:
    jinja, reason = MORE_BROKEN[name]
    with pytest.raises(Refused, match=reason):
        pieces_of(encoder(Template(jinja, chatml)), CONVERSATIONS["one turn"])


def test_an_empty_reply_behind_reasoning_is_refused() -> None:
    messages = [*chat("x"), {"role": "assistant", "content": "\n", "reasoning_content": "2+2"}]
    with pytest.raises(Refused, match="of role 'assistant' is empty"):
        pieces_of(encoder(TEMPLATES["harmony (channels)"]), messages)


def test_llama_3_1_tool_calls_are_trained_from_the_brace_on() -> None:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    jinja = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}{{ '{\"name\": \"' + call.name + '\", ' }}"
        "{{ '\"parameters\": ' + (call.arguments | tojson) + '}' }}{{ '<|eom_id|>' }}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
    messages = [*chat("weather?"), {"role": "assistant", "tool_calls": [CALL]}]
    text, trained, _ = pieces_of(encoder(Template(jinja, chatml, special, "<|eot_id|>")), messages)
    assert text == "<s>" + header.format("user") + "weather?<|eot_id|>" + header.format("assistant") + trained
    assert trained == '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}<|eom_id|>'


def test_a_template_that_upper_cases_trains_what_it_writes() -> None:
    template = Template(CHATML.replace("m.content", "(m.content | upper)") + ASK, chatml)
    _, trained, _ = pieces_of(encoder(template), chat("Say yes", "yes é"))
    assert trained == "YES É<|im_end|>"
