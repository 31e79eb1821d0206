"""What tests of data preparation share."""

import pytest

from tests.helpers.toy import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of the toy tokenizer, with a marked template; test modules that need another have their own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder
