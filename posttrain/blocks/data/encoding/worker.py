"""Runs as a process of its own: takes an encoder and then batches of rows on its input, and writes what they became.

It is started by its path with nothing imported, and is told the caller's `sys.path`. So it imports what the encoder
needs and nothing else: not the user's main script, no GPU, no threads that a fork would have copied halfway.
"""

import os
import pickle
import signal
import sys
import traceback
from typing import Any


def told(error: Exception) -> Exception:
    """Return an error that can be sent, with where it was raised."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that cannot be made from its arguments, say
        return RuntimeError("".join(traceback.format_exception(error)).rstrip())
    return error


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is interrupted too, and closes the input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what user code prints must not stand between the answers

    def answer(value: Any) -> None:
        pickle.dump(value, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    sys.path[:] = pickle.load(sys.stdin.buffer)
    packed = pickle.load(sys.stdin.buffer)
    try:
        encoder = pickle.loads(packed)
    except Exception as error:
        answer(told(error))
        return
    answer(None)
    while True:
        try:
            rows = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer((encoder.encode(rows), encoder.reading))
        except Exception as error:
            answer(told(error))


if __name__ == "__main__":
    main()
