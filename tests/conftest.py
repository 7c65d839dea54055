import devices


def pytest_addoption(parser):
    parser.addoption("--device", choices=devices.DEVICES, default="cpu", help="where the operators run: devices.py")


def pytest_configure(config):
    devices.use(config.getoption("--device"))


def pytest_report_header(config):
    return f"mmca_ext: operators on {devices.current}"
