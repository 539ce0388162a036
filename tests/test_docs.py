"""Every `>>>` example: in the docstrings of the public names, README.md and docs/*.md."""

import doctest
import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest

import roialign

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
FRAMEWORKS = {
    "torch": (
        "roialign.torch",
        *[f"roialign.compat.{name}" for name in ("torchvision", "detectron2", "mmdet")],
    ),
    "jax": ("roialign.jax",),
    "mindspore": ("roialign.mindspore",),
    "matplotlib": ("roialign._explain",),
}
MISSING = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]
MODULES = (
    "roialign",
    "roialign._api",
    "roialign._checks",
    "roialign._grid",
    "roialign._identify",
    "roialign._rule",
    "roialign.numpy",
    *(module for name in FRAMEWORKS if name not in MISSING for module in FRAMEWORKS[name]),
)
BLOCK = re.compile(r"^( *)```(?:python|pycon|py)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
IMPORTED = re.compile(r"^(?:>>> )? *(?:import|from) (\w+)", re.MULTILINE)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def run(example):
    report = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def missing(source):
    """What it imports and is not installed."""
    return [name for name in IMPORTED.findall(source) if importlib.util.find_spec(name) is None]


def examples_of(page):
    """One test of all blocks: a later block may use an earlier one's names.

    In the README, which has a block for each framework, those of missing ones are left out.
    """
    text = page.read_text(encoding="utf-8")
    kept = []
    line = 0
    for match in BLOCK.finditer(text):
        if page.name == "README.md" and missing(match[2]):
            continue
        start = text.count("\n", 0, match.start(2))
        kept += [""] * (start - line) + match[2].splitlines()
        line = start + match[2].count("\n")
    source = "\n".join(kept) + "\n"
    return doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if examples_of(page).examples],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_page(page, tmp_path, monkeypatch):
    example = examples_of(page)
    assert any("roialign" in e.source for e in example.examples)
    for name in missing("".join(e.source for e in example.examples)):
        pytest.skip(f"the examples of this page need {name}")
    monkeypatch.chdir(tmp_path)
    run(example)


def docstrings():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        for example in finder.find(importlib.import_module(name), name):
            if example.examples:
                yield example


@pytest.mark.parametrize("example", list(docstrings()), ids=lambda e: e.name)
def test_docstring(example):
    run(example)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_an_example(module):
    module = importlib.import_module(module)
    for name in getattr(module, "__all__", ()):
        assert name == "conventions" or ">>>" in getattr(module, name).__doc__, name


def test_a_wrong_example_fails():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(AssertionError, match="Expected"):
        run(wrong)


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target


def test_pages_name_only_conventions_that_exist():
    # `library:setting` in backticks or quotes
    libraries = "|".join({name.split(":")[0] for name in roialign.conventions if ":" in name})
    named = re.compile(rf"[`\"]((?:{libraries}):[\w=.]+)[`\"]")
    for page in PAGES:
        for name in named.findall(page.read_text(encoding="utf-8")):
            assert name in roialign.conventions, f"{name} in {os.fspath(page)}"
