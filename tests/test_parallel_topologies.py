"""TPU topologies: every name, what libtpu is asked for, and the error for what is unknown."""

import importlib.util
import re

import pytest

from saro_jax.parallel import topologies

LIBTPU = importlib.util.find_spec("libtpu") is not None
NEEDS_LIBTPU = pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed: .[tpu]")


@pytest.mark.parametrize(
    ("name", "libtpu", "devices", "host"),
    [
        ("v4-32", "v4:2x2x4", 16, (2, 2, 1)),
        ("v5litepod-1", "v5e:1x1", 1, (1, 1, 1)),
        ("v5e-8", "v5e:2x4", 8, (2, 4, 1)),
        ("v5litepod-16", "v5e:4x4", 16, (2, 2, 1)),
        ("v5e-32", "v5e:4x8", 32, (2, 2, 1)),
        ("v5p-8", "v5p:2x2x1", 4, (2, 2, 1)),
        ("v5p-32", "v5p:2x2x4", 16, (2, 2, 1)),
        ("v5p:2x2x4", "v5p:2x2x4", 16, (2, 2, 1)),
        ("v5:2x2x4", "v5p:2x2x4", 16, (2, 2, 1)),
        ("V6E-8", "v6e:2x4", 8, (2, 4, 1)),
        ("trillium-256", "v6e:16x16", 256, (2, 2, 1)),
        ("tpu7x-8", "tpu7x:2x2x1", 8, (2, 2, 1)),
        ("ironwood:4x4x4", "tpu7x:4x4x4", 128, (2, 2, 1)),
        ("2xv5e-16", "v5e:4x4", 32, (2, 2, 1)),
    ],
)
def test_names(name, libtpu, devices, host):
    found = topologies.find(name)
    assert (found.libtpu_name, found.devices) == (libtpu, devices)
    assert found.chips_per_host_bounds == host


def test_every_listed_name_is_found():
    for name in topologies.names():
        assert topologies.find(name).chips >= 1, name


def test_options():
    assert topologies.find("v4-8").options["chip_config_name"] == "megacore"
    assert topologies.find("4xv6e-16").options["num_slices"] == 4
    assert "num_slices" not in topologies.find("v6e-16").options
    assert topologies.find("v5p:4x4x8").wrap == (True, True, True)
    assert topologies.find("v5p:2x2x4").wrap == (False, False, False)
    assert topologies.find("v6e:16x16").wrap == (True, True, False)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5p-31", "v5p-32"),
        ("v5e-17", "v5e-16"),
        ("v6e:2x2x2", "v6e:2x2"),
        ("v7-8", "v6e-8"),
        ("h100", "such as v5p-32"),
        ("v5p", "v5p-8"),
        ("v5p:0x2x2", "v5p:"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"^topology '{name}': unknown; ") as caught:
        topologies.find(name)
    assert near in str(caught.value) and "\n" not in str(caught.value)


def test_description():
    assert topologies.find("v5p-32").description() == "16 x TPU v5p (2x2x4, 4 hosts)"
    assert topologies.find("v6e-8").description() == "8 x TPU v6e (2x4, 1 host)"


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(ValueError, match=re.escape("pip install -e '.[tpu]'")):
        topologies.devices(topologies.find("v5e-4"))


@NEEDS_LIBTPU
@pytest.mark.parametrize(
    "name", ["v5e-1", "v5e-8", "v6e-16", "v4-8", "v5p-32", "tpu7x-8", "2xv5e-16"]
)
def test_libtpu_has_as_many_devices(name):
    wanted = topologies.find(name)
    found = topologies.devices(wanted)
    assert len(found) == wanted.devices
    assert len({getattr(device, "slice_index", 0) for device in found}) == wanted.slices


@NEEDS_LIBTPU
def test_what_libtpu_refuses_is_one_line():
    with pytest.raises(ValueError, match=r"^topology 'v5e:3x5' \(v5e:3x5\): ") as caught:
        topologies.devices(topologies.find("v5e:3x5"))
    assert "\n" not in str(caught.value)
