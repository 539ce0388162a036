"""docs/errors.md: each row raises what it says, and each `raise` of the package has a row.

A row has a call; a command, after `$`; or words for what takes a device or a missing library, which
other tests stand in for. What a call reaches is seen from its traceback. Of words and commands the
text tells it.
"""

import ast
import re
import shlex
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest

import roialign
from backends import Triton
from isolation import python

PACKAGE = Path(roialign.__file__).parent
PAGE = (Path(__file__).parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
ROW = re.compile(r"^\| (.+?) \| (.+?) \| .+ \|$", re.MULTILINE)
LIBRARIES = "numpy", "matplotlib", "torch", "triton", "jax", "mindspore"
# whose sections reach what a module, or a function in it, raises: the first that fits
PLACES = {
    "_explain": "matplotlib",
    "_checks:refuse_script": "torch",
    "_checks:mapping": "torch",
    "_checks:flag": "torch",
    "_operations:require_first_order": "torch",
    "torch/kernels:_on_device": "triton",
    "torch/": "torch",
    "compat/__init__": "numpy",
    "compat/": "torch",
    "cupy": "torch",
    "_triton/": "triton",
    "jax": "jax",
    "mindspore": "mindspore",
    "": "numpy",
}


def sections():
    """Library, code before the calls, and rows (call, what it says) of each."""
    start, *rest = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    for text in rest:
        (code,) = BLOCK.findall(text) or BLOCK.findall(start)
        library = next(n for n in reversed(LIBRARIES) if f"import {n}" in code)
        yield library, code, ROW.findall(text.partition("|---")[2])


def raises(library):
    """File, lines and the pattern of what it says, of each `raise` that these sections reach."""
    for path in PACKAGE.rglob("*.py"):
        tree, inside = ast.parse(path.read_text(encoding="utf-8")), {}
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                inside |= dict.fromkeys(ast.walk(function), function.name)
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                place = f"{module}:{inside.get(node)}"
                if library == next(PLACES[start] for start in PLACES if place.startswith(start)):
                    yield str(path), range(node.lineno, node.end_lineno + 1), written(node.exc)


def written(error):
    """None: its words are elsewhere."""
    text = error.args[0]
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    if not isinstance(text, (ast.JoinedStr, ast.Constant)):
        return None
    words = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts]
    return re.compile(rf"({ast.unparse(error.func)}|roialign \w+): {''.join(words)}")


def of_command(command, folder):
    """The last line of its errors; no output goes before them."""
    words = shlex.split(command)
    env = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *arguments = words[len(env) :]
    ran = python(*["-m", "roialign"][: 2 * (program != "python")], *arguments, env=env, cwd=folder)
    assert ran.returncode in (1, 2) and not ran.stdout, command
    return ran.stderr.splitlines()[-1]


def of_call(code, namespace):
    """What it raises, and the lines of Python where that, and what it came from, was."""
    with pytest.raises(Exception) as caught:
        exec(code, namespace)
    error, lines = caught.value, set()
    says = f"{type(error).__name__}: {error}"
    while error:
        lines |= {(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)}
        error = error.__context__
    return says, lines


@pytest.mark.filterwarnings("ignore")  # of torch's former exporter
@pytest.mark.parametrize("library", LIBRARIES)
def test_each_row_is_true_and_each_raise_has_one(library, tmp_path, monkeypatch, request):
    if find_spec("torch" if library == "triton" else library) is None:
        pytest.skip(f"needs {library}")
    if library == "triton":
        backend = Triton()
        backend.start(monkeypatch)
        request.addfinalizer(backend.stop)
    told, reached = [], set()
    for code, rows in (section for reader, *section in sections() if reader == library):
        namespace = {}
        if library == "triton":  # a GPU's tensors are the CPU's, in Triton's interpreter
            code = code.replace('device="cuda"', f'device="{Triton.device}"')
        exec(code, namespace)
        for call, says in rows:
            found, lines = says, set()
            if call.startswith("`$"):
                found = of_command(call.strip("`$ "), tmp_path)
            elif call.startswith("`"):
                found, lines = of_call(call.strip("`"), namespace)
            pattern = ".*".join(map(re.escape, says.split("…")))
            assert re.fullmatch(pattern, found, re.DOTALL), f"{call}\n{says}\n{found}"
            reached |= lines
            told += [says] if not lines else []
    missing = []
    for path, lines, words in raises(library):
        if any((path, line) in reached for line in lines):
            continue
        row = next((says for says in told if words and words.fullmatch(says)), None)
        if row:
            told.remove(row)  # it tells of no other
        else:
            missing.append(f"{path}:{lines[0]}")
    assert not missing, f"docs/errors.md has no row for {missing}"
