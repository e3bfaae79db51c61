"""Models, tokenizers and text from local paths. Nothing is downloaded.

A checkpoint is a folder as `save_pretrained` leaves it; the small model of this folder, which reads bytes, has no tokenizer in it.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import corpus
import torch
import xxhash
from full_float32 import require_float32
from model import ByteTokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vocabulary import END, VOCABULARY

warnings.filterwarnings("ignore", ".past_key_values. is deprecated", FutureWarning)  # the only name that transformers 5.23 knows
SMALL = Path(__file__).parent / "byte-llama"  # what TRAINING.md made
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
READ = 1 << 20  # bytes at each end of a file that a fingerprint is made of


class Tokenizer(Protocol):
    """What evaluation asks of a tokenizer."""

    @property
    def end(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Bytes(ByteTokenizer):
    """Of the small model of this folder."""

    end = frozenset({END})


class Pretrained:
    """A tokenizer of transformers, without special tokens but the leading one."""

    def __init__(self, path: Path, end: frozenset[int]) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.end = end

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Checkpoint:
    """`model` in evaluation mode on its device, attending by SDPA. `name`: the folder's, with a fingerprint unless it is the small model of
    this repository, for training calls every model's folder `model`, and ledgers tell runs by it."""

    name: str
    model: Any
    tokenizer: Tokenizer

    @property
    def suffix(self) -> str:
        """What tells results of this model from those of the small one of this repository, in a file's name."""
        return "" if self.name == SMALL.name else f"_{self.name}"

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        return len(self.tokenizer.encode(text))


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path, device: str | None = None, dtype: str | None = None) -> Checkpoint:
    """The checkpoint in the folder `path`; `dtype` None: the one it was saved in, `device` None: the GPU where there is one.

    Raises ValueError for a folder that holds none, an unknown dtype, or a vocabulary that is neither bytes nor has a tokenizer;
    ArithmeticError for float32 on a device that has fewer bits for it.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path} holds no *.safetensors; pickled weights are not read")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    tokenizer = _tokenizer(path, config)
    chosen = "auto" if dtype is None else DTYPES[dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, local_files_only=True, attn_implementation="sdpa")
    name = path.name if path.resolve() == SMALL.resolve() else f"{path.name}-{fingerprint(path)}"
    checkpoint = Checkpoint(name, model.to(device or default_device()).eval().requires_grad_(False), tokenizer)
    if model.dtype == torch.float32:
        require_float32(checkpoint.device)
    return checkpoint


def fingerprint(path: Path) -> str:
    """Eight hexadecimal digits of the length and of the first and last MiB of each file of weights: enough to tell models of another seed
    or another hour of training, and the same whatever type the weights are loaded in."""
    digest = xxhash.xxh64()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as weights:
            for start in (0, max(0, size - READ)):
                weights.seek(start)
                digest.update(weights.read(READ))
    return digest.hexdigest()[:8]


def _tokenizer(path: Path, config: Any) -> Tokenizer:
    end = config.eos_token_id
    ends = frozenset([] if end is None else [end] if isinstance(end, int) else end)
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        return Pretrained(path, ends)
    if config.vocab_size == VOCABULARY:
        return Bytes()
    raise ValueError(
        f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}) and a vocabulary of {config.vocab_size}; "
        f"without a tokenizer only the byte-level model's {VOCABULARY} ids can be read"
    )


def texts(path: Path | None) -> Iterator[str]:
    """Whole texts: the file `path`, or each .txt of the folder in order of its name (as PG-19 is distributed); None: the part of
    the standard library's source that the small model was not trained on. Raises ValueError where there is none."""
    if path is None:
        yield from corpus.documents("held-out")
        return
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(f"{path} is neither a text file nor a folder with .txt files")
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def all_windows(checkpoint: Checkpoint, source: Path | None, tokens: int) -> Iterator[torch.Tensor]:
    """Windows of `tokens` ids [1, tokens] on the checkpoint's device, texts joined by blank lines; what is left at the end is dropped."""
    ids: list[int] = []
    for text in texts(source):
        ids += checkpoint.tokenizer.encode(text + "\n\n")
        while len(ids) >= tokens:
            yield torch.tensor([ids[:tokens]], device=checkpoint.device)
            del ids[:tokens]


def windows(checkpoint: Checkpoint, source: Path | None, tokens: int, count: int) -> list[torch.Tensor]:
    """The first `count` windows. Raises ValueError if the text is too short for them."""
    found = list(itertools.islice(all_windows(checkpoint, source, tokens), count))
    if len(found) < count:
        raise ValueError(f"{source or 'the standard library'} holds {len(found)} windows of {tokens} tokens; {count} are needed")
    return found
