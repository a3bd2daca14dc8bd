"""Which tokens are trained: a table of chat templates times conversations, each exact or refused with a reason.

What is expected is written out per template as a function from messages to (text, trained) pieces.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from tokens import ASK, CHATML, SPECIAL, byte_tokenizer

from posttrain.blocks.data.encoding.encoders import ChatEncoder, supervised
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.schemas import Sample, conversation

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]


@attrs.frozen
class Template:
    """A chat template, and what it must give."""

    jinja: str
    expected: Callable[[list[Message]], Pieces]
    special: tuple[str, ...] = ()
    eos: str = "<|im_end|>"


def pair(begin: str, reply: str) -> Pieces:
    return [(begin, False), (reply, True)]


def chatml(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        reply = m["role"] == "assistant"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (f"{m['content']}<|im_end|>", reply), ("\n", False)]
    return pieces


def llama3(messages: list[Message]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        begin = f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n"
        pieces += [(begin, False), (m["content"].strip() + "<|eot_id|>", m["role"] == "assistant")]
    return pieces


def folded(messages: list[Message]) -> Pieces:
    """Gemma and Llama 2: no system turn, its text goes in front of the first question; no generation prompt."""
    pieces: Pieces = [("<s>", False)]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    for m in messages:
        if m["role"] == "user":
            pieces += [(f"[INST] {system}{m['content'].strip()} [/INST]", False)]
            system = ""
        elif m["role"] == "assistant":
            pieces += [(" ", False), (f"{m['content'].strip()}</s>", True)]
    return pieces


def thinking(messages: list[Message]) -> Pieces:
    """Qwen3: reasoning is kept for the last reply only, and taken out of the content if it stands there."""
    pieces: Pieces = []
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        content, thought = m["content"], m.get("reasoning_content", "")
        if "</think>" in content:
            thought, content = content.split("</think>")[0], content.split("</think>")[-1]
            thought, content = thought.removeprefix("<think>").strip("\n"), content.lstrip("\n")
        if m["role"] == "assistant" and i > last:
            content = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{content.lstrip(chr(10))}"
        pieces += [
            (f"<|im_start|>{m['role']}\n", False),
            (f"{content}<|im_end|>", m["role"] == "assistant"),
            ("\n", False),
        ]
    return pieces


def opened(messages: list[Message]) -> Pieces:
    """QwQ and DeepSeek R1: the generation prompt opens the thinking, so the tag is not the model's to say."""
    pieces: Pieces = []
    for m in messages:
        if m["role"] == "assistant":
            thought = m.get("reasoning_content", "")
            pieces += [
                ("<|im_start|>assistant\n<think>\n", False),
                (f"{thought}</think>{m['content']}<|im_end|>", True),
            ]
        else:
            pieces += [(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>", False)]
        pieces += [("\n", False)]
    return pieces


def calls(messages: list[Message]) -> Pieces:
    """Qwen 2.5: tool calls as JSON between tags, results as user turns."""
    pieces: Pieces = []
    for m in messages:
        text = m.get("content") or ""
        for call in m.get("tool_calls", ()):
            function = call["function"]
            arguments = json.dumps(function["arguments"])
            text += f'\n<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
        role = "user" if m["role"] == "tool" else m["role"]
        if m["role"] == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
        pieces += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def renamed(messages: list[Message]) -> Pieces:
    """Gemma: the assistant is called model."""
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        name = "model" if m["role"] == "assistant" else m["role"]
        pieces += [
            (f"<start_of_turn>{name}\n", False),
            (f"{m['content'].strip()}<end_of_turn>", name == "model"),
            ("\n", False),
        ]
    return pieces


def bare(messages: list[Message]) -> Pieces:
    """Vicuna: no tokens but the end token, and the generation prompt has no line of its own."""
    pieces: Pieces = []
    for m in messages:
        if m["role"] == "assistant":
            pieces += [("ASSISTANT:", False), (f" {m['content']}</s>", True)]
        else:
            pieces += [(f"{m['role'].upper()}: {m['content']} ", False)]
    return pieces


def parts(messages: list[Message]) -> Pieces:
    return chatml(
        [
            {**m, "content": "".join(p["text"] for p in m["content"])} if isinstance(m["content"], list) else m
            for m in messages
        ]
    )


def channels(messages: list[Message]) -> Pieces:
    """Harmony: reasoning in a channel of its own, both are the model's to say."""
    pieces: Pieces = []
    for m in messages:
        if m["role"] == "assistant":
            thought = m.get("reasoning_content")
            said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
            pieces += [
                ("<|start|>assistant", False),
                (f"{said}<|channel|>final<|message|>{m['content']}<|return|>", True),
            ]
        else:
            pieces += [(f"<|start|>{m['role']}<|message|>{m['content']}<|end|>", False)]
    return pieces


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATES = {
    "chatml": Template(CHATML + ASK, chatml),
    "llama 3 (headers, trimmed)": Template(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        llama3, HEADERS,
    ),
    "llama 2 (system folded, no generation prompt)": Template(
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        folded, eos="</s>",
    ),
    "qwen 3 (history rewritten)": Template(
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}"
        "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
        "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
        thinking,
    ),
    "qwq (the prompt opens the thinking)": Template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' }}"
        "{{ (m.reasoning_content or '') + '</think>' + m.content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        opened,
    ),
    "qwen 2.5 (tool calls)": Template(
        "{% for m in messages %}{% set role = 'user' if m.role == 'tool' else m.role %}{{ '<|im_start|>' + role + '\n' }}"
        "{% if m.role == 'tool' %}{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% else %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{{ '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) "
        "+ '}\n</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
        calls,
    ),
    "gemma (roles renamed)": Template(
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        renamed, ("<start_of_turn>", "<end_of_turn>"),
    ),
    "vicuna (no turn tokens)": Template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
        "{% else %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        bare, eos="</s>",
    ),
    "content parts": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
        parts,
    ),
    "harmony (channels)": Template(
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% if m.reasoning_content %}{{ '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}"
        "{% endif %}{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}"
        "{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        channels, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>",
    ),
}  # fmt: skip


def chat(*turns: str, system: str | None = None) -> list[Message]:
    found = [{"role": "system", "content": system}] if system else []
    return found + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
CONVERSATIONS = {
    "one turn": chat("Hi", "Hello"),
    "three turns and a system": chat("a", "b", "c", "d", "e", "f", system="Be brief."),
    "the reply repeats the question": chat("Say yes", "Say yes"),
    "a reply equals an earlier one": chat("x", "yes", "yes", "yes"),
    "the reply is part of the system text": chat("x", "brief", system="Be brief."),
    "whitespace around the reply": chat("x", "  yes \n"),
    "whitespace around the question": chat("\n x ", "yes"),
    "no ASCII": chat("Grüße 😀 漢字", "مرحبا 👩‍👩‍👧 ok"),
    "template syntax in the text": chat("{{ bos_token }}", "{% if %} user\n assistant\n"),
    "a role's name as the reply": chat("assistant\n", "assistant\n"),
    "reasoning": [*chat("x"), {"role": "assistant", "content": "4", "reasoning_content": "2+2"}],
    "reasoning in two turns": [
        *chat("x"), {"role": "assistant", "content": "4", "reasoning_content": "2+2"},
        *chat("y"), {"role": "assistant", "content": "6", "reasoning_content": "3+3"},
    ],
    "reasoning inside the reply": chat("x", "<think>\n2+2\n</think>\n\n4"),
    "tool calls": [
        *chat("weather?"), {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sunny."},
    ],
    "a tool call without text": [*chat("weather?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ],
}  # fmt: skip

FITS = {  # conversations that only some templates can show
    "reasoning": ("qwen 3 (history rewritten)", "qwq (the prompt opens the thinking)", "harmony (channels)"),
    "reasoning in two turns": ("qwq (the prompt opens the thinking)", "harmony (channels)"),
    "tool calls": ("qwen 2.5 (tool calls)",),
    "a tool call without text": ("qwen 2.5 (tool calls)",),
    "parts": ("content parts",),
}


def encoder(template: Template, **options: Any) -> ChatEncoder:
    tokenizer = byte_tokenizer(template.jinja, [*SPECIAL, *template.special], template.eos)
    return ChatEncoder(ChatRenderer(tokenizer, **options), lambda row: Sample([conversation(row)]))


def pieces_of(made: ChatEncoder, messages: list[Message]) -> tuple[str, str, Any]:
    (encoded,) = made.encode([{"messages": messages}])
    if isinstance(encoded, Refused):
        raise encoded
    ((ids, mask),) = encoded.documents
    decode = made.renderer.tokenizer.decode
    return decode(ids.tolist()), decode(ids[mask].tolist()), ids


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


# -- what a message says of itself ----------------------------------------------------


def trained(messages: list[Message], template: str = "chatml", **options: Any) -> str:
    return pieces_of(encoder(TEMPLATES[template], **options), messages)[1]


NOT_TRAINED = [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"loss_weight": 0},
    {"train_detail": []}, {"weight": 1, "train": False}, {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]},
]  # fmt: skip


@pytest.mark.parametrize("said", NOT_TRAINED, ids=str)
def test_a_reply_that_says_so_is_not_trained(said: dict[str, Any]) -> None:
    messages = chat("a", "first", "b", "second")
    messages[1] |= said
    text, found, _ = pieces_of(encoder(TEMPLATES["chatml"]), messages)
    assert found == "second<|im_end|>"
    assert "weight" not in text and "train" not in text
    messages[3] |= said
    with pytest.raises(Refused, match=r"every reply says that it is not trained \(weight: 0, train: false\)"):
        trained(messages)


def test_weight_one_changes_nothing_and_train_true_trains_any_role() -> None:
    messages = chat("a", "first", "b", "second", system="s")
    assert trained([m | {"weight": 1, "loss": True} for m in messages]) == "first<|im_end|>second<|im_end|>"
    messages[1] |= {"train": True}
    assert trained(messages) == "a<|im_end|>first<|im_end|>second<|im_end|>"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"weight": 0.5}, "weight 0.5: only 0 .not trained. and 1 are possible"),
        ({"weight": True}, "weight True: only 0"),
        ({"train": "no"}, "train 'no', not true or false"),
        ({"train_detail": [{"begin_offset": 3}]}, "does not hold begin_offset, end_offset and train"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 99, "train": True}]},
            "reaches to character 99 of a text of 5",
        ),
        ({"train_detail": 5}, "'train_detail' is not a list"),
    ],
)
def test_a_mark_that_cannot_be_honoured_is_refused(said: dict[str, Any], reason: str) -> None:
    messages = chat("a", "first")
    messages[1] |= said
    with pytest.raises(Refused, match=reason):
        trained(messages)


@pytest.mark.parametrize("template", ["chatml", "llama 3 (headers, trimmed)", "qwen 3 (history rewritten)"])
def test_train_detail_trains_the_characters_it_names(template: str) -> None:
    """Ends are included, as Axolotl counts; the end of the turn goes with the last character."""
    end = "<|eot_id|>" if "llama" in template else "<|im_end|>"
    thought = "<think>\n\n</think>\n\n" if "qwen" in template else ""

    def with_detail(content: str, *ranges: tuple[int, int]) -> str:
        detail = [{"begin_offset": b, "end_offset": e, "train": True} for b, e in ranges]
        reply = {"role": "assistant", "content": content, "train_detail": detail}
        return trained([*chat("a"), reply], template)

    assert with_detail("one two three", (4, 6)) == "two"
    assert with_detail("one two three", (0, 2), (8, 12)) == f"{thought}onethree{end}"
    assert with_detail("one two three", (0, 12)) == f"{thought}one two three{end}"
    assert with_detail("é😀é two", (1, 1)) == "😀"


def test_a_mark_in_a_row_of_sharegpt_counts_too() -> None:
    row = {"conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "first", "weight": 0},
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "second"},
    ]}  # fmt: skip
    made = encoder(TEMPLATES["chatml"])
    ((ids, mask),) = made.encode([row])[0].documents  # type: ignore[union-attr]
    assert made.renderer.tokenizer.decode(ids[mask].tolist()) == "second<|im_end|>"


def test_last_turn_only_trains_all_behind_the_last_question() -> None:
    messages = [*chat("a", "first", "weather?"), {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
                {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}]  # fmt: skip
    found = trained(messages, "qwen 2.5 (tool calls)", last_turn_only=True)
    assert found.startswith("Let me see.\n<tool_call>") and found.endswith("Sunny.<|im_end|>")
    assert "first" not in found


# -- what a template leaves out -------------------------------------------------------

THOUGHTS = CONVERSATIONS["reasoning in two turns"]


def test_thoughts_that_a_template_forgets_are_refused_or_split_into_turns() -> None:
    template = TEMPLATES["qwen 3 (history rewritten)"]
    inline = chat("x", "<think>\n2+2\n</think>\n\n4", "y", "<think>\n3+3\n</think>\n\n6")
    for messages in (THOUGHTS, inline):
        with pytest.raises(Refused, match=r"leaves out .* of a message of role 'assistant'; data.split_turns=true"):
            trained(messages, "qwen 3 (history rewritten)")
        made = encoder(template, split_turns=True)
        (encoded,) = made.encode([{"messages": messages}])
        assert not isinstance(encoded, Refused)
        decode = made.renderer.tokenizer.decode
        found = [(decode(ids.tolist()), decode(ids[mask].tolist())) for ids, mask in encoded.documents]
        first = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        replies = ["<think>\n2+2\n</think>\n\n4<|im_end|>", "<think>\n3+3\n</think>\n\n6<|im_end|>"]
        assert found[0] == (f"{first}{replies[0]}\n", replies[0])
        second = f"{first}4<|im_end|>\n<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\n"
        assert found[1] == (f"{second}{replies[1]}\n", replies[1])
        assert trained(messages, "qwen 3 (history rewritten)", last_turn_only=True) == replies[1]


def test_turns_of_which_nothing_is_trained_are_only_context() -> None:
    messages = chat("a", "first", "b", "second", "c", system="s")
    messages[2] |= {"weight": 0}
    made = encoder(TEMPLATES["chatml"], split_turns=True)
    (encoded,) = made.encode([{"messages": messages}])
    assert not isinstance(encoded, Refused)
    ((ids, mask),) = encoded.documents
    assert made.renderer.tokenizer.decode(ids[mask].tolist()) == "second<|im_end|>"
    assert "first" in made.renderer.tokenizer.decode(ids.tolist())


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
SWALLOWED = {
    "a developer's message": (
        "{% for m in messages %}{% if m.role != 'developer' %}" + CHATML.removeprefix("{% for m in messages %}").replace(
            "{% endfor %}", "{% endif %}{% endfor %}") + ASK,
        {"messages": [{"role": "developer", "content": "Be brief."}, *chat("a", "b")]}, "leaves out a message of role 'developer'",
    ),
    "tools": (CHATML + ASK, {"messages": chat("a", "b"), "tools": TOOLS}, "leaves out the tools"),
    "tool calls": (CHATML + ASK, {"messages": CONVERSATIONS["tool calls"]}, "leaves out a tool call"),
    "reasoning": (CHATML + ASK, {"messages": CONVERSATIONS["reasoning"]}, "leaves out the reasoning"),
    "text beside a tool call": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
        {"messages": [*chat("a"), {"role": "assistant", "content": "Hm.", "tool_calls": [{"function": {"name": "f"}}]}]},
        "leaves out a part of the text",
    ),
    "a list's own spelling": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content | list) ~ '<|im_end|>\n' }}{% endfor %}" + ASK,
        {"messages": chat("a", "b")}, "leaves out a message|changes or inspects|cuts the text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWALLOWED)
def test_what_a_template_swallows_is_refused(name: str) -> None:
    jinja, row, reason = SWALLOWED[name]
    (encoded,) = encoder(Template(jinja, chatml)).encode([row])
    assert isinstance(encoded, Refused)
    assert any(word in str(encoded) for word in reason.split("|")), encoded


def test_tools_that_a_template_writes_are_fine() -> None:
    jinja = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML + ASK
    (encoded,) = encoder(Template(jinja, chatml)).encode([{"messages": chat("a", "b"), "tools": TOOLS}])
    assert not isinstance(encoded, Refused)


# -- spellings of content -------------------------------------------------------------


def test_parts_are_joined_for_a_template_that_wants_text_and_text_is_a_part_where_it_wants_parts() -> None:
    assert trained(CONVERSATIONS["parts"]) == "cd<|im_end|>"
    only_parts = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    assert pieces_of(encoder(Template(only_parts + ASK, chatml)), chat("a", "b"))[1] == "b<|im_end|>"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
@pytest.mark.parametrize(
    "said",
    ["{{ m.content }}", "{{ m.content or '' }}", "{% if m.content is none %}{% else %}{{ m.content }}{% endif %}", "{{ m.content + '' }}"],
)  # fmt: skip
def test_a_tool_call_without_text_is_trained_whatever_the_template_asks_of_the_content(
    content: dict[str, Any], said: str
) -> None:
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + said + "{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
    )
    messages = [*chat("a"), {"role": "assistant", **content, "tool_calls": [{"function": {"name": "weather"}}]}]
    assert pieces_of(encoder(Template(jinja, chatml)), messages)[1] == "weather<|im_end|>"


def test_a_template_that_calls_tools_only_where_the_content_is_null_gets_null() -> None:
    call = "{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + call + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
    )
    messages = [*chat("a"), {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"}}]}]
    assert pieces_of(encoder(Template(jinja, chatml)), messages)[1] == "f<|im_end|>"
    printed = Template(jinja.replace("{{ m.tool", "None{{ m.tool"), chatml)
    with pytest.raises(Refused):
        pieces_of(encoder(printed), messages)


def test_the_reason_is_that_of_the_spelling_that_the_template_can_read() -> None:
    only_parts = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
    with pytest.raises(Refused, match="writes no end-of-turn token"):  # and not that it leaves out the user's text
        pieces_of(encoder(Template(only_parts, chatml)), chat("a", "b"))


def test_a_tool_result_that_repeats_the_name_of_the_call_is_no_part_of_the_reply() -> None:
    """As gpt-oss writes it: the result of a call is a message from the tool, under the tool's name."""
    jinja = (
        "{% set ns = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}"
        "{{ '<|start|>assistant to=' + ns.name + '<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|start|>' + ns.name + '<|message|>' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    template = Template(jinja, channels, ("<|start|>", "<|message|>", "<|end|>", "<|call|>"), "<|end|>")
    messages = [*chat("weather?"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"},
                {"role": "assistant", "content": "Sunny."}]  # fmt: skip
    _, found, _ = pieces_of(encoder(template), messages)
    arguments = '{"city": "Rome", "days": 2}'
    assert found == f" to=weather<|message|>{arguments}<|call|><|message|>Sunny.<|end|>"
