"""Kernels without one of their guards (guards.py), compiled one by one."""

from .guards import AMX, PORTABLE


def portable(copy, options):
    return mutants(copy, options, PORTABLE)


def amx(copy, options):
    copy.must_build()
    question = "from mmca_ext import _C; print(any(k['isa'] == 'amx' and k['available'] for k in _C.kernels()))"
    answer = copy.run("-c", question, timeout=60)
    if answer.stdout.strip() not in ("True", "False"):
        raise SystemExit(answer.stderr)
    if answer.stdout.strip() == "True":
        yield from mutants(copy, options, AMX, "-k", "amx")
    else:
        print("amx: not run, this processor has none", flush=True)


def mutants(copy, options, table, *pytest_options):
    chosen = []
    for file, guards in table.items():
        for guard in guards:
            label = f"{file.rsplit('/', 1)[1]}: {guard.what}"
            if options.selects(label):
                chosen.append((label, file, guard))
    if not chosen:
        return
    copy.must_build()
    copy.require_passing(sorted({test for _, _, guard in chosen for test in guard.tests}), options, *pytest_options)
    for label, file, guard in chosen:
        text = (copy.folder / file).read_text()
        try:
            copy.write(file, text.replace(guard.old, guard.new))
            complaint = copy.build()
            yield label, f"DOES NOT COMPILE: {complaint}" if complaint else copy.killer(guard.tests, *pytest_options)
        finally:
            copy.write(file, text)
    copy.must_build()
