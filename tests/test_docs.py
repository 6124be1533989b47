"""The documents: links lead somewhere, names stand in the files they are linked to, examples run.

A link whose text is code, [`Model::forward`](../csrc/model.cpp), claims that the file defines or
mentions that name: every part of it must occur there as a word.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
WHOLE_TREE = (ROOT / "CMakeLists.txt").exists()  # else a copy of some directories, to test a wheel
LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def ids(documents: list[Path]) -> list[str]:
    return [str(document.relative_to(ROOT)) for document in documents]


def relative_links(document: Path) -> list[tuple[str, str, str]]:
    """(text, path, anchor) of links into the repository."""
    links = LINK.findall(FENCED.sub("", document.read_text(encoding="utf-8")))
    return [(text, *target.partition("#")[::2]) for text, target in links if ":" not in target]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_are_there() -> None:
    names = ids(DOCUMENTS)
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"} <= set(names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_links(document: Path) -> None:
    wrong = []
    for text, path, anchor in relative_links(document):
        target = (document.parent / path).resolve() if path else document
        top = target.relative_to(ROOT).parts[0]  # ValueError: the link leaves the repository
        if not WHOLE_TREE and not (ROOT / top).exists():
            continue
        name = re.fullmatch(r"`(.+)`", text)
        if not target.exists():
            wrong.append(f"{path}: no such file")
        elif name and target.is_file():
            source = target.read_text(encoding="utf-8")
            words = re.findall(r"\w+", name[1])
            if not all(re.search(rf"\b{re.escape(word)}\b", source) for word in words):
                wrong.append(f"{path}: no {name[1]}")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{path}: no heading #{anchor}")
    assert not wrong


def run_examples(
    document: Path, model: Path, chat: bool, directory: Path, patch: pytest.MonkeyPatch
) -> None:
    """The examples of a document that chat, or those that do not, one after the other, with a tiny
    model for the one they name."""
    examples = EXAMPLE.findall(document.read_text(encoding="utf-8"))
    (directory / "gpt-oss-20b").symlink_to(model)
    patch.chdir(directory)
    namespace: dict[str, object] = {}
    for example in examples:
        if chat == (document.name == "chat.md" or ".chat(" in example):
            exec(compile(example, str(document), "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_python_examples(
    document: Path, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_examples(document, tiny_path, False, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["README.md", "docs/chat.md"])
def test_python_examples_of_chat(
    name: str, harmony_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_examples(ROOT / name, harmony_path, True, tmp_path, monkeypatch)
