"""Drawing and timing take most of the time of a small study, and are tested by themselves."""

import base64
from collections.abc import Iterator

import pytest

from memloc_ext.study import accounting, shipped
from memloc_ext.study.report import page

POINT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP6DwABBQECz6AuzQAAAABJRU5ErkJggg==")


@pytest.fixture(autouse=True, scope="package")
def quick() -> Iterator[None]:
    """Reports show a point in the place of every picture, and costs are measured no longer than they must."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "encoded", lambda figure, file_format="png": POINT)
        patch.setattr(accounting, "_SECONDS", 0)
        patch.setattr(shipped, "_SECONDS", 0)
        yield
