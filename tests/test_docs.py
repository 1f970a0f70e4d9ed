"""What the documentation tells people to type works: commands are run, or at least parsed.

Blocks marked ``bash`` and ``python`` in the README and the pages of docs/ are taken in the order of
each page. A comment ``<!-- not run: REASON -->`` before a block has its commands only checked for
names and options that exist.
"""

import importlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import pytest
import typer.main
import yaml

from autolora.cli import app, main
from tests.conftest import ROOT, random_factors

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        page
        for page in (ROOT / "docs").rglob("*.md")
        if page.name not in ("RESULTS.md", "LOG.md")  # what was once run, on other commits
    ),
]
BLOCK = re.compile(r"^( *)```(bash|console|python)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
LORAS = ("elephant", "neon", "dragon", "sepia", "rocket", "watercolor", "cat", "blueprint")


@dataclass(frozen=True)
class Block:
    """A block of code in a page."""

    language: str
    text: str
    line: int
    run: bool


def blocks(page: Path) -> list[Block]:
    """Find a page's blocks."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()]
        found.append(Block(match[2], match[3], before.count("\n") + 1, not NOT_RUN.search(before)))
    return found


def commands(block: Block) -> Iterator[str]:
    """Split a block into commands: lines, joined where one goes on in the next."""
    text = re.sub(r"(?:\\|(?<=\|))\n\s*", " ", block.text)
    for line in text.splitlines():
        line = re.sub(r"^\$ ", "", line.strip())
        if line and not line.startswith("#"):
            yield line


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def words_of(command: str) -> list[str]:
    """Split a simple command into words, without a comment at its end."""
    return shlex.split(command, comments=True)


def program_words(words: list[str]) -> list[str]:
    """Drop what may stand before a program: its folder, or a launcher."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "accelerate" and words[1] == "launch":
        return ["python", *words[2:]]
    return [program, *words[1:]]


def check_parses(command: str) -> None:
    """Make sure that a command's names and options exist, without running it."""
    simple = re.sub(r"\s(?:[<>]|2>)\s*\S+", "", command.split(" | ")[-1].split(" && ")[0])
    program, *arguments = program_words(words_of(simple))
    if program == "autolora":
        parse_autolora(arguments)
    elif program == "python":
        check_script(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, command
    elif program == "pip":
        assert arguments[0] == "install", command
    else:
        assert program in OTHERS, f"{command!r}: this test does not know {program}"


OTHERS = {"export", "source", "sed", "curl", "printf", "modelscope", "hf", "cd", "git"}


def parse_autolora(arguments: list[str]) -> None:
    """Parse a command line as the shell would, and stop before anything is done."""
    command, context, name = typer.main.get_command(app), None, "autolora"
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        context = command.make_context(name, [arguments[0]], parent=context)
        name, *arguments = arguments
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    for word in arguments:
        if re.match(r"--|-[a-z]$", word):
            assert word.split("=")[0] in {*known, "--help"}, f"{name} has no option {word}"


def check_script(arguments: list[str]) -> None:
    """Make sure that a program and its options exist, by its text."""
    if arguments[0] == "-m":
        if arguments[1] in ("pytest", "pip", "autolora"):
            return
        file = ROOT / (arguments[1].replace(".", "/") + ".py")
        arguments = arguments[1:]
    else:
        file = ROOT / arguments[0]
    assert file.is_file(), f"{relative(file)} is not there"
    text = file.read_text(encoding="utf-8")
    for word in arguments[1:]:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in text, f"{relative(file)} has no option {word}"


@pytest.fixture(scope="module")
def one_base_model() -> Iterator[None]:
    """Load the base model once; each command makes a pipeline of its own."""
    from autolora.families import load as loading

    load, loaded = loading.load_pipeline, {}

    def load_once(config):
        key = (config.kind, config.weights, config.storage)
        if key not in loaded:
            loaded[key] = load(config)
        return loaded[key]

    patch = pytest.MonkeyPatch()
    patch.setattr(loading, "load_pipeline", load_once)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: the shipped model with few steps, some LoRAs, a download."""
    folder = tmp_path_factory.mktemp("reader")
    pool = folder / "lora_pool" / "tiny"
    pool.mkdir(parents=True)
    for name in LORAS:
        for file in (ROOT / "lora_pool" / "tiny").glob(f"{name}.*"):
            shutil.copy(file, pool)
    shutil.copytree(pool, folder / "loras")
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    config |= {"pool": "lora_pool/tiny", "steps": 1, "width": 64, "height": 64}
    config["portrait"]["noises"] = 1
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture
def reader(place: Path, tiny_shapes, one_base_model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in that folder, with the home folder there, too."""
    from autolora import config
    from autolora import config as template
    from autolora.fusion.strategies import base as strategies
    from autolora.lora import save_lora

    downloads = place / "Downloads"
    downloads.mkdir(exist_ok=True)
    save_lora(downloads / "style.safetensors", random_factors(tiny_shapes, 5))
    for added in place.glob("lora*/**/my-style*"):
        added.unlink()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    find = config.find_config
    small = place / "tiny.yaml"
    for module in (config, template):
        monkeypatch.setattr(
            module, "find_config", lambda name: small if str(name) == "tiny" else find(name)
        )
    # What a page registers is gone after it.
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))
    monkeypatch.delenv("AUTOLORA_MODEL", raising=False)
    monkeypatch.delenv("AUTOLORA_POOL", raising=False)
    return place


def run_command(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Run one command in this process; a pipe and files are done here, other programs checked."""
    if command.startswith("export "):
        name, value = words_of(command)[1].split("=", 1)
        monkeypatch.setenv(name, str(Path(value).expanduser()))
        return
    source, _, command = command.rpartition(" | ")
    command, _, target = command.partition(" > ")
    command, _, stdin = command.partition(" < ")
    program, *arguments = program_words(words_of(command))
    if program != "autolora":
        check_parses(command)
        return
    if source:
        monkeypatch.setattr("sys.stdin", _lines(source))
    if stdin:
        text = Path(stdin.strip()).read_text(encoding="utf-8")
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
    expanded = [
        str(Path(word).expanduser()) if word.startswith("~") else word for word in arguments
    ]
    status = main(expanded)
    captured = capsys.readouterr()
    assert status == 0, f"{command!r} ended with status {status}: {captured.err}"
    if target:
        Path(target.strip()).write_text(captured.out, encoding="utf-8")


def _lines(command: str):
    """The output of a harmless command."""
    assert words_of(command)[0] in ("printf", "cat"), command
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return io.StringIO(done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_says_works(reader: Path, page: Path, monkeypatch, capsys) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        where = f"{relative(page)}, line {block.line}"
        try:
            if block.language == "python":
                code = compile(block.text, where, "exec")
                if block.run:
                    exec(code, names)
                continue
            for command in commands(block):
                if block.run:
                    run_command(command, monkeypatch, capsys)
                else:
                    check_parses(command)
        except Exception as error:
            raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("autolora genrate cat", "no command genrate"),
        ("autolora generate cat --sede 3", "no option --sede"),
        ("autolora search cat -z 3", "no option -z"),
        ("autolora pool chekc", "no command chekc"),
        ("python scripts/no_such.py", "is not there"),
        ("python scripts/evaluate_tiny.py --fast", "no option --fast"),
        ("python -m train.gate --confg x", "no option --confg"),
        ("make tset", "make tset"),
        ("no_such_program x", "does not know no_such_program"),
    ],
)
def test_wrong_commands_are_noticed(command: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_parses(command)


def test_pages_are_reached_from_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"\b([\w/-]+\.md)\b", text))
    there = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert named == there


def test_the_reference_names_what_there_is() -> None:
    named = [
        name
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(named) > 20
    for name in named:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, member = name.rpartition(".")
            assert hasattr(importlib.import_module(module), member), name


NAMED_FILE = re.compile(
    r"`((?:autolora|configs|docs|examples|lora_pool|scripts|tests|train)/[\w./*-]*)`"
)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_that_pages_name_are_there(page: Path) -> None:
    for name in NAMED_FILE.findall(page.read_text(encoding="utf-8")):
        assert any(ROOT.glob(name.rstrip("/"))), name


def test_the_http_page_names_every_route(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from autolora import AutoLoRAPipeline
    from autolora.console.server import make_app
    from autolora.console.studio import Studio

    studio = Studio(AutoLoRAPipeline.from_config("tiny"), tmp_path, None)
    paths = make_app(studio, page=False).openapi()["paths"]
    there = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    page = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([A-Z]+) (/api/\S+)`", page, re.MULTILINE)) == there


def test_every_command_is_in_the_page_about_the_shell() -> None:
    page = (ROOT / "docs" / "shell.md").read_text(encoding="utf-8")
    rows = " ".join(re.findall(r"^\| (`.+?) \|", page, re.MULTILINE))
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        names = [f"`{name} ", f"`{name}`"]
        assert any(text in rows for text in names), f"{name} is not in docs/shell.md"
        for inner in getattr(command, "commands", {}):
            assert re.search(rf"`(?:{name} )?{inner}`", rows), f"{name} {inner}"


def test_every_strategy_has_a_page() -> None:
    from autolora.fusion import strategy_names

    pages = {page.stem for page in (ROOT / "docs" / "strategies").glob("*.md")} - {"index"}
    assert pages == set(strategy_names())


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{relative(page)} links to {target}"


def test_the_page_about_models_says_what_doctor_says() -> None:
    from autolora.config import load_config
    from autolora.families.flux1.sizes import FLUX1_DEV
    from autolora.runtime.memory import GIB, all_needs

    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    said = {
        row[0]: (row[1], row[2])
        for row in re.findall(r"^\| `(\w+)` \| ([\d.]+)[^|]*\| ([\d.]*) *\|$", page, re.MULTILINE)
    }
    config = load_config("flux1-dev")
    needs = {
        need.offload: (f"{need.device / GIB:.1f}", f"{need.machine / GIB:.1f}")
        for need in all_needs(FLUX1_DEV, config.memory, config.width, config.height)
        if (need.storage, need.text_storage) == ("float8", "float8")
    }
    assert said == needs | {"none": (needs["none"][0], "")}


def test_every_public_name_is_in_the_reference() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    named = {
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for package in ("autolora", "autolora.lora", "autolora.fusion", "autolora.retrieval"):
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, (type, FunctionType)):
                home = value.__module__
                assert {home, f"{home}.{name}"} & named, f"{package}.{name}"


def test_every_program_is_named_in_the_documentation() -> None:
    texts = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    for folder in ("scripts", "examples"):
        for program in sorted((ROOT / folder).glob("*.*")):
            assert relative(program) in texts, relative(program)


@pytest.mark.parametrize(("name", "fewest"), [("compatibility.md", 20), ("security.md", 5)])
def test_every_row_of_a_page_is_held_by_a_test(name: str, fewest: int) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if not re.search(r"\| (test|tried by) \|$", row)]
    assert len(rows) > fewest
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert named, row
        assert f"def {named.group(2)}(" in (ROOT / named.group(1)).read_text("utf-8"), row
