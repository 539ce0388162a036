"""What `import roialign` loads, what it offers, and the settings that are read at import."""

import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest

import roialign
from isolation import isolated
from roialign import _core

PUBLIC = {
    "ROIAlign",
    "roi_align",
    "roi_align_adjoint",
    "roi_align_box_gradient",
    "Convention",
    "conventions",
    "set_num_threads",
    "get_num_threads",
}
FRAMEWORKS = {
    "torch",
    "torchvision",
    "jax",
    "jaxlib",
    "mindspore",
    "paddle",
    "tensorflow",
    "triton",
    "cupy",
    "onnx",
    "onnxruntime",
    "openvino",
    "ml_dtypes",
    "PIL",
    "matplotlib",
    "pandas",
    "scipy",
}


def check_nothing_else_is_imported():
    import contextlib

    asked = []

    class Recorder:
        """Sees every import that is tried, installed or not."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            asked.append(name.split(".")[0])

    import numpy as np

    for name in [n for n in sys.modules if n.split(".")[0] == "roialign"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Recorder)
    import roialign

    features = np.ones((1, 2, 8, 8), np.float32)
    rois = np.array([[0, 1, 1, 5, 5]], np.float32)
    y = roialign.roi_align(features, rois, 2)
    roialign.roi_align_adjoint(y, rois, features.shape)
    roialign.roi_align_box_gradient(y, features, rois)
    roialign.ROIAlign(2, 2, 1.0)(features.astype(np.float16), rois)
    with contextlib.suppress(TypeError):
        roialign.roi_align(features.tolist(), rois, 2)
    # the standard library's copy module asks for Jython's org
    allowed = {"roialign", "numpy", "org", *sys.stdlib_module_names}
    strangers = {n for n in asked if n not in allowed and not n.startswith("nanobind")}
    assert not strangers, strangers
    assert "roialign" in asked


def test_nothing_else_is_imported():
    isolated(check_nothing_else_is_imported_afresh)


def check_nothing_else_is_imported_afresh():
    # a second interpreter: this module has imported pytest and roialign already
    from inspect import getsource

    code = f"import sys\n{getsource(check_nothing_else_is_imported)}\n"
    code += "check_nothing_else_is_imported()\nprint(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert not loaded & FRAMEWORKS, loaded & FRAMEWORKS
    assert "roialign" in loaded


@pytest.mark.parametrize("name", ["torch", "jax", "mindspore"])
def test_a_library_is_imported_with_its_adapter(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    code = f"import sys, roialign; assert {name!r} not in sys.modules; roialign.{name}"
    subprocess.run([sys.executable, "-c", f"{code}; assert {name!r} in sys.modules"], check=True)


def test_public_names():
    assert set(roialign.__all__) - {"__version__"} == PUBLIC
    for name in PUBLIC:
        assert getattr(roialign, name).__doc__ or name == "conventions"
    assert set(dir(roialign)) >= PUBLIC
    namespace = {}
    exec("from roialign import *", namespace)
    assert set(namespace) >= PUBLIC


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no_such_name"):
        roialign.no_such_name  # noqa: B018


def check_isa(isa):
    assert _core.isa == isa, _core.isa


@pytest.mark.parametrize("isa", _core.usable_isas)
def test_isa_is_forced(isa):
    isolated(check_isa, isa, env={"ROIALIGN_ISA": isa})


def test_the_best_usable_isa_is_chosen():
    assert set(_core.usable_isas) <= set(_core.compiled_isas)
    assert _core.isa in _core.usable_isas
    isolated(
        check_isa,
        [i for i in ("v2", "v3", "v4", "neon") if i in _core.usable_isas][-1],
        env={"ROIALIGN_ISA": ""},
    )


@pytest.mark.parametrize(
    "isa", ["v9", "V3", *sorted({"v2", "v3", "v4", "neon"} - set(_core.usable_isas))]
)
def test_an_isa_that_cannot_be_used_is_an_import_error(isa):
    with pytest.raises(AssertionError, match=rf"ImportError.*{isa}"):
        isolated(check_isa, isa, env={"ROIALIGN_ISA": isa})


def check_threads(count):
    assert roialign.get_num_threads() == count
    roialign.set_num_threads(5)
    assert roialign.get_num_threads() == 5


def test_threads_from_the_environment():
    isolated(check_threads, 3, env={"ROIALIGN_NUM_THREADS": "3"})


@pytest.mark.parametrize("setting", ["0", "2.5", "000", "\N{ARABIC-INDIC DIGIT THREE}"])
def test_a_meaningless_thread_setting_is_an_error(setting):
    isolated(check_thread_setting_is_refused, setting, env={"ROIALIGN_NUM_THREADS": setting})


def check_thread_setting_is_refused(setting):
    try:
        check_small_call()
    except ValueError as error:
        assert "ROIALIGN_NUM_THREADS" in str(error) and setting in str(error)
    else:
        raise AssertionError("no ValueError")


@pytest.mark.parametrize("setting", ["", "99999999999999999999", "9" * 5000, "0" * 5000 + "1"])
def test_a_small_call_with_any_number_of_threads(setting):
    isolated(check_small_call, env={"ROIALIGN_NUM_THREADS": setting})


def check_small_call():
    import numpy as np

    y = roialign.roi_align(np.ones((1, 2, 8, 8)), np.array([[0, 1.0, 1, 5, 5]]), 2)
    assert np.allclose(y, 1)


def check_very_many_threads():
    roialign.set_num_threads(10**30)
    assert roialign.get_num_threads() > 1
    check_small_call()


def test_very_many_threads():
    isolated(check_very_many_threads)


@pytest.mark.parametrize("setting", ["", "0", "064", "9" * 40])
def test_a_cache_setting(setting):
    isolated(check_small_call, env={"ROIALIGN_CACHE_MB": setting})


@pytest.mark.parametrize(
    "setting", ["abc", "64MB", "0x10", "1e300", "nan", "-1", "+1", "2.5", " 64", "64 ", "\u0661"]
)
def test_a_meaningless_cache_setting_is_an_import_error(setting):
    message = f"ImportError: ROIALIGN_CACHE_MB must be .*decimal digits, got '{re.escape(setting)}'"
    with pytest.raises(AssertionError, match=message):
        isolated(check_small_call, env={"ROIALIGN_CACHE_MB": setting})


def test_threads_default_to_the_cpus_of_this_process():
    if not hasattr(__import__("os"), "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    isolated(check_affinity)


CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    "quota, period, cpus",
    [
        ("max", "100000", CPUS),
        ("-1", "100000", CPUS),
        ("100000", "100000", 1),
        ("1", "100000", 1),
        ("100001", "100000", min(2, CPUS)),
        ("9999999999999999999999", "100000", CPUS),
        ("9" * 400, "9" * 400, CPUS),
        ("100000", "9" * 400, 1),
        ("nan", "100000", CPUS),
        ("100000", "0", CPUS),
        ("100000", "", CPUS),
        ("", "", CPUS),
    ],
)
def test_the_quota_of_a_cgroup(tmp_path, quota, period, cpus):
    version_1, version_2 = tmp_path / "1", tmp_path / "2"
    (version_1 / "cpu").mkdir(parents=True)
    version_2.mkdir()
    (version_1 / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (version_1 / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    (version_2 / "cpu.max").write_text(f"{quota} {period}\n")
    assert _core.available_cpus(str(version_1)) == _core.available_cpus(str(version_2)) == cpus
    assert _core.available_cpus(str(tmp_path)) == CPUS


def check_affinity():
    # the default is read at import, so it needs an interpreter that starts on one CPU
    import os
    import subprocess

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    env = {k: v for k, v in os.environ.items() if k != "ROIALIGN_NUM_THREADS"}
    code = "import roialign; print(roialign.get_num_threads())"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "1", ran.stdout + ran.stderr


def test_version():
    from importlib.metadata import version

    assert roialign.__version__ == version("roialign")


@pytest.mark.parametrize("name", ["torch", "jax", "mindspore"])
def test_a_module_of_a_library_that_has_no_arrays_yet(name, monkeypatch):
    """Half imported, or a stand-in."""
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(TypeError, match="`features` must be a numpy.ndarray, torch.Tensor"):
        roialign.roi_align([1.0], [2.0], 2)


def nothing_has_memory():
    from roialign import _core

    assert not any(map(_core.has_memory, (1, object(), "features", [])))
    assert not _core.takes_rows([], 1)


def test_what_is_no_tensor_has_no_memory():
    isolated(nothing_has_memory)
