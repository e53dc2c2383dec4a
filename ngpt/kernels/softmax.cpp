// Softmax without the final division, over rows of bfloat16 logits, in place: see `_unnormalized_softmax` in
// linear_cross_entropy.py.
//
// It is twice as fast as what torch.compile generates. It reads each row twice, for the maximum and for the
// exponentials, and does not store the exponentials in float32 as compiled code does. e^x is only as accurate as
// bfloat16 can represent.

#include <limits>

#include "fast_exp.h"

// Replaces logits (rows, width) by e^(logit - row_max). row_max (rows) is the largest logit of each row and exp_sum
// (rows) the sum of its exponentials, both in float32.
extern "C" void unnormalized_softmax(uint16_t* logits, float* row_max, float* exp_sum, int64_t rows, int64_t width) {
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
        row_max[row] = largest;
        exp_sum[row] = sum;
    }
}
