"""What a full disk does to a data file is told as the system says it."""

import errno
import io
import os
from types import SimpleNamespace

import pytest
import torch

from megatron_sstoken.conversion.torch_dist import write_objects


class FullFile(io.BytesIO):
    name = "/place/__0_0.distcp"

    def write(self, data):
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_an_error_of_the_system():
    """torch.save raises a RuntimeError of its own that says nothing of it."""
    item = SimpleNamespace(data=torch.zeros(1000), unique_key="a")
    with pytest.raises(OSError) as caught:
        write_objects(FullFile(), SimpleNamespace(objects=[item]))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, FullFile.name)
