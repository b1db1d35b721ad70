"""Programs of several threads: never two in the compiler, and no lock for one that is compiled."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.offload import _alone_jit
from emloc_jax.offload._alone_jit import AloneJit


def slow_to_trace(inside, most):
    """A program that says how many are traced at once, and takes its time over it."""

    def run(x):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return 2 * x

    return AloneJit(run)


def in_threads(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


def test_no_two_programs_are_compiled_at_once():
    inside, most, results = [], [], {}
    programs = [slow_to_trace(inside, most) for _ in range(4)]

    def call(index):
        results[index] = programs[index](jnp.full(index + 1, 3.0))

    in_threads([lambda index=index: call(index) for index in range(4)])
    assert most == [1, 1, 1, 1]
    for index, result in results.items():
        np.testing.assert_array_equal(result, np.full(index + 1, 6.0))


def test_what_is_compiled_takes_no_lock_and_what_is_new_waits_for_it():
    program, done = AloneJit(lambda x: x + 1), []
    program(jnp.zeros(2))

    def call(x):
        program(x)
        done.append(x.shape)

    with _alone_jit._COMPILING:
        in_threads([lambda: call(jnp.ones(2))])
        assert done == [(2,)]
        waiting = threading.Thread(target=call, args=(jnp.ones(3),))
        waiting.start()
        waiting.join(timeout=0.2)
        assert waiting.is_alive()
    waiting.join(timeout=60)
    assert done == [(2,), (3,)]


def test_static_values_are_told_apart():
    program = AloneJit(lambda x, last: x if last else -x, static_argnames="last")
    x = jnp.ones(())
    assert [float(program(x, last=last)) for last in (True, False, True)] == [1, -1, 1]


def test_it_may_be_part_of_another_program():
    program = AloneJit(lambda x: 2 * x)
    assert int(jax.jit(lambda x: program(x) + 1)(jnp.int32(2))) == 5
