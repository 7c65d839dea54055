"""Threads and processes: the same bits for any number, after fork(), in several at once, in DataLoader's workers."""

import os
import threading
import time

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmca_ext import _C, functional

from .common import DTYPES, FEATURES, Problem, assert_same_bits, different, everything, problem, qkv, randn

MOST_THREADS = max(4, min(8, os.cpu_count() or 1))  # more than there are cores, too


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_number_of_threads_does_not_change_a_bit(isa, threads, feature, dtype):
    arguments = problem(feature, dtype, 130, 420, batch=2)
    threads(1)
    expected = everything(arguments)
    for count in (*range(2, MOST_THREADS + 1), 1):
        threads(count)
        assert_same_bits(everything(arguments), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 900), (1, 1, 500, 500), (3, 6, 97, 193), (2, 8, 33, 1000)], ids=str)
def test_every_way_to_cut_work_into_items(isa, threads, shape, dtype):
    batch, heads, q_len, k_len = shape
    query, key, value = qkv(q_len, k_len, batch, heads, max(1, heads // 2), dtype=dtype)
    arguments, results = Problem(query=query, key=key, value=value, is_causal=True), []
    for count in (1, 2, 3):
        threads(count)
        results.append(everything(arguments))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def wait_for(child, seconds=60):
    """The exit status of a forked child, None if it hangs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("before, inside", [(1, 1), (2, 2), (2, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fork_after_use(threads, before, inside, dtype):
    """A child computes with any number of threads. torch's own operators hang there with more than one, so its results
    are compared by numpy; autograd refuses its engine after a fork, so the kernels are called themselves."""
    query, key, value = qkv(300, 400, dim=32, dtype=dtype)
    threads(before)
    results = _C.attention_forward(query, key, value, save_for_backward=True, is_causal=True)
    grad = results[0].cos()
    backward = (grad, None, query, key, value, *results)
    expected = [bits(t) for t in (*results[:2], *_C.attention_backward(*backward, is_causal=True)[:3])]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if inside != before:
                torch.set_num_threads(inside)
            results = _C.attention_forward(query, key, value, save_for_backward=True, is_causal=True)
            actual = (*results[:2], *_C.attention_backward(*backward, is_causal=True)[:3])
            same = all(numpy.array_equal(bits(a), e) for a, e in zip(actual, expected, strict=True))
            status = 0 if same else 2
        finally:
            os._exit(status)
    assert wait_for(child) == 0, "None: it hangs; 2: other bits"
    again = _C.attention_forward(query, key, value, save_for_backward=True, is_causal=True)  # the parent goes on
    assert numpy.array_equal(bits(again[0]), expected[0])


def test_a_fork_of_a_fork(threads):
    query, key, value = qkv(200, 200, dim=32)
    threads(2)
    expected = bits(_C.attention_forward(query, key, value)[0])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            grandchild = os.fork()
            if grandchild == 0:
                same = numpy.array_equal(bits(_C.attention_forward(query, key, value)[0]), expected)
                os._exit(0 if same else 2)
            status = wait_for(grandchild, 30)
        finally:
            os._exit(3 if status is None else status)
    assert wait_for(child) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_python_threads_train_at_once(threads, dtype):
    """Each its own problem, forward and backward, kernels on two threads each: scratch and plans are nobody else's."""
    threads(2)
    problems = [problem(feature, dtype, 60, 200) for feature in ("causal", "bias", "block gate", "packed mmca")]
    expected, failures = [everything(p) for p in problems], []

    def work(index):
        try:
            for _ in range(15):
                failures.extend((index, name) for name in different(everything(problems[index]), expected[index]))
        except Exception as error:
            failures.append((index, error))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    assert not failures, failures


class Attending(Dataset):
    """Items are results of the operators, computed in the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        query, key, value = (t + index for t in qkv(40, 50, batch=1))
        ids = torch.ones(1, 50, dtype=torch.int64)
        return functional.attention(query, key, value) + functional.mmca_attention(query, key, value, ids)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(threads, start):
    threads(2)
    data = Attending()
    expected = [data[i] for i in range(len(data))]  # the parent has used its threads before the workers are forked
    # 60 seconds a batch: a worker that hangs is an error, not a wait without end.
    loader = DataLoader(data, num_workers=2, multiprocessing_context=start, timeout=60)
    for actual, item in zip(loader, expected, strict=True):
        assert torch.equal(actual[0], item)


def test_a_backward_in_another_thread(dtype):
    """The graph made in one thread, its gradients taken in another."""
    arguments = problem("bias", dtype, 40, 300)
    expected = everything(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in arguments.differentiable()}
    out, lse = functional.attention(**{**arguments, **leaves}, return_lse=True)
    found = {}

    def work():
        found["gradients"] = torch.autograd.grad((out, lse), list(leaves.values()), seeds)

    seeds = randn(*out.shape, seed=4, dtype=out.dtype), randn(*lse.shape, seed=5, dtype=lse.dtype)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join(60)
    assert "gradients" in found
    actual = {f"d_{name}": g for name, g in zip(leaves, found["gradients"], strict=True)}
    assert_same_bits(actual, expected, list(actual))
