"""What 0.2 saved is loaded by every later version, and gives what the functions give."""

import pickle
from pathlib import Path

import numpy as np
import pytest

import roialign

torch = pytest.importorskip("torch", reason="what is saved are programs and layers of PyTorch")
from artefacts import make_torch  # noqa: E402

FOLDER = Path(make_torch.__file__).parent


@pytest.mark.parametrize("name", make_torch.PROGRAMS)
def test_exported_program(name):
    program = torch.export.load(FOLDER / f"torch-0.2.0-{name}.pt2").module()
    features, rois = make_torch.inputs()
    for count in (4, 3):
        given = torch.from_numpy(features), torch.from_numpy(rois[:count])
        expected = roialign.roi_align(features, rois[:count], (3, 2), **make_torch.PROGRAMS[name])
        np.testing.assert_array_equal(program(*given), expected)


@pytest.mark.parametrize("name", make_torch.PROGRAMS)
def test_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the models")
    session = onnxruntime.InferenceSession(FOLDER / f"torch-0.2.0-{name}.onnx")
    features, rois = make_torch.inputs()
    (output,) = session.run(None, {"features": features, "rois": rois})
    expected = roialign.roi_align(features, rois, (3, 2), **make_torch.PROGRAMS[name])
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", make_torch.LAYERS)
def test_pickles(name):
    layer = pickle.loads((FOLDER / f"pickle-0.2.0-{name}.pkl").read_bytes())
    assert type(layer) is type(make_torch.LAYERS[name])
    assert repr(layer) == repr(make_torch.LAYERS[name])


def test_a_program_of_version_0_1_is_a_clear_error():
    program = torch.export.load(FOLDER / "torch-0.1.0-fixed.pt2").module()
    with pytest.raises(RuntimeError, match=r"exported by roialign 0\.1, .*: export it again"):
        program(*map(torch.from_numpy, make_torch.inputs()))
