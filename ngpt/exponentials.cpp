// Softmax without its division, over rows of bfloat16 logits, in place: see `_exponentials` in loss.py.
//
// Twice as fast as what torch.compile makes of it: it goes over a row once to find the peak and once for the rest,
// where the compiler keeps the exponentials in float32 beside, and e^x is only as exact as bfloat16 logits can use.

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

inline uint32_t bits(float value) {
    uint32_t out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

inline float from_bits(uint32_t value) {
    float out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

inline float widen(uint16_t half) { return from_bits(uint32_t(half) << 16); }

inline uint16_t narrow(float value) {  // to nearest, ties to even
    uint32_t whole = bits(value);
    return uint16_t((whole + 0x7fffu + ((whole >> 16) & 1u)) >> 16);
}

// e^x for x <= 0 within 3e-7 of itself, not below 2^-126; NaN stays NaN. It is 2^whole * 2^rest with |rest| <= 1/2, and
// the second factor is a polynomial fitted by least squares.
inline float exponential(float x) {
    const float turns = x * 1.44269504088896341f;
    const float power = turns < -126.0f ? -126.0f : turns;
    const float rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
    const float shifted = power + rounder;
    const float rest = power - (shifted - rounder);
    float value = 1.32187e-3f;
    value = value * rest + 9.67170e-3f;
    value = value * rest + 5.550893e-2f;
    value = value * rest + 2.4022238e-1f;
    value = value * rest + 6.9314686e-1f;
    value = value * rest + 1.0f;
    return from_bits(bits(value) + (bits(shifted) << 23));
}

}  // namespace

// logits (rows, width) become e^(logit - peak); peak and mass, the sum of these in float32, are (rows).
extern "C" void exponentials(uint16_t* logits, float* peak, float* mass, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        uint16_t* entries = logits + row * width;
        float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < width; ++i) {
            const float entry = widen(entries[i]);
            top = entry > top ? entry : top;
        }
        float total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) {
            const float value = exponential(widen(entries[i]) - top);
            total += value;
            entries[i] = narrow(value);
        }
        peak[row] = top;
        mass[row] = total;
    }
}
