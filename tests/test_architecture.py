"""The rules of the house, read from the source: who may import whom, and what no file may contain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOUNS = {"types", "errors", "config", "host", "system.seeds"}
"""Modules that everyone may import and that import no room."""

MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "host": set(),
    "config": {"errors"},
    "system.seeds": set(),
    "search": NOUNS,
    "models": NOUNS,
    "rollout": NOUNS | {"search", "models", "zs_kernels"},
    "learn": NOUNS | {"models", "zs_kernels", "system.distributed"},
    "system": NOUNS,
    "report": NOUNS | {"system.files", "system.jsonl"},
    "recipe_files": NOUNS,
}
"""Room -> what of ours it may import besides itself. Files not listed join the rooms: train, evaluate, cli, ..."""

TORCH_FREE = ("search", "types", "errors", "config", "host", "recipe_files", "cli", "system.seeds")


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if "__pycache__" not in path.parts)


OURS = sources("zs_fast", "kernels")
ALL = [*OURS, *sources("bench", "scripts", "examples"), ROOT / "setup.py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    """Dotted name below its root: zs_fast/search/data.py -> search.data, kernels/zs_kernels/a.py -> zs_kernels.a."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] in ("kernels", "zs_fast") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full dotted names that a file imports, `from a import b` as `a.b`; under TYPE_CHECKING too."""
    module = tree(path)
    for node in module.body if top_level_only else ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)}: relative imports hide the arrow; write zs_fast.{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, allowed: set[str] | tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def room_of(module: str) -> str:
    return "system.seeds" if module == "system.seeds" else module.partition(".")[0]


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_arrows(path):
    module = module_of(path)
    room = room_of(module)
    for name in imports(path):
        package, _, target = name.partition(".")
        if package == "zs_kernels":
            target = "zs_kernels"
        elif package != "zs_fast":
            continue
        if room == "zs_kernels":
            assert package == "zs_kernels", f"{relative(path)} imports {name}: the ops know no trainer"
        if within(target, ("train",)):
            assert module == "cli", f"{relative(path)} imports {name}: nobody but the command line imports train"
        if room in MAY_IMPORT and target and not target.startswith("_"):
            allowed = MAY_IMPORT[room] | {room} if room != "system.seeds" else set()
            assert within(target, allowed), f"{relative(path)} imports {name}; {room} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", [path for path in OURS if within(module_of(path), TORCH_FREE)], ids=relative)
def test_torch_free(path):
    found = [name for name in imports(path) if within(name, ("torch", "transformers", "triton"))]
    assert not found, f"{relative(path)} imports {found}; this room runs without torch"


@pytest.mark.parametrize("path", [path for path in OURS if module_of(path).startswith("zs_kernels")], ids=relative)
def test_ops_need_torch_and_triton_alone(path):
    import sys

    known = {"torch", "triton", "zs_kernels", *sys.stdlib_module_names}
    found = {name.partition(".")[0] for name in imports(path, top_level_only=True)} - known
    assert not found, f"{relative(path)} imports {sorted(found)}; zs_kernels is torch and triton alone"


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_vllm_is_known_in_its_own_files_alone(path):
    """Its private names change with every version."""
    users = {name for name in imports(path) if within(name, ("vllm",))}
    assert not users or path.name.startswith("vllm_"), f"{relative(path)} imports {sorted(users)}"


def test_no_kernels_package():
    """With an __init__.py, `kernels` in the root would hide Hugging Face's package of that name from transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
BANNED_ARGUMENTS = {("shell", True), ("verify", False), ("trust_remote_code", True), ("allow_pickle", True)}
WAITS_FOR_A_REPLY = {"urlopen", "urllib.request.urlopen", "socket.create_connection"} | {
    f"{library}.{verb}" for library in ("requests", "httpx") for verb in ("get", "post", "put", "head", "request")
}
"""Calls that wait for ever unless they are given a timeout."""
MEMORY_VERBS = {"sleep", "wake", "wake_up", "empty_cache"}


def banned(path: Path) -> Iterator[str]:
    """One line for each construct that no file may hold."""
    for name in imports(path):
        if name.partition(".")[0] in BANNED_MODULES:
            yield f"imports {name}"
        if name in BANNED_CALLS:
            yield f"imports {name}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield f"line {node.lineno}: listens to the whole network"
        if not isinstance(node, ast.Call):
            continue
        if (name := ast.unparse(node.func)) in BANNED_CALLS:
            yield f"line {node.lineno}: {name}"
        if name in WAITS_FOR_A_REPLY and not any(keyword.arg == "timeout" for keyword in node.keywords):
            yield f"line {node.lineno}: {name} without a timeout"
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in BANNED_ARGUMENTS:
                yield f"line {node.lineno}: {keyword.arg}={keyword.value.value}"


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_nothing_banned(path):
    assert not list(banned(path))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(x)",
        "torch.save(a, b)",
        "eval('1')",
        "exec(code)",
        "yaml.load(x)",
        "run(c, shell=True)",
        "get(u, verify=False)",
        "f(p, trust_remote_code=True)",
        "host = '0.0.0.0'",
        "requests.get(url)",
        "urllib.request.urlopen(url)",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_ban_finds_what_it_bans(text, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(text)
    assert list(banned(path))


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "pattern.exec", "load(x)", "torch.loads", "f(shell=False)", "urlopen(u, timeout=9)", "x[::2]"],
)
def test_the_ban_leaves_the_rest_alone(text, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(text)
    assert not list(banned(path))


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_only_memory_puts_things_to_sleep(path):
    """Who is resident when is decided in one file. Waiting (time.sleep, asyncio.sleep) is another matter."""
    if module_of(path) == "system.memory":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MEMORY_VERBS:
            owner = ast.unparse(node.func.value)
            assert owner in ("time", "asyncio"), f"{relative(path)}:{node.lineno}: {owner}.{node.func.attr}()"


def test_test_file_names_are_unique():
    """`--import-mode=importlib` and people alike tell test files apart by name."""
    names = [path.name for path in sources("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", sources("tests"), ids=relative)
def test_tests_have_no_packages(path):
    assert path.name != "__init__.py", "room names are not package names: a tests/system package would hide others"
