// Causal attention in float32, forward and backward, for sequences whose score matrix fits in a core's cache: see
// cpu_attention.py.
//
// Each task handles one head of one sequence. It copies q, k and v into dense matrices and multiplies them in tiles,
// skipping tiles above the diagonal. torch's kernel calls a matrix library for each block; for a few hundred tokens
// these calls cost more than the arithmetic.

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
constexpr int64_t TILE_COLUMNS = 2 * LANES;
constexpr int64_t TILE_ROWS = 6;  // 12 accumulators, 2 operands and 1 broadcast value fit in 16 registers

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float))));

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A row-major matrix, zero-padded to whole tiles, with room for a tile that starts on the diagonal.
struct Matrix {
    int64_t stride;
    std::vector<float> entries;

    Matrix(int64_t rows, int64_t columns)
        : stride(round_up(round_up(columns, TILE_ROWS), TILE_COLUMNS)),
          entries(round_up(rows, TILE_ROWS) * stride, 0.0f) {}
    float* row(int64_t number) { return entries.data() + number * stride; }
};

// A view of one head of one sequence in q, k or v (B, T, heads, K).
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

// Computes out (TILE_ROWS, columns) = a (TILE_ROWS, depth) @ b[from : from + depth], with columns rounded up to a
// multiple of TILE_COLUMNS. Swapping the strides of a transposes it.
inline void multiply(
    const float* a, int64_t row_stride, int64_t column_stride, int64_t depth, Matrix& b, int64_t from, int64_t columns,
    float* out, int64_t out_stride
) {
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
        Lanes sum[TILE_ROWS][2] = {};
        const float* factors = b.row(from) + column;
        for (int64_t k = 0; k < depth; ++k, factors += b.stride) {
            const Lanes first = *(const Lanes*)factors, second = *(const Lanes*)(factors + LANES);
#pragma GCC unroll 6
            for (int64_t row = 0; row < TILE_ROWS; ++row) {
                const float factor = a[row * row_stride + k * column_stride];
                sum[row][0] += factor * first;
                sum[row][1] += factor * second;
            }
        }
        for (int64_t row = 0; row < TILE_ROWS; ++row) {
            *(Lanes*)(out + row * out_stride + column) = sum[row][0];
            *(Lanes*)(out + row * out_stride + column + LANES) = sum[row][1];
        }
    }
}

// Replaces scores[0 .. count) by softmax(scale * scores); returns the log-sum-exp of scale * scores.
inline float softmax(float* scores, int64_t count, float scale) {
    float row_max = -std::numeric_limits<float>::infinity(), total = 0.0f;
#pragma omp simd reduction(max : row_max)
    for (int64_t j = 0; j < count; ++j) row_max = scores[j] > row_max ? scores[j] : row_max;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; ++j) {
        scores[j] = fast_exp((scores[j] - row_max) * scale);
        total += scores[j];
    }
    const float inverse = 1.0f / total;
    for (int64_t j = 0; j < count; ++j) scores[j] *= inverse;
    return row_max * scale + std::log(total);
}

inline float dot(const float* a, const float* b, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

}  // namespace

// Computes out (B, T, H, K) from q (B, T, H, K) and k and v (B, T, G, K), with H a multiple of G and scale > 0. Also
// writes log_sum_exp (B, H, T), the log-sum-exp of the scaled scores, for the backward pass.
extern "C" void attention_forward(
    const float* q, const float* k, const float* v, float scale, int64_t B, int64_t H, int64_t G, int64_t T, int64_t K,
    float* out, float* log_sum_exp
) {
#pragma omp parallel
    {
        Matrix queries(T, K), keys(K, T), values(T, K), scores(TILE_ROWS, T), mixed(TILE_ROWS, K);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < B * H; ++task) {
            const int64_t sequence = task / H, head = task % H, group = sequence * T * G + head / (H / G);
            const int64_t first = (sequence * T * H + head) * K;
            Head{q + first, H * K, T, K}.copy(queries);
            Head{k + group * K, G * K, T, K}.transpose(keys);
            Head{v + group * K, G * K, T, K}.copy(values);
            for (int64_t i = 0; i < T; i += TILE_ROWS) {
                const int64_t end = std::min(i + TILE_ROWS, T);
                multiply(queries.row(i), queries.stride, 1, K, keys, 0, end, scores.row(0), scores.stride);
                for (int64_t token = i; token < end; ++token) {
                    float* row = scores.row(token - i);
                    log_sum_exp[task * T + token] = softmax(row, token + 1, scale);
                    std::fill(row + token + 1, row + end, 0.0f);
                }
                multiply(scores.row(0), scores.stride, 1, end, values, 0, K, mixed.row(0), mixed.stride);
                for (int64_t token = i; token < end; ++token)
                    std::copy(mixed.row(token - i), mixed.row(token - i) + K, out + first + token * H * K);
            }
        }
    }
}

// Computes the gradients of q, k and v from `grad`, the gradient of out; shapes as in the forward pass.
extern "C" void attention_backward(
    const float* q, const float* k, const float* v, const float* out, const float* log_sum_exp, const float* grad, float scale,
    int64_t B, int64_t H, int64_t G, int64_t T, int64_t K, float* grad_q, float* grad_k, float* grad_v
) {
#pragma omp parallel
    {
        Matrix queries(T, K), keys(T, K), keys_t(K, T), values_t(K, T), grads(T, K);  // _t: transposed
        Matrix weights(T, T), score_grads(T, T), mixed(TILE_ROWS, K);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < B * G; ++task) {
            const int64_t sequence = task / G, group = task % G, first_key = (sequence * T * G + group) * K;
            const Head key{k + first_key, G * K, T, K};
            key.copy(keys);
            key.transpose(keys_t);
            Head{v + first_key, G * K, T, K}.transpose(values_t);
            for (int64_t head = group * (H / G); head < (group + 1) * (H / G); ++head) {
                const int64_t first = (sequence * T * H + head) * K;
                Head{q + first, H * K, T, K}.copy(queries);
                Head{grad + first, H * K, T, K}.copy(grads);
                for (int64_t i = 0; i < T; i += TILE_ROWS) {
                    const int64_t end = std::min(i + TILE_ROWS, T);
                    multiply(queries.row(i), queries.stride, 1, K, keys_t, 0, end, weights.row(i), weights.stride);
                    multiply(grads.row(i), grads.stride, 1, K, values_t, 0, end, score_grads.row(i), score_grads.stride);
                    for (int64_t token = i; token < end; ++token) {
                        float *weight = weights.row(token), *score_grad = score_grads.row(token);
                        const float mean_grad = dot(out + first + token * H * K, grads.row(token), K);
                        const float row_log_sum_exp = log_sum_exp[(sequence * H + head) * T + token];
#pragma omp simd
                        for (int64_t j = 0; j <= token; ++j) {
                            weight[j] = fast_exp(weight[j] * scale - row_log_sum_exp);
                            score_grad[j] = weight[j] * (score_grad[j] - mean_grad) * scale;
                        }
                        std::fill(weight + token + 1, weight + end, 0.0f);
                        std::fill(score_grad + token + 1, score_grad + end, 0.0f);
                    }
                    multiply(score_grads.row(i), score_grads.stride, 1, end, keys, 0, K, mixed.row(0), mixed.stride);
                    for (int64_t token = i; token < end; ++token)
                        std::copy(mixed.row(token - i), mixed.row(token - i) + K, grad_q + first + token * H * K);
                }
                const bool is_first = head == group * (H / G);
                const auto add = [&](Matrix& by_token, Matrix& rows, float* to) {  // to += by_token^T @ rows
                    for (int64_t j = 0; j < T; j += TILE_ROWS) {
                        multiply(by_token.row(j) + j, 1, by_token.stride, T - j, rows, j, K, mixed.row(0), mixed.stride);
                        for (int64_t token = j; token < std::min(j + TILE_ROWS, T); ++token) {
                            float* sum = to + first_key + token * G * K;
                            for (int64_t d = 0; d < K; ++d) sum[d] = (is_first ? 0.0f : sum[d]) + mixed.row(token - j)[d];
                        }
                    }
                };
                add(score_grads, queries, grad_k);
                add(weights, grads, grad_v);
            }
        }
    }
}
