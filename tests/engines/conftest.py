"""The stand-in for a GPU. As this folder has a conftest, pytest puts it on the path: the tests in
the folders below share its modules `cpu_device` and `delayed_runtime`.
"""

from __future__ import annotations

import pytest
from cpu_device import CpuDevice


@pytest.fixture(scope="session")
def cpu_device() -> type[CpuDevice]:
    return CpuDevice
