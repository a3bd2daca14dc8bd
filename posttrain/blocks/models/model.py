"""Model blocks: networks from transformers, ready to train."""

import fnmatch
import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
from attrs.validators import ge, gt, min_len, optional

from posttrain.blocks.models.adapters import merge, origin
from posttrain.blocks.models.content import content_of
from posttrain.blocks.models.lora import LoRA
from posttrain.blocks.models.quantized.aware import QAT
from posttrain.blocks.models.quantized.fp8 import FP8
from posttrain.errors import RecipeError
from posttrain.registry import block, key
from posttrain.runtime.launch import silence_libraries
from posttrain.values import Secret, as_data, missing_folder

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn

    from posttrain.blocks.models.documents.ways import Way
    from posttrain.blocks.models.vision.parts import Sight

log = logging.getLogger("posttrain")
QUANTIZE = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
"""Arguments of older versions of transformers -> what `model.quantize` says instead."""


@block("model", "hf")
class HFModel:
    """A causal language model of transformers, from a folder, a hub name, or a configuration alone."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    task: ClassVar[str] = "CAUSAL_LM"
    fixed: ClassVar[dict[str, Any]] = {}
    """What the configuration must be for this kind of model."""
    begins: ClassVar[tuple[str, ...]] = ()
    """Patterns of the weights that are new, and in no files."""

    name_or_path: str
    """A folder or a hub name. The folder of an adapter, as a run with LoRA exports it, stands for the adapter's base
    with the adapter merged into it."""
    random_init: bool = False
    """Start from random weights: only the configuration is read."""
    config: dict[str, Any] = key(factory=dict, also=("hf_config_kwargs",))
    """Changes to the model's configuration; with `random_init` and a `model_type`, all of it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in memory; with precision `bf16-mixed` keep float32."""
    attn_implementation: str = "auto"
    """`auto` takes what keeps packed documents apart best, which is tried on a tiny copy of the model (see documents/):
    `packed`, our own, for most. Or `sdpa`, `eager`, `flex_attention`, `flash_attention_2`, or another that
    transformers knows."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    token: Secret | None = None
    """For a private hub model: `${HF_TOKEN}`."""
    lora: LoRA | None = key(None, also=("peft_config",))
    """Train low-rank adapters instead of the weights."""
    quantize: Literal["nf4", "fp4", "int8"] | None = key(None, also=("bnb_4bit_quant_type",))
    """Keep the layers' matrices, which adapters leave alone, in 4 bits (`nf4`, `fp4`) or 8 (`int8`), as QLoRA does
    (arXiv:2305.14314; extra `bnb`); of what is trained, with `lora`. Embeddings and head stay in `dtype`."""
    double_quantization: bool | None = key(None, also=("bnb_4bit_use_double_quant",))
    """Quantize the scales of 4-bit numbers, too, which is the default: 4.13 bits a number instead of 4.5."""
    qat: QAT | None = None
    """Train for a model that will be quantized: `{weights: int4}` (see quantized/aware.py; extra `qat`)."""
    fp8: FP8 | bool = key(False, convert=lambda value: FP8() if value is True else value)
    """Multiply in 8-bit floating point, forward and backward: `true`, or `{recipe: rowwise}` (see quantized/fp8.py;
    extra `qat`)."""
    train: list[Literal["language", "projector", "tower"]] = key(
        factory=lambda: ["language", "projector"], check=min_len(1)
    )
    """Which parts of a model of images and text are trained: the language model, the projector that hands on what was
    seen, the tower that sees. Where the data hold no images, it is the language model alone."""
    freeze: list[str] = attrs.field(factory=list)
    """Patterns of parameter names that are not trained, such as `*.embed_tokens.*`."""
    router_aux_loss: float | None = key(None, also=("router_aux_loss_coef",), check=optional(ge(0)))
    """Weight of the loss that balances the experts of a mixture (see experts/router.py). By default what the model's
    configuration says: its `router_aux_loss_coef` where `output_router_logits` is set, else 0."""
    router_z_loss: float = key(0.0, check=ge(0))
    """Weight of the loss that keeps the logits of a mixture's routers small; 0.001 is usual."""
    router_bias_rate: float = key(0.0, check=ge(0))
    """How far the biases by which experts are chosen move after each step, toward an even load: balancing without a
    loss, for models that have them, such as DeepSeek V3, whose authors took 0.001 (see experts/load.py)."""
    activation_checkpointing: bool | Literal["selective"] = key(False, also=("gradient_checkpointing",))
    """Keep one activation per layer and compute the rest again in the backward pass; `selective` also keeps attention
    and every second matrix product."""
    offload_activations: bool = False
    """Keep these activations in the memory of the host while they are not needed."""
    tiled_mlp: int | None = key(None, check=optional(gt(0)))
    """Compute MLPs in so many tiles of a row, and again in the backward pass: for rows that are very long."""
    compile: bool | str = False
    """Compile each layer with torch.compile; a name chooses the backend."""
    liger: bool = False
    """Use Liger's Triton kernels for norms, rotary embeddings and MLPs (extra `liger`); on GPUs."""
    kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Further arguments of `from_pretrained`."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself, and a path that leads nowhere."""
        if (problem := missing_folder(self.name_or_path)) and not self.config.get("model_type"):
            yield "name_or_path", problem
        if self.offload_activations and self.activation_checkpointing is not True:
            yield "offload_activations", "moves what activation_checkpointing keeps: set that to true"
        if self.quantize is not None:
            yield from self.unfit_for_bytes()
        elif self.double_quantization is not None:
            yield "double_quantization", "is of a quantized base: say how with quantize: nf4"
        if self.qat is not None and (self.lora is not None or self.quantize is not None):
            yield "qat", "trains the weights themselves: leave lora and quantize out"
        if self.fp8 and (self.lora is not None or self.quantize is not None or self.qat is not None):
            yield "fp8", "multiplies with the weights that are trained, as they are: leave lora, quantize and qat out"
        if self.compile and self.activation_checkpointing == "selective":
            yield "activation_checkpointing", "selective cannot look into compiled layers: say true, or compile: false"

    def unfit_for_bytes(self) -> Iterator[tuple[str, str]]:
        """Yield what needs the numbers of matrices that are kept as bytes."""
        if self.quantize == "int8" and self.double_quantization:
            yield "double_quantization", "is of 4-bit numbers; int8 has one scale for each row"
        if "quantization_config" in self.kwargs:
            yield "quantize", "is said twice: leave kwargs.quantization_config out"
        more = self.lora.kwargs if self.lora else {}
        start = more.get("init_lora_weights", True)
        if more.get("use_dora") or (not isinstance(start, bool | None) and start != "gaussian"):
            why = "these adapters (lora.kwargs) begin with, or are scaled by, numbers of the base: leave one out"
            yield "quantize", why
        if more.get("target_parameters"):
            yield "quantize", "lora.kwargs.target_parameters adapts what is quantized: leave one out"

    def build(self, fabric: "Fabric") -> "nn.Module":
        """Return the network, ready to train (see `wrap`).

        Where rank zero will send the weights (fsdp), other ranks do not load them.

        Raises:
            RecipeError: the model cannot be loaded, or an option does not fit it.
        """
        from posttrain.blocks.parallel.sharding import only_shapes, without_weights

        if isinstance(self.fp8, FP8) and not only_shapes():
            self.fp8.check_device(fabric.device)
        if self.kwargs:  # they may change what is built, as other ways of quantization do
            return self.make(empty=False)
        with without_weights(fabric) as empty:
            return self.make(empty, fabric)

    def make(self, empty: bool, fabric: "Fabric | None" = None) -> "nn.Module":
        """Return the network, with weights unless it is to be empty (see assembly.py)."""
        from posttrain.blocks.models.assembly import assemble

        return assemble(self, empty, fabric)

    @property
    def doubly(self) -> bool:
        """Whether scales are quantized, too."""
        return self.quantize != "int8" and self.double_quantization is not False

    def way(self, hf: Any) -> "Way":
        """Return how the model keeps the documents of a row apart, with the attention for that set.

        Raises:
            RecipeError: it cannot.
        """
        from posttrain.blocks.models.documents.probe import find_way
        from posttrain.blocks.models.documents.trial import set_attention

        asked = None if self.attn_implementation == "auto" else self.attn_implementation
        way = find_way(hf.config, self.name_or_path, asked, hf.is_remote_code())
        set_attention(hf, way.attention)
        log.info("%s: documents of a row are kept apart by %s", self.name_or_path, way)
        return way

    def sight(self, hf: Any, way: "Way") -> "Sight | str":
        """Return how images enter the model, which is tried with the processor beside it, or why they cannot."""
        from posttrain.blocks.models.vision.sight import find_sight

        return find_sight(hf, self.name_or_path, way, self.hub)

    def sees_images(self) -> bool:
        """Whether it is a model of images and text."""
        config = self.read_config()
        return config.get_text_config() is not config

    def saved_as(self) -> str | None:
        """Return the half-precision type that the model's files are in, for exports; None to write what is trained."""
        if self.random_init or self.lora is not None or self.qat is not None or self.dtype != "float32":
            return None
        dtype = str(self.read_config().dtype).removeprefix("torch.")
        return dtype if dtype in ("bfloat16", "float16") else None

    def wrap(self, hf: Any) -> "nn.Module":
        """Return a `CausalLM` around a transformers model (see causal.py)."""
        from posttrain.blocks.models.causal import CausalLM

        return CausalLM(hf)

    def load(self, empty: bool = False) -> Any:
        """Return the transformers model, with its weights unless it is to be empty."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        silence_libraries()
        if not sys.stderr.isatty():  # a log file is no place for progress bars
            disable_progress_bar()
        try:
            config = self.configured(self.read_config())
            config.get_text_config()  # some have several, and do not say which
            auto = self.auto_class(config)
            if self.attn_implementation != "auto":
                config._attn_implementation = self.attn_implementation
            if self.random_init or empty:
                dtype = getattr(torch, self.dtype)
                hf = auto.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
            else:
                plain = self.quantize and not origin(self.name_or_path)[1]
                dtype = "auto" if plain else self.dtype  # as in the files, which are then not even copied
                hf, report = auto.from_pretrained(
                    self.base, config=config, dtype=dtype, output_loading_info=True, **self.hub, **self.kwargs
                )
                self.refuse_missing(report["missing_keys"])
        except (OSError, ValueError, ImportError) as error:
            said = " ".join(str(error).partition("Model type should be one of")[0].split())  # hundreds of names
            raise RecipeError(f"model {self.name_or_path!r} cannot be loaded: {said}") from error
        except TypeError as error:
            if unknown := [name for name in self.kwargs if f"'{name}'" in str(error)]:
                hint = f": write model.quantize: {QUANTIZE[unknown[0]]}" if unknown[0] in QUANTIZE else ""
                raise RecipeError(f"model.kwargs: transformers does not take {unknown[0]}{hint}") from error
            raise
        if adapters := origin(self.name_or_path)[1]:
            hf = hf if empty else merge(hf, adapters)
            hf.name_or_path = hf.config._name_or_path = self.name_or_path  # what a new adapter has as its base
        return hf

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Refuse files that lack weights of the model: transformers draws them at random, and training would go on.

        Raises:
            RecipeError: there are such weights.
        """
        found = sorted(name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in self.begins))
        if found:
            raise RecipeError(
                f"model {self.name_or_path!r}: its files hold no {', '.join(found[:3])}"
                + (f" and {len(found) - 3} more weights" if len(found) > 3 else "")
                + ", which would be random; look at model.config, or begin from random weights with random_init"
            )

    @property
    def base(self) -> str:
        """The folder or hub name of the weights: below adapters, if `name_or_path` is one."""
        return origin(self.name_or_path)[0]

    def auto_class(self, config: Any) -> Any:
        """Return the class of transformers that loads the model; one of images and text is loaded as a whole."""
        import transformers

        from posttrain.blocks.models.documents.trial import auto_of

        return auto_of(config) if self.auto == "AutoModelForCausalLM" else getattr(transformers, self.auto)

    @property
    def hub(self) -> dict[str, Any]:
        """How transformers is to fetch the model."""
        token = self.token.reveal() if self.token else None
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision, "token": token}

    def read_config(self) -> Any:
        """Return the configuration that the recipe names, with its changes.

        Raises:
            RecipeError: a change is of a key that this kind of model does not have.
        """
        from posttrain.blocks.models.changes import changed, made

        changes = {**self.config, **self.fixed}
        if self.random_init and "model_type" in self.config:
            return made(changes)
        return changed(self.base, changes, self.hub)

    def configured(self, config: Any) -> Any:
        """Return the configuration to build from; a subclass may make another one of the model's own."""
        return config

    def content(self) -> str | None:
        """Return what identifies the weights without loading them: a hash of the files, or the hub's commit.

        None if nothing does: the weights are random, or the hub does not say.
        """
        found = content_of(self)
        return hashlib.sha256(found).hexdigest() if isinstance(found, bytes) else found

    def fingerprint(self) -> str | None:
        """Return what identifies the network, that is, its weights and how they are used; None if nothing does."""
        said = repr({k: v for k, v in as_data(self).items() if k not in ("name_or_path", "token")})
        found = content_of(self)
        if isinstance(found, bytes):
            return hashlib.sha256(said.encode() + found).hexdigest()
        return f"{said} {found}" if found else None

    def freeze_parameters(self, hf: Any) -> None:
        """Freeze the parameters whose names match a pattern.

        Raises:
            RecipeError: a pattern matches nothing, or all is frozen.
        """
        parameters = dict(hf.named_parameters())
        for pattern in self.freeze:
            matching = fnmatch.filter(parameters, pattern)
            if not matching:
                raise RecipeError(f"model.freeze: {pattern!r} matches no parameter, such as {next(iter(parameters))!r}")
            for name in matching:
                parameters[name].requires_grad_(False)
        trains = self.quantize is None or self.lora is not None  # else it is a reference
        if trains and not any(parameter.requires_grad for parameter in parameters.values()):
            raise RecipeError("model.freeze leaves nothing to train")


@block("model", "reward")
class RewardModel(HFModel):
    """A model that gives a conversation one number, at its last token: a sequence classifier with one label.

    From a causal language model, its head is new. transformers and vLLM (`/classify`) load what is exported; of a model
    of images and text, see docs/images.md.
    """

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    task: ClassVar[str] = "SEQ_CLS"
    fixed: ClassVar[dict[str, Any]] = {"num_labels": 1}
    begins: ClassVar[tuple[str, ...]] = ("score.*",)

    def wrap(self, hf: Any) -> "nn.Module":
        """Return a `Scorer` around a transformers model (see reward.py)."""
        from posttrain.blocks.models.reward import Scorer

        return Scorer(hf)

    def auto_class(self, config: Any) -> Any:
        """Return the class of transformers that loads the model."""
        from posttrain.blocks.models.reward import know_scores

        know_scores(config)
        return super().auto_class(config)
