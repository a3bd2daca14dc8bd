"""Chat templates and conversations, and for each template what it must write, as pieces (text, trained)."""

import json
from collections.abc import Callable
from typing import Any

import attrs
from tokens import ASK, CHATML, SPECIAL, byte_tokenizer

from posttrain.blocks.data.encoding.encoders import ChatEncoder
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


def trained(messages: list[Message], template: str = "chatml", **options: Any) -> str:
    return pieces_of(encoder(TEMPLATES[template], **options), messages)[1]
