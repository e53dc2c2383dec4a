// Softmax without its division, over rows of bfloat16 logits, in place: see `_unnormalized_softmax` in
// linear_cross_entropy.py.
//
// It is twice as fast as the code of torch.compile. It reads a row once for the peak and once for the rest, while the
// compiler stores the exponentials in float32 too; and e^x is only as exact as bfloat16 logits can use.

#include <limits>

#include "fast_exp.h"

// logits (rows, width) become e^(logit - peak). peak (rows) is the largest logit, mass (rows) the sum of the
// exponentials in float32.
extern "C" void unnormalized_softmax(uint16_t* logits, float* peak, float* mass, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        uint16_t* entries = logits + row * width;
        float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < width; ++i) {
            const float entry = to_float(entries[i]);
            largest = entry > largest ? entry : largest;
        }
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) {
            const float value = fast_exp(to_float(entries[i]) - largest);
            sum += value;
            entries[i] = to_bfloat16(value);
        }
        peak[row] = largest;
        mass[row] = sum;
    }
}
