"""The SwiftKV model block: a teacher and its student in one set of weights, and what the student saves."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from attrs.validators import gt, optional

from posttrain.blocks.models.model import HFModel
from posttrain.blocks.models.swiftkv.config import FAMILIES, SUFFIX
from posttrain.errors import RecipeError
from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn

    from posttrain.blocks.models.documents.ways import Way


@block("model", "swiftkv")
class SwiftKVModel(HFModel):
    """A causal language model whose upper layers learn to take keys and values from one lower layer.

    From a model of a known family, or from an exported SwiftKV model, whose student goes on as it is. Only the
    student's own weights are trained. transformers loads what is exported once `posttrain` has been imported with
    `import posttrain.blocks.models.swiftkv.modeling`.
    """

    num_key_value_layers: int | None = key(None, check=optional(gt(0)))
    """Lower layers that stay as they are, k; half of all by default."""
    key_value_group_size: int | None = key(None, check=optional(gt(0)))
    """Upper layers that share keys and values; 1 by default. More need less memory for them in serving."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the method."""
        yield from super().check()
        if self.lora is not None:
            yield "lora", "has no place here: the student's weights are trained, and nothing else"
        if self.quantize is not None:
            yield "quantize", "has no place here: the student's weights are exported with those of the teacher"
        if self.qat is not None:
            yield "qat", "has no place here: the teacher's weights, which the student shares, are not trained"
        if self.fp8:
            yield "fp8", "has no place here: the student is compared with its teacher, in the same precision"

    def configured(self, config: Any) -> Any:
        """Return the configuration of the network with a student.

        Raises:
            RecipeError: the family is not known, or the layers cannot be divided as asked.
        """
        from posttrain.blocks.models.swiftkv.modeling import family

        asked = {"num_key_value_layers": self.num_key_value_layers, "key_value_group_size": self.key_value_group_size}
        if config.model_type.endswith(SUFFIX):
            for name, value in asked.items():
                if value not in (None, getattr(config, name)):
                    raise RecipeError(f"model.{name} is {value}, but {self.name_or_path} was made with another: "
                                      f"{getattr(config, name)}")  # fmt: skip
            return config
        if config.model_type not in FAMILIES:
            raise RecipeError(f"model.name_or_path: SwiftKV knows {', '.join(FAMILIES)}, not {config.model_type!r}")
        if config.to_dict().get("sliding_window") is not None:
            raise RecipeError(
                "model.name_or_path: the model attends in a sliding window, which SwiftKV does not; where its data are "
                "shorter, switch it off with model.config: {sliding_window: null}"
            )
        layers, group = config.num_hidden_layers, self.key_value_group_size or 1
        first = self.num_key_value_layers or layers // 2
        if not 0 < first < layers:
            raise RecipeError(f"model.num_key_value_layers must be 1 to {layers - 1}, the model has {layers}: {first}")
        if (layers - first) % group:
            raise RecipeError(f"model.key_value_group_size: the {layers - first} upper layers cannot share by {group}")
        made, _ = family(config.model_type)
        said = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        return made(**said, num_key_value_layers=first, key_value_group_size=group)

    def load(self, empty: bool = False) -> Any:
        """Return the network; from a base model, its student begins as the teacher."""
        from transformers.utils import logging as theirs

        from posttrain.blocks.models.swiftkv.modeling import start_from_teacher

        verbosity = theirs.get_verbosity()
        theirs.set_verbosity_error()  # that the student's weights are missing is how it should be
        try:
            hf = super().load(empty)
        finally:
            theirs.set_verbosity(verbosity)
        if not self.is_exported:
            start_from_teacher(hf)
        hf.requires_grad_(False)
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_("_swiftkv" in name)
        return hf

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Refuse files that lack weights, but for a student that begins as its teacher."""
        begins = not self.is_exported
        super().refuse_missing(name for name in names if not (begins and "_swiftkv" in name))

    def way(self, hf: Any) -> "Way":
        """Return packed attention, or what the recipe asks for: the families are known to keep documents apart."""
        from posttrain.blocks.models.documents.attention import NAME
        from posttrain.blocks.models.documents.ways import Way

        attention = NAME if self.attn_implementation == "auto" else self.attn_implementation
        hf.set_attn_implementation(attention)
        return Way(attention)

    @property
    def is_exported(self) -> bool:
        """Whether the model has a student already."""
        from transformers import AutoConfig

        import posttrain.blocks.models.swiftkv.modeling  # noqa: F401 - registers the configurations with transformers

        if self.random_init:
            return False
        token = self.token.reveal() if self.token else None
        found = AutoConfig.from_pretrained(self.base, revision=self.revision, token=token)
        return bool(found.model_type.endswith(SUFFIX))

    def wrap(self, hf: Any) -> "nn.Module":
        """Return the network that the trainer calls."""
        from posttrain.blocks.models.swiftkv.network import SwiftKV

        return SwiftKV(hf)
