"""The engine's loop, on slots that write the letters of the alphabet."""

import queue
import threading

import pytest

from megatron_scmoe.inference.engine import BROKEN, CLOSING, Engine, Job, Progress
from megatron_scmoe.inference.slots import Place, Text, Written
from megatron_scmoe.inference.text import Continuation

WAIT_S = 20


class Letters:
    """A tokenizer of ASCII."""

    def detokenize(self, ids) -> str:
        return bytes(ids).decode()


class Alphabet:
    """Two slots; each text is "abc..."; a prompt of "!" breaks the model."""

    size = 2

    def __init__(self):
        self.texts: dict[int, int] = {}
        self.most = 0

    def count_fitting(self, waiting, leaving) -> int:
        return min(len(waiting), self.size - len(self.texts.keys() - leaving))

    def step(self, leaving, joining) -> list[Written]:
        for key in leaving:
            del self.texts[key]
        for text in joining:
            if text.prompt == (ord("!"),):
                raise RuntimeError("out of memory")
            self.texts[text.key] = 0
        self.most = max(self.most, len(self.texts))
        new = {text.key for text in joining} or set(self.texts)
        written = [Written(key, Place(ord("a") + self.texts[key])) for key in new]
        for key in new:
            self.texts[key] += 1
        return written

    def clear(self) -> None:
        self.texts.clear()


class Listener:
    """A job, and what its client is told."""

    def __init__(self, key: int, max_tokens: int, *stop_words: str, prompt: str = "?", end=None):
        self.told: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        words = Continuation(Letters(), prompt.encode(), stop_words)
        text = Text(key, tuple(prompt.encode()))
        self.job = Job(text, max_tokens, words, end and ord(end), self.told.put)

    def text(self) -> tuple[str, str | None]:
        """The whole text and what ended it."""
        text = ""
        while True:
            progress = self.told.get(timeout=WAIT_S)
            text += progress.text
            if progress.is_last:
                return text, progress.finish_reason or progress.error


@pytest.fixture
def engine():
    """An engine that runs on a thread."""
    engine = Engine(Alphabet())
    thread = threading.Thread(target=engine.run)
    thread.start()
    yield engine
    engine.close(0)
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_more_texts_than_slots_are_all_written(engine):
    listeners = [Listener(key, 1 + key) for key in range(9)]
    for listener in listeners:
        engine.submit(listener.job)
    for key, listener in enumerate(listeners):
        assert listener.text() == ("abcdefghi"[: 1 + key], "length")
    assert engine._slots.most == 2


class Experts:
    """Remembers how far texts had come when it was summed up."""

    def __init__(self, slots: Alphabet):
        self._slots = slots
        self.seen: list[list[int]] = []

    def sum_up(self) -> None:
        self.seen.append(list(self._slots.texts.values()))


def test_caches_are_summed_up_with_the_last_token_and_not_with_each():
    slots = Alphabet()
    experts = Experts(slots)
    engine = Engine(slots, experts)
    thread = threading.Thread(target=engine.run)
    thread.start()
    listener = Listener(0, 20)
    engine.submit(listener.job)
    assert listener.text() == ("abcdefghijklmnopqrst", "length")
    assert experts.seen[1] == [20]  # the first is with the first token, as nothing was known
    engine.close(0)
    thread.join(WAIT_S)
    assert experts.seen == [[1], [20], []]


def test_what_ends_a_text(engine):
    for listener, expected in (
        (Listener(1, 9, "cd"), ("ab", "stop")),
        (Listener(2, 9, end="d"), ("abc", "stop")),
        (Listener(3, 9, "cx", end="d"), ("abc", "stop")),  # c has waited for x
        (Listener(4, 3, "cx"), ("abc", "length")),
        (Listener(5, 0), ("", "length")),
    ):
        engine.submit(listener.job)
        assert listener.text() == expected


def test_a_cancelled_text_makes_room(engine):
    endless = [Listener(key, 26, end="~") for key in range(2)]
    last = Listener(2, 2)
    for listener in (*endless, last):
        engine.submit(listener.job)
    for key in range(2):
        engine.cancel(key)
    assert last.text() == ("ab", "length")


def test_a_text_cancelled_while_it_waits_is_never_written(engine):
    engine.cancel(0)  # of nothing: it came too late
    first, second = Listener(1, 3), Listener(2, 3)
    engine.submit(first.job)
    engine.submit(second.job)
    assert {first.text(), second.text()} == {("abc", "length")}


def test_an_error_of_the_model_fails_what_runs_and_no_more(engine, capsys):
    broken = Listener(0, 3, prompt="!")
    engine.submit(broken.job)
    assert broken.text() == ("", BROKEN)
    good = Listener(1, 3)
    engine.submit(good.job)
    assert good.text() == ("abc", "length")
    assert "RuntimeError: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(("grace_s", "ends"), [(WAIT_S, ("abcd", "length")), (0, ("", CLOSING))])
def test_at_its_end_the_engine_writes_what_runs_while_there_is_time(grace_s, ends):
    engine = Engine(Alphabet())
    running, waiting = [Listener(key, 4) for key in range(2)], Listener(2, 4)
    engine._running = {listener.job.text.key: listener.job for listener in running}
    engine._slots.texts = dict.fromkeys(engine._running, 0)
    engine.submit(waiting.job)
    engine.close(grace_s)
    engine.run()
    assert [listener.text() for listener in running] == [ends, ends]
    assert waiting.text() == ("", CLOSING)
    assert engine.is_closing
