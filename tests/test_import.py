"""What `import roialign` loads, what it offers, and the settings that are read at import."""

import importlib.util
import os
import re
import sys
import types

import numpy as np
import pytest

import roialign
from isolation import isolated, printed
from roialign import _core

PUBLIC = {
    "Identification",
    "Match",
    "SamplingGrid",
    "explain",
    "identify",
    "sampling_grid",
    "ROIAlign",
    "roi_align",
    "roi_align_adjoint",
    "roi_align_box_gradient",
    "roi_align_rotated",
    "roi_align_rotated_adjoint",
    "roi_align_rotated_box_gradient",
    "multiscale_roi_align",
    "multiscale_roi_align_adjoint",
    "multiscale_roi_align_box_gradient",
    "assign_levels",
    "Convention",
    "conventions",
    "set_num_threads",
    "get_num_threads",
}
IMPORTED_IN_USE = """if True:
    import contextlib
    import sys
    import numpy as np

    asked = set()

    class Recorder:
        # sees every import that is tried, installed or not
        @staticmethod
        def find_spec(name, path=None, target=None):
            asked.add(name.split(".")[0])

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
    print(*asked)
"""


def test_nothing_else_is_imported():
    # the standard library's copy module asks for Jython's org
    allowed = {"roialign", "numpy", "org", *sys.stdlib_module_names}
    asked = set(printed("-c", IMPORTED_IN_USE).split())
    assert "roialign" in asked
    assert not {name for name in asked - allowed if not name.startswith("nanobind")}


CALLS_OF_TORCH = """import torch
for device in ("cpu", "meta"):
    torch.set_default_device(device)
    roialign.roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 2)
"""
LAZY = [  # what is used, what that loads, what it does not
    ("roialign", "numpy", "torch torchvision jax mindspore"),
    ("roialign.torch", "torch", "torchvision jax mindspore torch.distributed.tensor"),
    (CALLS_OF_TORCH, "torch", "jax mindspore torch.distributed.tensor"),
    ("roialign.jax", "jax", "torch mindspore"),
    ("roialign.mindspore", "mindspore", "torch jax"),
    ("roialign.compat", "numpy", "torch roialign.compat.torchvision roialign.compat.detectron2"),
    ("roialign.compat.torchvision, roialign.compat.detectron2", "torch", "jax detectron2"),
]


@pytest.mark.parametrize("used, needs, others", LAZY)
def test_a_library_is_imported_with_what_uses_it(used, needs, others):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    code = f"import sys, roialign.compat\n{used}\nprint(*sys.modules)"
    loaded = set(printed("-c", code).split())
    assert needs in loaded and not loaded & set(others.split())


def test_public_names():
    assert set(roialign.__all__) - {"__version__"} == PUBLIC
    for name in PUBLIC:
        assert getattr(roialign, name).__doc__ or name == "conventions"
    assert set(dir(roialign)) >= PUBLIC
    namespace = {}
    exec("from roialign import *", namespace)
    assert set(namespace) >= PUBLIC


@pytest.mark.parametrize("module", ["roialign", "roialign.compat"])
def test_unknown_attribute(module):
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(module).no_such_name  # noqa: B018


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
    assert not any(map(_core.has_memory, (1, object(), "features", [])))
    assert not _core.takes_rows([], 1)


def test_what_is_no_tensor_has_no_memory():
    isolated(nothing_has_memory)


# Settings


def check_small_call():
    y = roialign.roi_align(np.ones((1, 2, 8, 8)), np.array([[0, 1.0, 1, 5, 5]]), 2)
    assert np.allclose(y, 1)


UNUSABLE = {"v9", "V3", "v2", "v3", "v4", "neon"} - {*_core.usable_isas}
MEANINGLESS = {  # setting: (what its error says, values)
    "NUM_THREADS": ("ValueError: .*", ["0", "2.5", "000", "\N{ARABIC-INDIC DIGIT THREE}"]),
    "CACHE_MB": (
        "ImportError: ROIALIGN_CACHE_MB must be .*decimal digits, got '",
        ["abc", "64MB", "0x10", "1e300", "nan", "-1", "+1", "2.5", " 64", "64 ", "\u0661"],
    ),
    "ISA": ("ImportError.*", sorted(UNUSABLE)),
    "LOG": ("ImportError: ROIALIGN_LOG must be 0 or 1, got '", ["2", "true", "01"]),
}
ANY_NUMBER = {
    "NUM_THREADS": ["", "99999999999999999999", "9" * 5000, "0" * 5000 + "1"],
    "CACHE_MB": ["", "0", "064", "9" * 40],
}


@pytest.mark.parametrize(
    "setting, value", [(name, v) for name, (_, values) in MEANINGLESS.items() for v in values]
)
def test_a_meaningless_setting_is_an_error(setting, value):
    name, (message, _) = f"ROIALIGN_{setting}", MEANINGLESS[setting]
    with pytest.raises(AssertionError, match=message + re.escape(value)) as error:
        isolated(check_small_call, env={name: value})
    assert name in str(error.value)


@pytest.mark.parametrize(
    "setting, value", [(name, v) for name, values in ANY_NUMBER.items() for v in values]
)
def test_a_setting_may_be_any_number(setting, value):
    isolated(check_small_call, env={f"ROIALIGN_{setting}": value})


@pytest.mark.parametrize("isa", ["", *_core.usable_isas])
def test_isa(isa):
    """The one that is asked for, else the best usable one."""
    assert {_core.isa} <= {*_core.usable_isas} <= {*_core.compiled_isas}
    best = [i for i in ("v2", "v3", "v4", "neon") if i in _core.usable_isas][-1]
    code = "from roialign import _core; print(_core.isa)"
    assert printed("-c", code, env={"ROIALIGN_ISA": isa}).strip() == (isa or best)


def check_threads(count):
    assert roialign.get_num_threads() == count
    roialign.set_num_threads(5)
    assert roialign.get_num_threads() == 5
    roialign.set_num_threads(10**30)
    assert roialign.get_num_threads() > 1
    check_small_call()


def test_threads():
    isolated(check_threads, 3, env={"ROIALIGN_NUM_THREADS": "3"})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_threads_default_to_the_cpus_of_this_process():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import roialign; "
    code += "print(roialign.get_num_threads())"
    assert printed("-c", code, env={"ROIALIGN_NUM_THREADS": ""}).strip() == "1"


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
