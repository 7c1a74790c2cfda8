"""What README.md, CONTRIBUTING.md and docs/ name exists: links, paths, functions, and the flags of the commands."""

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest
import torch.distributed.run
from support import ROOT

import train_gpt2

PAGES = sorted(str(path.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md") for path in ROOT.glob(pattern))
PLACES = ("lib", "tools", "tests", "docs", "assets", ".ci")  # what begins so is of this repository
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
PROGRAM = re.compile(r"(?:\S+/)?(train_gpt2|fineweb|hellaswag)\.py|(?:tests|docs)/\w+\.(?:py|sh)|tools\.\w+")
SCRIPTS = ["train_gpt2.py", "fineweb.py", "hellaswag.py"]
TOOLS = [f"tools.{path.stem}" for path in ROOT.glob("tools/*.py") if "ArgumentParser" in path.read_text()]
FOREIGN = {"--exclusive", "--"}  # of sbatch; of argparse


def prose(page):
    """A page without its blocks of code."""
    return BLOCK.sub("", (ROOT / page).read_text())


def inline(page):
    """The pieces of code within the sentences of a page, each on one line."""
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """Every command of a page as words: the lines of its blocks, which may be continued, and what stands in sentences.
    What a program prints comes along, and begins with no program."""
    text = "\n".join(block for _, language, block in BLOCK.findall((ROOT / page).read_text()) if not language)
    for line in [*text.replace("\\\n", " ").splitlines(), *inline(page)]:
        for command in re.split(r"&&|\|\|?|;|2>&1", re.sub(r"^\$ |\s#.*", "", line)):
            try:
                yield shlex.split(command)
            except ValueError:  # an apostrophe in what a program prints
                continue


@functools.cache
def help_of(program):
    """What a program says for --help; run in this process, which has loaded torch."""
    if program == "torchrun":
        return torch.distributed.run.get_args_parser().format_help()
    text, path = io.StringIO(), program.replace(".", "/") + ".py" if program.startswith("tools.") else program
    with (
        mock.patch.object(sys, "argv", [program, "--help"]),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return text.getvalue()


def flags_of(program):
    flags = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_of(program)))
    if program == "torchrun":
        flags |= {flag.replace("_", "-") for flag in flags} | {"--shutdown-timeout"}  # which torch 2.11 lacks
    return flags


def added_by(page):
    """The flags of the settings that a page's changes add."""
    return {f"--{name}" for name in re.findall(r"^\+    (\w+): ", (ROOT / page).read_text(), re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    here, missing = ROOT / page, []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("LOG.md")])  # a history names what was
def test_every_path_exists(page):
    words = [word for code in inline(page) for word in code.split()] + [w for words in commands(page) for w in words]
    paths = [word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word)]
    ours = {p for p in paths if p.split("/")[0] in PLACES and "/" in p or re.fullmatch(r"\w+\.py|req\S+\.txt", p)}
    assert not [path for path in sorted(ours) if not (ROOT / path).exists()]


def test_the_readme_can_be_read_to_the_end_and_has_no_gaps():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 185
    assert not re.findall(r"@[A-Z_]+@", text), "figures that were to be filled in"


def test_every_function_of_the_readmes_tables_exists():
    rows = re.findall(r"^\|.*?\|(.*?)\|", prose("README.md"), re.M)
    named = [(name, path) for cell in rows for name, path in re.findall(r"`([A-Z_a-z.]+)`(?: in \[(\S+)\])?", cell)]
    named = [(name, path) for name, path in named if re.match(r"[A-Z]", name) or "_" in name or path]
    assert len(named) > 15
    for name, path in named:
        module = importlib.import_module((path or "train_gpt2.py").removesuffix(".py").replace("/", "."))
        if name == "set_float32_matmul_precision":  # of torch, called in train
            assert name in (ROOT / "train_gpt2.py").read_text()
        elif name != "run.record":
            functools.reduce(getattr, name.split("."), module)


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("LOG.md")])
def test_every_flag_of_the_commands_exists(page):
    for words in commands(page):
        program, launcher = None, "torchrun" in words
        for word in words:
            if word == "--":  # of tools.compare: what follows is for the script that it starts
                program = "train_gpt2.py"
            elif word.startswith("-") and len(word) > 1 and (program or launcher):
                flag = word.split("=")[0]
                known = flags_of(program or "torchrun") | added_by(page) | {"-m"}
                assert flag in known, f"{program or 'torchrun'} has no {word}: {words}"
            elif PROGRAM.fullmatch(word) and "llama.cpp" not in word:
                program = "train_gpt2.py" if word.endswith(".sh") else word
        if "--preset" in words and program == "train_gpt2.py":
            assert words[words.index("--preset") + 1] in train_gpt2.PRESETS


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("LOG.md")])
def test_every_flag_of_the_sentences_exists(page):
    known = set().union(FOREIGN, added_by(page), *map(flags_of, ["torchrun", *SCRIPTS, *TOOLS]))
    words = [word.split("=")[0] for code in inline(page) if code.startswith("--") for word in code.split()]
    assert not [word for word in words if word.startswith("--") and word not in known]
