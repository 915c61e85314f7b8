"""nnsight's silent hazards: what goes wrong without a word elsewhere is right here, or refused."""

import dataclasses
import threading
import warnings
from typing import Any

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import Tensor, nn

from hydra_lab.capture import record
from hydra_lab.lens import HydraLens
from hydra_lab.locks import model_lock
from hydra_lab.taps import TAPS, Routing
from tests.helpers import lively_model, random_ids


class Reshaping(nn.Module):
    """A tap that does to a decision what a tap must not do."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, decision: Any) -> Any:
        return self.change(decision)


def with_tap(change: Any) -> Any:
    model: Any = lively_model()
    model.model.layers[0].moe.routing = Reshaping(change)
    return model


class TestRowsOfInvokes:
    """A tap flattened to [B * L], or without a batch axis, is cut at the wrong rows across invokes."""

    def test_every_tap_has_the_batch_first(self, model: Any) -> None:
        for path, decision in record(model, random_ids(model.config, 5, 13)).items():
            assert type(decision) in TAPS.values()
            for name, value in decision._asdict().items():
                assert value.shape[0] == 5, f"{path}.{name}"

    def test_invokes_see_their_own_rows(self, model: Any, lens: HydraLens) -> None:
        """Rows of three lengths in one batch read as they do alone, at the same indices, and are written alone."""
        short, long, other = (random_ids(model.config, rows, size, seed) for seed, (rows, size) in enumerate(
            [(1, 9), (2, 21), (1, 14)]
        ))  # fmt: skip
        with lens.trace() as tracer:
            with tracer.invoke(short):
                first = lens.layers[2].memory.weights.save()
                first_logits = lens.logits[:, -9:].save()
            with tracer.invoke(long):
                lens.layers[2].moe.experts[:] = 3
                second = lens.layers[2].memory.weights.save()
                second_logits = lens.logits.save()
            with tracer.invoke(other):
                third = lens.layers[2].memory.weights.save()
                third_logits = lens.logits[:, -14:].save()
        for ids, weights, logits in ((short, first, first_logits), (other, third, third_logits)):
            alone = record(model, ids)
            torch.testing.assert_close(weights[:, : ids.shape[1]], alone["layers.2.memory.lookup"].weights)
            torch.testing.assert_close(logits, alone.logits)
        with lens.trace(long):
            lens.layers[2].moe.experts[:] = 3
            weights = lens.layers[2].memory.weights.save()
            logits = lens.logits.save()
        torch.testing.assert_close(second, weights)
        torch.testing.assert_close(second_logits, logits)

    def test_another_row_count_is_refused(self) -> None:
        ids = torch.ones(1, 8, dtype=torch.long)
        lens = HydraLens(with_tap(lambda decision: Routing(*(x.flatten(0, 1) for x in decision))))
        with pytest.raises(ValueError, match=r"moe.routing.weights has 16 rows where this invoke has 1"):
            with lens.trace() as tracer:
                with tracer.invoke(ids):
                    lens.layers[0].moe.routing.experts.save()
                with tracer.invoke(ids):
                    lens.layers[0].moe.routing.experts.save()

    def test_beams_of_several_invokes_are_refused(self, lens: HydraLens) -> None:
        with pytest.raises(ValueError, match="num_return_sequences"):
            with lens.generate(max_new_tokens=2, num_beams=2, do_sample=False) as tracer:
                with tracer.invoke([1, 2, 3]):
                    lens.layers[0].moe.experts.save()
                with tracer.invoke([4, 5]):
                    lens.layers[0].moe.experts.save()


def test_a_dataclass_is_refused() -> None:
    """nnsight neither cuts nor detaches the fields of a dataclass."""

    @dataclasses.dataclass
    class AsDataclass:
        logits: Tensor
        experts: Tensor
        weights: Tensor

    for decision in TAPS.values():
        assert issubclass(decision, tuple) and hasattr(decision, "_fields")
    lens = HydraLens(with_tap(lambda decision: AsDataclass(*decision)))
    with pytest.raises(TypeError, match="carries a AsDataclass; only a NamedTuple"):
        with lens.trace([1, 2, 3]):
            lens.layers[0].moe.experts.save()


class TestWritesAfterTheTap:
    """An operation in place after a tap changes a saved value that was not cloned."""

    @pytest.fixture
    def spoiled(self, model: Any) -> Any:
        """A model that, after the tap has been seen, doubles the decision's tensors in place."""

        def double(_module: nn.Module, _inputs: Any, decision: Routing) -> None:
            decision.weights.mul_(2)

        handle = model.model.layers[0].moe.routing.register_forward_hook(double)
        yield model
        handle.remove()

    def test_a_saved_field_stays(self, spoiled: Any, lens: HydraLens, ids: Tensor) -> None:
        with lens.trace(ids):
            weights = lens.layers[0].moe.weights.save()
            logits = lens.logits.save()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 21))
        assert torch.equal(logits, record(spoiled, ids).logits)

    def test_a_saved_decision_stays(self, spoiled: Any, lens: HydraLens, ids: Tensor) -> None:
        with lens.trace(ids):
            decision = lens.layers[0].moe.routing.output.save()
        torch.testing.assert_close(decision.weights.sum(dim=-1), torch.ones(2, 21))

    def test_an_edited_field_stays(self, spoiled: Any, lens: HydraLens, ids: Tensor) -> None:
        with lens.trace(ids):
            lens.layers[0].moe.weights[:] = 0.25
            weights = lens.layers[0].moe.weights.save()
        assert weights.eq(0.25).all()

    def test_a_cached_decision_stays(self, spoiled: Any, lens: HydraLens, ids: Tensor) -> None:
        with lens.trace(ids) as tracer:
            cache = tracer.cache(modules=[lens.layers[0].moe.routing])
        weights = cache["model.model.layers.0.moe.routing"].output.weights
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 21))

    def test_a_recorded_decision_stays(self, model: Any, ids: Tensor) -> None:
        kept = record(model, ids)["layers.0.moe.routing"].weights

        made: list[Routing] = []

        def double(_module: nn.Module, _inputs: Any, _update: Tensor) -> None:
            made[0].weights.mul_(2)

        block = model.model.layers[0]
        with (
            block.moe.routing.register_forward_hook(lambda _module, _inputs, decision: made.append(decision)),
            block.contributions["moe"].register_forward_hook(double),
        ):
            weights = record(model, ids)["layers.0.moe.routing"].weights
        assert torch.equal(weights, kept)


class TestCache:
    """nnsight's cache of a name that is no module stays empty without a word."""

    def test_a_field_is_refused(self, lens: HydraLens) -> None:
        with pytest.raises(ValueError, match=r"no module 'model.model.layers.0.moe.experts' to cache"):
            with lens.trace([1, 2, 3]) as tracer:
                tracer.cache(modules=["model.model.layers.0.moe.experts"])

    def test_taps_are_cached(self, model: Any, lens: HydraLens, ids: Tensor) -> None:
        recorded = record(model, ids)
        with lens.trace(ids) as tracer:
            cache = tracer.cache(modules=[f"model.{path}" for path in recorded])
        for path, decision in recorded.items():
            cached = cache[f"model.{path}"].output
            assert all(torch.equal(a, b) for a, b in zip(cached, decision, strict=True)), path


class TestCells:
    """A trace in a cell whose magic rewrites it has no source to compile: it must say so."""

    @pytest.fixture
    def shell(self, lens: HydraLens) -> InteractiveShell:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shell = InteractiveShell()
        shell.history_manager.enabled = False  # type: ignore[union-attr]
        shell.push({"lens": lens})
        return shell

    cell = "with lens.trace([1, 2, 3]):\n    experts = lens.layers[0].moe.experts.save()\n"

    def test_a_plain_cell_traces(self, shell: InteractiveShell) -> None:
        assert shell.run_cell(self.cell).success
        assert shell.user_ns["experts"].shape == (1, 1, 2)

    def test_a_timed_cell_is_refused(
        self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shell.run_cell("%%time\n" + self.cell)
        assert "experts" not in shell.user_ns
        assert "nnsight has no source" in capsys.readouterr().out


class TestThreads:
    """Threads break traces, and plain forwards too, unless they take turns."""

    def test_80_traces_in_4_threads(self, model: Any, lens: HydraLens) -> None:
        inputs = [random_ids(model.config, 1, 6 + n % 5, seed=n) for n in range(20)]
        expected = [record(model, ids) for ids in inputs]
        forced = []
        for ids in inputs:
            with lens.trace(ids):
                lens.layers[2].moe.experts[:] = 1
                logits = lens.logits.save()
            forced.append(logits)
        right: list[str] = []
        errors: list[BaseException] = []

        def work(number: int) -> None:
            for n, ids in enumerate(inputs):
                check(number, n, ids)

        def check(number: int, n: int, ids: Tensor) -> None:
            try:
                with lens.trace(ids):
                    weights = lens.layers[0].moe.weights.save()
                    if number % 2:
                        lens.layers[2].moe.experts[:] = 1
                    logits = lens.logits.save()
                assert torch.equal(weights, expected[n]["layers.0.moe.routing"].weights)
                assert torch.equal(logits, forced[n] if number % 2 else expected[n].logits)
                if n % 5 == 0:
                    assert torch.equal(record(model, ids).logits, expected[n].logits)
                    with model_lock(model), torch.no_grad():
                        assert torch.equal(model(ids, use_cache=False).logits, expected[n].logits)
                right.append(f"{number}.{n}")
            except BaseException as error:  # reported below, from the main thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        assert len(set(right)) == 80

    def test_one_lock_per_model(self, model: Any, lens: HydraLens) -> None:
        assert lens.lock is model_lock(model) is HydraLens(model).lock
        assert lens.lock is not model_lock(nn.Linear(1, 1))

    def test_a_trace_holds_the_lock_and_gives_it_back(self, lens: HydraLens) -> None:
        held = []

        def taken_elsewhere() -> None:
            free = lens.lock.acquire(blocking=False)
            held.append(not free)
            if free:
                lens.lock.release()

        def look() -> None:
            other = threading.Thread(target=taken_elsewhere)
            other.start()
            other.join()

        with lens.trace([1, 2, 3]):
            lens.layers[0].moe.experts.save()
            look()
        with pytest.raises(ZeroDivisionError):
            with lens.trace([1, 2, 3]):
                lens.layers[0].moe.experts.save()
                raise ZeroDivisionError("in the middle of a trace")
        assert held == [True]
        look()
        assert held == [True, False]
