"""What comes after training: `posttrain chat`, `eval`, `merge` and `push`."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.blocks.models.exports import end_of_turn, export_of, open_model
from posttrain.blocks.models.speculator.speculate import speculate
from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.recipes import load as recipes
from posttrain.tools.afterwards.evaluate import Result, compare, evaluate
from posttrain.tools.afterwards.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
SUMS = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(4) for b in range(2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("afterwards")
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return folder


def trained(place: Path, name: str, model: Path, keys: str, more: str = "") -> Path:
    file = place / f"{name}.yaml"
    file.write_text(
        f"model: {{name_or_path: {model}{keys}}}\ndata: {{sources: [{place}/sums.jsonl], max_length: 64}}\n"
        f"optimizer: {{lr: 1e-2}}\naccelerator: cpu\noutput_dir: {place / name}\nlogger: []\n{more}"
    )
    assert recipes.load(file).train().status == "finished"
    return place / name


@pytest.fixture(scope="module")
def run(place: Path, tiny_model: Path) -> Path:
    """A run that knows its eight sums by heart."""
    return trained(place, "sft", tiny_model, "", "type: sft\nmax_steps: 150\nmicro_batch_size: 8\n")


@pytest.fixture(scope="module")
def adapter(place: Path, tiny_model: Path) -> Path:
    return trained(place, "lora", tiny_model, ", lora: {r: 4}", "type: sft\nmax_steps: 5\n")


def by_hand(model: Any, tokenizer: Any, text: str, limit: int = 12) -> str:
    """The likeliest continuation, one token at a time."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    made: list[int] = []
    while len(made) < limit and (not made or made[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return str(tokenizer.decode(made, skip_special_tokens=True))


# -- chat -----------------------------------------------------------------------------


def test_a_conversation_holds_what_was_said_before(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("3+1=\n\n1+1=\n/new\n2+1=\n"))
    assert main(["chat", str(run), "--max-new-tokens", "12", "--temperature", "0"]) == 0
    export = run / "huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    first = "<|im_start|>user\n3+1=<|im_end|>\n<|im_start|>assistant\n"
    assert by_hand(model, tokenizer, first) == "4"
    second = f"{first}4<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    said = capsys.readouterr().out.splitlines()
    assert (said[0], said[-1]) == ("4", "3")
    assert "\n".join(said[1:-1]) == by_hand(model, tokenizer, second)


def test_a_file_of_prompts_is_answered(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("3+1=\n\n2+0=\n")
    rows = [
        {"messages": [{"role": "user", "content": "3+1="}, {"role": "assistant", "content": "?"}]},
        {"prompt": "2+0="},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("p.txt", "p.jsonl"):
        out = tmp_path / f"{name}.out.jsonl"
        assert main(["chat", str(run), "--prompts", str(tmp_path / name), "-o", str(out)]) == 0
        found = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
        assert [[m["content"] for m in chat] for chat in found] == [["3+1=", "4"], ["2+0=", "2"]]
    assert "2 conversations" in capsys.readouterr().out
    assert main(["chat", str(run), "--prompts", str(tmp_path / "p.txt"), "--system", "Be exact."]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["messages"][0]["content"] == "Be exact."
    assert sys.stdout.closed is False


def test_an_adapter_is_opened_with_its_base(adapter: Path, tiny_model: Path) -> None:
    from peft import PeftModel

    ids = torch.tensor([[5, 6, 7, 9]])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter / "huggingface")
    with torch.no_grad():
        torch.testing.assert_close(open_model(str(adapter)).hf(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_swiftkv_and_speculators_answer(place: Path, run: Path, tmp_path: Path) -> None:
    """A speculator says what its base says; a SwiftKV model is opened as itself."""
    base = run / "huggingface"
    heads = ", n_speculator_heads: 2, speculator_width: 32"
    drafts = trained(place, "drafts", base, heads, "type: spec-decode\nmax_steps: 3\ngenerate_from: 10\n")
    opened = open_model(str(drafts))
    assert opened.speculator is not None
    assert "with a speculator" in str(opened)
    (tmp_path / "p.txt").write_text("3+1=\n")
    for name in (drafts, run):
        assert main(["chat", str(name), "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / name.name)]) == 0
    assert (tmp_path / "drafts").read_text() == (tmp_path / "sft").read_text()
    ids = torch.tensor([[5, 6, 7]])
    assert speculate(opened.hf, opened.speculator, ids, 4)[0].tolist() == (
        open_model(str(run)).hf.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    )
    shared = trained(place, "shared", base, ", num_key_value_layers: 1", "type: swiftkv\nmax_steps: 2\n")
    assert type(open_model(str(shared)).hf).__name__ == "LlamaSwiftKVForCausalLM"
    assert main(["chat", str(shared), "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "kv")]) == 0


def test_a_name_that_is_a_slip_is_noticed_before_the_hub_is_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "runs").mkdir(exist_ok=True)
    (run.parent / "runs" / "first").mkdir(exist_ok=True)
    assert export_of("runs/firts") == "runs/firts"
    assert (
        "there is no folder runs/firts here, so it is looked for on the hub; did you mean 'runs/first'?" in caplog.text
    )
    caplog.clear()
    assert export_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert caplog.text == ""


def test_what_cannot_be_talked_to_is_refused(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder /nowhere"):
        open_model("/nowhere")
    (tmp_path / "recipe.yaml").write_text("type: sft\nmodel: {name_or_path: x}\n")
    with pytest.raises(RecipeError, match="has exported no model yet"):
        open_model(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert main(["chat", str(tmp_path / "base")]) == 2
    said = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**said, "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(RecipeError, match="is a reward model"):
        open_model(str(tmp_path / "base"))


def test_a_conversation_that_is_too_long_says_so(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 1100 + "\n"))
    assert main(["chat", str(tiny_model)]) == 0
    found = capsys.readouterr()
    assert "and the model reads 1,024: /new begins another" in found.out + found.err


def test_the_end_of_a_turn_is_read_off_the_template(tiny_model: Path) -> None:
    """Also where the configuration names another end, as that of a base model does."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize(
    "row", ['{"messages": []}', '{"prompt": ""}', '{"x": 1}', '{"messages": [{"role": "system", "content": "s"}]}']
)
def test_a_row_that_asks_nothing_is_a_message_with_its_place(run: Path, tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    for command in (["chat", str(run), "--prompts"], ["eval", str(run), "--data"]):
        assert main([*command, str(tmp_path / "rows.jsonl")]) == 2
    with pytest.raises(RecipeError, match=r"rows.jsonl:1: "):
        evaluate(str(run), tmp_path / "rows.jsonl", output_dir=tmp_path)


# -- eval -----------------------------------------------------------------------------


def test_models_are_compared_on_the_same_rows(
    run: Path, tiny_model: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked = ["eval", str(tiny_model), str(run), "--data", str(place / "sums.jsonl"), "--check", "number"]
    assert main([*asked, "--max-new-tokens", "8"]) == 0
    output = capsys.readouterr().out
    assert "100.0%  [67.6%, 100.0%]" in output  # Wilson's interval of 8 of 8
    assert "row by row: +100.0 points [+100.0, +100.0], 8 rows better, 0 worse, p = 0.0078" in output
    folder = run / "evals" / "sums-number"
    said = json.loads((folder / "summary.json").read_text())
    assert (said["right"], said["rows"], said["cut"]) == (1.0, 8, 0)
    rows = [json.loads(line) for line in (folder / "2-verify.jsonl").read_text().splitlines()]
    assert [(row["answer"], row["response"]) for row in rows] == [(row["response"],) * 2 for row in SUMS]
    assert (tmp_path / "evals").is_dir()  # of what is no run
    monkeypatch.setattr("posttrain.synth.clients.transformers.open_model", lambda *_: pytest.fail("asked again"))
    assert main([*asked, "--max-new-tokens", "8"]) == 0


def test_a_check_of_your_own_and_one_that_fails(run: Path, place: Path, tmp_path: Path) -> None:
    def short(answer: str, row: dict[str, Any], *, wanted: str = "answer") -> float:
        if row["answer"] == "4":
            raise KeyError("no")
        return len(answer) / 2

    found = evaluate(str(run), place / "sums.jsonl", short, max_new_tokens=8, output_dir=tmp_path)
    assert set(found.scores.values()) == {0.5}
    assert len(found.scores) == 7
    assert sum(found.unscored.values()) == 1


def test_rows_without_an_answer_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "3+1="}], "right": "4"}\n')
    with pytest.raises(RecipeError, match=r"no reply at the end to compare with: say by --wanted"):
        evaluate(str(run), tmp_path / "rows.jsonl")
    found = evaluate(str(run), tmp_path / "rows.jsonl", "number", wanted="right", max_new_tokens=8, output_dir=tmp_path)
    assert found.scores == {0: 1.0}
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecipeError, match="holds no rows"):
        evaluate(str(run), tmp_path / "empty.jsonl")
    with pytest.raises(RecipeError, match="there is no verifier 'nubmer'; did you mean 'number'"):
        evaluate(str(run), tmp_path / "rows.jsonl", "nubmer", wanted="right")


def test_intervals_and_mcnemar_by_known_values() -> None:
    """8 of 10: Wilson's interval is 49.0 to 94.3 %; 5 rows better and 1 worse: p = 2 * (1 + 6) / 64."""
    scores = {n: float(n < 8) for n in range(10)}
    made = [
        Result(name, s, 0, {}, Path())
        for name, s in (("a", scores), ("b", {n: float(n >= 1 and n < 10) for n in scores}))
    ]
    assert [round(x, 3) for x in made[0].right] == [0.8, 0.49, 0.943]
    better = {n: float(n in (0, 1, 2, 3, 4)) for n in range(10)}
    worse = {n: float(n == 9) for n in range(10)}
    found = compare(Result("w", worse, 0, {}, Path()), Result("b", better, 0, {}, Path()))
    assert (found.better, found.worse, found.p_value) == (5, 1, 14 / 64)
    assert found.difference.value == pytest.approx(0.4)


def test_tasks_of_the_harness_need_the_harness_and_are_checked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it installed, a task of one's own is run; CI has it not, and is told what to install."""
    rows = [{"question": "3+1=", "answer": "4"}, {"question": "1+1=", "answer": "7"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(f"""
task: own_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|im_end|>"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    arguments = ["eval", str(run), "--tasks", "own_sums", "--task-folder", str(tmp_path), "-o", str(tmp_path / "out")]
    code = main(arguments)
    found = capsys.readouterr()
    if importlib.util.find_spec("lm_eval") is None:
        assert code == 2
        assert "pip install 'posttrain[eval]'" in found.err
        return
    assert code == 0
    assert "0.5000" in found.out
    assert (tmp_path / "out" / "lm-eval-own_sums.json").is_file()
    assert main([*arguments[:3], "own_smus", *arguments[4:]]) == 2
    assert "no task 'own_smus'; did you mean 'own_sums'?" in capsys.readouterr().err


# -- merge ----------------------------------------------------------------------------


def test_a_merged_model_is_the_adapter_on_its_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    assert "8 texts" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, open_model(str(adapter)).hf(ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 2  # not empty
    assert merge(str(adapter / "huggingface"), tmp_path / "by-export").rows == 8


def test_a_merge_that_loses_the_tuning_is_refused(adapter: Path, run: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    weak = shutil.copytree(adapter / "huggingface", tmp_path / "weak")
    tensors = load_file(weak / "adapter_model.safetensors")
    small = {name: 1e-3 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(small, weak / "adapter_model.safetensors")
    assert main(["merge", str(weak), "-o", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if "merged" in path.name) == []
    assert main(["merge", str(weak), "-o", str(tmp_path / "merged")]) == 0
    assert main(["merge", str(run)]) == 2  # a whole model


# -- push -----------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub needs of the hub for a commit."""

    files: dict[str, bytes]
    calls: list[tuple[str, str | None, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = [json.loads(line) for line in body.splitlines() if line.strip()]
        self.calls.append((self.path, self.headers["Authorization"], said))
        if self.path == "/api/repos/create":
            return self.answer(
                {"url": f"http://{self.headers['Host']}/me/tiny"} if "tiny" in said[0]["name"] else {"error": "no"},
                said,
            )
        if self.path.startswith("/api/models/me/tiny/preupload/"):
            wanted = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in said[0]["files"]]
            return self.answer({"files": wanted}, said)
        if "/commit/" in self.path:
            found = [line["value"] for line in said if line["key"] == "file"]
            self.files.update({f["path"]: base64.b64decode(f["content"]) for f in found})
            return self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1",
                    "commitOid": "1",
                    "pullRequestUrl": None,
                },
                said,
            )
        return self.answer({"errors": [], "warnings": []}, said)

    def answer(self, body: Any, said: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(403 if "error" in body else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    kind = type("Kind", (Hub,), {"files": {}, "calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_export_is_uploaded_with_a_card(
    run: Path, place: Path, tiny_model: Path, hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    address, seen = hub
    evaluate(str(run), place / "sums.jsonl", "number", max_new_tokens=8)

    def push(*arguments: str) -> Any:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-m", "posttrain.cli", "push", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    done = push(str(run), "me/tiny", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{address}/me/tiny/commit/1" in done.stdout
    exported = {path.name for path in (run / "huggingface").iterdir()} - {"posttrain-export.json"}
    assert set(seen.files) == exported | {"README.md"}
    assert seen.files["model.safetensors"] == (run / "huggingface" / "model.safetensors").read_bytes()
    assert {authorization for _, authorization, _ in seen.calls} == {"Bearer hf_secret"}
    assert seen.calls[0][2][0]["visibility"] == "private"
    card = seen.files["README.md"].decode()
    assert "tags: [posttrain, sft]" in card
    assert "| sums.jsonl | 8 rows in, 8 documents" in card
    assert "| sums.jsonl | number | 100.0% [67.6%, 100.0%] | 8 |" in card
    assert str(place) not in card  # whose folders they are is nobody's business
    refused = push(str(run), "me/other")
    assert refused.returncode == 1
    assert "could not be uploaded to me/other" in refused.stderr
    assert "hf_secret" not in refused.stderr + refused.stdout
    assert push(str(tmp_path), "me/tiny").returncode == 2


# -- view -----------------------------------------------------------------------------


def test_a_run_is_one_page(run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves, right answers, samples, rows with their masks, recipe and versions; what was said is no markup."""
    evaluate(str(run), place / "sums.jsonl", "number", max_new_tokens=8)
    (run / "samples.jsonl").write_text('{"step": 0, "prompt": "<b>3+1=", "reply": "</pre><script>"}\n{"step": 1, "pro')
    lines = ["".join(json.dumps({"step": n, "time": n, "loss": 1 / n, "lr": 1e-3, "tokens": 5}) + "\n") for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert main(["view", str(run), "-o", str(tmp_path / "view.html")]) == 0
    page = (tmp_path / "view.html").read_text()
    assert "&lt;/pre&gt;&lt;script&gt;" in page and "<script" not in page
    for said in ("loss by step", "100.0%", "67.6% to 100.0%", "name_or_path", "transformers", "10 tokens", "2 steps"):
        assert said in page
    assert "<mark>0&lt;|im_end|&gt;</mark>" in page
    assert main(["view", str(place)]) == 2
    assert "holds no recipe.yaml" in capsys.readouterr().err


def test_the_page_shows_what_a_policy_said(tmp_path: Path) -> None:
    from posttrain.tools.afterwards.view import page

    (tmp_path / "recipe.yaml").write_text("type: grpo\nmodel: {name_or_path: x}\n")
    reply = {
        "text": "46",
        "ids": [1],
        "ended": True,
        "reward": 1.0,
        "rewards": {"exact": 1.0},
        "failed": {},
        "advantage": 0.5,
    }
    groups = [
        {"step": n, "prompt": "rows.jsonl:1", "text": f"34+{n}=", "row": {}, "replies": [reply, reply]}
        for n in range(20)
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    found = page(tmp_path)
    assert "reward 1, advantage 0.5" in found
    assert "34+0=" in found and "34+19=" in found and "34+10=" not in found


# -- while it learns ------------------------------------------------------------------


def test_right_answers_are_counted_while_a_model_learns(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    """At the end it knows the sums, and that model is the one that is kept."""
    file = tmp_path / "learn.yaml"
    file.write_text(f"""
type: sft
model: {{name_or_path: {tiny_model}}}
data: {{sources: [{place}/sums.jsonl], eval_sources: [{place}/sums.jsonl], max_length: 64}}
optimizer: {{lr: 1e-2}}
micro_batch_size: 8
max_steps: 150
eval_every: 75
accelerator: cpu
logger: [jsonl]
callbacks:
  - {{type: right-answers, source: {place}/sums.jsonl, check_by: number, max_new_tokens: 8}}
  - {{type: keep-best, metric: eval_right, mode: max}}
output_dir: {tmp_path / "run"}
""")
    assert recipes.load(file).train().memory["keep-best"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["eval_right"] for line in lines if "eval_right" in line]
    assert len(shares) == 2
    assert (
        shares[-1] == evaluate(str(tmp_path / "run"), place / "sums.jsonl", "number", max_new_tokens=8).right.value == 1
    )
    with pytest.raises(RecipeError, match="there is no verifier 'nubmer'"):
        recipes.load(file, ["callbacks.0.check_by=nubmer"])


def test_the_card_has_the_last_evaluation_and_reads_metrics_that_a_crash_cut(tmp_path: Path) -> None:
    from posttrain.tools.afterwards.push import card

    (tmp_path / "recipe.yaml").write_text("type: sft\nmodel: {name_or_path: org/base}\n")
    lines = [{"step": 1, "loss": 2.0, "eval_loss": 3.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    found = card(tmp_path, "me/tiny")
    for said in ("| step | 3 |", "| loss | 0.5 |", "| eval_loss | 3 |", "base_model: org/base"):
        assert said in found
