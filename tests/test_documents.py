"""The two documents name what exists: modules, functions, tests, constants; and every invariant says where it is held."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CERTIFICATE = ROOT / "kernels" / "tierd_kernels" / "CERTIFICATE.md"
ARCHITECTURE = ROOT / "tierd" / "ARCHITECTURE.md"
DOCUMENTS = [CERTIFICATE, ARCHITECTURE]
# `path/to/file.py`, `folder/`, or either with `::name` behind it.
REFERENCE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|proto)|(?:[\w.-]+/)+)(?:::(\w+))?`")
CONSTANT = re.compile(r"^\| `([\w/]+)\.py::(\w+)` \| `([^`]+)` \|", re.MULTILINE)
INVARIANT = re.compile(r"^\*\*I(\d+)\.\*\* (.*?)\n\n", re.MULTILINE | re.DOTALL)
OURS = {"tierd", "tierd_client", "tierd_kernels", "tierd_proto"}


def references(text: str) -> list[tuple[str, str]]:
    """(path, name) of every reference; the name is empty where a whole file or folder is meant."""
    return REFERENCE.findall(text)


def located(document: Path, path: str) -> Path | None:
    """The file that a document means: beside it, or from the root."""
    return next((base / path for base in (document.parent, ROOT) if (base / path).exists()), None)


def defined(file: Path) -> set[str]:
    """Functions, methods, classes and module constants of a Python file."""
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def problems(document: Path, text: str) -> list[str]:
    """What of the text's references does not exist."""
    wrong = []
    for path, name in references(text):
        file = located(document, path)
        if file is None:
            wrong.append(f"{path} does not exist")
        elif name and name not in (defined(file) if file.suffix == ".py" else file.read_text()):
            wrong.append(f"{path} has no {name}")
    return wrong


def invariants() -> list[tuple[int, str]]:
    return [(int(number), " ".join(text.split())) for number, text in INVARIANT.findall(ARCHITECTURE.read_text())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_everything_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    assert len(references(text)) > 20
    assert problems(document, text) == []


def test_a_wrong_reference_would_be_seen() -> None:
    text = "`engine/loop.py::Engine` `engine/loop.py::nothing` `engine/gone.py` `gone/` `pools/` `tests/test_documents.py::located`"
    assert problems(ARCHITECTURE, text) == ["engine/loop.py has no nothing", "engine/gone.py does not exist", "gone/ does not exist"]


def test_invariants_are_numbered_in_order() -> None:
    numbers = [number for number, _ in invariants()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 10


@pytest.mark.parametrize(("number", "text"), invariants())
def test_an_invariant_names_where_it_is_enforced_and_what_fails_without_it(number: int, text: str) -> None:
    statement, enforced, breaks = re.split(r" Enforced: | Breaks: ", text)
    assert statement.endswith(".")
    assert references(enforced), f"I{number} names no place"
    tests = [name for path, name in references(breaks) if path.startswith("tests/") and name.startswith("test_")]
    assert tests or "`make lint`" in breaks, f"I{number} names no test"


def test_constants_of_the_certificate_have_the_values_that_it_states() -> None:
    rows = CONSTANT.findall(CERTIFICATE.read_text())
    assert len(rows) == 15
    for path, name, stated in rows:
        module = importlib.import_module("tierd_kernels." + path.replace("/", "."))
        assert getattr(module, name) == eval(stated, {"u": 2.0**-24}), f"{path}.py::{name} is not {stated}"


def test_the_oracle_imports_nothing_of_ours() -> None:
    tree = ast.parse((ROOT / "tests" / "oracle.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & (OURS | {"", "tests"})
