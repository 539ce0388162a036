"""Timing of short calls that take turns."""

import timeit

ROUNDS, SECONDS = 7, 0.1


def seconds_of(calls):
    """Seconds of one call, a list of the rounds for each name."""
    timers = {name: timeit.Timer(call) for name, call in calls.items()}
    counts = {}
    for name, timer in timers.items():
        count, seconds = timer.autorange()
        counts[name] = max(1, int(count * SECONDS / seconds))
    samples = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(counts[name]) / counts[name])
    return samples
