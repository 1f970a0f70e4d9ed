"""Rules that hold for the whole repository: sizes, imports, configurations, words."""

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION = 60
MAX_MAIN = 80  # in programs, where a run is read from top to bottom
PROGRAMS = ("scripts", "train")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".sh", ".cfg", ""}


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", sources("autolora", "train", "scripts"), ids=relative)
def test_functions_are_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    limit = MAX_MAIN if relative(file).startswith(PROGRAMS) else MAX_FUNCTION
    long = [
        f"{node.name} ({length} lines)"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := body_lines(node)) > limit
    ]
    assert not long, f"{relative(file)}: {', '.join(long)}"


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring, which grow with what is said."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1


def test_function_limit_can_be_exceeded() -> None:
    lines = "\n".join("    x = 1" for _ in range(MAX_FUNCTION + 1))
    function = ast.parse(f'def f():\n    """Doc."""\n{lines}\n').body[0]
    assert body_lines(function) == MAX_FUNCTION + 1


@pytest.mark.parametrize(
    "code",
    [
        "import autolora; autolora.AutoLoRAError",
        "import autolora.config as c; c.load_config('tiny')",
        "from autolora import Pool",
        "from autolora.cli import main; assert main(['--help']) == 0",
        "from autolora.cli import main; assert main(['generate', '--help']) == 0",
        "from autolora.cli import main; main(['pool', 'list', '--pool', '/nowhere'])",
        "from autolora.cli import main; assert main(['generate', '  ']) == 2",
    ],
)
def test_light_commands_load_nothing_heavy(code: str) -> None:
    check = (
        f"import sys; {code}; "
        "heavy = {'torch', 'diffsynth', 'transformers', 'faiss'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_pipeline_needs_no_diffsynth() -> None:
    check = "import sys, autolora.pipeline; sys.exit('diffsynth' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=relative)
def test_every_config_is_yaml_and_says_how_it_is_used(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    assert text.startswith("#"), "a configuration opens with how to use it"


def test_configs_of_base_models_load() -> None:
    from autolora.config import load_config, shipped_configs

    names = list(shipped_configs())
    assert "tiny" in names
    for name in names:
        assert load_config(name).name == name


def committed_files() -> list[Path]:
    """Files that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def committed_texts() -> list[Path]:
    return [file for file in committed_files() if file.suffix in TEXT_SUFFIXES]


def test_no_paths_of_one_machine() -> None:
    absolute = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|workspace|mnt|opt)/\w+")
    found = [
        f"{relative(file)}: {match.group()}"
        for file in committed_texts()
        for match in absolute.finditer(file.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found


def test_no_large_file_is_committed() -> None:
    assert not [relative(f) for f in committed_files() if f.stat().st_size > 25_000_000]


def test_a_wheel_holds_every_file_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]
    held: set[Path] = set()
    for package in packages["packages"]:
        folder = ROOT / packages["package-dir"].get(package, package.replace(".", "/"))
        for pattern in ("*.py", *packages["package-data"].get(package, [])):
            held.update(folder.glob(pattern))
    ours = {file for file in committed_files() if file.is_relative_to(ROOT / "autolora")}
    assert not sorted(relative(file) for file in ours - held)


def test_what_is_installed_is_what_the_ranges_say() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, lines):
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                continue
            assert installed in requirement.specifier, f"{requirement}: {installed} is installed"


def test_every_option_of_a_program_says_what_it_is() -> None:
    silent = [
        f"{relative(file)}:{node.lineno}"
        for file in sources("train")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and not any(keyword.arg == "help" for keyword in node.keywords)
    ]
    assert not silent
