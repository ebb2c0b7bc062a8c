"""The last tests of a dry run."""

import pytest
import sitecustomize


@pytest.mark.gpu
def test_last():
    sitecustomize.begins("test last")
