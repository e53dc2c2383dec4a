"""Downstream tasks in tests reach no network, and leave the user's caches alone."""

from collections.abc import Iterator

import pytest

from tests.helpers.harness_tasks import OFFLINE


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield
