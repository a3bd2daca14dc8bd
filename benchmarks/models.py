"""Every architecture of transformers, tiny: how posttrain keeps packed documents apart, and how exact that is.

    python benchmarks/models.py [--only llama mamba] [--write docs/models.md]

For each type, a network with random weights computes rows of six documents through posttrain's own path; the reference is
transformers' own network, with its own attention, on one document at a time. `loss` and `gradient` are differences
relative to the reference's; `exact` means both are below 1e-5. An export is loaded again and must give the same logits.
"""

import argparse
import contextlib
import copy
import io
import math
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import attrs
import image_models
import numpy as np
import torch
import transformers
from model_uses import Uses, refusal
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from posttrain.blocks.layout import lay
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents import probe
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.experts.router import has_routers
from posttrain.errors import RecipeError

CAUSAL = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGES = sorted(set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(CAUSAL))
DECODER = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "reformer",
)  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
COMPASS = {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}
DRAFTER = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
INDEXED = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 16,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100,
    "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25},
}  # fmt: skip
CHANGES = {
    **{kind: {"is_decoder": True} for kind in DECODER},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    **{kind: {"layer_types": ["conv", "full_attention"] * 16} for kind in ("lfm2", "lfm2_moe")},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "cohere_compass_text": COMPASS,
    "cohere_compass": {"text_config": COMPASS},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 16, "num_experts_per_tok": 2}},
    "gemma4_assistant": {"text_config": DRAFTER},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**PLAIN, "mrope_section": [22, 22, 20]}}},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "qwen4_exp_text": INDEXED,
    "qwen4_exp": {"text_config": INDEXED},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "topk_group": 1, "n_group": 1},
}
"""What the default configuration of a type lacks to be a causal model."""
CLOSE = 1e-5
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
SECTIONS = {"Causal language models": CAUSAL, "Models of images and text, on text": IMAGES}
COLUMNS = (
    "type", "", "documents kept apart by", "loss", "gradient", "router loss", "export", "twin", "plan", "SwiftKV",
    "speculator",
)  # fmt: skip
MEASURED = 7
"""So many of them are of `measure`, the others of `Uses`."""
HEAD = """# Models

Every architecture of transformers was made tiny, with random weights, and its packed rows were compared with each
document alone through transformers' own network: `python benchmarks/models.py --write docs/models.md`, transformers
{transformers}, torch {torch}. `loss` and `gradient` are relative differences; exact is below 1e-05 in both. What
a model does is tried anew when it is built; this table only shows what to expect. What is refused says why, as building it
would: it needs more than tokens, or looks ahead, or transformers cannot make it without another package. "no model" are
types whose default configuration gives no network at all.

The last columns were tried with what is exact: `twin` are the checks of `posttrain check --twin` that need one process
(packed as alone, a step as its micro-batches, an export as what was trained), from the type's default configuration on;
`plan` is of that twin, and `speculator` a step of its training packed and alone. SwiftKV says "no" to all but four families
(llama, mistral, qwen2, qwen3), whose layers it knows.

"""


@attrs.define
class Row:
    """What was found for a type."""

    kind: str
    way: str = ""
    loss: float = math.nan
    gradient: float = math.nan
    router: bool = False
    export: str = ""
    problem: str = ""

    @property
    def verdict(self) -> str:
        """What it comes to."""
        if self.problem:
            return "refused" if self.problem.startswith("refused") else "no model" if not self.way else "failed"
        if math.isnan(self.gradient):  # transformers' own is not a number
            return "unknown"
        return "exact" if self.loss < CLOSE and self.gradient < CLOSE else "wrong"


def document(seed: int, length: int, vocabulary: int):
    """Return random tokens, most of them supervised."""
    random = np.random.default_rng(seed)
    return random.integers(min(3, vocabulary - 1), vocabulary, length), random.random(length) < 0.8


def measure(kind: str) -> Row:
    """Try one type."""
    row = Row(kind)
    default = AutoConfig.for_model(kind, **CHANGES.get(kind, {}))
    try:
        torch.manual_seed(0)
        config = tiny(default, vocabulary=97, window=8, works=forwards)
        config.get_text_config().initializer_range = 0.06
        theirs = probe.auto_of(config).from_config(config, dtype=torch.float32).eval()
    except Exception as error:
        said = refusal(kind, default)
        row.problem = f"refused: {said}" if said else f"{type(error).__name__}: {one_line(error)}"
        return row
    row.router = has_routers(theirs)
    try:
        way = probe.find_way(default, kind, None)
    except RecipeError as error:
        row.problem = f"refused: {one_line(error)}"
        return row
    if not way.proven and (said := refusal(kind, default)):
        row.problem = f"refused: {said}"
        return row
    row.way = str(way)
    try:
        compare(row, way, theirs)
        row.export = exported(theirs)
    except Exception as error:
        row.problem = f"{type(error).__name__}: {one_line(error)}"
    return row


def forwards(config) -> None:
    """Fail if a network cannot compute tokens alone."""
    network = probe.auto_of(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        network(input_ids=torch.arange(3, 12)[None], use_cache=False)


def compare(row: Row, way, theirs) -> None:
    """Compare loss and gradient of packed rows with those of each document alone."""
    known = theirs.config.get_text_config().vocab_size
    lengths = [[21, 3, 30], [40], [2, 17]]
    rows = [[document(7 * i + j, n, known) for j, n in enumerate(each)] for i, each in enumerate(lengths)]
    hf = copy.deepcopy(theirs)
    probe.set_attention(hf, way.attention)
    net = CausalLM(hf)
    net.keep_apart(way)
    ours = net.eval()(lay(rows, int(rows[0][0][0][0])))  # the token for padding is zero in random weights
    ours.backward()
    expected = torch.zeros(())
    for ids, mask in (one for each in rows for one in each):
        logits = theirs(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1].float()
        trained = torch.from_numpy(mask[1:])
        targets = torch.from_numpy(ids[1:])[trained]
        expected = expected + torch.nn.functional.cross_entropy(logits[trained], targets, reduction="sum")
    expected.backward()
    row.loss = abs(ours.item() - expected.item()) / expected.item()
    pairs = [(a.grad, b.grad) for a, b in zip(hf.parameters(), theirs.parameters(), strict=True) if b.grad is not None]
    differ = sum(float(((0 if a is None else a) - b).square().sum()) for a, b in pairs)
    row.gradient = math.sqrt(differ / sum(float(b.square().sum()) for _, b in pairs))


def exported(hf) -> str:
    """Say whether an export loads again with the same logits."""
    ids = torch.arange(3, 12)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        hf.save_pretrained(folder)
        again = type(hf).from_pretrained(folder).eval()
        gap = (again(input_ids=ids, use_cache=False).logits - hf(input_ids=ids, use_cache=False).logits).abs().max()
    return "same" if gap < 1e-5 else f"differs by {gap:.1e}"


def one_line(error: Exception) -> str:
    """Return the beginning of a message."""
    return " ".join(str(error).split())[:160]


def cells(row: Row) -> list[str]:
    """Return what was measured as cells of the table; `uses` are filled in afterwards."""
    figures = ["", ""] if math.isnan(row.loss) else [f"{row.loss:.0e}", f"{row.gradient:.0e}"]
    said = row.problem.removeprefix("refused: ").replace("|", "/") if row.problem else row.way
    return [f"`{row.kind}`", row.verdict, said, *figures, "yes" if row.router else "", row.export]


def summary(rows: list[list[str]]) -> str:
    """Say how many of each there are."""
    count = Counter(row[1] for row in rows)
    found = ", ".join(
        f"{count[name]} {name}" for name in ("exact", "refused", "wrong", "failed", "unknown", "no model")
    )
    can = {name: sum(row[i].startswith("yes") for row in rows) for i, name in enumerate(COLUMNS) if i >= MEASURED}
    return f"{len(rows)} types: {found}. " + ", ".join(f"{name} {number}" for name, number in can.items())


def read(page: str, title: str) -> dict[str, list[str]]:
    """Return the rows of a section of the page, by type."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): [*row, *[""] * (len(COLUMNS) - len(row))] for row in rows}


def write(page: str, title: str, rows: list[list[str]]) -> str:
    """Return the page with a section's rows replaced."""
    before, _, rest = page.partition(f"## {title}\n")
    after = rest.partition("\n## ")
    lines = [" | ".join(["", *row, ""]).strip() for row in ([*COLUMNS], ["---"] * len(COLUMNS), *rows)]
    return f"{before}## {title}\n\n{summary(rows)}.\n\n" + "\n".join(lines) + "\n" + "".join(after[1:])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types; others stay as the page has them")
    parser.add_argument("--uses", action="store_true", help="the last columns alone; the others stay")
    parser.add_argument("--images", action="store_true", help="the table of images alone")
    parser.add_argument("--write", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    page = (chosen.write or PAGE).read_text()
    for title, kinds in SECTIONS.items():
        rows = read(page, title)
        for kind in kinds:
            if chosen.images or kind not in (chosen.only or kinds):
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                row = rows[kind][:MEASURED] if chosen.uses and kind in rows else cells(measure(kind))
                found = attrs.astuple(Uses.of(kind, CHANGES.get(kind, {}))) if row[1] == "exact" else [""] * 4
                rows[kind] = [*row, *found]
            print(" | ".join(rows[kind]), flush=True)
            if chosen.write:  # after each, since it takes long
                page = write(page, title, [rows[kind] for kind in kinds if kind in rows])
                chosen.write.write_text(page)
        print(f"{title}: {summary(list(rows.values()))}")
    if chosen.images or not (chosen.only or chosen.uses):
        page = image_models.rewritten(page, chosen.only, CHANGES)
    if chosen.write:
        begin = page.index(f"## {next(iter(SECTIONS))}")
        chosen.write.write_text(
            HEAD.format(transformers=transformers.__version__, torch=torch.__version__) + page[begin:]
        )


if __name__ == "__main__":
    main()
