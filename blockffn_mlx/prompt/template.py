"""Chat templates are programs that come with a model: they run within limits of time and memory."""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..checkpoints.tokenizer import CHAT_TEMPLATE

SECONDS = 5.0
CHECK_INTERVAL = 0.05  # seconds
MEMORY = 512 << 20  # bytes beyond what the process holds
# Characters of what a template may add to the messages, and how often it may repeat them.
ADDED, REPEATED = 1 << 20, 4
PAGE = os.sysconf("SC_PAGE_SIZE")
STATM = "/proc/self/statm"  # on Linux: pages of the address space


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    for_answer: bool = True,
) -> str:
    """The text that a tokenizer's chat template makes of messages.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; without a chat template the models' own format counts.
        messages: The conversation, each with a role, a content, and what else a template reads.
        options: More arguments of the template.
        for_answer: Whether the text ends where the next answer begins.

    Raises:
        ValueError: If the template refuses the messages, fails, or goes beyond the limits.
    """
    conversation = [dict(message) for message in messages]
    if not tokenizer.has_chat_template:
        options = {"chat_template": CHAT_TEMPLATE, **options}
    try:
        with limits():
            text = tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=for_answer, **options
            )
    except BeyondLimits as error:
        raise ValueError(f"the model's chat template {error}") from None
    except MemoryError:
        raise ValueError("the model's chat template takes too much memory") from None
    except Exception as error:  # whatever the program does wrong
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the model's chat template fails: {reason}") from error
    if len(text) > ADDED + REPEATED * len(str(conversation)):
        raise ValueError("the model's chat template writes without end")
    return text


class BeyondLimits(BaseException):
    """Ends a template; no `except Exception` inside it keeps this."""


@contextmanager
def limits() -> Iterator[None]:
    """Ends what runs inside the block with BeyondLimits or MemoryError if it takes too much."""
    end, most = time.monotonic() + SECONDS, _peak_memory() + MEMORY

    def check(*signal_and_frame):
        if time.monotonic() > end:
            raise BeyondLimits(f"takes more than {SECONDS:.0f} seconds")
        if _peak_memory() > most:
            raise BeyondLimits("takes too much memory")

    with _small_address_space(), _called_often(check):
        yield


@contextmanager
def _called_often(check) -> Iterator[None]:
    """By a timer, which stops long computations in C too; in other threads at every line."""
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGALRM, check)
        timer = signal.setitimer(signal.ITIMER_REAL, CHECK_INTERVAL, CHECK_INTERVAL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, before)
        return

    def trace(*event):
        check()
        return trace

    traced_before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(traced_before)


@contextmanager
def _small_address_space() -> Iterator[None]:
    """Where the system keeps to such a limit: a single huge string cannot be made either."""
    if not os.path.exists(STATM):
        yield
        return
    with open(STATM) as file:
        size = int(file.read().split()[0]) * PAGE
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = size + MEMORY
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak_memory() -> int:
    """The most bytes that the process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
