"""Where every reply can be enumerated: the estimate is the gradient of the expected reward, and a bandit is solved."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import JSONL, AdamW, Constant, GRPOTrainer, HFModel, PromptData, TransformersSampler, before, reward

LETTERS = "abcde"
END = 5
LLAMA = {
    "model_type": "llama", "vocab_size": 6, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "initializer_range": 0.5,
    "bos_token_id": None, "eos_token_id": END, "pad_token_id": END, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = ("ab", "dcb")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model of six tokens, letters and an end, and two prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({**{letter: n for n, letter in enumerate(LETTERS)}, "</s>": END}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>").save_pretrained(tmp_path / "m")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "m")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return tmp_path


@reward("test-table")
def table(prompt: str, reply: str, row: dict[str, Any]) -> float:
    """Any table of numbers will do."""
    return math.sin(sum((n + 1) * (ord(x) - 90) for n, x in enumerate(prompt + "|" + reply)))


@reward("test-arm")
def arm(prompt: str, reply: str, row: dict[str, Any]) -> float:
    """A bandit with five arms, one of which pays best; another one pays half."""
    return {"c": 1.0, "a": 0.5}.get(reply[:1], 0.0)


def trainer(folder: Path, **keys: Any) -> Any:
    defaults: dict[str, Any] = {
        "sampler": TransformersSampler(max_new_tokens=2), "micro_batch_size": 2, "group_size": 8, "logger": [JSONL()],
        "checkpoint": [], "log_every": 50, "scheduler": Constant(), "accelerator": "cpu", "max_grad_norm": None,
        "output_dir": folder / "run", "rewards": [table],
    }  # fmt: skip
    data = PromptData(sources=[folder / "prompts.jsonl"], text_column="text", cache_dir=folder / "cache")
    return GRPOTrainer(**{"model": HFModel(name_or_path=str(folder / "m")), "data": data, **defaults, **keys})


def expected(network: Any, temperature: float) -> torch.Tensor:
    """The mean over prompts of the exact expected reward."""
    replies = [(END,), *((a, b) for a, b in itertools.product(range(END), range(END + 1)))]
    total = torch.zeros((), dtype=torch.float64)
    for prompt in PROMPTS:
        ids = [LETTERS.index(x) for x in prompt]
        for reply in replies:
            logits = network(input_ids=torch.tensor([[*ids, *reply]])).logits[0].double() / temperature
            chosen = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(reply)[:, None])
            text = "".join(LETTERS[n] for n in reply if n != END)
            total = total + chosen.sum().exp() * table(prompt, text, {})
    return total / len(PROMPTS)


def estimates(folder: Path, steps: int, temperature: float, **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of many steps that learn nothing, [steps, parameters], and the exact one, [parameters]."""
    found: list[torch.Tensor] = []

    @before("strategy.update")
    def note(strategy: Any, run: Any, max_grad_norm: Any) -> None:
        found.append(torch.cat([-p.grad.double().flatten() for p in run.model.parameters()]))

    sampler = TransformersSampler(max_new_tokens=2, temperature=temperature)
    made = trainer(folder, max_steps=steps, optimizer=AdamW(lr=1e-12), sampler=sampler, log_every=steps, **keys)
    run = made.train(callbacks=[note])
    network = run.model.module.base
    network.zero_grad()
    expected(network, temperature).backward()
    return torch.stack(found), torch.cat([p.grad.double().flatten() for p in network.parameters()])


@pytest.mark.parametrize(
    ("temperature", "keys", "scale"),
    [
        (1.0, {"loss_type": "rloo"}, 1.0),
        pytest.param(0.7, {"loss_type": "rloo"}, 1.0, marks=pytest.mark.slow),
        # A baseline of 8 that includes the reply; two tokens at most.
        pytest.param(1.0, {"loss_type": "dr_grpo"}, 7 / 8 / 2, marks=pytest.mark.slow),
        pytest.param(1.0, {"loss_type": "reinforce"}, 7 / 8, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_the_gradient_of_the_expected_reward(
    folder: Path, temperature: float, keys: dict[str, Any], scale: float
) -> None:
    each, exact = estimates(folder, 400, temperature, **keys)
    along = each @ exact / (exact @ exact) / scale
    error = float(along.std() / math.sqrt(len(along)))
    assert error < 0.06
    assert abs(float(along.mean()) - 1) < 3 * error
    mean, errors = each.mean(0), each.std(0) / math.sqrt(len(each))
    within = (mean - scale * exact).abs() <= 2 * errors + 1e-12
    assert float(within.double().mean()) > 0.85  # 95 % if coordinates were independent of one another
    assert float(torch.cosine_similarity(mean, exact, dim=0)) > 0.99


@pytest.mark.slow
def test_dividing_by_the_spread_of_a_group_is_another_objective(folder: Path) -> None:
    """So that the test above can fail."""
    each, exact = estimates(folder, 400, 1.0, loss_type="grpo")
    along = each @ exact / (exact @ exact)
    assert abs(float(along.mean()) - 1) > 5 * float(along.std() / math.sqrt(len(along)))


SLOW = [pytest.param(loss, marks=pytest.mark.slow) for loss in ("grpo", "dr_grpo", "gspo", "cispo", "sapo", "ppo")]


@pytest.mark.parametrize("loss", ["dapo", "rloo", *SLOW])
def test_a_bandit_is_solved(folder: Path, loss: str) -> None:
    model = HFModel(name_or_path=str(folder / "m"), random_init=True, config={"initializer_range": 0.1})
    keys: dict[str, Any] = {"loss_type": loss, "rewards": [arm], "group_size": 16, "entropy": 0.01, "model": model}
    run = trainer(folder, max_steps=80, optimizer=AdamW(lr=1e-2), **keys).train()
    assert run.last["reward"] > 0.9
