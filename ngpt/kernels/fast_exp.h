// What the C++ beside the Python does to single numbers, in forms that compilers make vector instructions of.

#pragma once

#include <cstdint>
#include <cstring>

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

// bfloat16 is the upper half of a float32.
inline float widen(uint16_t half) { return from_bits(uint32_t(half) << 16); }

inline uint16_t narrow(float value) {  // to nearest, ties to even
    const uint32_t whole = bits(value);
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
