"""Models, tokenizers and text from local paths. Nothing is downloaded.

A checkpoint is a folder as `save_pretrained` leaves it. One without a tokenizer whose vocabulary holds the 256 bytes first is read
byte by byte, as the small model of this folder is.
"""

import itertools
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

warnings.filterwarnings("ignore", ".past_key_values. is deprecated", FutureWarning)  # the only name that transformers 5.23 knows
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BYTE_VOCABULARIES = range(256, 513)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HELD_OUT_EVERY = 16  # one module in so many of the standard library is text to measure on


class Tokenizer(Protocol):
    """What evaluation asks of a tokenizer."""

    @property
    def end(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Bytes:
    """Each byte of UTF-8 is an id; ids from 256 on are no text."""

    end: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


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
    """`model` in evaluation mode on its device, attending by SDPA."""

    name: str
    model: Any
    tokenizer: Tokenizer

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

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

    Raises ValueError for a folder that holds none, an unknown dtype, or a vocabulary that is neither bytes nor has a tokenizer.
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
    return Checkpoint(path.name, model.to(device or default_device()).eval().requires_grad_(False), tokenizer)


def _tokenizer(path: Path, config: Any) -> Tokenizer:
    end = config.eos_token_id
    ends = frozenset([] if end is None else [end] if isinstance(end, int) else end)
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        return Pretrained(path, ends)
    if config.vocab_size in BYTE_VOCABULARIES:
        return Bytes(ends)
    raise ValueError(
        f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}) and a vocabulary of {config.vocab_size}; "
        f"without a tokenizer {BYTE_VOCABULARIES.start} to {BYTE_VOCABULARIES.stop - 1} ids are read as bytes"
    )


def texts(path: Path | None) -> Iterator[str]:
    """Whole texts: the file `path`, or each .txt of the folder in order of its name (as PG-19 is distributed); None: modules of the
    standard library that are kept out of training. Raises ValueError where there is none."""
    if path is None:
        files = held_out_modules()
    elif path.is_dir():
        files = sorted(path.glob("*.txt"))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise ValueError(f"{path} is neither a text file nor a folder with .txt files")
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def held_out_modules() -> list[Path]:
    """Modules at the top of this Python's standard library, every sixteenth by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::HELD_OUT_EVERY]


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
