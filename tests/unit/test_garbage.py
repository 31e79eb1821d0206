"""Collections of reference cycles stop, and go on only where they did."""

import gc

import pytest

from megatron_sstoken.garbage import without_collections


@pytest.mark.parametrize("enabled", [True, False])
def test_as_before_afterwards(enabled):
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ValueError, match="inside"), without_collections():
            assert not gc.isenabled()
            raise ValueError("inside")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
