"""The commands: what they print, their help, their exit status."""

import json
import os
import re
from importlib.util import find_spec

import numpy as np
import pytest

import roialign
from isolation import python
from roialign import _core, cli

pillow = pytest.mark.skipif(find_spec("PIL") is None, reason="needs Pillow (roialign[demo])")


def run(*arguments, **options):
    return python("-m", "roialign", *arguments, **options)


def lines(text):
    """First word of a line -> the rest."""
    return {key: rest for key, _, rest in (line.partition(" ") for line in text.splitlines())}


def test_info():
    ran = run("info", env={"ROIALIGN_NUM_THREADS": "3", "ROIALIGN_ISA": _core.usable_isas[0]})
    assert ran.returncode == 0 and not ran.stderr
    shown = lines(ran.stdout)
    assert roialign.__version__ in shown["roialign"]
    assert re.search(rf"\b{_core.usable_isas[0]}\b", shown["ISA"].split(",")[0])
    assert all(isa in shown["ISA"] for isa in _core.compiled_isas)
    assert shown["threads"].split()[0] == "3"
    assert np.__version__ in shown["numpy"] and "yes" in shown["numpy"]
    for library in ("torch", "jax", "mindspore", "cupy"):
        missing = find_spec(library) is None
        assert shown[library].split()[0] in ("no" if missing else "yes no")
        assert "not installed" in shown[library] or not missing
    triton = find_spec("triton")
    assert shown["gpu"].split()[1:3] == (["yes", "(triton"] if triton else ["no", "(needs"])


def test_info_as_json():
    ran = run("info", "--json")
    rows, shown = json.loads(ran.stdout), lines(run("info").stdout)
    assert ran.returncode == 0 and [name.split()[0] for name in rows] == list(shown)
    assert rows["roialign"] == roialign.__version__ and type(rows["threads"]) is int


@pytest.mark.parametrize("command", [None, *cli.EXAMPLES])
def test_help_has_examples_and_the_exit_status(command):
    ran = run(*([command] if command else []), "--help")
    assert ran.returncode == 0 and not ran.stderr
    for name, example in cli.EXAMPLES.items():
        assert (example in ran.stdout) == (command in (name, None))
    assert all(f"\n  {status}  " in ran.stdout for status in range(3)) and "docs/" in ran.stdout


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["info", "extra"], ["demo", "--wrong"]])
def test_usage_errors(arguments):
    ran = run(*arguments)
    assert ran.returncode == 2 and "usage: roialign" in ran.stderr and not ran.stdout


def test_version():
    ran = run("--version")
    assert ran.returncode == 0 and roialign.__version__ in ran.stdout


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="roialign")
    assert callable(command.load())


def pixels_of(path):
    """Of a PNG file that is whole."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        image.verify()
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The demo with a path and without: (what it printed, its folder) of each."""
    folders = [tmp_path_factory.mktemp(name) for name in ("given", "default")]
    ran = [
        run("demo", "--output", str(folders[0] / "picture.png"), cwd=folders[0]),
        run("demo", cwd=folders[1]),
    ]
    assert [r.returncode for r in ran] == [0, 0], ran[0].stderr + ran[1].stderr
    return list(zip([r.stdout for r in ran], folders, strict=True))


@pillow
def test_demo(demos):
    printed, folder = demos[0]
    (picture,) = folder.iterdir()
    assert picture.name == "picture.png" and str(picture) in printed
    height, width, _ = pixels_of(picture).shape
    assert width > 400 and height > 200
    shown = lines(printed)
    assert "ROIAlign(" in printed and "float32" in shown["features"] + shown["output"]
    example = [float(v) for v in re.findall(r"\d+\.\d+", shown["example"])]
    np.testing.assert_allclose(example, [1.775, 2.025, 2.275, 2.525], rtol=1e-6)
    assert re.search(r"\d\.\d+ ms", shown["time"])


@pillow
def test_demo_draws_the_same_picture_again_by_default_into_the_current_folder(demos):
    files = [list(folder.iterdir()) for _, folder in demos]
    pixels = [pixels_of(file) for (file,) in files]
    assert (pixels[0] == pixels[1]).all()
    # photograph and boxes, not a blank sheet
    assert len(np.unique(pixels[0].reshape(-1, 3), axis=0)) > 1000
    default = files[1][0].name
    assert default.endswith(".png")
    assert default in "".join(run("demo", "--help").stdout.split())  # --help wraps at hyphens


@pillow
def test_demo_into_a_folder_that_is_not_there(tmp_path):
    ran = run("demo", "--output", str(tmp_path / "missing" / "picture.png"))
    assert ran.returncode == 1 and "missing" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "package, arguments, words",
    [
        ("PIL", ["demo"], "Pillow: pip install pillow, or install roialign[demo]"),
        ("onnx", ["identify", "--onnx", "model.onnx"], "ONNX and its runtime: pip install onnx"),
        ("matplotlib", ["show", "--box", "1,1,5,5", "--map", "8x8"], "pip install matplotlib"),
    ],
)
def test_a_package_that_is_missing(tmp_path, package, arguments, words):
    text = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    (tmp_path / f"{package}.py").write_text(text)
    ran = run(
        *arguments,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert ran.returncode == 1 and len(ran.stderr.splitlines()) == 1 and words in ran.stderr
    assert not list(tmp_path.glob("*.png"))
