"""Weights from a folder that trainer and vLLM share: an engine of vLLM's own weight-transfer API, also where there is
no NCCL, such as on a CPU.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs \
        --weight-transfer-config '{"backend": "posttrain"}'

The trainer writes the files of a checkpoint, and says what each tensor must hash to. Tried with vLLM 0.32 on CPUs.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

BACKEND = "posttrain"


class Wrong(ValueError):
    """Weights that are not what they should be."""


@dataclass
class Begin(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where the weights are."""

    folder: str
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the bytes of each tensor, by name."""


class FolderEngine(WeightTransferEngine[Begin, Update]):
    """Loads safetensors in the form of a checkpoint, tensor by tensor."""

    init_info_cls = Begin
    update_info_cls = Update

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.wanted: set[str] = set()
        """Names of the parameters that must be sent."""
        self.tied: dict[str, str] = {}
        """Name of a parameter -> that of the one that it is."""

    def init_transfer_engine(self, init_info: Begin) -> None:
        """There is nothing to set up."""

    def start_weight_update(self) -> None:
        """Let layers take weights in the form of a checkpoint again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        once: dict[int, str] = {}
        for name, value in self.model.named_parameters(remove_duplicate=False):
            if (first := once.setdefault(id(value), name)) != name:
                self.tied[name] = first
        self.wanted = set(once.values()) - self.tied.keys()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the weights; on a CPU there is nothing to wait for."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Load the weights, and see that they are those that the trainer wrote, and all of them.

        Raises:
            Wrong: a tensor is another one, or missing, or the model is.
        """
        try:
            loaded = self.model.load_weights(self.read(update_info))
        except Exception as error:
            with suppress(Exception):
                self.finish_weight_update()  # else the layers would add the next weights to these
            if isinstance(error, Wrong):
                raise
            said = f"{type(error).__name__} {error}".strip()[:300]
            raise Wrong(f"these weights do not fit the model that is served here ({said})") from error
        if loaded is not None and self.model_config.quantization is None and (missing := sorted(self.wanted - loaded)):
            raise Wrong(f"the trainer sent nothing for {missing[0]} ({len(missing)} such in all)")

    def read(self, update_info: Update) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a folder."""
        from safetensors import safe_open

        left = dict(update_info.digests)
        for file in sorted(Path(update_info.folder).glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 - it is no dict
                    tensor = content.get_tensor(name)
                    if left.pop(name, None) != digest(tensor):
                        raise Wrong(f"the tensor {name} is not what the trainer wrote to {file}")
                    yield name, tensor.to(self.device)
        if left:
            raise Wrong(f"the tensor {min(left)} is not in {update_info.folder}: is it shared?")

    def finish_weight_update(self) -> None:
        """Let layers compute again: also those that are tied to others, such as a head to the embedding. vLLM's reload
        leaves these with what they had made of the old weights, such as the packed form of a CPU."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        for name, first in self.tied.items():
            path, _, own = name.rpartition(".")
            layer: Any = self.model.get_submodule(path)
            setattr(layer, own, self.model.get_parameter(first))
            if self.model_config.quantization is None and hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """There is nothing to release."""


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()
