"""Coordinates and taps, docs/spec.md (1) to (3) and (6), on tensors: bins of an axis of boxes.

Kernels that call this are compiled with fusion off: a fused multiply-add would move coordinates.
"""

import triton
import triton.language as tl

WIDE_SAMPLES = tl.constexpr(2**22)  # up to here i + 1/2 is exact in float32 (docs/spec.md, (2))
MAX_SAMPLES = tl.constexpr(2**31)  # of a bin on an axis (docs/spec.md, (1))
MOST_SAMPLES = 4096  # where their number is fixed: they bound the time of a call
MAX_POSITION = tl.constexpr(2.0**32)  # beyond every map, and an int64 holds it


@triton.jit
def exponent(number):
    """The largest n with 2**n <= number, or one more where float32 rounds it up."""
    return (number.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def divide(a, b):
    """The correctly rounded quotient: `/` of float32 is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


def check(rule: tuple[float, ...]) -> None:
    sampling_ratio, *_ = rule
    if not 0 <= sampling_ratio <= MOST_SAMPLES:
        raise ValueError(f"sampling_ratio must be at most {MOST_SAMPLES}; 0 adapts to the box")


def spread_of(rule: tuple[float, ...], size: int, bins: int, double: bool) -> int:
    """How many pixels consecutive bins may share, and one: 2, and what rounding moves positions.

    In float32 two ends of a box of B feature pixels are off by at most B / 2^23, and by 2^-22 of
    the map. A box has at most 2^22 samples a bin, or positions are float64: so an adaptive one,
    with a sample in every pixel, has B <= 2^22 bins, and in a fixed one bins stay apart where they
    have less than 2^22 samples together. In float64 all of that is nothing.
    """
    sampling_ratio, *_ = rule
    if double:
        return min(size, 3)
    if sampling_ratio * (bins + 1) > 2**22:
        return size
    return min(size, 3 + (size >> 20) + (0 if sampling_ratio else bins // 2))


@triton.jit
def grid_of(lo, hi, scale, bins, RULE: tl.constexpr):
    """Equation (1): the start, a bin's length, its samples, and whether `min_size` holds the size.

    RULE is the vector of numbers of csrc/rule.hpp. They stay constants of Python, which are
    float64, until they have the coordinates' type: unpacked at once they would be tensors of
    float32.
    """
    pixel_offset: tl.constexpr = tl.constexpr(RULE).value[1]
    input_offset: tl.constexpr = tl.constexpr(RULE).value[2]
    end_offset: tl.constexpr = tl.constexpr(RULE).value[3]
    real: tl.constexpr = lo.dtype
    before, shift = tl.full((), input_offset, real), tl.full((), pixel_offset, real)

    start = (lo + before) * scale - shift
    end = (hi + before + tl.full((), end_offset, real)) * scale - shift
    _, bin, samples, clamped = sides_of(end - start, bins, RULE)
    return start, bin, samples, clamped


@triton.jit
def sides_of(size, bins, RULE: tl.constexpr):
    """Equation (1) from a size on: what counts as it, and the rest that `grid_of` gives."""
    sampling_ratio: tl.constexpr = int(tl.constexpr(RULE).value[0])
    min_size: tl.constexpr = tl.constexpr(RULE).value[4]
    adaptive: tl.constexpr = tl.constexpr(RULE).value[5]
    real: tl.constexpr = size.dtype
    least = tl.full((), min_size, real)
    clamped = size < least
    size = tl.where(clamped, least, size)
    size = tl.where(tl.abs(size) < float("inf"), size, float("nan"))
    bin = divide(size, tl.zeros_like(size) + bins.to(real))
    if sampling_ratio > 0:
        samples = tl.where(size == size, sampling_ratio, 0).to(tl.int64)
    else:
        if adaptive == 1:
            samples = tl.floor(bin)
            samples = tl.where(samples > 1, samples, 1)
        else:
            samples = tl.ceil(bin)
            samples = tl.where(
                (bin > 0) & (samples < 1), 1, samples
            )  # NVIDIA's takes subnormals for 0
        counted = (size > 0) & (samples <= MAX_SAMPLES)
        samples = tl.where(counted, samples, 0).to(tl.int64)
    return size, bin, samples, clamped


@triton.jit
def position(start, bin, samples, k, j, WIDE: tl.constexpr = True):
    """Equation (2), in float64, of sample j of bin k, where j counts along the axis.

    Without WIDE, for devices that have no float64, all of it is in the coordinates' own type.
    """
    i = tl.where(bin < 0, samples - 1 - j, j)
    real: tl.constexpr = start.dtype
    samples = tl.maximum(samples, 1)
    offset = divide((i.to(real) + 0.5) * bin, samples.to(real))
    p = start + k.to(real) * bin + offset
    if WIDE:
        p = p.to(tl.float64)
        wide = samples > WIDE_SAMPLES
        if tl.max(wide.to(tl.int32)) > 0:
            step = bin.to(tl.float64)
            exact = start.to(tl.float64) + k.to(tl.float64) * step
            exact += (i.to(tl.float64) + 0.5) * step / samples.to(tl.float64)
            p = tl.where(wide, exact, p)
    return p


@triton.jit
def limit(start, samples, size, WIDE: tl.constexpr):
    """The last position that is inside, as positions are compared with it."""
    rounded = size.to(start.dtype)
    if WIDE:
        return tl.where(samples > WIDE_SAMPLES, size.to(tl.float64), rounded.to(tl.float64))
    else:
        return rounded


@triton.jit
def inside(start, bin, samples, k, size, WIDE: tl.constexpr = True):
    """The samples [first, end) of bin k that are inside, counted along the axis."""
    last = limit(start, samples, size, WIDE)
    zero = tl.zeros_like(samples + k)
    first, end = zero, zero + samples
    # NaN: neither reached nor passed, so nothing is inside
    fits = (position(start, bin, samples, k, first, WIDE) >= -1) & (
        position(start, bin, samples, k, end - 1, WIDE) <= last
    )
    if tl.min((fits | (end == 0)).to(tl.int32)) == 0:
        first_high, end_low, end_high = end, first, end
        for _ in range(
            exponent(tl.max(end)) + 1
        ):  # halvings; triton-ascend has no `while` of tensors
            middle = first + (first_high - first) // 2
            reached = position(start, bin, samples, k, middle, WIDE) >= -1
            going = first < first_high
            first_high = tl.where(going & reached, middle, first_high)
            first = tl.where(going & ~reached, middle + 1, first)
            middle = end_low + (end_high - end_low) // 2
            passed = ~(position(start, bin, samples, k, middle, WIDE) <= last)
            going = end_low < end_high
            end_high = tl.where(going & passed, middle, end_high)
            end_low = tl.where(going & ~passed, middle + 1, end_low)
        end = end_low
    return first, tl.maximum(first, end)


@triton.jit
def tap(p, size):
    """Equation (3): the lower pixel of a sample at p, the next one's weight, whether it moves."""
    raw = tl.where((p >= -1) & (p <= MAX_POSITION), p, 0.0)  # of a sample that is not inside: any
    q = tl.where(raw < 0, 0.0, raw)
    lo = q.to(tl.int64)
    last = lo >= size - 1
    lo = tl.where(last, size - 1, lo)
    fraction = tl.where(last, 0.0, q - lo.to(q.dtype))
    return lo, fraction, (raw >= 0) & ~last


@triton.jit
def shares(bin, samples, bins, k, j, clamped, REAL: tl.constexpr):
    """How far a sample follows the start and the end of its box, 1 - t and t of equation (6)."""
    i = tl.where(bin < 0, samples - 1 - j, j)
    t = k.to(REAL) + divide(i.to(REAL) + 0.5, tl.maximum(samples, 1).to(REAL))
    t = divide(t, tl.zeros_like(t) + bins.to(REAL))
    return tl.where(clamped, 1, 1 - t), tl.where(clamped, 0, t)
