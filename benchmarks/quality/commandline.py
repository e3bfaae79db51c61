"""Options that several commands of this folder take, declared once."""

import argparse
from pathlib import Path

import checkpoints
from ledger import WHOLE, Share


def add_model(parser: argparse.ArgumentParser, dtype: str | None = None) -> None:
    """--model, --device, --dtype: what `checkpoints.load` is to be given; `dtype`: the type if none is given, None for the checkpoint's."""
    parser.add_argument("--model", type=Path, default=checkpoints.SMALL, help="folder of a checkpoint (default: the small model here)")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=tuple(checkpoints.DTYPES), default=dtype, help=f"default: {dtype or 'as it was saved'}")


def add_run(parser: argparse.ArgumentParser, ledger: str, dtype: str | None = None) -> None:
    """The same, and --minutes, --share, --ledger of a run in parts; `ledger`: name of its file if none is given."""
    add_model(parser, dtype)
    parser.add_argument("--minutes", type=float, help="start no part after this long")
    parser.add_argument("--share", type=_share, default=WHOLE, help="of several processes, for instance 2/4; one without it sums up")
    parser.add_argument("--ledger", type=Path, default=Path(ledger), help="where parts are written as they are done")


def _share(text: str) -> Share:
    """Share.parse, whose own words argparse shows only of an ArgumentTypeError."""
    try:
        return Share.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
