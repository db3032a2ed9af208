// Inner loops of assign_codes, included once per instruction set inside a namespace of its own with
//   USERIP_LANES   floats in a vector register
//   USERIP_GROUP   rows of a register tile: GROUP x 2 accumulators + 3 must fit the register file
//   USERIP_BITS    turns a Mask into an integer with one bit per lane
// No include guard, no includes: everything comes from assign_codes.cpp. Vectors are the compilers'
// vector extension, so that one text serves all; products and sums in one expression become FMAs.
//
// A row's result does not depend on its neighbours, on the block it falls in or on the thread:
// every score is the same chain of FMAs over d. Equal codewords therefore score equally.

constexpr int64_t kLanes = USERIP_LANES;
constexpr int kGroup = USERIP_GROUP;
constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kBlockRows = 32 * kGroup;
constexpr int64_t kBlockCodes = 256;
constexpr int64_t kBlockDepth = 256;  // a panel of it is half of a 32 KiB L1 (AVX2)
constexpr int kDirectRows = 2;        // 2 x 4 accumulators
constexpr int64_t kDirectCodes = 8;   // up to here memory is the limit and distances are for free

typedef float Vec __attribute__((vector_size(4 * USERIP_LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * USERIP_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * USERIP_LANES), aligned(4), may_alias));

inline Vec load_vec(const float* p) {
    return *reinterpret_cast<const UnalignedVec*>(p);
}
inline void store_vec(float* p, Vec v) {
    *reinterpret_cast<UnalignedVec*>(p) = v;
}
inline Vec splat(float a) {
    return a - Vec{};
}  // x - 0 is x, also for -0: folded away

inline Mask lane_numbers() {
    Mask index;
    for (int i = 0; i < int(kLanes); ++i) index[i] = i;
    return index;
}

inline float sum_lanes(Vec v) {
#pragma GCC unroll 4
    for (int step = 1; step < int(kLanes); step *= 2) v += shuffle(v, lane_numbers() ^ step);
    return v[0];
}

inline Vec max_lanes(Vec v) {  // in every lane
#pragma GCC unroll 4
    for (int step = 1; step < int(kLanes); step *= 2) {
        const Vec other = shuffle(v, lane_numbers() ^ step);
        v = v > other ? v : other;
    }
    return v;
}

void pack(Book& book, const uint8_t* active, int64_t dim) {
    for (int64_t p = 0; p < book.num_panels; ++p) {
        float* panel = book.panels + p * dim * kPanel;
        double norm[kPanel] = {};
        // In pieces of a few cache lines per code, so that every line written is filled while near.
        for (int64_t d0 = 0; d0 < dim; d0 += 32) {
            const int64_t d1 = std::min(dim, d0 + 32);
            for (int64_t lane = 0; lane < kPanel; ++lane) {
                const int64_t k = p * kPanel + lane;
                const float* c = book.codewords + std::min(k, book.size - 1) * dim;
                const float real = k < book.size ? 1.0f : 0.0f;
                for (int64_t d = d0; d < d1; ++d) {
                    panel[d * kPanel + lane] = real * c[d];
                    norm[lane] += double(c[d]) * c[d];
                }
            }
        }
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            const int64_t k = p * kPanel + lane;
            const bool usable = k < book.size && (active == nullptr || active[k] != 0);
            book.half_norm[k] = usable ? float(norm[lane] / 2) : kInfinity;
        }
    }
}

// scores[r][0:panel] (+)= sum over d of x[r][d] * panel[d][0:panel]. `ahead` (0: none) is where,
// from x[r], to prefetch: rows are too short for the hardware to find its stride by itself.
inline void score_tile(const float* const* x, const float* panel, int64_t depth, float* scores,
                       int64_t stride, bool first, int64_t ahead) {
    Vec acc[kGroup][2];
#pragma GCC unroll 16
    for (int r = 0; r < kGroup; ++r) {
        acc[r][0] = first ? Vec{} : load_vec(scores + r * stride);
        acc[r][1] = first ? Vec{} : load_vec(scores + r * stride + kLanes);
    }
    const float* row[kGroup];
#pragma GCC unroll 16
    for (int r = 0; r < kGroup; ++r) row[r] = x[r];
    for (int64_t d = 0; d < depth;) {
        if (ahead != 0) {
#pragma GCC unroll 16
            for (int r = 0; r < kGroup; ++r) __builtin_prefetch(row[r] + d + ahead);
        }
        const int64_t stop = std::min(depth, d + 16);  // a cache line of x
#pragma GCC unroll 2
        for (; d < stop; ++d) {
            const Vec c0 = load_vec(panel + d * kPanel);
            const Vec c1 = load_vec(panel + d * kPanel + kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < kGroup; ++r) {
                const Vec value = splat(row[r][d]);
                acc[r][0] = acc[r][0] + value * c0;
                acc[r][1] = acc[r][1] + value * c1;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kGroup; ++r) {
        store_vec(scores + r * stride, acc[r][0]);
        store_vec(scores + r * stride + kLanes, acc[r][1]);
    }
}

// The best two codes of a row so far, by score; -1 where there is none.
struct Top2 {
    float best = -kInfinity;
    float second = -kInfinity;
    int64_t best_id = -1;
    int64_t second_id = -1;

    void offer(float score, int64_t id) {  // ids come in rising order among equal scores
        if (score > best) {
            second = best, second_id = best_id;
            best = score, best_id = id;
        } else if (score > second) {
            second = score, second_id = id;
        }
    }
};

// Offers the best two codes of one panel. Past the first panels of a large codebook almost none
// beats the second best, so the common case is two subtractions and one test.
inline void offer_panel(Top2& top, const float* scores, const float* half_norm, int64_t first_id) {
    Vec s[2] = {load_vec(scores) - load_vec(half_norm),
                load_vec(scores + kLanes) - load_vec(half_norm + kLanes)};
    const Vec bar = splat(top.second);
    if (USERIP_BITS((s[0] > bar) | (s[1] > bar)) == 0) return;
    for (int turn = 0; turn < 2; ++turn) {
        const Vec most = max_lanes(s[0] > s[1] ? s[0] : s[1]);
        const Mask at[2] = {s[0] == most, s[1] == most};
        const uint64_t bits = USERIP_BITS(at[0]) | uint64_t(USERIP_BITS(at[1])) << kLanes;
        if (bits == 0) return;                   // NaN
        const int lane = __builtin_ctzll(bits);  // the first of equals
        top.offer(most[0], first_id + lane);
        // Takes that one lane out for the second turn.
        const Vec gone = splat(-kInfinity);
        s[0] = lane_numbers() == lane ? gone : s[0];
        s[1] = lane_numbers() == lane - int(kLanes) ? gone : s[1];
    }
}

inline float squared_distance(const float* x, const float* c, int64_t dim) {
    Vec acc[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vec e = load_vec(x + d + i * kLanes) - load_vec(c + d + i * kLanes);
            acc[i] = acc[i] + e * e;
        }
    }
    for (; d + kLanes <= dim; d += kLanes) {
        const Vec e = load_vec(x + d) - load_vec(c + d);
        acc[0] = acc[0] + e * e;
    }
    float tail = 0;
    for (; d < dim; ++d) tail += (x[d] - c[d]) * (x[d] - c[d]);
    return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3])) + tail;
}

template <typename T>
inline void convert(const T* x, int64_t stride, int64_t n, float* out) {
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i * stride]);
    }
}

void load(const Problem& p, int64_t j, int64_t n, int64_t begin, int64_t end, float* out) {
    const int64_t at = j * p.stride_book + n * p.stride_row + begin * p.stride_dim;
    switch (p.type) {
        case Type::kFloat32:
            return convert(static_cast<const float*>(p.x) + at, p.stride_dim, end - begin, out);
        case Type::kBFloat16:
            return convert(static_cast<const BFloat16*>(p.x) + at, p.stride_dim, end - begin, out);
        case Type::kFloat16:
            return convert(static_cast<const Float16*>(p.x) + at, p.stride_dim, end - begin, out);
    }
}

// Writes a row's outputs, given the best two codes and their direct distances.
inline void finish(const Problem& p, int64_t id, float near, int64_t other, float far,
                   int64_t out) {
    if (far < near || (far == near && other >= 0 && other < id)) {
        std::swap(near, far);
        std::swap(id, other);
    }
    if (!std::isfinite(near)) id = -1;  // NaN, Inf or overflow in x; the caller refuses the row
    p.code_ids[out] = id;
    p.sq_distance[out] = near;
    if (p.second_sq_distance != nullptr) p.second_sq_distance[out] = far;
}

// Decides between the best two by score. The second's distance is only needed where rounding could
// have swapped them: two chains of `dim` FMAs are off by at most 2 dim u |x| |c|, u = 2^-24, and
// the half norms by a few u |c|^2.
inline void decide(const Problem& p, const Book& book, const Top2& top, const float* x,
                   int64_t out) {
    float near = kInfinity, far = kInfinity;
    if (top.best_id >= 0) near = squared_distance(x, book.codewords + top.best_id * p.dim, p.dim);
    if (top.second_id >= 0) {
        const float norm = 1.01f * std::sqrt(near) + book.max_norm;  // at least |x|
        const float rounding = 0x1p-23f * float(p.dim + 4) * (norm + book.max_norm) * book.max_norm;
        if (p.second_sq_distance != nullptr || !(top.best - top.second > rounding)) {
            far = squared_distance(x, book.codewords + top.second_id * p.dim, p.dim);
        }
    }
    finish(p, top.best_id, near, top.second_id, far, out);
}

// Rows x[0:rows] by score; outputs from `out` on. `scores` is [rows up to a group, panels of a
// block].
inline void assign_by_score(const Problem& p, const Book& book, const float* const* x, int64_t rows,
                            int64_t block_depth, int64_t block_panels, int64_t ahead, float* scores,
                            float* packed, int64_t out) {
    const int64_t stride = block_panels * kPanel;
    const int64_t rows_up = (rows + kGroup - 1) / kGroup * kGroup;
    Top2 top[kBlockRows];
    for (int64_t p0 = 0; p0 < book.num_panels; p0 += block_panels) {
        const int64_t panels = std::min(block_panels, book.num_panels - p0);
        for (int64_t d0 = 0; d0 < p.dim; d0 += block_depth) {
            const int64_t depth = std::min(block_depth, p.dim - d0);
            const float* piece[kBlockRows];
            for (int64_t r = 0; r < rows_up; ++r) {
                piece[r] = x[r] + d0;
                if (packed == nullptr) continue;
                std::memcpy(packed + r * kBlockDepth, piece[r], depth * sizeof(float));
                piece[r] = packed + r * kBlockDepth;
            }
            const float* first = book.panels + (p0 * p.dim + d0) * kPanel;
            const auto tile = [&](int64_t g, int64_t q, int64_t prefetch) {
                score_tile(piece + g, first + q * p.dim * kPanel, depth,
                           scores + g * stride + q * kPanel, stride, d0 == 0, prefetch);
            };
            if (packed != nullptr) {  // a panel stays in L1, the rows in L2
                for (int64_t q = 0; q < panels; ++q) {
                    for (int64_t g = 0; g < rows; g += kGroup) tile(g, q, 0);
                }
            } else {  // rows stay in L1 while the few panels pass from L2
                for (int64_t g = 0; g < rows; g += kGroup) {
                    for (int64_t q = 0; q < panels; ++q) tile(g, q, q == 0 ? ahead : 0);
                }
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t q = 0; q < panels; ++q) {
                const int64_t k = (p0 + q) * kPanel;
                offer_panel(top[r], scores + r * stride + q * kPanel, book.half_norm + k, k);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) decide(p, book, top[r], x[r], out + r);
}

// out[r][k] = -|x_r - c_k|^2 of kDirectRows rows and 4 codes.
inline void direct_tile(const float* const* x, const float* const* c, int64_t dim, int64_t ahead,
                        float* out) {
    Vec acc[kDirectRows][4] = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const Vec code = load_vec(c[k] + d);
#pragma GCC unroll 4
            for (int r = 0; r < kDirectRows; ++r) {
                const Vec e = load_vec(x[r] + d) - code;
                acc[r][k] = acc[r][k] + e * e;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kDirectRows; ++r) __builtin_prefetch(x[r] + d + ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kDirectRows; ++r) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) out[r * kPanel + k] = -sum_lanes(acc[r][k]);
    }
    if (d == dim) return;
    for (int r = 0; r < kDirectRows; ++r) {
        for (int k = 0; k < 4; ++k) {
            float tail = 0;
            for (int64_t t = d; t < dim; ++t) tail += (x[r][t] - c[k][t]) * (x[r][t] - c[k][t]);
            out[r * kPanel + k] -= tail;
        }
    }
}

// Few codes: memory is the limit, so every distance is formed directly and none needs a second
// look. `penalty` [kPanel] is 0 for codes in use, else Inf.
inline void assign_direct(const Problem& p, const Book& book, const float* penalty,
                          const float* const* x, int64_t rows, int64_t ahead, int64_t out) {
    const float* c[kDirectCodes];
    for (int64_t k = 0; k < kDirectCodes; ++k) {
        c[k] = book.codewords + std::min(k, book.size - 1) * p.dim;
    }
    float scores[kDirectRows * kPanel] = {};
    for (int64_t k = 0; k < book.size; k += 4) {
        direct_tile(x, c + k, p.dim, k == 0 ? ahead : 0, scores + k);
    }
    for (int64_t r = 0; r < rows; ++r) {
        Top2 top;
        offer_panel(top, scores + r * kPanel, penalty, 0);
        finish(p, top.best_id, -top.best, top.second_id, -top.second, out + r);
    }
}

void assign(const Problem& p, int64_t j, int64_t begin, int64_t end, Scratch& scratch,
            float* sums) {
    const Book& book = p.books[j];
    const bool plain = p.type == Type::kFloat32 && p.stride_dim == 1 && !p.normalize;
    const bool direct = book.size <= kDirectCodes;
    // One panel: whole rows in one go, so that x streams once from memory through L1.
    const bool one_panel = book.num_panels == 1;
    const bool pack_rows = book.num_panels > 8;
    const int64_t group = direct ? kDirectRows : kGroup;
    const int64_t block_rows = one_panel ? group : kBlockRows;
    const int64_t block_depth = one_panel ? p.dim : kBlockDepth;
    const int64_t block_panels = std::min(book.num_panels, kBlockCodes / kPanel);
    const int64_t stride = block_panels * kPanel;
    const int64_t x_stride = p.dim + 16;  // off powers of two, which would share cache sets
    const int64_t ahead = plain ? (group + 2048 / p.dim) * p.stride_row : 0;  // 8 KiB at least
    float penalty[kPanel];
    for (int64_t k = 0; k < kPanel; ++k) penalty[k] = book.half_norm[k] < kInfinity ? 0 : kInfinity;
    scratch.scores.resize(block_rows * stride);
    if (pack_rows) scratch.piece.resize(kBlockRows * kBlockDepth);
    if (!plain) scratch.x.resize(block_rows * x_stride);

    for (int64_t n0 = begin; n0 < end; n0 += block_rows) {
        const int64_t rows = std::min(block_rows, end - n0);
        const int64_t out = j * p.rows + n0;
        const float* x[kBlockRows];
        for (int64_t r = 0; r < block_rows; ++r) {
            if (r >= rows) {
                x[r] = x[rows - 1];  // computed and thrown away
            } else if (plain) {
                x[r] = static_cast<const float*>(p.x) + j * p.stride_book + (n0 + r) * p.stride_row;
            } else {
                float* row = scratch.x.data() + r * x_stride;
                load(p, j, n0 + r, 0, p.dim, row);
                if (p.normalize) {
                    const float scale = inverse_norm(row, p.dim);
                    for (int64_t d = 0; d < p.dim; ++d) row[d] *= scale;
                }
                x[r] = row;
            }
        }
        if (direct) {
            assign_direct(p, book, penalty, x, rows, ahead, out);
        } else {
            assign_by_score(p, book, x, rows, block_depth, block_panels, ahead,
                            scratch.scores.data(), pack_rows ? scratch.piece.data() : nullptr, out);
        }
        if (sums == nullptr) continue;
        for (int64_t r = 0; r < rows; ++r) {
            if (p.code_ids[out + r] < 0) continue;
            float* __restrict sum = sums + p.code_ids[out + r] * p.dim;
            for (int64_t d = 0; d < p.dim; ++d) sum[d] += x[r][d];
        }
    }
}
