"""A packed row gives what its documents give alone, and the chunked losses what full logits give."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from allocated import most
from toy import LLAMA, document
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.blocks.layout import lay
from posttrain.blocks.losses import cross_entropy as losses
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents.probe import find_way

SMALL = {k: v for k, v in LLAMA.items() if k != "model_type"}
SLIDING = {**SMALL, "sliding_window": 8, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 8},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "phi3": SMALL,
    "granite": {**SMALL, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "gemma2": {**SLIDING, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": SLIDING,
}


def model(kind: str, implementation: str) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind])
    hf = AutoModelForCausalLM.from_config(config)
    hf.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.2)
    net = CausalLM(hf)
    net.keep_apart(find_way(config, kind, implementation))
    return net


def rows() -> list[list[Any]]:
    return [[document(1), document(2), document(3)], [document(4)], [document(5), document(6)]]


PAIRS = [(kind, how) for kind in MODELS for how in ("packed", "sdpa", "eager") if (kind, how) != ("gemma2", "sdpa")]
"""sdpa knows no soft caps."""


@pytest.mark.parametrize(("kind", "implementation"), PAIRS)
def test_a_packed_row_equals_its_documents_alone(kind: str, implementation: str) -> None:
    net = model(kind, implementation)
    together = net(lay(rows(), 0), "logits")
    reference = net.hf
    reference.set_attn_implementation("eager")
    alone = []
    for ids, mask in (document for row in rows() for document in row):
        logits = reference(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0, :-1]
        alone.append(logits[torch.tensor(mask[1:])])
    expected = torch.cat(alone)
    scale = expected.abs().max()
    torch.testing.assert_close(together / scale, expected / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_the_summed_loss_and_its_gradients_equal_full_logits(kind: str) -> None:
    net = model(kind, "eager")
    batch = lay(rows(), 0)
    ours = net(batch)
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    theirs = F.cross_entropy(net(batch, "logits"), batch["targets"], reduction="sum")
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    log_probs = net(batch, "log_probs")
    assert log_probs.shape == batch["targets"].shape
    torch.testing.assert_close(-log_probs.sum(), theirs, rtol=1e-6, atol=1e-5)


def test_a_leak_between_documents_would_be_seen() -> None:
    """The test above can fail: without positions that restart, sdpa lets documents see each other."""
    net = model("llama", "sdpa")
    batch = lay(rows(), 0)
    good = net(batch, "logits")
    wrong = batch.but(position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))
    assert (net(wrong, "logits") - good).abs().max() > 1e-2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_do_not_change_loss_or_gradients(monkeypatch: pytest.MonkeyPatch, bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=not frozen)
    offset = torch.randn(50, requires_grad=not frozen) if bias else None
    targets = torch.randint(50, (300,))
    monkeypatch.setattr(losses, "chunk_rows", lambda weight: 64)
    wanted = [x for x in (hidden, weight, offset) if x is not None and x.requires_grad]
    reference = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="sum")
    expected = torch.autograd.grad(reference * 0.3, wanted)
    for found in (
        losses.nll_sum(hidden, weight, offset, targets),
        -losses.token_log_probs(hidden, weight, offset, targets[:, None]).sum(),
    ):
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-4)
        for ours, theirs in zip(torch.autograd.grad(found * 0.3, wanted), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_loss_is_exact_to_float32_in_bfloat16() -> None:
    """The sum stays in float32 where a bfloat16 scalar would be off in the second digit."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(50, (500,))
    reference = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    found = losses.nll_sum(hidden, weight, None, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=0)


def test_no_supervised_token_gives_a_loss_of_zero_and_gradients() -> None:
    net = model("llama", "packed")
    ids, mask = document(1)
    loss = net(lay([[(ids, np.zeros_like(mask))]], 0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_generation_is_transformers_own_with_padding_on_the_left() -> None:
    ours, theirs = model("llama", "packed"), model("llama", "sdpa")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    torch.testing.assert_close(ours.generate(**call), theirs.generate(**call))


def test_an_evaluation_makes_no_gradients_and_a_backward_pass_holds_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.blocks.losses import cross_entropy

    made: list[str] = []
    monkeypatch.setattr(cross_entropy, "add_product", lambda *args: made.append("a gradient of the head"))
    net = model("llama", "packed")
    with torch.no_grad():
        net(lay(rows(), 0))
    assert not made
    net(lay(rows(), 0))
    assert made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_holds_its_logits_once_and_no_product_as_large_as_the_head(dtype: torch.dtype) -> None:
    tokens, size, vocabulary = 128, 64, 4096
    hidden = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    losses.nll_sum(hidden, weight, None, targets)  # what is made once
    logits, head = 4 * tokens * vocabulary, 4 * vocabulary * size
    low = 0 if dtype == torch.float32 else logits // 2  # they come from a product in bfloat16
    slack = max(logits, head) // 4
    assert most(lambda: losses.nll_sum(hidden, weight, None, targets)) < head + logits + low + slack


def test_the_gradient_of_the_head_is_not_copied() -> None:
    from posttrain.blocks.losses.cross_entropy import nll_sum

    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(97, 4, requires_grad=True)
    loss = nll_sum(hidden, weight, None, torch.arange(8))
    kept = loss.grad_fn.grads[1].data_ptr()  # type: ignore[union-attr]
    (loss * 0.5).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == kept
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(8), reduction="sum") * 0.5, weight
    )
    torch.testing.assert_close(weight.grad, expected[0])
