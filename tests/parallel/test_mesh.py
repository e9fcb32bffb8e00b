import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from slmjax import axes
from slmjax.config import MeshConfig
from slmjax.parallel import make_mesh

pytestmark = pytest.mark.multidevice


def test_axes_are_the_fields_of_the_config_in_order():
    names = tuple(field.name for field in dataclasses.fields(MeshConfig))
    assert make_mesh(MeshConfig()).axis_names == names == (axes.DATA, axes.FSDP)


def test_axes_are_partitioned_by_the_compiler():
    assert set(make_mesh(MeshConfig()).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(1, -1, (1, 8)), (-1, 2, (4, 2)), (2, 4, (2, 4)), (-1, 8, (1, 8)), (8, -1, (8, 1))]
)
def test_minus_one_takes_what_is_left(data, fsdp, shape):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_some_devices_only():
    devices = jax.devices()[2:4]
    assert list(make_mesh(MeshConfig(), devices).devices.flat) == devices


def test_error_names_sizes_and_device_count():
    with pytest.raises(ValueError, match=r"data = 4, fsdp = 3 needs 12 devices, 8 are present"):
        make_mesh(MeshConfig(data=4, fsdp=3))
    with pytest.raises(ValueError, match=r"data = 2, fsdp = 2 needs 4 devices, 8 are present"):
        make_mesh(MeshConfig(data=2, fsdp=2))
    with pytest.raises(ValueError, match=r"8 devices cannot be divided by 3.*fsdp = -1"):
        make_mesh(MeshConfig(data=3, fsdp=-1))
