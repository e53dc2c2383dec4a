// Causal attention in float32, forward and backward, for sequences whose scores fit a core's cache: see attention.py.
//
// One task is a head of one sequence. Its q, k and v are copied side by side; then everything is a product of small
// matrices, without what lies above the diagonal. torch's kernel calls a library for the product of each block, which for
// some hundred tokens costs more than the product.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fast_exp.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t WIDE = 2 * LANES;  // columns of a tile
constexpr int64_t TALL = 6;          // its rows: twelve sums, two factors and one that is repeated fit 16 registers

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float))));

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows and columns filled up with zeros to whole tiles, and columns so far that a tile may stand on the diagonal.
struct Matrix {
    int64_t stride;
    std::vector<float> entries;

    Matrix(int64_t rows, int64_t columns)
        : stride(up_to(up_to(columns, TALL), WIDE)), entries(up_to(rows, TALL) * stride, 0.0f) {}
    float* row(int64_t number) { return entries.data() + number * stride; }
};

// Of q, k and v (B, T, heads, K) one head of one sequence.
struct Head {
    const float* first;
    int64_t step, tokens, width;

    const float* row(int64_t token) const { return first + token * step; }
    void copy(Matrix& to) const {
        for (int64_t token = 0; token < tokens; ++token) std::copy(row(token), row(token) + width, to.row(token));
    }
    void transpose(Matrix& to) const {
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t d = 0; d < width; ++d) to.row(d)[token] = row(token)[d];
    }
};

// TALL rows of out = a (TALL, depth) times b (depth, columns), columns up to a multiple of WIDE. Entries of a are `down`
// apart in a column and `right` in a row, so that it may be a transposed matrix.
inline void multiply(
    const float* a, int64_t down, int64_t right, int64_t depth, Matrix& b, int64_t from, int64_t columns, float* out,
    int64_t out_stride
) {
    for (int64_t column = 0; column < columns; column += WIDE) {
        Lanes sum[TALL][2] = {};
        const float* factors = b.row(from) + column;
        for (int64_t k = 0; k < depth; ++k, factors += b.stride) {
            const Lanes first = *(const Lanes*)factors, second = *(const Lanes*)(factors + LANES);
#pragma GCC unroll 6
            for (int64_t row = 0; row < TALL; ++row) {
                const float factor = a[row * down + k * right];
                sum[row][0] += factor * first;
                sum[row][1] += factor * second;
            }
        }
        for (int64_t row = 0; row < TALL; ++row) {
            *(Lanes*)(out + row * out_stride + column) = sum[row][0];
            *(Lanes*)(out + row * out_stride + column + LANES) = sum[row][1];
        }
    }
}

// scores[0 .. count) become softmax(scale * scores); returns the logarithm of their sum.
inline float softmax(float* scores, int64_t count, float scale) {
    float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; ++j) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; ++j) {
        scores[j] = exponential((scores[j] - top) * scale);
        total += scores[j];
    }
    const float share = 1.0f / total;
    for (int64_t j = 0; j < count; ++j) scores[j] *= share;
    return top * scale + std::log(total);
}

inline float dot(const float* a, const float* b, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

}  // namespace

// q and out (B, T, H, K), k and v (B, T, G, K) with H a multiple of G; log_sum (B, H, T) is for the backward pass. scale > 0.
extern "C" void attention_forward(
    const float* q, const float* k, const float* v, float scale, int64_t B, int64_t H, int64_t G, int64_t T, int64_t K,
    float* out, float* log_sum
) {
#pragma omp parallel
    {
        Matrix queries(T, K), keys(K, T), values(T, K), scores(TALL, T), mixed(TALL, K);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < B * H; ++task) {
            const int64_t sequence = task / H, head = task % H, group = sequence * T * G + head / (H / G);
            const int64_t first = (sequence * T * H + head) * K;
            Head{q + first, H * K, T, K}.copy(queries);
            Head{k + group * K, G * K, T, K}.transpose(keys);
            Head{v + group * K, G * K, T, K}.copy(values);
            for (int64_t i = 0; i < T; i += TALL) {
                const int64_t end = std::min(i + TALL, T);
                multiply(queries.row(i), queries.stride, 1, K, keys, 0, end, scores.row(0), scores.stride);
                for (int64_t token = i; token < end; ++token) {
                    float* row = scores.row(token - i);
                    log_sum[task * T + token] = softmax(row, token + 1, scale);
                    std::fill(row + token + 1, row + end, 0.0f);
                }
                multiply(scores.row(0), scores.stride, 1, end, values, 0, K, mixed.row(0), mixed.stride);
                for (int64_t token = i; token < end; ++token)
                    std::copy(mixed.row(token - i), mixed.row(token - i) + K, out + first + token * H * K);
            }
        }
    }
}

// The gradients of q, k and v from that of out, all as in the forward pass.
extern "C" void attention_backward(
    const float* q, const float* k, const float* v, const float* out, const float* log_sum, const float* grad, float scale,
    int64_t B, int64_t H, int64_t G, int64_t T, int64_t K, float* grad_q, float* grad_k, float* grad_v
) {
#pragma omp parallel
    {
        Matrix queries(T, K), keys(T, K), keys_across(K, T), values_across(K, T), grads(T, K);
        Matrix weights(T, T), slopes(T, T), mixed(TALL, K);  // softmax, and the gradient of what goes into it
#pragma omp for schedule(static)
        for (int64_t task = 0; task < B * G; ++task) {
            const int64_t sequence = task / G, group = task % G, first_key = (sequence * T * G + group) * K;
            const Head key{k + first_key, G * K, T, K};
            key.copy(keys);
            key.transpose(keys_across);
            Head{v + first_key, G * K, T, K}.transpose(values_across);
            for (int64_t head = group * (H / G); head < (group + 1) * (H / G); ++head) {
                const int64_t first = (sequence * T * H + head) * K;
                Head{q + first, H * K, T, K}.copy(queries);
                Head{grad + first, H * K, T, K}.copy(grads);
                for (int64_t i = 0; i < T; i += TALL) {
                    const int64_t end = std::min(i + TALL, T);
                    multiply(queries.row(i), queries.stride, 1, K, keys_across, 0, end, weights.row(i), weights.stride);
                    multiply(grads.row(i), grads.stride, 1, K, values_across, 0, end, slopes.row(i), slopes.stride);
                    for (int64_t token = i; token < end; ++token) {
                        float *weight = weights.row(token), *slope = slopes.row(token);
                        const float along = dot(out + first + token * H * K, grads.row(token), K);
                        const float log_mass = log_sum[(sequence * H + head) * T + token];
#pragma omp simd
                        for (int64_t j = 0; j <= token; ++j) {
                            weight[j] = exponential(weight[j] * scale - log_mass);
                            slope[j] = weight[j] * (slope[j] - along) * scale;
                        }
                        std::fill(weight + token + 1, weight + end, 0.0f);
                        std::fill(slope + token + 1, slope + end, 0.0f);
                    }
                    multiply(slopes.row(i), slopes.stride, 1, end, keys, 0, K, mixed.row(0), mixed.stride);
                    for (int64_t token = i; token < end; ++token)
                        std::copy(mixed.row(token - i), mixed.row(token - i) + K, grad_q + first + token * H * K);
                }
                const bool starts = head == group * (H / G);
                const auto add = [&](Matrix& by_token, Matrix& rows, float* to) {  // by_token^T times rows, below the diagonal
                    for (int64_t j = 0; j < T; j += TALL) {
                        multiply(by_token.row(j) + j, 1, by_token.stride, T - j, rows, j, K, mixed.row(0), mixed.stride);
                        for (int64_t token = j; token < std::min(j + TALL, T); ++token) {
                            float* at = to + first_key + token * G * K;
                            for (int64_t d = 0; d < K; ++d) at[d] = (starts ? 0.0f : at[d]) + mixed.row(token - j)[d];
                        }
                    }
                };
                add(slopes, queries, grad_k);
                add(weights, grads, grad_v);
            }
        }
    }
}
