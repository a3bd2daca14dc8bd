"""The block of low-rank adapters."""

import warnings
from collections.abc import Iterator
from typing import Any

import attrs
from attrs.validators import ge, gt

from posttrain.blocks.models.adapters import CONFIG, attach
from posttrain.errors import RecipeError
from posttrain.registry import key
from posttrain.values import expanded, missing_folder


@attrs.frozen(kw_only=True, slots=False)
class LoRA:
    """Low-rank adapters (Hu et al., arXiv:2106.09685), through peft (extra `peft`)."""

    r: int = key(16, also=("rank",), check=gt(0))
    """Rank."""
    alpha: float = key(32.0, also=("lora_alpha",), check=gt(0))
    """The adapters' output is scaled by alpha / r."""
    dropout: float = key(0.0, also=("lora_dropout",), check=ge(0))
    """Probability, on the adapters' input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers to adapt, or `all-linear`."""
    start_from: str | None = None
    """Folder of an adapter to train on, the export of an earlier run, instead of a new one. Its shape is its own: leave
    the other keys out."""
    kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Further arguments of `peft.LoraConfig`."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield a folder that is no adapter, and keys that would do nothing."""
        if self.start_from is None:
            return
        if not (expanded(self.start_from) / CONFIG).is_file():
            yield "start_from", missing_folder(self.start_from) or f"{self.start_from} holds no {CONFIG}"
        if self != LoRA(start_from=self.start_from):
            yield "start_from", "the adapter has its own r, alpha, dropout and modules: leave the other keys out"

    def apply(self, hf: Any, task: str, linears: list[str]) -> Any:
        """Return the model with adapters, everything else frozen.

        Args:
            hf: of transformers.
            task: peft's name of what the model does.
            linears: of a model of images and text, what `all-linear` means: the layers of the parts that are trained.
        """
        if self.start_from is not None:
            return attach(hf, expanded(self.start_from), task)
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise RecipeError("model.lora needs peft: pip install 'posttrain[peft]'") from None
        every = self.target_modules == "all-linear" and hf.config.get_text_config() is not hf.config
        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout,
            target_modules=linears if every else self.target_modules,
            task_type=task, **self.kwargs,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's own affair
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")  # experts' old names
            return get_peft_model(hf, config)
