import pytest
import torch

from mmca_ext import _C

from .common import DTYPES, ISAS


@pytest.fixture(autouse=True)
def one_thread():
    """For a few elements, threads would only wait for each other. Tests of threads set their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    """The instruction set the kernels of this test are forced to."""
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def dtype(request):
    return request.param
