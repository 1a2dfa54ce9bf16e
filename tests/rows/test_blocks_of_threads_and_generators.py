"""Threads and generators warn or raise if they could use a wrong ``lora_ext.adapters`` block."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from two_layers import inputs, make, pins

import lora_ext

Forward = Callable[[], torch.Tensor]
TOLD = r"runs a model without a block, and so uses the base.*\(\['red'\]\).*\(None\) selects"


def forwards(model: Any) -> tuple[Forward, dict[str | None, torch.Tensor]]:
    """Return a function that runs a forward pass, and its expected output in the block of each
    name."""
    x = inputs(2, 3)
    expected = {}
    with torch.no_grad():
        for name in ("red", "blue", None):
            with lora_ext.adapters(name):
                expected[name] = model(x)
    assert not torch.allclose(expected["red"], expected["blue"])
    return lambda: model(x).detach(), expected


# -------------------------------------------------------------------------------------------------
# Threads


def in_a_thread(forward: Forward) -> None:
    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()


def in_a_new_executor(forward: Forward) -> None:
    with ThreadPoolExecutor(1) as executor:
        executor.submit(forward).result()


def in_an_executor_of_the_loop(forward: Forward) -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, forward)

    asyncio.run(main())


@pytest.mark.parametrize("run", [in_a_thread, in_a_new_executor, in_an_executor_of_the_loop])
def test_forward_in_a_thread_without_the_block_warns_once(run: Callable[[Forward], None]) -> None:
    model = make()
    forward, _ = forwards(model)
    with lora_ext.adapters("red"):
        with pytest.warns(UserWarning, match=TOLD):
            run(forward)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(forward)


def test_forward_in_a_thread_older_than_the_block_warns() -> None:
    model = make()
    forward, _ = forwards(model)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()
        with lora_ext.adapters("red"), pytest.warns(UserWarning, match=TOLD):
            executor.submit(forward).result()


def test_forward_in_a_thread_does_not_warn_in_unambiguous_cases() -> None:
    # Cases: a block of None, layers of another pool, the thread of the block, and calls after the
    # block.
    model, other = make(), make()
    x = inputs(2, 3)

    def base() -> None:
        with lora_ext.adapters(None, pool=model.up.pool):
            model(x)

    async def beside() -> None:
        entered, left = asyncio.Event(), asyncio.Event()

        async def serve() -> None:
            with lora_ext.adapters("red", pool=model.up.pool):
                entered.set()
                await left.wait()

        task = asyncio.create_task(serve())
        await entered.wait()
        model(x)
        left.set()
        await task

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lora_ext.adapters("red", pool=model.up.pool):
            in_a_thread(base)
            in_a_thread(lambda: other(x))
            model(x)
        with lora_ext.adapters([None, None], pool=model.up.pool):
            in_a_thread(lambda: model(x))
        in_a_thread(lambda: model(x))
        asyncio.run(beside())


# -------------------------------------------------------------------------------------------------
# Generators


INSIDE = r"block of \['blue'\] is entered inside a block of \['red'\] that a forward has used"


def test_generators_that_yield_inside_blocks_warn_before_one_uses_the_block_of_another() -> None:
    # Without inspecting stack frames, lora_ext cannot detect which generator continues.
    model = make()
    forward, expected = forwards(model)

    def serve(name: str) -> Iterator[torch.Tensor]:
        with lora_ext.adapters(name):
            while True:
                yield forward()

    red, blue = serve("red"), serve("blue")
    assert torch.equal(next(red), expected["red"])
    with pytest.warns(UserWarning, match=INSIDE) as caught:
        assert torch.equal(next(blue), expected["blue"])
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(next(red), expected["blue"])  # the mistake that the warning describes
    with pytest.raises(RuntimeError, match=r"expected the innermost block to be left first"):
        red.close()
    assert torch.equal(next(blue), expected["blue"])
    blue.close()
    assert torch.equal(forward(), expected[None])
    assert pins(model) == 0


def test_exiting_blocks_out_of_order_raises_and_keeps_the_other_blocks() -> None:
    model = make()
    forward, expected = forwards(model)
    first, second = lora_ext.adapters("red"), lora_ext.adapters("blue")
    first.__enter__()
    second.__enter__()
    with pytest.raises(
        RuntimeError, match=r"found Block\(\('blue',\)\) innermost while Block\(\('red'"
    ):
        first.__exit__(None, None, None)
    assert torch.equal(forward(), expected["blue"])
    second.__exit__(None, None, None)
    assert torch.equal(forward(), expected[None])
    assert pins(model) == 0


def test_nested_blocks_do_not_warn_if_they_are_intended() -> None:
    # Cases: the base model, the same names, an unused outer block, and blocks of a call or a parent
    # task.
    model = make()
    forward, expected = forwards(model)

    async def child() -> None:
        with lora_ext.adapters("blue"):
            assert torch.equal(forward(), expected["blue"])

    async def parent() -> None:
        await asyncio.gather(child(), child())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lora_ext.adapters("red"):
            with lora_ext.adapters("blue"):
                assert torch.equal(forward(), expected["blue"])
            assert torch.equal(forward(), expected["red"])
            with lora_ext.adapters(None):
                assert torch.equal(forward(), expected[None])
            with lora_ext.adapters("red"):
                assert torch.equal(forward(), expected["red"])
            asyncio.run(parent())


def test_async_generators_that_yield_inside_blocks_warn_and_raise() -> None:
    model = make()
    forward, expected = forwards(model)

    async def serve(name: str) -> AsyncIterator[torch.Tensor]:
        with lora_ext.adapters(name):
            yield forward()
            yield forward()

    async def main() -> None:
        red, blue = serve("red"), serve("blue")
        assert torch.equal(await anext(red), expected["red"])
        with pytest.warns(UserWarning, match=INSIDE):
            assert torch.equal(await anext(blue), expected["blue"])
        with pytest.raises(RuntimeError, match="expected the innermost block to be left first"):
            await red.aclose()
        await blue.aclose()

    asyncio.run(main())


def test_context_managers_made_of_generators_and_children_of_tasks_nest() -> None:
    model = make()
    forward, expected = forwards(model)

    @contextlib.contextmanager
    def serving(name: str) -> Iterator[None]:
        with lora_ext.adapters(name):
            yield

    def outer() -> Iterator[None]:
        with serving("red"), serving("blue"):
            assert torch.equal(forward(), expected["blue"])
            yield

    async def child(name: str) -> None:
        for _ in range(3):
            with serving(name):
                await asyncio.sleep(0)
                assert torch.equal(forward(), expected[name])
            assert torch.equal(forward(), expected["red"])

    async def main() -> None:
        with lora_ext.adapters("red"):
            await asyncio.gather(child("blue"), child("red"))
            assert torch.equal(forward(), expected["red"])

    with torch.no_grad():
        assert list(outer()) == [None]
        asyncio.run(main())
        with serving("red"), lora_ext.adapters("blue"):
            assert torch.equal(forward(), expected["blue"])


def test_block_of_an_unfinished_generator_is_exited_when_it_is_garbage_collected() -> None:
    model = make()
    forward, expected = forwards(model)

    def serve() -> Iterator[torch.Tensor]:
        with lora_ext.adapters("red"):
            yield forward()

    generator = serve()
    next(generator)
    assert pins(model) == 1
    del generator
    gc.collect()
    assert pins(model) == 0
    assert torch.equal(forward(), expected[None])
