// Cross-entropy of a linear head and its gradients on a CPU with AVX512_BF16 (products of pairs of bfloat16): see
// cpu_cross_entropy.py.
//
// The three matrix products and the softmax run while a tile is in registers or cache. Logits are never stored; only
// the exponentials of a few hundred rows are, in bfloat16, since the weight gradient needs each row's complete sum.
// oneDNN passes over the logits five times and packs them twice; this code writes and reads the exponentials once.
//
// Exponentials are relative to the target's logit: e^(z - z_target). Subtracting the row maximum would be safer, but it
// is known only after a full pass. With the target's logit the loss is log1p(sum over the other entries), which stays
// accurate when the model is confident. If a row's sum exceeds LIMIT, the caller falls back to the slower path.

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)  // with AMX, oneDNN is faster still

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <vector>

#include "fast_exp.h"

namespace {

using bf16 = uint16_t;

constexpr int LANES = 16;    // float32 numbers per register
constexpr int PANEL = 48;    // vocabulary entries per tile: three registers
constexpr int ROWS = 8;      // rows of x per tile
constexpr int ENTRIES = 12;  // vocabulary entries per tile of the weight's gradient
constexpr int WIDTH = 32;    // columns per tile of both gradients
constexpr int BLOCK = 4 * PANEL;   // vocabulary entries accumulated before adding to the gradient of x
constexpr int64_t CACHED = 32768;  // entries of the gradient of x that fit in a core's cache beside the tiles
constexpr int64_t LINE = 64;       // bytes per cache line
constexpr float LIMIT = 1e30f;
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float MASKED = -1e30f;  // replaces masked logits, since its exponential is 0; minus infinity would give NaN

inline int64_t ceil_div(int64_t whole, int64_t parts) { return (whole + parts - 1) / parts; }

inline __m512bh load_pairs(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512bh broadcast_pair(const bf16* from) {
    int both;
    std::memcpy(&both, from, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

// Prefetches cache lines. Without it the products wait for memory: hardware prefetchers do not follow the tiles.
inline void prefetch(const char* from, int64_t lines) {
    for (int64_t line = 0; line < lines; ++line) _mm_prefetch(from + line * LINE, _MM_HINT_T1);
}

// Returns 2^x with a relative error below 3e-7; NaN stays NaN. Uses the polynomial of fast_exp.h.
inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 fraction = _mm512_sub_ps(x, whole);
    __m512 value = _mm512_set1_ps(1.32187e-3f);
    value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(9.67170e-3f));
    value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(5.550893e-2f));
    value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(2.4022238e-1f));
    value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(6.9314686e-1f));
    value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(value, whole);
}

// The weight, and scale * weight packed in bfloat16 in the two layouts that the products read: by_columns interleaves
// pairs of columns (panels, D / 2, PANEL, 2), by_entries pairs of entries (V / 2, D, 2). The last panel is zero-padded.
struct Weight {
    const float *values, *scale;  // (V, D); (V), (1) or null
    int64_t scales, vocabulary, width;
    bf16 *by_columns, *by_entries;

    int64_t panels() const { return ceil_div(vocabulary, PANEL); }
    float scale_of(int64_t entry) const { return scale ? scale[scales == 1 ? 0 : entry] : 1.0f; }
    const bf16* panel(int64_t number) const { return by_columns + number * PANEL * width; }
    float factor(int64_t entry, int64_t d, float scale) const {
        return to_float(to_bfloat16(values[entry * width + d] * scale));
    }
};

// A tile of ROWS rows of x with their targets and running sums.
struct Rows {
    std::vector<bf16> x;                         // (D / 2, ROWS, 2): pairs of columns interleaved
    int64_t target[ROWS];                        // -PANEL, which lies in no panel, for padding rows
    float target_z[ROWS];                        // target logits, times log2(e)
    alignas(LINE) float sums[ROWS][LANES] = {};  // per lane: sum of exponentials without the target's

    Rows(const bf16* from, const int64_t* targets, int64_t filled, const Weight& weight) : x(weight.width * ROWS) {
        const int64_t width = weight.width;
        for (int64_t row = 0; row < ROWS; ++row) {
            target[row] = row < filled ? targets[row] : -PANEL;
            float z = 0.0f;
            if (row < filled) {
                const float scale = weight.scale_of(target[row]);
                for (int64_t d = 0; d < width; ++d) {
                    x[(d / 2 * ROWS + row) * 2 + d % 2] = from[row * width + d];
                    z += to_float(from[row * width + d]) * weight.factor(target[row], d, scale);
                }
            }
            target_z[row] = z * LOG2_E;
        }
    }
};

// Computes the exponentials (ROWS, PANEL) of the panel whose first entry is `start`, with 0 at the target, and adds
// them to the sums. With gradients, also writes them to `by_rows`, with row stride BLOCK, and to `zipped`
// (ROWS / 2, PANEL, 2), with pairs of rows interleaved.
template <bool gradients>
inline void add_exponentials(
    Rows& rows, const Weight& weight, const bf16* panel, int64_t start, bf16* by_rows, bf16* zipped
) {
    constexpr int parts = PANEL / LANES;
    __m512 z[ROWS][parts];
    for (auto& row : z)
        for (auto& part : row) part = _mm512_setzero_ps();
    const bf16* x_pairs = rows.x.data();
    for (int64_t k = 0; k < weight.width / 2; ++k) {
        __m512bh factor[parts];
        for (int part = 0; part < parts; ++part) factor[part] = load_pairs(panel + (k * PANEL + part * LANES) * 2);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const __m512bh x = broadcast_pair(x_pairs + (k * ROWS + row) * 2);
#pragma GCC unroll 3
            for (int part = 0; part < parts; ++part) z[row][part] = _mm512_dpbf16_ps(z[row][part], x, factor[part]);
        }
    }
    const __m512 masked = _mm512_set1_ps(MASKED), log2_e = _mm512_set1_ps(LOG2_E);
    const __m512i zip = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0
    );
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row += 2) {
        __m512 sum[2] = {_mm512_load_ps(rows.sums[row]), _mm512_load_ps(rows.sums[row + 1])};
#pragma GCC unroll 3
        for (int part = 0; part < parts; ++part) {
            const int64_t first = start + part * LANES, left = weight.vocabulary - first;
            __m512 value[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                __m512 logit = z[row + i][part];
                const int64_t lane = rows.target[row + i] - first;
                if (__builtin_expect(lane >= 0 && lane < LANES, 0))
                    logit = _mm512_mask_mov_ps(logit, __mmask16(1u << lane), masked);
                if (__builtin_expect(left < LANES, 0))
                    logit = _mm512_mask_mov_ps(logit, __mmask16(left > 0 ? 0xffffu << left : 0xffffu), masked);
                value[i] = power_of_two(_mm512_fmsub_ps(logit, log2_e, _mm512_set1_ps(rows.target_z[row + i])));
                sum[i] = _mm512_add_ps(sum[i], value[i]);
            }
            if (!gradients) continue;
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
            bf16* upper = by_rows + row * BLOCK + part * LANES;
            _mm256_storeu_si256((__m256i*)upper, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i*)(upper + BLOCK), _mm512_extracti64x4_epi64(both, 1));
            _mm512_storeu_si512(zipped + (row / 2 * PANEL + part * LANES) * 2, _mm512_permutexvar_epi16(zip, both));
        }
        _mm512_store_ps(rows.sums[row], sum[0]);
        _mm512_store_ps(rows.sums[row + 1], sum[1]);
    }
}

// Computes out (count, WIDTH) = a (count, 2 * pairs) @ b (2 * pairs, WIDTH), or out += with `add`. out has row stride
// `width`; b is stored as (pairs, width, 2). Meanwhile prefetches memory from `ahead`, `per_pair` bytes for each pair.
template <int count, int row_stride, int pair_stride>
inline void multiply(
    const bf16* a, const bf16* b, int64_t width, int64_t pairs, float* out, bool add, const char* ahead, int64_t per_pair
) {
    constexpr int parts = WIDTH / LANES;
    __m512 sum[count][parts];
    for (int row = 0; row < count; ++row)
        for (int part = 0; part < parts; ++part) {
            sum[row][part] = _mm512_setzero_ps();
            _mm_prefetch((const char*)(out + row * width + part * LANES), _MM_HINT_T0);
        }
    for (int64_t k = 0; k < pairs; ++k) {
        const __m512bh first = load_pairs(b + k * width * 2), second = load_pairs(b + k * width * 2 + 2 * LANES);
        _mm_prefetch(ahead + k * per_pair, _MM_HINT_T1);
#pragma GCC unroll 12
        for (int row = 0; row < count; ++row) {
            const __m512bh factor = broadcast_pair(a + row * row_stride + k * pair_stride);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], factor, first);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], factor, second);
        }
    }
    for (int row = 0; row < count; ++row)
        for (int part = 0; part < parts; ++part) {
            float* to = out + row * width + part * LANES;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[row][part]) : sum[row][part]);
        }
}

// Rows of x that are processed together, padded to a multiple of ROWS.
struct Chunk {
    const bf16* x;  // (rows, D)
    const int64_t* target;
    int64_t start, rows, padded;
    std::vector<bf16> scaled;  // x / ((1 + others) N) stored as (padded / 2, D, 2); zero in padding rows

    Chunk(const bf16* all, const int64_t* targets, int64_t start, int64_t rows, int64_t width)
        : x(all + start * width), target(targets + start), start(start), rows(rows),
          padded(ceil_div(rows, ROWS) * ROWS), scaled(padded * width) {}
};

// Output buffers. Gradients are of the mean loss; all buffers but `others` are null if only the loss is needed.
struct Results {
    float* others;       // (N): sum of e^(z - z_target) over all entries except the target
    float* grad_x;       // (N, D)
    float* grad_weight;  // (V, D)
    float* grad_scale;   // (V)
    bf16* grad_logits;  // (panels, padded / 2, PANEL, 2): a chunk's exponentials, with -others at the target
};

// Computes the sums, the logit gradients and the gradient of x for tiles [first, last) of a chunk. Returns false if a
// sum exceeds LIMIT or is NaN.
bool process_rows(Chunk& chunk, int64_t first, int64_t last, int64_t n, const Weight& weight, const Results& results) {
    const int64_t width = weight.width, count = last - first;
    const bool gradients = results.grad_logits != nullptr;
    std::vector<Rows> tiles;
    for (int64_t row = first * ROWS; row < last * ROWS; row += ROWS)
        tiles.emplace_back(chunk.x + row * width, chunk.target + row, chunk.rows - row, weight);
    std::vector<float> grad(gradients ? count * ROWS * width : 0);
    std::vector<bf16> by_rows(gradients ? count * ROWS * BLOCK : 0);
    const int64_t panel_bytes = PANEL * width * sizeof(bf16);
    const int64_t lines = ceil_div(panel_bytes / LINE, count);  // of the next panel to prefetch per tile
    for (int64_t begin = 0; begin < weight.panels(); begin += BLOCK / PANEL) {
        const int64_t end = std::min<int64_t>(begin + BLOCK / PANEL, weight.panels());
        for (int64_t number = begin; number < end; ++number)
            for (int64_t tile = 0; tile < count; ++tile) {
                prefetch((const char*)weight.panel(number + 1) + tile * lines * LINE, lines);
                if (gradients)
                    add_exponentials<true>(
                        tiles[tile], weight, weight.panel(number), number * PANEL,
                        &by_rows[tile * ROWS * BLOCK + (number - begin) * PANEL],
                        results.grad_logits + (number * chunk.padded + (first + tile) * ROWS) * PANEL
                    );
                else
                    add_exponentials<false>(tiles[tile], weight, weight.panel(number), number * PANEL, nullptr, nullptr);
            }
        if (!gradients) continue;
        const int64_t pairs = (end - begin) * PANEL / 2;
        const char* ahead = (const char*)(weight.by_entries + end * PANEL * width);
        const int64_t per_pair = ceil_div(BLOCK * width * sizeof(bf16), count * width / WIDTH * pairs);
        for (int64_t column = 0; column < width; column += WIDTH)
            for (int64_t tile = 0; tile < count; ++tile, ahead += pairs * per_pair)
                multiply<ROWS, BLOCK, 2>(
                    &by_rows[tile * ROWS * BLOCK], weight.by_entries + (begin * PANEL / 2 * width + column) * 2, width,
                    pairs, &grad[tile * ROWS * width + column], begin > 0, ahead, per_pair
                );
    }
    bool in_range = true;
    for (int64_t row = first * ROWS; row < std::min(last * ROWS, chunk.rows); ++row) {
        const int64_t target = chunk.target[row];
        const float others = _mm512_reduce_add_ps(_mm512_load_ps(tiles[row / ROWS - first].sums[row % ROWS]));
        in_range = in_range && others < LIMIT;
        results.others[chunk.start + row] = others;
        if (!gradients) continue;
        const int64_t slot = (target / PANEL * chunk.padded + row / 2 * 2) * PANEL + target % PANEL * 2 + row % 2;
        results.grad_logits[slot] = to_bfloat16(-others);
        const float share = 1.0f / ((1.0f + others) * float(n)), scale = weight.scale_of(target);
        const float* from = &grad[(row - first * ROWS) * width];
        for (int64_t d = 0; d < width; ++d) {
            results.grad_x[(chunk.start + row) * width + d] = (from[d] - others * weight.factor(target, d, scale)) * share;
            chunk.scaled[(row / 2 * width + d) * 2 + row % 2] = to_bfloat16(to_float(chunk.x[row * width + d]) * share);
        }
    }
    return in_range;
}

// Adds a chunk's contribution to one panel of the weight gradient; after the `last` chunk also applies the scale.
void process_panel(const Chunk& chunk, int64_t number, bool last, const Weight& weight, const Results& results) {
    const int64_t width = weight.width, pairs = chunk.padded / 2, left = weight.vocabulary - number * PANEL;
    const bf16* grad_logits = results.grad_logits + number * chunk.padded * PANEL;
    float* const result = results.grad_weight + number * PANEL * width;
    std::vector<float> edge;  // padded copy of the last panel, whose result ends at the vocabulary
    if (left < PANEL) {
        edge.assign(PANEL * width, 0.0f);
        if (chunk.start) std::copy(result, result + left * width, edge.begin());
    }
    float* const out = left < PANEL ? edge.data() : result;
    const int64_t per_pair = ceil_div(PANEL * 2 * sizeof(bf16), PANEL / ENTRIES * width / WIDTH);
    const char* ahead = (const char*)(grad_logits + chunk.padded * PANEL);
    for (int64_t column = 0; column < width; column += WIDTH)
        for (int64_t entry = 0; entry < PANEL; entry += ENTRIES, ahead += pairs * per_pair)
            multiply<ENTRIES, 2, PANEL * 2>(
                grad_logits + entry * 2, &chunk.scaled[column * 2], width, pairs, out + entry * width + column,
                chunk.start > 0, ahead, per_pair
            );
    if (last && weight.scale)
        for (int64_t entry = number * PANEL; entry < number * PANEL + std::min<int64_t>(PANEL, left); ++entry) {
            float* entry_grad = out + (entry - number * PANEL) * width;
            const float *values = weight.values + entry * width, factor = weight.scale_of(entry);
            float product = 0.0f;
#pragma omp simd reduction(+ : product)
            for (int64_t d = 0; d < width; ++d) {
                product += entry_grad[d] * values[d];
                entry_grad[d] *= factor;
            }
            results.grad_scale[entry] = product;
        }
    if (left < PANEL) std::copy(edge.begin(), edge.begin() + left * width, result);
}

void pack(const Weight& weight, bool gradients) {
    const int64_t width = weight.width;
#pragma omp parallel
    {
        std::vector<bf16> rows(PANEL * width);
#pragma omp for schedule(static)
        for (int64_t number = 0; number < weight.panels(); ++number) {
            const int64_t begin = number * PANEL, filled = std::min<int64_t>(PANEL, weight.vocabulary - begin);
            std::fill(rows.begin(), rows.end(), 0);
            for (int64_t entry = 0; entry < filled; ++entry) {
                const float *from = weight.values + (begin + entry) * width, factor = weight.scale_of(begin + entry);
                for (int64_t d = 0; d < width; ++d) rows[entry * width + d] = to_bfloat16(from[d] * factor);
            }
            bf16* out = weight.by_columns + begin * width;
            for (int64_t d = 0; d < width; d += 2)
                for (int64_t entry = 0; entry < PANEL; ++entry)
                    std::memcpy(out + d * PANEL + 2 * entry, &rows[entry * width + d], 2 * sizeof(bf16));
            if (!gradients) continue;
            out = weight.by_entries + begin * width;
            for (int64_t entry = 0; entry < PANEL; entry += 2)
                for (int64_t d = 0; d < width; ++d) {
                    out[entry * width + 2 * d] = rows[entry * width + d];
                    out[entry * width + 2 * d + 1] = rows[(entry + 1) * width + d];
                }
        }
    }
}

}  // namespace

// Computes the cross-entropy of logits x @ (scale * weight)^T and its gradients, for x (N, D) in bfloat16, D a multiple
// of 32, weight (V, D) and scale (V), (1) or null. Results describes the outputs. Workspace: `packed`
// (2, panels * PANEL, D), whose second half is unused without gradients, and `grad_logits` (panels * PANEL, rows_at_once),
// null without gradients.
// Returns 0 on success, or 1 if a target is outside the vocabulary or a sum exceeds LIMIT or is NaN.
extern "C" int cpu_cross_entropy(
    const bf16* x, const int64_t* target, const float* values, const float* scale, int64_t scales, int64_t n, int64_t width,
    int64_t vocabulary, int64_t rows_at_once, bf16* packed, bf16* grad_logits, float* others, float* grad_x, float* grad_weight,
    float* grad_scale
) {
    if (std::any_of(target, target + n, [=](int64_t entry) { return entry < 0 || entry >= vocabulary; })) return 1;
    bf16* by_entries = packed + ceil_div(vocabulary, PANEL) * PANEL * width;
    const Weight weight{values, scale, scales, vocabulary, width, packed, by_entries};
    pack(weight, grad_logits != nullptr);
    const Results results{others, grad_x, grad_weight, grad_scale, grad_logits};
    for (int64_t start = 0; start < n; start += rows_at_once) {
        Chunk chunk(x, target, start, std::min(rows_at_once, n - start), width);
        const int64_t tiles = chunk.padded / ROWS, cached = std::max<int64_t>(1, CACHED / width / ROWS);
        const int64_t threads = std::min<int64_t>(omp_get_max_threads(), tiles);
        const int64_t blocks = ceil_div(ceil_div(tiles, cached), threads) * threads;
        bool in_range = true;
#pragma omp parallel for schedule(dynamic) reduction(&& : in_range)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = tiles * block / blocks, last = tiles * (block + 1) / blocks;
            if (first < last) in_range = process_rows(chunk, first, last, n, weight, results) && in_range;
        }
        if (!in_range) return 1;
        if (!grad_logits) continue;
#pragma omp parallel for schedule(static)
        for (int64_t number = 0; number < weight.panels(); ++number)
            process_panel(chunk, number, start + chunk.rows == n, weight, results);
    }
    return 0;
}

#endif
