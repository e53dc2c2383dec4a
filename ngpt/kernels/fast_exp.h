// e^x and bfloat16 conversions for the C++ kernels, written so that compilers vectorize them.

#pragma once

#include <cstdint>
#include <cstring>

inline uint32_t to_bits(float value) {
    uint32_t out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

inline float from_bits(uint32_t value) {
    float out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// bfloat16 is the upper upper_half of a float32.
inline float to_float(uint16_t upper_half) { return from_bits(uint32_t(upper_half) << 16); }

inline uint16_t to_bfloat16(float value) {  // rounds to nearest, ties to even
    const uint32_t whole = to_bits(value);
    return uint16_t((whole + 0x7fffu + ((whole >> 16) & 1u)) >> 16);
}

// Returns e^x for x <= 0, with a relative error below 3e-7; results are clamped at 2^-126 and NaN stays NaN. Computed
// as 2^whole * 2^fraction with |fraction| <= 1/2; the second factor is a polynomial fitted by least squares.
inline float fast_exp(float x) {
    const float exponent = x * 1.44269504088896341f;  // log2(e)
    const float power = exponent < -126.0f ? -126.0f : exponent;
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float shifted = power + rounder;
    const float fraction = power - (shifted - rounder);
    float value = 1.32187e-3f;
    value = value * fraction + 9.67170e-3f;
    value = value * fraction + 5.550893e-2f;
    value = value * fraction + 2.4022238e-1f;
    value = value * fraction + 6.9314686e-1f;
    value = value * fraction + 1.0f;
    return from_bits(to_bits(value) + (to_bits(shifted) << 23));
}
