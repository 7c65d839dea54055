import pytest
import torch

from mmca_ext import _C


@pytest.fixture(autouse=True)
def one_thread():
    """For a few elements, threads would only wait for each other. Tests of threads set their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    """Not as the fixtures' params: pytest imports this file before it has read --device, and cases.py asks for it."""
    from .common import DTYPES, ISAS

    marks = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0].split(", ")}
    for name, values, ids in (("dtype", DTYPES, lambda dtype: str(dtype)[6:]), ("isa", ISAS, None)):
        if name in metafunc.fixturenames and name not in marks:
            metafunc.parametrize(name, values, indirect=True, ids=ids)


@pytest.fixture
def isa(request):
    """The instruction set the kernels of this test are forced to."""
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


@pytest.fixture
def dtype(request):
    return request.param
