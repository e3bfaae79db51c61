"""The text that needles lie in: the repeated sentences that RULER calls noise, a text of one's own, or the standard library's source."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import corpus

# RULER's noise (arXiv 2404.06654, appendix B, "repeat"): these five sentences over and over.
NOISE = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again.\n")
BETWEEN_PIECES = re.compile(r"(?<=\n)(?!\n)|(?<=[.!?] )")


@dataclass(frozen=True)
class Haystack:
    """Pieces of text with their white space, in order; a needle may lie between any two. `shuffled_start`: begin anywhere."""

    name: str
    pieces: tuple[str, ...]
    shuffled_start: bool

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError(f"the haystack {self.name!r} holds no text")

    def take(self, count: int, rng: Random) -> list[str]:
        """`count` consecutive pieces; after the last comes the first. Draws from `rng` the same whatever `count` is."""
        start = rng.randrange(len(self.pieces)) if self.shuffled_start else 0
        whole, pieces = divmod(start + count, len(self.pieces))
        if not whole:
            return list(self.pieces[start:pieces])
        return [*self.pieces[start:], *self.pieces * (whole - 1), *self.pieces[:pieces]]

    @classmethod
    def noise(cls) -> "Haystack":
        """RULER's five sentences."""
        return cls("noise", NOISE, False)

    @classmethod
    def text(cls, text: str, name: str = "text") -> "Haystack":
        """Any text, cut at line ends and sentence ends."""
        pieces = tuple(piece for piece in BETWEEN_PIECES.split(text.rstrip() + "\n") if piece.strip())
        return cls(name, pieces, True)

    @classmethod
    def file(cls, path: Path) -> "Haystack":
        """A UTF-8 text file, or all `*.txt` files of a folder in the order of their names. Raises FileNotFoundError."""
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} holds no .txt file: a haystack is a text file or a folder of them")
        return cls.text("\n".join(file.read_text(encoding="utf-8") for file in files), path.name)

    @classmethod
    @lru_cache(maxsize=2)
    def source(cls, part: corpus.Part = "held-out") -> "Haystack":
        """The standard library's source: by default the files that our own model was not trained on."""
        return cls.text("".join(corpus.documents(part)), f"source ({part})")
