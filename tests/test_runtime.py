"""Work in batches that memory may not hold, and what the options of a command mean."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from srd_lab.cli import errors, tracked
from srd_lab.cli.options import Count, WeightsFile, common_options
from srd_lab.errors import BadValue, SrdLabError, SrdLabWarning, Unavailable
from srd_lab.runs.report import progress
from srd_lab.runs.settings import Settings, weights_of
from srd_lab.runtime import Batcher, is_out_of_memory, pick_device

# --- batches -----------------------------------------------------------------------------------------------

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1152921504606846976 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY: dict[str, Callable[[], BaseException]] = {
    "Python": MemoryError,
    "NumPy": lambda: MemoryError("Unable to allocate 1.00 PiB for an array with shape (1,) and data type u1"),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 GiB."),
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 18.02 GB)"),
    "CPU": lambda: RuntimeError(CPU),
    "cuBLAS": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cuDNN": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "system": lambda: RuntimeError("[Errno 12] Cannot allocate memory"),
    "Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
}


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a second with all that is loaded here, and there is nothing to collect."""
    monkeypatch.setattr("gc.collect", lambda: 0)


class Narrow:
    """Doubles what fits, ``room`` items at once; keeps the sizes that were tried."""

    def __init__(self, room: int, error: Callable[[], BaseException] = MemoryError) -> None:
        self.room, self.error, self.tried = room, error, list[int]()

    def __call__(self, part: Sequence[int]) -> list[int]:
        self.tried.append(len(part))
        if len(part) > self.room:
            raise self.error()
        return [2 * item for item in part]


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_where_memory_runs_out_half_as_many_are_taken_for_good(error: Callable[[], BaseException]) -> None:
    batcher, work = Batcher(8), Narrow(3, error)
    assert batcher.run(work, range(11)) == [[0, 2], [4, 6], [8, 10], [12, 14], [16, 18], [20]]
    assert work.tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert batcher.run(work, range(3)) == [[0, 2], [4]]
    assert (work.tried[8:], batcher.size) == ([2, 1], 2)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("room", [1, 2, 5, 50])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_results_are_complete_and_in_order(size: int, room: int, count: int) -> None:
    batcher, work = Batcher(size), Narrow(room)
    results = batcher.run(work, range(count))
    assert [item for part in results for item in part] == [2 * item for item in range(count)]
    assert work.tried == sorted(work.tried[:-1], reverse=True) + work.tried[-1:]
    assert batcher.size <= size
    assert (batcher.size == size) == all(tried <= room for tried in work.tried)


def test_a_short_last_part_is_halved_by_its_own_length() -> None:
    batcher, taken = Batcher(8), []

    def work(part: Sequence[int]) -> int:
        if len(part) == 3:
            raise MemoryError
        taken.append(len(part))
        return sum(part)

    assert batcher.run(work, range(11)) == [sum(range(8)), 8, 9, 10]
    assert (taken, batcher.size) == ([8, 1, 1, 1], 1)


def test_what_does_not_fit_alone_is_said_in_one_line() -> None:
    work = Narrow(0)
    with pytest.raises(Unavailable, match=r"not even one image fits into memory; take .*--device") as caught:
        Batcher(4).run(work, range(9))
    assert "\n" not in str(caught.value)
    assert work.tried == [4, 2, 1]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        SrdLabError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_go_through(error: BaseException) -> None:
    batcher, work = Batcher(4), Narrow(0, lambda: error)
    with pytest.raises(type(error)) as caught:
        batcher.run(work, range(9))
    assert caught.value is error
    assert (work.tried, batcher.size) == ([4], 4)


def test_what_the_failed_work_held_is_free_before_the_next_try() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(part: Sequence[int]) -> None:
        assert not any(tensor() is not None for tensor in held)
        large = torch.zeros(len(part))
        held.append(weakref.ref(large))
        if len(large) > 1:
            raise MemoryError

    Batcher(8).run(work, range(4))
    assert len(held) == 2 + 4


def test_the_words_are_those_of_the_allocator_here() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8, device="cpu")
    assert is_out_of_memory(caught.value)
    assert Batcher(2).run(Narrow(1, lambda: caught.value), range(2)) == [[0], [2]]
    assert not is_out_of_memory(RuntimeError("The size of tensor a (3) must match"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_stands_more_progress_than_there_is_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that ran out of memory has reported some already and reports it again."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(10, "srd") as advance:
        for _ in range(4):
            advance(4)
    shown = terminal.getvalue()
    assert "srd" in shown
    assert "100%" in shown
    assert not {"120%", "160%"} & set(shown.split())


# --- weights files -----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "net.npz"
    path.touch()
    return str(path)


def convert(kind: click.ParamType, text: str) -> Any:
    return kind.convert(text, None, None)


def test_weights_go_to_the_model_they_are_for(file: str) -> None:
    assert weights_of([], ["a", "b"]) == {"a": None, "b": None}
    assert weights_of([file], ["a"]) == {"a": Path(file)}
    assert weights_of([f"b={file}"], ["a", "b"]) == {"a": None, "b": Path(file)}
    assert weights_of([f"b={file}", f"a={file}"], ["a", "b"]) == {"a": Path(file), "b": Path(file)}


def test_a_file_name_may_hold_an_equals_sign(tmp_path: Path) -> None:
    odd = tmp_path / "lr=0.1.npz"
    odd.touch()
    assert convert(WeightsFile(), str(odd)) == str(odd)
    assert weights_of([str(odd)], ["a"]) == {"a": odd}
    assert weights_of([f"b={odd}"], ["a", "b"]) == {"a": None, "b": odd}


@pytest.mark.parametrize(
    ("given", "models", "message"),
    [
        (["{}"], ["a", "b"], "--weights {} does not say which of 2 models it is for; give NAME={}"),
        (["c={}"], ["a", "b"], "--weights c={} is for a model that is not asked for; the models are a, b"),
        (["b={}"], ["a"], "--weights b={} is for a model that is not asked for; the models are a"),
        (["{}", "{}"], ["a"], "two --weights files for a; give one"),
        (["a={}", "b={}", "a={}"], ["a", "b"], "two --weights files for a; give one"),
        (["{}", "a={}"], ["a"], "two --weights files for a; give one"),
    ],
)
def test_weights_that_are_for_none_or_for_two(
    given: list[str], models: list[str], message: str, file: str
) -> None:
    with pytest.raises(BadValue) as caught:
        weights_of([text.replace("{}", file) for text in given], models)
    assert str(caught.value) == message.replace("{}", file)


@pytest.mark.parametrize("text", ["gone.npz", "vgg16=gone.npz", "vgg16=", ""])
def test_weights_that_are_not_there(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"there is no file .*; expected FILE or NAME=FILE"):
        convert(WeightsFile(), text)


# --- settings ----------------------------------------------------------------------------------------------


def test_how_many() -> None:
    assert convert(Count(), "all") == "all"
    assert convert(Count(), "17") == convert(Count(), 17) == 17  # type: ignore[arg-type]
    for wrong in ("0", "-3", "many", "1.5", "", "ALL"):
        with pytest.raises(click.BadParameter, match="expected a number from 1 on, or all"):
            convert(Count(), wrong)


# --- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_ends_a_command_as_ctrl_c_does_unless_it_is_ignored(name: str) -> None:
    """nohup works by ignoring SIGHUP."""
    end = getattr(signal, name)

    @click.command()
    @errors.command_errors
    def work() -> None:
        os.kill(os.getpid(), end)
        click.echo("went on")

    before = signal.getsignal(end)
    try:
        signal.signal(end, signal.SIG_DFL)
        result = CliRunner().invoke(work)
        assert (result.exit_code, result.output) == (1, "Error: interrupted\n")
        assert signal.getsignal(end) is signal.SIG_DFL
        signal.signal(end, signal.SIG_IGN)
        result = CliRunner().invoke(work)
        assert (result.exit_code, result.output) == (0, "went on\n")
        assert signal.getsignal(end) is signal.SIG_IGN
    finally:
        signal.signal(end, before)


# --- what is left of a run that ended early ----------------------------------------------------------------


class Fails:
    def __init__(self, error: BaseException, settings: Settings) -> None:
        self.error, self.settings, self.device = error, settings, "cpu"
        self.weights_sha256 = ()
        self.drawn = None

    def run(self, run: Any) -> None:
        raise type(self.error)(*self.error.args)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SrdLabError("no such thing"), "no such thing"),
        (OSError("disk full"), "disk full (OSError; --debug shows where)"),
        (MemoryError(), "MemoryError (MemoryError; --debug shows where)"),
        (RuntimeError("broken\nmore"), "broken (RuntimeError; --debug shows where)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_ends_a_run_says_how_to_go_on(
    error: BaseException, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        id = "abc"

        def __enter__(self) -> Known:
            return self

        def __exit__(self, *_: object) -> None: ...

        def list(self) -> list[str]:
            return []

        def save_text(self, *_: str) -> None: ...

        def describe(self, _: object) -> None: ...

        def store_figures_as(self, _: object) -> None: ...

    @click.command()
    @common_options
    @click.pass_context
    @errors.command_errors
    def work(ctx: click.Context, /, **_: Any) -> None:
        tracked.tracked(ctx, "attack", lambda given: Fails(error, given.read(Settings)))

    def output(*arguments: str) -> str:
        result = CliRunner().invoke(work, arguments)
        assert result.exit_code == 1
        return result.output

    untracked = "nothing is kept (no tracking, no --out)"
    assert output("--no-track") == f"Error: {said}; {untracked}\n"
    out = tmp_path / "out"
    again = f"what was finished is stored; go on with: srd-lab attack --no-track --resume {out}"
    assert output("--no-track", "--out", str(out)) == f"Error: {said}; {again}\n"
    monkeypatch.setattr("srd_lab.runs.tracking.open_run", lambda *_, **__: Known())
    again = "what was finished is stored; go on with: srd-lab attack --resume abc"
    assert output() == f"Error: {said}; {again}\n"
    assert output("--tracking-uri", "sqlite:///a b.db") == (
        f"Error: {said}; {again} --tracking-uri 'sqlite:///a b.db'\n"
    )


# --- devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "float64", "picked"),
    [
        ((), False, "cpu"),
        (("mps",), False, "mps"),
        (("mps",), True, "cpu"),
        (("cuda", "mps"), False, "cuda"),
        (("cuda", "mps"), True, "cuda"),
    ],
)
def test_auto_takes_the_first_device_that_can_do_it(
    there: tuple[str, ...], float64: bool, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert pick_device("auto", float64=float64) == pick_device(None, float64=float64) == torch.device(picked)


def test_a_device_that_cannot_do_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def single_precision(*size: int, dtype: torch.dtype | None = None, device: torch.device) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype. Please use float32.\nAnd more")
        return empty(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", single_precision)
    assert pick_device("mps") == torch.device("mps")
    with pytest.raises(
        SrdLabError, match=r"device 'mps' cannot be used here \(Cannot convert .* dtype\); try"
    ):
        pick_device("mps", float64=True)
    with pytest.raises(Unavailable, match="device 'quantum' cannot be used here"):
        pick_device("quantum")


def test_what_a_user_should_know_is_one_note_and_said_once() -> None:
    @click.command()
    @errors.command_errors
    def it() -> None:
        for _ in range(3):
            warnings.warn("the nearest has to do", SrdLabWarning, stacklevel=1)

    result = CliRunner().invoke(it)
    assert (result.exit_code, result.stderr) == (0, "Note: the nearest has to do\n")
