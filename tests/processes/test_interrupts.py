"""Ctrl-C, SIGTERM and exceptions end a run in order: callbacks told, the right exit code, no crash.

What kills a process, or may crash it, runs in a process of its own.
"""

from __future__ import annotations

import signal
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, TaskModule
from ofengine.loggers import Logger
from ofengine.processes import interrupts

# ---------------------------------------------------------------------- signals

TRAIN = """
trainer(Slow()).fit(Line(), batches(400))
say("finished")
"""
BY_CTRL_C = (130, -signal.SIGINT)


def test_ctrl_c_tells_the_callbacks_and_ends_as_an_interrupt(run: Any, mode: str) -> None:
    child = run(TRAIN, mode)
    child.until("ready")
    child.send(signal.SIGINT)
    assert child.end() in BY_CTRL_C
    assert child.lines == ["ready", "on_exception KeyboardInterrupt ", "teardown fit"]
    assert "KeyboardInterrupt" in child.errors.read_text()


def test_sigterm_tells_the_callbacks_and_ends_with_143(run: Any, mode: str) -> None:
    child = run(TRAIN, mode)
    child.until("ready")
    child.send(signal.SIGTERM)
    assert child.end() == 143
    assert child.lines == ["ready", "on_exception SystemExit 143", "teardown fit"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_work_in_the_other_verbs_too(run: Any, number: int) -> None:
    child = run("trainer(Slow()).validate(Line(), batches(400))")
    child.until("ready")
    child.send(number)
    assert child.end() in ((143,) if number == signal.SIGTERM else BY_CTRL_C)
    assert child.lines[-1] == "teardown validate"


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "on_fit_end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_hooks_is_not_lost(run: Any, hook: str, number: int) -> None:
    """Or the script would go on as if nobody had asked it to end."""
    child = run(
        f"""
class Late(Tells):
    def {hook}(self, trainer, task):
        signal.raise_signal({int(number)})

trainer(Late()).fit(Line(), batches(2))
say("goes on")
"""
    )
    assert child.end() in ((143,) if number == signal.SIGTERM else BY_CTRL_C)
    assert child.lines[-1] == "teardown fit"


def test_a_second_ctrl_c_does_not_wait_for_the_step(run: Any, mode: str) -> None:
    child = run(
        """
class Hangs(Tells):
    def on_train_batch_start(self, *_):
        for _ in range(1000):
            say("tick")
            time.sleep(0.05)
        say("woke up")
trainer(Hangs()).fit(Line(), batches(1))
""",
        mode,
    )
    child.until("tick")
    child.send(signal.SIGINT)
    child.until("tick", times=30)  # more than a second: the step may finish
    child.send(signal.SIGINT)
    assert child.end() in BY_CTRL_C
    assert "woke up" not in child.lines
    assert child.lines[-2:] == ["on_exception KeyboardInterrupt ", "teardown fit"]


def test_ctrl_c_lets_the_step_finish_and_keeps_the_trainer_usable(run: Any) -> None:
    child = run(
        """
class Counts(Tells):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        say("step", trainer.global_step)
        if batch_idx == 2:
            signal.raise_signal(signal.SIGINT)
            say("end of step", trainer.global_step)
task, run = Line(), trainer(Counts())
try:
    run.fit(task, batches(50))
except KeyboardInterrupt:
    say("caught at", run.global_step)
run.validate(task, batches(1))
"""
    )
    assert child.end() == 0
    assert child.lines == [
        "step 1", "step 2", "step 3", "end of step 3",
        "on_exception KeyboardInterrupt ", "teardown fit", "caught at 3", "teardown validate",
    ]  # fmt: skip


def test_after_ctrl_c_a_dataloader_that_keeps_its_workers_is_usable_again(run: Any) -> None:
    child = run(
        """
from oneflow.utils.data import DataLoader
class Interrupts(Tells):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        say(trainer.current_epoch, batch_idx)
        if batch_idx == 1 and trainer.current_epoch == 0 and first:
            signal.raise_signal(signal.SIGINT)
data = DataLoader(list(flow.ones(3, 2)), num_workers=2, persistent_workers=True)
first = True
try:
    trainer(Interrupts()).fit(Line(), data)
except KeyboardInterrupt:
    say("caught")
first = False
trainer(Interrupts(), max_epochs=2).fit(Line(), data)
""",
        "eager",
    )
    assert child.end() == 0, child.errors.read_text()
    assert child.lines == [
        "0 0", "0 1", "on_exception KeyboardInterrupt ", "teardown fit", "caught",
        "0 0", "0 1", "0 2", "1 0", "1 1", "1 2", "teardown fit",
    ]  # fmt: skip


def test_ctrl_c_after_fit_is_a_plain_keyboard_interrupt(run: Any) -> None:
    child = run(
        """
trainer().fit(Line(), batches(3))
try:
    say("ready")
    time.sleep(60)
except KeyboardInterrupt:
    say("caught")
    raise
"""
    )
    child.until("ready")
    child.send(signal.SIGINT)
    assert child.end() in BY_CTRL_C
    assert child.lines == ["ready", "caught"]


def test_handlers_are_as_they_were_after_fit(run: Any) -> None:
    child = run(
        """
def own(number, frame):
    pass
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
def handlers():
    return [signal.getsignal(number) for number in NUMBERS]
class Fails(Line):
    def on_train_start(self):
        raise ValueError("mine")
for before in ([own, own, own], [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL],
               [signal.SIG_IGN] * 3, [signal.SIG_DFL, own, signal.SIG_IGN]):
    for number, handler in zip(NUMBERS, before):
        signal.signal(number, handler)
    for mode in ("eager", "graph"):
        trainer(mode=mode).fit(Line(), batches(1))
        say(handlers() == before)
    try:
        trainer().fit(Fails(), batches(1))
    except ValueError:
        say(handlers() == before)
"""
    )
    assert child.end() == 0, child.errors.read_text()
    assert child.lines == ["True"] * 12


def test_a_signal_that_is_ignored_stays_ignored(run: Any) -> None:
    # As in `nohup` and in shell scripts that start a training in the background.
    child = run(
        """
signal.signal(signal.SIGINT, signal.SIG_IGN)
class Interrupts(Tells):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
trainer(Interrupts()).fit(Line(), batches(3))
say("finished")
"""
    )
    assert child.end() == 0, child.errors.read_text()
    assert child.lines == ["teardown fit", "finished"]


# ---------------------------------------------------------------------- exceptions


def test_an_exception_after_a_graph_was_compiled_ends_with_1_and_its_traceback(
    run: Any, mode: str
) -> None:
    child = run(
        """
class Fails(Tells):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise ValueError("my own mistake")
trainer(Fails()).fit(Line(), batches(5))
""",
        mode,
    )
    assert child.end() == 1
    assert child.lines == ["on_exception ValueError my own mistake", "teardown fit"]
    culprit, errors = child.errors.read_text().split("\n", 1)
    told = "Fails.on_train_batch_end raised ValueError in epoch 0, batch 2 (after step 3), at "
    assert culprit.startswith(told)
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.rstrip().endswith("ValueError: my own mistake")
    assert 'raise ValueError("my own mistake")' in errors


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("1 / 0", 1), ("sys.exit(3)", 3), ("sys.exit('no')", 1)]
)
def test_the_exit_code_after_a_graph_run_is_the_script_s(run: Any, ending: str, code: int) -> None:
    child = run(f"trainer().fit(Line(), batches(3), batches(1))\n{ending}\n")
    assert child.end() == code
    errors = child.errors.read_text()
    assert ("ZeroDivisionError" in errors) == (ending == "1 / 0")


def test_an_error_of_the_engine_ends_with_1(run: Any, mode: str) -> None:
    child = run(
        """
class Wrong(Line):
    def training_step(self, batch, batch_idx):
        return self.layer(batch)
trainer(Tells()).fit(Wrong(), batches(3))
""",
        mode,
    )
    assert child.end() == 1
    assert child.lines[-1] == "teardown fit"
    assert "ofengine.errors.ConfigurationError: Wrong.training_step" in child.errors.read_text()


def test_a_users_own_excepthook_is_kept(run: Any) -> None:
    child = run(
        """
def own(kind, error, trace):
    say("own hook", kind.__name__)
sys.excepthook = own
trainer().fit(Line(), batches(2))
raise ValueError
"""
    )
    assert child.end() == 1
    assert child.lines == ["own hook ValueError"]


def test_eager_fit_works_outside_of_the_main_thread(run: Any) -> None:
    child = run(
        """
def work():
    one = trainer(Tells(), mode="eager")
    one.fit(Line(), batches(3), batches(1))
    say("steps", one.global_step)
def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
before = handlers()
thread = threading.Thread(target=work)
thread.start()
thread.join()
say(handlers() == before)
"""
    )
    assert child.end() == 0, child.errors.read_text()
    assert child.lines == ["teardown fit", "steps 3", "True"]


def test_graph_evaluation_works_outside_of_the_main_thread(run: Any) -> None:
    child = run(
        """
def work():
    (result,) = trainer().validate(Line(), batches(3))
    say(list(result))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    )
    assert child.end() == 0, child.errors.read_text()
    assert child.lines == ["['mean']"]


def test_graph_fit_outside_of_the_main_thread_is_refused_in_one_sentence(run: Any) -> None:
    # OneFlow compiles graphs that update weights in the main thread only, and says so in C++.
    child = run(
        """
class Starts(Tells):
    def on_train_start(self, trainer, task):
        say("trains")
def work():
    try:
        trainer(Starts()).fit(Line(), batches(3))
    except Exception as error:
        say(type(error).__name__, str(error))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    )
    assert child.end() == 0, child.errors.read_text()
    line = child.lines[-1]
    assert "main thread" in line
    assert "ci-user" not in line
    assert "trains" not in child.lines


# ---------------------------------------------------------------------- in this process


def test_repeats_within_a_second_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(interrupts, "monotonic", lambda: clock[0])
    with interrupts.InterruptGuard() as guard:
        for number, at in ((signal.SIGTERM, 0.0), (signal.SIGTERM, 0.5), (signal.SIGHUP, 0.99)):
            clock[0] = 100.0 + at
            signal.raise_signal(number)
            assert (guard.received, guard.hurried) == (signal.SIGTERM, False)
        clock[0] = 101.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert guard.hurried
        with pytest.raises(SystemExit, match="143"):
            guard.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_wait_for_a_batch_that_failed_after_a_signal_ends_as_the_signal_says(number: int) -> None:
    """Workers that had the same signal are gone, which is an error to who waits for them."""
    error = RuntimeError("DataLoader worker exited unexpectedly")
    with interrupts.InterruptGuard() as guard:
        guard.waiting = True
        assert guard.reason(error) is error  # no signal came
        guard.waiting = True
        signal.raise_signal(number)
        found = guard.reason(error)
        assert guard.reason(error) is error  # nothing was waited for: it is an error of its own
    assert found.__cause__ is error
    expected = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
    assert (type(found), found.args) == (type(expected), expected.args)


class Line(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("mean", self.layer(batch).mean())


class Told(Callback):
    def __init__(self, log: List[Any], name: str) -> None:
        self.log = log
        self.name = name

    def on_exception(self, trainer: Any, task: Any, exception: BaseException) -> None:
        self.log.append((self.name, "on_exception", exception))

    def teardown(self, trainer: Any, task: Any, stage: str) -> None:
        self.log.append((self.name, "teardown", stage))


class Notes(Logger):
    def __init__(self, log: List[Any]) -> None:
        self.log = log

    def log_metrics(self, metrics: Dict[str, float], step: int, epoch: int) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.log.append(("logger", "finalize", status))


@pytest.mark.parametrize(
    "hook",
    [
        "setup",
        "on_fit_start",
        "on_sanity_check_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_batch_end",
        "on_train_epoch_end",
        "on_train_end",
        "on_fit_end",
    ],
)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_a_hook_raises_all_are_told_and_torn_down(
    mode: str, hook: str, kind: type
) -> None:
    log: List[Any] = []
    error = kind("mine")

    def fails(self: Any, *_: Any) -> None:
        raise error

    class TaskTold(Line):
        def on_exception(self, exception: BaseException) -> None:
            log.append(("task", "on_exception", exception))

        def teardown(self, stage: str) -> None:
            log.append(("task", "teardown", stage))

    callbacks = [Told(log, "first"), type("Fails", (Callback,), {hook: fails})(), Told(log, "last")]
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=callbacks, logger=Notes(log))
    with pytest.raises(kind) as caught:
        trainer.fit(TaskTold(), [flow.ones(1, 2)], [flow.ones(1, 2)])
    assert caught.value is error
    names = ("first", "last", "task")
    assert log == [
        *((name, "on_exception", error) for name in names),
        *((name, "teardown", "fit") for name in names),
        ("logger", "finalize", "failed"),
    ]


def test_a_task_can_be_evaluated_after_a_run_that_failed(mode: str) -> None:
    class Fails(Line):
        def on_validation_batch_end(self, *_: Any) -> None:
            if self.trainer.sanity_checking:
                raise ValueError("mine")

    task = Fails()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    with pytest.raises(ValueError, match="mine"):
        trainer.fit(task, [flow.ones(1, 2)], [flow.ones(1, 2)])
    (result,) = trainer.validate(task, [flow.ones(1, 2)])
    assert set(result) == {"mean"}
    assert trainer.callback_metrics["mean"] == result["mean"]


def test_a_teardown_that_fails_does_not_keep_the_others_from_theirs(mode: str) -> None:
    log: List[Any] = []

    class Fails(Callback):
        def teardown(self, trainer: Any, task: Any, stage: str) -> None:
            raise ValueError("in teardown")

    trainer = quiet_trainer(
        mode=mode, max_epochs=1, callbacks=[Fails(), Told(log, "last")], logger=Notes(log)
    )
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="in teardown"):
        trainer.fit(Line(), [flow.ones(1, 2)])
    assert ("last", "teardown", "fit") in log
    assert [entry[1] for entry in log][-1] == "finalize"
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == handlers
