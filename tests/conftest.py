import os

import devices
import torch


def pytest_addoption(parser):
    parser.addoption("--device", choices=devices.DEVICES, default="cpu", help="where the operators run: devices.py")
    parser.addoption(
        "--deterministic",
        action="store_true",
        help="as torch.use_deterministic_algorithms: what suites that compare bits need on a GPU, which has no order",
    )


def pytest_configure(config):
    device = config.getoption("--device")
    if device != "cpu":  # what the suites expect of index tensors; without it: test_emulated_kernels.py, test_cuda.py
        os.environ["MMCA_EXT_VALIDATE"] = "1"
    devices.use(device)
    if config.getoption("--deterministic"):
        torch.use_deterministic_algorithms(True)


def pytest_report_header(config):
    return f"mmca_ext: operators on {devices.current}"


def pytest_runtest_logfinish():
    """An error that leaves the process without its GPU would fail every test after it: where tests run in several
    processes, this one makes room for a new one (for which its last test counts as failed once more)."""
    if "PYTEST_XDIST_WORKER" in os.environ and devices.is_lost():
        os._exit(1)
