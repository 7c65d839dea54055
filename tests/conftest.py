import os

import devices


def pytest_addoption(parser):
    parser.addoption("--device", choices=devices.DEVICES, default="cpu", help="where the operators run: devices.py")


def pytest_configure(config):
    device = config.getoption("--device")
    if device != "cpu":  # what the suites expect of index tensors; without it: test_emulated_kernels.py, test_cuda.py
        os.environ["MMCA_EXT_VALIDATE"] = "1"
    devices.use(device)


def pytest_report_header(config):
    return f"mmca_ext: operators on {devices.current}"
