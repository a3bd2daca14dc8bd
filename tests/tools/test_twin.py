"""`posttrain check --twin`: it passes what is sound, and finds each of the mistakes that people make."""

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers

import posttrain.words
from posttrain import yaml12
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.model import HFModel
from posttrain.cli import main
from posttrain.tools.twin import proofs
from posttrain.tools.twin.twin import Failed, Skipped, Twin, quietly

BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
"""No end of turn."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = CHATML.replace(
    "\n{{ m.content", "\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content"
)
"""As Qwen3's does, for the last reply alone, and not in its generation prompt."""
CUT = CHATML.replace("trim", "truncate(9)")
"""A part of the content is lost."""
TWICE = "{{ bos_token }}{{ bos_token }}" + CHATML
FAMILIES: dict[str, Any] = {
    "llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config, "gemma3_text": transformers.Gemma3TextConfig,
    "mixtral": transformers.MixtralConfig, "qwen3_moe": transformers.Qwen3MoeConfig, "phi3": transformers.Phi3Config,
    "gpt_oss": transformers.GptOssConfig, "deepseek_v3": transformers.DeepseekV3Config,
}  # fmt: skip
MISTAKES = Path(__file__).parent.parent / "support" / "mistakes.py"
WORDS = "a quick brown fox jumps over the lazy dog and runs away from all of it".split()  # noqa: SIM905


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the twin of a recipe; keys are added to a plain one."""
    monkeypatch.chdir(tmp_path)
    chats = [
        {"prompt": f"say {n} words", "response": " ".join(WORDS[: 1 + n % 11]), "rejected": "no " * (n % 5 + 1)}
        for n in range(40)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pairs = [{"prompt": c["prompt"], "chosen": c["response"], "rejected": c["rejected"]} for c in chats]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def made(**keys: Any) -> Twin:
        pairs = keys.get("type") in ("dpo", "reward", "other-reference", "other-beginning")
        recipe = {
            "type": "sft", "code": str(MISTAKES), "model": {"name_or_path": str(tiny_model)},
            "data": {"sources": ["pairs.jsonl" if pairs else "chats.jsonl"], "max_length": 128},
            "micro_batch_size": 4, "max_steps": 20, **keys,
        }  # fmt: skip
        Path("recipe.yaml").write_text(yaml12.write(recipe))
        return Twin(Path("recipe.yaml"), [], Path(mkdtemp(dir=tmp_path)))

    with quietly():
        yield made


def failing(twin: Twin) -> set[str]:
    """Return the names of the checks that fail, of those that start no process."""
    checks = [check for check in proofs.CHECKS if check not in (proofs.ranks, proofs.resume)]
    return {result.name for result in proofs.prove(twin.path, [], checks) if result.passed is False}


@pytest.mark.parametrize("method", ["sft", "sound", "dpo", "reward"])
def test_what_is_sound_passes(make: Any, method: str) -> None:
    assert failing(make(type=method)) == set()


def test_a_template_that_adds_an_empty_thought_passes(make: Any) -> None:
    """Qwen3's does, to the reply after the last question."""
    twin = make(tokenizer={"chat_template": QWEN3})
    ids, mask = twin.sample(1)[0].encoded.documents[0]
    assert "<think>" in twin.tokenizer.decode(ids[mask])
    assert failing(twin) == set()


@pytest.mark.slow
def test_what_samples_passes(make: Any) -> None:
    """Also where the recipe's own reward gives random weights nothing at all."""
    keys: dict[str, Any] = {"rewards": [{"type": "verify", "function": "exact", "wanted": "response"}], "beta": 0.1}
    for more in ({}, {"updates": 2, "loss_type": "gspo", "max_grad_norm": None}):
        twin = make(type="grpo", data={"type": "prompts", "sources": ["chats.jsonl"]}, **keys, **more)
        found = {result.name: result for result in proofs.prove(twin.path, [])}
        assert {name for name, result in found.items() if result.passed is None} == {"packing"}
        assert not [result for result in found.values() if result.passed is False]
    assert "sampler and trainer within" in found["first loss"].figure


@pytest.mark.slow
def test_verdicts_and_teachers_of_what_is_said_pass(make: Any, tiny_model: Path) -> None:
    verdicts = [
        json.loads(line) | {"label": n % 2 == 0} for n, line in enumerate(Path("chats.jsonl").read_text().splitlines())
    ]
    Path("verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    assert failing(make(type="kto", data={"type": "unpaired", "sources": ["verdicts.jsonl"]})) == set()
    keys = {"teacher": {"name_or_path": str(tiny_model)}, "data": {"type": "prompts", "sources": ["chats.jsonl"]}}
    assert failing(make(type="on-policy-distill", **keys)) == set()
    rewards = [{"type": "verify", "function": "exact", "wanted": "response"}]
    assert failing(make(type="online-dpo", rewards=rewards, data=keys["data"])) == set()


def test_methods_with_models_of_their_own_pass(make: Any, tiny_model: Path) -> None:
    name = {"name_or_path": str(tiny_model)}
    assert failing(make(type="swiftkv", model={**name, "config": {"num_hidden_layers": 4}})) == set()
    assert failing(make(type="mlp-speculator", model={**name, "inner_dim": 16})) == set()
    assert failing(make(type="distill", model={**name, "lora": {"r": 2}}, teacher=name)) == set()


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ({"type": "sum"}, {"cuts"}),
        ({"type": "document-mean"}, {"packing", "cuts"}),
        ({"type": "other-reference"}, {"first loss"}),
        ({"callbacks": [{"type": "misspelt"}]}, {"hooked"}),
        ({"tokenizer": {"chat_template": BARE}}, {"masks"}),
        ({"tokenizer": {"chat_template": CUT}}, {"masks"}),
        ({"tokenizer": {"chat_template": TWICE}}, {"masks"}),
        ({"data": {"sources": ["chats.jsonl"], "max_length": 16}}, {"overflow"}),
    ],
)
def test_each_mistake_is_found(make: Any, mistake: dict[str, Any], found: set[str]) -> None:
    assert failing(make(**mistake)) == found


def test_documents_that_see_each_other_are_found(make: Any, tiny_model: Path) -> None:
    twin = make(model={"type": "convolved", "name_or_path": str(tiny_model)})
    assert failing(twin) == {"packing", "export"}


def test_attention_across_documents_is_found(make: Any, tiny_model: Path) -> None:
    twin = make(model={"type": "sees-all", "name_or_path": str(tiny_model)})
    assert failing(twin) == {"packing"}


def test_angles_that_are_rounded_are_found(make: Any, tiny_model: Path) -> None:
    twin = make(model={"type": "rounded", "name_or_path": str(tiny_model)})
    assert failing(twin) == {"export"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_reference_that_lacks_what_the_adapters_began_with_is_found(make: Any, tiny_model: Path) -> None:
    pytest.importorskip("peft")
    model = {"name_or_path": str(tiny_model), "lora": {"r": 2, "kwargs": {"init_lora_weights": "pissa"}}}
    with pytest.raises(Failed, match="policy and reference compute different things"):
        proofs.first_loss(make(type="other-beginning", model=model))
    assert "margin" in proofs.first_loss(make(type="dpo", model=model))


def test_a_learning_rate_that_no_checkpoint_holds_is_found(make: Any) -> None:
    with pytest.raises(Failed, match="run.memory is kept in checkpoints"):
        proofs.resume(make(callbacks=[{"type": "own-rate"}]))


def test_an_export_that_computes_something_else_is_found(make: Any, tiny_model: Path) -> None:
    twin = make(model={"type": "louder", "name_or_path": str(tiny_model)})
    with pytest.raises(Failed, match="does the model block change the network"):
        proofs.export(twin)


def test_a_state_that_no_checkpoint_holds_is_found(make: Any) -> None:
    with pytest.raises(Failed, match="run.memory is kept in checkpoints"):
        proofs.resume(make(callbacks=[{"type": "forgetful"}]))


def test_a_loss_that_depends_on_the_rank_is_found(make: Any) -> None:
    with pytest.raises(Failed, match="two ranks: does"):
        proofs.ranks(make(type="by-rank"))


@pytest.mark.slow
def test_a_rank_that_fails_is_quoted(make: Any) -> None:
    with pytest.raises(Failed, match="two processes failed: .*ValueError: not on rank one"):
        proofs.ranks(make(type="not-on-rank-one"))


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(make: Any) -> None:
    with pytest.raises(Failed, match="two processes failed: rank 1 was killed by SIGABRT$"):
        proofs.ranks(make(type="aborts"))


def test_what_does_not_apply_is_no_failure(make: Any) -> None:
    twin = make(checkpoint=[])
    for check in (proofs.export, proofs.first_loss):
        with pytest.raises(Skipped):
            check(twin)


def test_a_data_block_of_ones_own_is_tried_as_it_is(make: Any) -> None:
    toy = str(MISTAKES.with_name("toy.py"))
    twin = make(code=[toy, str(MISTAKES)], data={"type": "toy"}, tokenizer={"type": "toy"})
    found = {
        result.name: result.passed for result in proofs.prove(twin.path, [], [proofs.masks, proofs.cuts, proofs.memory])
    }
    assert found == {"masks": None, "cuts": True, "memory": None}
    assert failing(make(type="sum", code=[toy, str(MISTAKES)], data={"type": "toy"}, tokenizer={"type": "toy"})) == {
        "cuts"
    }


def test_an_error_names_the_line_of_the_users_code(make: Any) -> None:
    found = proofs.result(proofs.cuts, make(type="raises"))
    assert found.passed is False
    line = MISTAKES.read_text().splitlines().index("        return 1 / 0") + 1
    assert found.figure == f"ZeroDivisionError: division by zero ({MISTAKES}:{line})"


def test_an_error_inside_posttrain_names_the_line_of_the_users_code_that_led_there() -> None:
    def check(twin: Any) -> str:
        return posttrain.words.duration("long")

    line = Path(__file__).read_text().splitlines().index('        return posttrain.words.duration("long")') + 1
    assert proofs.result(check, None).figure.endswith(f"({__file__}:{line})")


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_twin_is_small_and_of_the_same_kind(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny(FAMILIES[kind]())
    model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name) < 1e6
    assert model.config.model_type == kind


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "minicpm3", "glm4_moe_lite", "longcat_flash"])
def test_a_twin_with_latent_attention_runs(kind: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = CONFIG_MAPPING[kind](num_experts_per_tok=6) if kind == "deepseek_v2" else CONFIG_MAPPING[kind]()
    config = tiny(config)
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name) < 1e6


def test_experts_are_compared_in_float64_too(make: Any, tiny_model: Path) -> None:
    """torch has no grouped product for it."""
    config = {"model_type": "mixtral", "vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 64}
    model = {"name_or_path": "toy", "random_init": True, "config": config}
    twin = make(model=model, tokenizer={"name_or_path": str(tiny_model)})
    assert proofs.result(proofs.packing, twin).passed


def test_a_network_that_computes_in_float32_whatever_it_is_given_is_compared_in_that(make: Any) -> None:
    """As the routers of some mixtures do."""

    def rounded(module: Any, args: Any) -> Any:
        return tuple(x.float() for x in args)

    twin = make()
    load = HFModel.load

    def loaded(block: HFModel, empty: bool = False) -> Any:
        hf = load(block, empty)
        hf.get_decoder().layers[0].mlp.up_proj.register_forward_pre_hook(rounded)
        return hf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFModel, "load", loaded)
        assert proofs.result(proofs.packing, twin).passed
    assert twin.precision == "32-true"


def test_a_network_that_draws_while_it_trains_is_not_said_to_leak(make: Any, tiny_model: Path) -> None:
    """The router of Phi 3.5 MoE samples experts."""
    config = tiny(transformers.PhimoeConfig(), vocabulary=512).to_dict()
    model = {"name_or_path": "toy", "random_init": True, "config": config}
    found = proofs.result(proofs.packing, make(model=model, tokenizer={"name_or_path": str(tiny_model)}))
    assert found.passed is None
    assert "draws at random while it trains" in found.figure


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "smolvlm", "idefics3", "mistral3"])
def test_a_vision_tower_shrinks_with_its_model(kind: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    config = tiny(CONFIG_MAPPING[kind]())
    model = AutoModelForImageTextToText.from_config(config)
    ends = ("embed_tokens.weight", "lm_head.weight")
    sizes = {name: p.numel() for name, p in model.named_parameters() if not name.endswith(ends)}
    assert sum(sizes.values()) < 3e6, max(sizes, key=sizes.__getitem__)


@pytest.mark.slow
def test_the_command_prints_a_table_and_fails_with_a_check(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    make()
    assert main(["check", "recipe.yaml", "--twin"]) == 0
    assert capfd.readouterr().out.count(" pass ") == 9
    assert main(["check", "recipe.yaml", "--twin", "type=sum"]) == 1
    said = capfd.readouterr().out
    assert said.count("FAIL") == 2, said
