"""Every `raise` of the Python halves, replaced by `pass`."""

import ast

from .guards import FAULTS

BAD_INPUT = [FAULTS + "test_arguments.py", "tests/test_bad_input.py"]
TESTS = {
    "mmca_ext/functional.py": [*BAD_INPUT, FAULTS + "test_autograd.py", "tests/test_functional_api.py"],
    "mmca_ext/reference/inputs.py": [*BAD_INPUT, FAULTS + "test_linear.py", "tests/test_reference.py"],
    "mmca_ext/nn/_heads.py": [*BAD_INPUT, "tests/test_layers.py"],
    "mmca_ext/nn/linear.py": ["tests/test_linear_layers.py"],
}


def without_raise(text, index):
    """The module without its raise statement number `index`, and that statement; None past the last."""
    tree, found = ast.parse(text), []

    class Remove(ast.NodeTransformer):
        def visit_Raise(self, node):  # the name is ast's
            found.append(node)
            return ast.copy_location(ast.Pass(), node) if len(found) == index + 1 else node

    changed = Remove().visit(tree)
    if index >= len(found):
        return None
    return ast.unparse(ast.fix_missing_locations(changed)), found[index]


def mutants(copy, options):
    copy.must_build()
    copy.require_passing(sorted({test for tests in TESTS.values() for test in tests}), options)
    for name, tests in TESTS.items():
        text, index = (copy.folder / name).read_text(), 0
        while changed := without_raise(text, index):
            index += 1
            label = f"{name}:{changed[1].lineno} {ast.unparse(changed[1])[:60]}"
            if options.selects(label):
                try:
                    copy.write(name, changed[0])
                    yield label, copy.killer(tests)
                finally:
                    copy.write(name, text)
