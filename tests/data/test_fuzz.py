"""What comes from outside is data: whatever it holds, it is used or refused with a message, and never run."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokens import SPECIAL, byte_tokenizer
from toy import trainer

from posttrain import yaml12
from posttrain.blocks.checkpoints.checkpoint import Resume
from posttrain.blocks.checkpoints.manifest import checkpoints, verify
from posttrain.blocks.data.kinds.preference import PreferenceData
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.schemas import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.recipes.convert import convert
from posttrain.synth.clients.cortex import CompleteDialect, SQLDialect
from posttrain.synth.ledger.pricing import usage
from posttrain.synth.ledger.replies import limits, verdict
from posttrain.synth.ledger.session import finish
from posttrain.synth.pipelines.rows import Reply, message_text
from posttrain.synth.sending.service import OpenAIDialect
from posttrain.synth.sending.wires.anthropic import MESSAGES
from posttrain.synth.sending.wires.bedrock import CONVERSE
from posttrain.synth.sending.wires.gemini import GENERATE
from posttrain.synth.steps.form import Form, Unfit

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
ROOT = Path(__file__).parent.parent.parent

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(SPECIAL)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)  # fmt: skip
names = ["weight", "train", "train_detail", "begin_offset", "end_offset", "history", "label", "system", "instruction", "output",
         "function_call", "gpt", "human", "observation", "images", "messages", "prompt", "response", "chosen", "rejected", "role", "content", "tool_calls", "tools", "from", "value",
         "conversations", "user", "assistant", "system", "score", "type", "text", "function", "arguments"]  # fmt: skip
chat_like = st.recursive(
    scalars | st.sampled_from(names), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def read(file: Path) -> None:
    """Read a file as both kinds of data do."""
    for kind in (SFTData, PreferenceData):
        data = kind(
            sources=[Source(name_or_path=str(file))], invalid="drop", overflow="drop", cache_dir=file.parent / "cache"
        )
        encoder = data.encoder(TOKENIZER)
        with suppress(DataError):
            rows = [row.values for row, _ in data.sources[0].read(data.sources[0].open())]
            for encoded in encoder.encode(rows):
                assert isinstance(encoded, Refused) or encoded.documents[0][1].any()


@FUZZ
@given(content=st.binary(max_size=400), kind=st.sampled_from(["jsonl", "json", "csv", "parquet", "jsonl.gz", "arrow"]))
def test_any_bytes_are_rows_or_an_error(tmp_path: Path, content: bytes, kind: str) -> None:
    file = tmp_path / f"data.{kind}"
    file.write_bytes(content)
    read(file)


@FUZZ
@given(rows=st.lists(st.dictionaries(st.sampled_from(names), chat_like, max_size=4), max_size=4))
@example(rows=[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"a": 1}}]}])
@example(rows=[{"prompt": "\ud800", "response": "a"}])
def test_any_json_is_rows_or_an_error(tmp_path: Path, rows: list[Any]) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(file)


@FUZZ
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_a_damaged_table_is_rows_or_an_error(tmp_path: Path, seed: int, share: float) -> None:
    import pyarrow
    import pyarrow.parquet

    good = tmp_path / "good.bin"
    if not good.exists():
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"] * 50, "response": ["a"] * 50}), good)
    content = bytearray(good.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1 + seed % 255
    file = tmp_path / "data.parquet"
    file.write_bytes(content)
    read(file)


theirs = ["type", "model", "name_or_path", "data", "sources", "deepspeed", "zero_optimization", "optimizer", "learning_rate",
          "scheduler", "name", "num_warmup_steps", "num_decay_steps", "train_iters", "checkpoint", "output_dir", "auto_resume",
          "save_every_n_steps", "logger", "wandb", "enable", "peft_config", "r", "train_eval_split", "wds", "sft", "huggingface",
          "epochs", "scheduler_specific_kwargs", "sample_count", "betas", "code"]  # fmt: skip
arctic = st.recursive(
    scalars | st.sampled_from(theirs),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(theirs), inner, max_size=5),
    max_leaves=20,
)


@FUZZ
@given(recipe=st.dictionaries(st.sampled_from(theirs), arctic, max_size=6))
def test_any_recipe_of_arctic_training_is_converted_or_an_error(tmp_path: Path, recipe: dict[str, Any]) -> None:
    file = tmp_path / "theirs.yml"
    file.write_text(yaml12.write({"model": {"name_or_path": "a"}, **recipe}), errors="replace")
    with suppress(RecipeError):
        text, _ = convert(file)
        yaml12.parse(text, lambda line: (line, ""))


PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m.content }}", "{{ m['content'] | trim }}", "{{ m }}",
    "{% if add_generation_prompt %}", "{% endif %}", "<|im_start|>", "<|im_end|>", "{{ eos_token }}", "\n", "{{", "%}",
    "{{ m.content.split('x')[9] }}", "{{ 1 / 0 }}", "{{ messages[99].role }}", "{{ raise_exception('no') }}", "x",
    "{{ messages | tojson }}", "{% set ns = namespace(a=1) %}", "{{ ns.a }}", "{% generation %}", "{% endgeneration %}",
    "{{ strftime_now('%Y') }}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ m.content[::-1] }}", "{% else %}",
    "{{ loop.index0 }}", "{{ undefined.name.more }}", "{% include 'file' %}", "{{ m.content | int }}", "{{ '%d' % 'a' }}",
]  # fmt: skip


def render(template: str) -> str:
    """Render a conversation with a template."""
    tokenizer = byte_tokenizer(template)
    chat = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}
    return ChatRenderer(tokenizer).render(chat).text


@FUZZ
@given(parts=st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_template_renders_or_is_refused(parts: list[str]) -> None:
    with suppress(PosttrainError, Refused):
        render("".join(parts))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
    "{{ strftime_now.__self__.__class__.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{% set x = messages.append({'role': 'assistant', 'content': 'forged'}) %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(escape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        text = render(escape + TEMPLATES["chatml"])
    except (PosttrainError, Refused):
        text = ""
    assert not list(tmp_path.iterdir())
    assert "class" not in text and "forged" not in text and "builtins" not in text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, max_steps=1, checkpoint=[Resume()]).train()
    return checkpoints(folder)[0]


@FUZZ
@given(draw=st.randoms(use_true_random=False), how=st.sampled_from(["flip", "cut", "grow", "swap"]))
def test_any_damage_to_a_checkpoint_is_noticed(checkpoint: Path, tmp_path: Path, draw: random.Random, how: str) -> None:
    copy = tmp_path / checkpoint.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    assert verify(copy) is None
    file = draw.choice(sorted(copy.iterdir()))
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    if how == "flip":
        content[at] ^= draw.randrange(1, 256)
    elif how == "cut":
        del content[at:]
    elif how == "grow":
        content += bytes([draw.randrange(256)])
    else:
        content[at], content[at - 1] = content[at - 1], content[at]
    same_json = file.suffix == ".json" and parses_to_the_same(file.read_bytes(), bytes(content))
    same = bytes(content) == file.read_bytes() or same_json
    file.write_bytes(content)
    assert same or verify(copy) is not None


def parses_to_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


REQUEST = SimpleNamespace(endpoint="/chat/completions")


def dialects() -> list[Any]:
    return [
        OpenAIDialect(),
        CompleteDialect(),
        SQLDialect({}, 60.0),
        MESSAGES,
        CONVERSE,
        GENERATE,
    ]


reply_names = ["choices", "message", "messages", "content", "finish_reason", "usage", "error", "code", "type", "data", "delta",
               "prompt_tokens", "completion_tokens", "logprobs", "top_logprobs", "token", "logprob", "reasoning_content", "stop_reason",
               "tool_calls", "function", "name", "arguments", "text", "thinking", "tool_use", "input_tokens", "input",
               "candidates", "parts", "functionCall", "usageMetadata", "output", "toolUse", "reasoningContent"]  # fmt: skip
reply_like = st.recursive(
    scalars | st.sampled_from(reply_names),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(reply_names), inner, max_size=5), max_leaves=20,
)  # fmt: skip
headers = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "x-should-retry", "x-ratelimit-limit-requests", "x-request-id"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12), max_size=3,
)  # fmt: skip


@FUZZ
@given(
    body=reply_like.map(json.dumps).map(str.encode) | st.binary(max_size=200), status=st.integers(200, 599),
    said=headers, stream=st.booleans(),
)  # fmt: skip
@example(
    body=b'{"type": "message", "content": [{"type": "text", "text": 3}], "usage": {"input_tokens": []}}',
    status=200,
    said={},
    stream=False,
)
@example(
    body=b'{"choices": [{"message": {"tool_calls": [{"function": 3}], "content": [{"thinking": 3}]}}]}',
    status=200,
    said={},
    stream=False,
)
@example(body=b'{"choices": [3]}', status=200, said={}, stream=False)
@example(body=b'{"choices": [{"message": "x"}]}', status=200, said={}, stream=False)
@example(body=b'{"data": [{"0": 1}]}', status=200, said={}, stream=False)
@example(body=b'data: {"choices": [{"delta": 3}]}\n\n', status=200, said={}, stream=True)
def test_any_reply_is_an_answer_or_an_error(body: bytes, status: int, said: dict[str, str], stream: bool) -> None:
    kind = {"content-type": "text/event-stream"} if stream else {}
    for dialect in dialects():
        response = httpx.Response(status, headers={**said, **kind}, content=body)
        limits(response.headers)
        found = dialect.reply(response)
        judged = verdict(status, response.headers, found)
        if judged.action.value == "result":
            assert all(isinstance(tokens, int) for tokens in usage(found))
            finish(REQUEST, found)
            reply = Reply(found, None)
            assert isinstance(reply.text, str | None)  # type: ignore[arg-type]
            assert isinstance(reply.reasoning, str | None)  # type: ignore[arg-type]
            assert isinstance(reply.said, str | None)  # type: ignore[arg-type]
            message_text(reply.choice.get("message") or {})
            with suppress(Unfit):
                Form({"type": "object", "properties": {"text": {"type": "string"}}}).read(reply)


def test_no_file_is_unpickled() -> None:
    """Of our code, nothing can: no pickle, no torch.load, no numpy files with objects."""
    ours = {
        "steps/jail.py",  # a process that has locked itself in, to run what a model wrote
        "encoding/processes.py", "encoding/worker.py",  # two processes of one run, over their own pipes
    }  # fmt: skip
    for file in (ROOT / "posttrain").rglob("*.py"):
        if f"{file.parent.name}/{file.name}" in ours:
            continue
        text = file.read_text()
        for forbidden in ("import pickle", "torch.load(", "allow_pickle=True", "joblib", "eval(", " exec("):
            assert forbidden not in text.replace(".eval(", ""), f"{file}: {forbidden}"


SECRET = "sk-do-not-show-9f3b"
LEAKING = """
model: {{name_or_path: {model}, token: "${{MY_SECRET}}"}}
data: {{sources: [{data}], max_length: 64}}
micro_batch_size: 2
max_steps: 3
log_every: 1
accelerator: cpu
output_dir: run
code: [failing.py]
callbacks: [failing]
"""
FAILING = """
import posttrain
@posttrain.block("callback", "failing")
class Failing:
    @posttrain.before("trainer.step")
    def fail(self, trainer, batches):
        if trainer.run.step == 1:
            raise ZeroDivisionError(f"with {trainer.model!r}")
"""


def test_a_secret_is_in_no_file_and_no_message(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("type: sft" + LEAKING.format(model=tiny_model, data=sums))
    (tmp_path / "failing.py").write_text(FAILING)
    environment = {
        **os.environ,
        "MY_SECRET": SECRET,
        "POSTTRAIN_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    said = ""
    for command in (["check"], ["show"], ["show", "--json"], ["train"]):
        done = subprocess.run([sys.executable, "-m", "posttrain.cli", command[0], "recipe.yaml", *command[1:]], text=True,
                              capture_output=True, env=environment, cwd=tmp_path, check=False)  # fmt: skip
        said += done.stdout + done.stderr
    assert "ZeroDivisionError: with HFModel" in said  # it did get as far as that
    assert (tmp_path / "run" / "failure.txt").exists()
    assert SECRET not in said
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
