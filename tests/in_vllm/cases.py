"""Runs one model in vLLM and prints what came out as JSON. A process each: an engine cannot be taken down cleanly."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LENGTHS = (5, 17, 64, 120, 33, 40)
NEW = 24


def prompts() -> list[list[int]]:
    """Return prompts as token ids."""
    random = np.random.default_rng(0)
    return [random.integers(3, 512, length).tolist() for length in LENGTHS]


def spread(hf: Any) -> Any:
    """Give a network random weights that make it say something, in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.08)
    hf.generation_config.eos_token_id = None
    return hf.eval()


def base(folder: Path) -> Any:
    """Save a plain Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = spread(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=4)))
    hf.save_pretrained(folder)
    return hf


def swiftkv(folder: Path, group: int) -> Any:
    """Save a SwiftKV Llama of 6 layers, 2 of them with keys and values of their own."""
    from posttrain.blocks.models.swiftkv.modeling import family

    config, causal = family("llama")
    hf = spread(causal(config(**SHAPE, num_hidden_layers=6, num_key_value_layers=2, key_value_group_size=group)))
    hf.save_pretrained(folder)
    return hf


def greedy(hf: Any) -> list[list[int]]:
    """Return what transformers says."""
    found = []
    for prompt in prompts():
        out = hf.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


def speculator(folder: Path, hf: Any, model: Path) -> Any:
    """Train a speculator on what the model says to half of the prompts, and save it."""
    from posttrain.blocks.layout import lay
    from posttrain.blocks.models.speculator.continuation import document, with_positions
    from posttrain.blocks.models.speculator.model import SpeculatorModel
    from posttrain.blocks.models.speculator.network import MLPSpeculator, Speculating

    block = SpeculatorModel(name_or_path=str(model), inner_dim=128, scale_input=True)
    net = Speculating(hf.requires_grad_(False), MLPSpeculator(block.configuration_for(hf.config)))
    pairs = list(zip(prompts(), greedy(hf), strict=True))[::2]
    batch = with_positions(lay([[document(prompt, reply)] for prompt, reply in pairs], 0), 3)
    optimizer = torch.optim.Adam(net.speculator.parameters(), lr=1e-2)
    for _ in range(40):
        loss = net(batch, batch["supervised"][batch["chosen"]] - 1)[0].sum() / batch["weight"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.save_pretrained(folder)
    return net.speculator


def engine(folder: Path, **keys: Any) -> Any:
    """Return an engine over a saved model."""
    from vllm import LLM

    return LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26, seed=0, enable_prefix_caching=False, disable_log_stats=False, **keys,
    )  # fmt: skip


def said(llm: Any) -> list[list[int]]:
    """Return what vLLM says, greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    return [
        list(out.outputs[0].token_ids) for out in llm.generate([{"prompt_token_ids": p} for p in prompts()], sampling)
    ]


def main(work: Path, group: int | None, drafts: int | None, fast: bool, chunk: int | None) -> dict[str, Any]:
    """Run a case: a plain model or a SwiftKV one, with or without drafts."""
    from posttrain.blocks.models.speculator.speculate import Drafts, speculate

    model = work / "model"
    hf = base(model) if group is None else swiftkv(model, group)
    expected = greedy(hf)
    keys: dict[str, Any] = {"kv_sharing_fast_prefill": fast}
    if chunk is not None:
        keys |= {"max_num_batched_tokens": chunk, "enable_chunked_prefill": True}
    ours = None
    if drafts is not None:
        trained = speculator(work / "speculator", hf, model)
        ours = Drafts([0] * drafts)
        for prompt in prompts():
            ours.add(speculate(hf, trained, torch.tensor([prompt]), NEW, drafts)[1])
        proposer = "posttrain.serve.vllm_speculator.Proposer"
        keys |= {
            "additional_config": {"mlp_speculator": str(work / "speculator")},
            "speculative_config": {"method": "custom_class", "model": proposer, "num_speculative_tokens": drafts},
        }
    llm = engine(model, skip_tokenizer_init=True, **keys)
    network = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model
    if group is not None:
        network.upper_rows = 0  # not those of profiling
    found = said(llm)
    counters = {m.name.removeprefix("vllm:spec_decode_num_"): m for m in llm.get_metrics() if "spec_decode" in m.name}
    return {
        "equal": found == expected,
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "upper_rows": network.upper_rows if group is not None else None,
        "ours": None if ours is None else [ours.steps, ours.accepted],
        "theirs": None if ours is None else [counters["drafts"].value, counters["accepted_tokens_per_pos"].values],
    }


def classify(work: Path) -> dict[str, Any]:
    """Score conversations with a reward model, in vLLM and in transformers."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
    from tokens import byte_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from vllm import PoolingParams

    shape = {**SHAPE, "pad_token_id": 0, "num_hidden_layers": 2, "num_labels": 1}
    hf = LlamaForSequenceClassification(LlamaConfig(**shape)).eval()
    hf.save_pretrained(work / "model")
    byte_tokenizer().save_pretrained(work / "model")  # vLLM wants one to classify
    with torch.no_grad():
        ours = [hf(torch.tensor([prompt])).logits[0, 0].item() for prompt in prompts()]
    llm = engine(work / "model")
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    found = llm.classify(asked, pooling_params=PoolingParams(use_activation=False))
    return {"ours": ours, "theirs": [one.outputs.probs[0] for one in found]}


if __name__ == "__main__":
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    result = classify(folder) if given == "reward" else main(folder, **given)
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # taking the engine down prints pages
