// Inner loops of assign_codes, included once per instruction set inside a namespace of its own with
//   USERIP_LANES   floats in a vector register
//   USERIP_GROUP   rows of a register tile: GROUP x 2 accumulators + 4 must fit the register file
//   USERIP_BITS    turns a Mask into an integer with one bit per lane
// No include guard, no includes: everything comes from assign_codes.cpp. Vectors are the compilers'
// vector extension, so that one text serves all; products and sums in one expression become FMAs.
//
// A row's result does not depend on its neighbours, on the block it falls in or on the thread:
// every score is the same chains of FMAs over d. Equal codewords therefore score equally.

constexpr int64_t kLanes = USERIP_LANES;
constexpr int kGroup = USERIP_GROUP;
constexpr int64_t kPanel = 2 * kLanes;  // most codes of a panel
constexpr int64_t kBlockRows = 32 * kGroup;
constexpr int64_t kFewRows = 4 * kGroup;
constexpr int64_t kBlockCodes = 1024;
constexpr int64_t kBlockDepth = 256;  // a panel of it is half of a 32 KiB L1 (AVX2)
constexpr int64_t kChain = 128;       // distances are summed in chains of so many columns
constexpr int64_t kChunk = 32;        // columns between two looks at what to prefetch
constexpr int64_t kFewPanels = 8;     // up to here x is read where it lies, panels pass from L2
constexpr int64_t kStreamBytes = 256 << 10;  // of panels that stay in L2 while x streams by
constexpr int64_t kRunDim = 1024;    // rows of up to so many columns are prefetched as one run
constexpr int64_t kRunAhead = 2048;  // floats from the rows at hand to what is prefetched of a run
constexpr int64_t kRowAhead = 512;   // and from the column at hand in longer rows
constexpr int64_t kFewCodes = 4;     // up to here lanes go over columns: over codes most would idle

typedef float Vec __attribute__((vector_size(4 * USERIP_LANES)));
typedef double WideVec __attribute__((vector_size(8 * USERIP_LANES)));
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

// The compiler would load `v` anew for every use: two loads a cycle would then be what binds.
inline void keep_in_register(Vec& v) {
#if defined(__x86_64__)
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

inline Vec greater(Vec a, Vec b) {
    return a > b ? a : b;
}
inline Vec lesser(Vec a, Vec b) {
    return a < b ? a : b;
}
inline Vec plus(Vec a, Vec b) {
    return a + b;
}

// `op` over all lanes, the result in each.
template <typename Op>
inline Vec reduce_lanes(Vec v, Op op) {
#pragma GCC unroll 4
    for (int step = 1; step < int(kLanes); step *= 2) v = op(v, shuffle(v, lane_numbers() ^ step));
    return v;
}

inline void transpose(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
    for (int step = int(kLanes) / 2; step > 0; step /= 2) {
        const Mask upper = (lane_numbers() & step) != 0;
#pragma GCC unroll 16
        for (int i = 0; i < int(kLanes); ++i) {
            if ((i & step) != 0) continue;
            const Vec a = v[i], b = v[i + step];
            v[i] = upper ? shuffle(b, lane_numbers() ^ step) : a;
            v[i + step] = upper ? b : shuffle(a, lane_numbers() ^ step);
        }
    }
}

void pack(Book& book, const uint8_t* active, int64_t dim) {
    for (int64_t first = 0; first < book.num_panels * book.width; first += kLanes) {
        float* out = book.panels + first / book.width * book.width * dim + first % book.width;
        const float* c[kLanes];
        Vec real = {};
        for (int lane = 0; lane < int(kLanes); ++lane) {
            c[lane] = book.codewords + std::min(first + lane, book.size - 1) * dim;
            real[lane] = first + lane < book.size ? 1.0f : 0.0f;
        }
        WideVec norm = {};
        for (int64_t d = 0; d < dim; d += kLanes) {
            const int64_t depth = std::min(kLanes, dim - d);
            Vec v[kLanes];
            for (int lane = 0; lane < int(kLanes); ++lane) {
                if (depth == kLanes) {
                    v[lane] = load_vec(c[lane] + d);
                } else {
                    for (int i = 0; i < int(kLanes); ++i)
                        v[lane][i] = i < depth ? c[lane][d + i] : 0;
                }
            }
            transpose(v);
            for (int64_t i = 0; i < depth; ++i) {
                v[i] *= real;
                store_vec(out + (d + i) * book.width, v[i]);
                const WideVec wide = __builtin_convertvector(v[i], WideVec);
                norm += wide * wide;
            }
        }
        for (int lane = 0; lane < int(kLanes); ++lane) {
            const int64_t k = first + lane;
            const bool usable = k < book.size && (active == nullptr || active[k] != 0);
            book.penalty[k] = !usable ? kInfinity : book.direct ? 0 : float(norm[lane] / 2);
        }
    }
}

// What a tile asks for ahead of time: a line per row and line of columns, `row` bytes apart, then
// `step` bytes on. The hardware cannot follow six short rows by itself.
struct Prefetch {
    uintptr_t at = 0;  // 0: nothing
    int64_t row = 0, step = 0;
};

// out[r][0 : kVecs vectors] (+)= over d of x[r][d] * panel[d][...], or of the squared differences.
//
// Not inlined: among a caller's variables GCC keeps the strides in memory, to reload them per
// column.
template <bool kDirect, int kVecs>
__attribute__((noinline)) void tile(const float* x, int64_t stride, const float* panel,
                                    int64_t depth, float* out, int64_t out_stride, bool first,
                                    Prefetch prefetch) {
    if (!kDirect && !first) {
#pragma GCC unroll 16
        for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {
                __builtin_prefetch(out + r * out_stride + v * kLanes, 1);
            }
        }
    }
    Vec acc[kGroup][kVecs] = {};
    const float* row[kGroup / 3];  // of every third; the others are a fixed stride away
#pragma GCC unroll 16
    for (int i = 0; i < kGroup / 3; ++i) row[i] = x + 3 * i * stride;
    // The `u`-th column from here. Mixed with the next one, or its differences with their squares,
    // GCC runs out of registers and spills.
    const auto column = [&](int u) __attribute__((always_inline)) {
        Vec code[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) code[v] = load_vec(panel + (u * kVecs + v) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kGroup; ++r) {
            const Vec value = splat(row[r / 3][r % 3 * stride + u]);
            Vec e[kVecs];
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) e[v] = value - code[v];
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {
                acc[r][v] = acc[r][v] + (kDirect ? e[v] * e[v] : value * code[v]);
            }
        }
        asm volatile("" ::: "memory");
    };
    const auto advance = [&](int columns) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int i = 0; i < kGroup / 3; ++i) row[i] += columns;
        panel += columns * kVecs * kLanes;
    };
    const float* const end = panel + depth * kVecs * kLanes;
    while (panel < end) {
        constexpr int64_t kSummed = (kDirect ? kChain : kBlockDepth) * kVecs * kLanes;
        const float* const chain = std::min(end, panel + kSummed);
        while (panel < chain) {
            for (int line = 0; line < int(kChunk / 16) && prefetch.at != 0; ++line) {
#pragma GCC unroll 16
                for (int r = 0; r < kGroup; ++r) {
                    __builtin_prefetch(
                        reinterpret_cast<const void*>(prefetch.at + r * prefetch.row), 0, 2);
                }
                prefetch.at += prefetch.step;
            }
            const float* const stop = std::min(chain, panel + kChunk * kVecs * kLanes);
            for (; panel + 2 * kVecs * kLanes <= stop; advance(2)) {
                column(0);
                column(1);
            }
            for (; panel < stop; advance(1)) column(0);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) {
                float* to = out + r * out_stride + v * kLanes;
                store_vec(to, first ? acc[r][v] : load_vec(to) + acc[r][v]);
                acc[r][v] = Vec{};
            }
        }
        first = false;
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
        const Vec most = reduce_lanes(greater(s[0], s[1]), greater);
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

// Of `rows` (at most kLanes) rows of distances [row][width of the panel]: each one's code of least
// distance + penalty, the first of equals, that distance and the next. -1 and Inf where there is
// none. Lanes are rows after a transposition, so that the search needs no reduction.
template <int kVecs>
inline void nearest(const float* distance, int64_t rows, const float* penalty, Mask& id, Vec& near,
                    Vec& far) {
    id = Mask{} - 1;
    near = far = splat(kInfinity);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
        Vec code[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < int(kLanes); ++r) {
            const int64_t row = std::min<int64_t>(r, rows - 1);
            code[r] = load_vec(distance + (row * kVecs + v) * kLanes);
            code[r] = code[r] + load_vec(penalty + v * kLanes);
        }
        transpose(code);
#pragma GCC unroll 16
        for (int k = 0; k < int(kLanes); ++k) {
            const Mask less = code[k] < near;
            far = less ? near : lesser(code[k], far);
            near = less ? code[k] : near;
            id = less ? Mask{} + (v * int(kLanes) + k) : id;
        }
    }
}

// Summed in 64 lanes whatever a vector holds, then joined in one order: of one distance all sets
// find the same bits.
inline float squared_distance(const float* x, const float* c, int64_t dim) {
    constexpr int kSums = 64 / int(kLanes), kStep = kSums / 4;  // vectors; of sixteen lanes
    Vec acc[kSums] = {};
    int64_t d = 0;
    const auto add = [&](int i, int64_t at) __attribute__((always_inline)) {
        const Vec e = load_vec(x + at) - load_vec(c + at);
        acc[i] = acc[i] + e * e;
    };
    for (; d + 64 <= dim; d += 64) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) add(i, d + i * kLanes);
    }
    for (; d + 16 <= dim; d += 16) {
#pragma GCC unroll 4
        for (int i = 0; i < kStep; ++i) add(i, d + i * kLanes);
    }
    float tail = 0;
    for (; d < dim; ++d) tail += (x[d] - c[d]) * (x[d] - c[d]);
    float sums[16];
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) {
        store_vec(sums + i * kLanes,
                  (acc[i] + acc[kStep + i]) + (acc[2 * kStep + i] + acc[3 * kStep + i]));
    }
#pragma GCC unroll 4
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0] + tail;
}

template <typename T>
inline void convert(const T* x, int64_t stride, int64_t n, float* out) {
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i * stride]);
    }
}

void load(const Problem& p, int64_t j, int64_t n, int64_t begin, int64_t end, float scale,
          float* out) {
    const int64_t at = j * p.stride_book + n * p.stride_row + begin * p.stride_dim;
    switch (p.type) {
        case Type::kFloat32:
            convert(static_cast<const float*>(p.x) + at, p.stride_dim, end - begin, out);
            break;
        case Type::kBFloat16:
            convert(static_cast<const BFloat16*>(p.x) + at, p.stride_dim, end - begin, out);
            break;
        case Type::kFloat16:
            convert(static_cast<const Float16*>(p.x) + at, p.stride_dim, end - begin, out);
            break;
    }
    if (scale == 1.0f) return;
    for (int64_t i = 0; i < end - begin; ++i) out[i] *= scale;
}

// Writes a row's outputs.
inline void finish(const Problem& p, int64_t id, float near, float far, int64_t out) {
    if (!std::isfinite(near)) id = -1;  // NaN, Inf or overflow in x; the caller refuses the row
    p.code_ids[out] = id;
    p.sq_distance[out] = near;
    if (p.second_sq_distance != nullptr) p.second_sq_distance[out] = far;
}

// What rounding can do to the difference of two scores: a chain of `dim` FMAs is off by at most
// dim u |x| |c|, u = 2^-24, and a half norm by a few u |c|^2. `near` is a squared distance of x.
inline float rounding_of(const Book& book, float near, int64_t dim) {
    const float norm = 1.01f * std::sqrt(near) + book.max_norm;  // at least |x|
    return 0x1p-23f * float(dim + 4) * (norm + book.max_norm) * book.max_norm;
}

// Decides between the best two by score. The second's distance is only needed where rounding could
// have swapped them.
inline void decide(const Problem& p, const Book& book, const Top2& top, const float* x,
                   int64_t out) {
    int64_t id = top.best_id, other = top.second_id;
    float near = kInfinity, far = kInfinity;
    if (id >= 0) near = squared_distance(x, book.codewords + id * p.dim, p.dim);
    if (other >= 0 && (p.second_sq_distance != nullptr ||
                       !(top.best - top.second > rounding_of(book, near, p.dim)))) {
        far = squared_distance(x, book.codewords + other * p.dim, p.dim);
    }
    if (far < near || (far == near && other >= 0 && other < id)) {
        std::swap(near, far);
        std::swap(id, other);
    }
    finish(p, id, near, far, out);
}

// The same for a row whose scores are all there (panels `step` apart), where nobody wants the
// second and rounding cannot have touched the first; false where that is not so. Keeping the best
// two costs more than a few codes are worth.
inline bool decide_clear(const Problem& p, const Book& book, const float* scores, int64_t step,
                         const float* x, int64_t out) {
    const auto each = [&](const auto& see) {
        for (int64_t q = 0; q < book.num_panels; ++q) {
#pragma GCC unroll 2
            for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
                see(load_vec(scores + q * step + lane) - load_vec(book.penalty + q * kPanel + lane),
                    q * kPanel + lane);
            }
        }
    };
    Vec most = splat(-kInfinity);
    each([&](Vec s, int64_t) { most = greater(s, most); });
    most = reduce_lanes(most, greater);
    int64_t id = -1;
    each([&](Vec s, int64_t first) {
        const unsigned bits = USERIP_BITS(s == most);
        if (bits != 0 && id < 0) id = first + __builtin_ctz(bits);
    });
    if (id < 0) return false;  // NaN
    const float near = squared_distance(x, book.codewords + id * p.dim, p.dim);
    const Vec rounding = splat(rounding_of(book, near, p.dim));
    int rivals = 0;
    each(
        [&](Vec s, int64_t) { rivals += __builtin_popcount(USERIP_BITS(~(most - s > rounding))); });
    if (rivals > 1) return false;
    finish(p, id, near, kInfinity, out);
    return true;
}

// A run of rows on its way through the codebook, and how to reach them as fp32.
struct Block {
    const Problem& p;
    const Book& book;
    Scratch& scratch;
    int64_t j, first, rows;
    bool stream;    // the codebook stays in L2 while x streams by, a group of whole rows at a time
    bool in_place;  // tiles read x itself, in whole groups
    int64_t depth;  // most columns of a piece, in whole chains
    float scale[kBlockRows];

    const float* address(int64_t r) const {
        return static_cast<const float*>(p.x) + j * p.stride_book + (first + r) * p.stride_row;
    }
    bool one_run() const { return p.stride_row == p.dim && p.dim <= kRunDim; }
    // While group g is at the `count` columns from d.
    Prefetch prefetch(int64_t g, int64_t d, int64_t count) const {
        const auto here = reinterpret_cast<uintptr_t>(address(g * kGroup));
        const int64_t row = p.stride_row * sizeof(float), group = kGroup * row;
        if (stream && one_run()) {  // in its order
            return {here + group + (kRunAhead + d * kGroup) * sizeof(float), 64, 64 * kGroup};
        }
        if (!stream && (g + 1) * kGroup < rows) return {here + group + d * sizeof(float), row, 64};
        // Columns to come of these rows; after their last, the next rows' first.
        const bool last = d + count == p.dim;
        if (stream) {
            return {here + (last ? group : (d + kRowAhead) * int64_t(sizeof(float))), row, 64};
        }
        const auto block = reinterpret_cast<uintptr_t>(address(last ? rows : 0));
        return {block + (last ? 0 : d + count) * sizeof(float), row, 64};
    }
    // `slot` 0 or 1: both may be in use at a time.
    const float* whole_row(int64_t r, int slot = 0) const {
        if (p.plain()) return address(r);
        float* row = scratch.row.data() + slot * p.dim;
        load(p, j, first + r, 0, p.dim, scale[r], row);
        return row;
    }
};

// Scores of the block's rows by a few of the panels (kVecs vectors wide) over all columns.
// Distances lie [row][code], scores [panel][row][lane], so that what a tile adds to is one run of
// memory.
template <bool kDirect, int kVecs>
inline void score(const Block& b, int64_t first_panel, int64_t panels) {
    const Problem& p = b.p;
    const int64_t width = kVecs * kLanes, groups = (b.rows + kGroup - 1) / kGroup;
    const int64_t row_step = kDirect ? panels * width : width;
    const int64_t panel_step = kDirect ? width : groups * kGroup * width;
    const int64_t stride = b.in_place ? p.stride_row : kBlockDepth;
    const auto run = [&](int64_t g, int64_t q, int64_t d0, int64_t count,
                         const Prefetch& prefetch) {
        const float* x = b.in_place ? b.address(0) + d0 : b.scratch.piece.data();
        tile<kDirect, kVecs>(x + g * kGroup * stride, stride,
                             b.book.panels + ((first_panel + q) * p.dim + d0) * width, count,
                             b.scratch.scores.data() + g * kGroup * row_step + q * panel_step,
                             row_step, d0 == 0, prefetch);
    };
    // Few panels pass from L2.
    const auto pass = [&](int64_t g, int64_t d0, int64_t count) {
        for (int64_t q = 0; q < panels; ++q) {
            run(g, q, d0, count, b.in_place && q == 0 ? b.prefetch(g, d0, count) : Prefetch());
        }
    };
    if (b.stream && b.in_place) {
        // In two pieces: while its last columns pass, the first ones of other rows are asked for.
        const int64_t turn =
            b.one_run() ? 0 : std::max<int64_t>(0, p.dim - kRowAhead) / kBlockDepth * kBlockDepth;
        for (int64_t g = 0; g < groups; ++g) {
            if (turn > 0) pass(g, 0, turn);
            pass(g, turn, p.dim - turn);
        }
        return;
    }
    for (int64_t d0 = 0; d0 < p.dim; d0 += b.depth) {
        const int64_t count = std::min(b.depth, p.dim - d0);
        for (int64_t r = 0; r < b.rows && !b.in_place; ++r) {
            load(p, b.j, b.first + r, d0, d0 + count, b.scale[r],
                 b.scratch.piece.data() + r * kBlockDepth);
        }
        if (b.book.num_panels <= kFewPanels) {
            for (int64_t g = 0; g < groups; ++g) pass(g, d0, count);
            continue;
        }
        for (int64_t q = 0; q < panels; ++q) {  // a panel stays in L1, the rows pass from L2
            // Every eighth group asks for its share of the next panel.
            const auto next = reinterpret_cast<uintptr_t>(
                b.book.panels + ((first_panel + q + 1) * p.dim + d0) * width);
            for (int64_t g = 0; g < groups; ++g) {
                const bool ask = q + 1 < panels && g % 8 == 0;
                run(g, q, d0, count,
                    ask ? Prefetch{next + g / 8 * kGroup * 4 * count, 64, 64 * kGroup}
                        : Prefetch());
            }
        }
    }
}

// Lane i of the result is the sum over the lanes of v[i]. v is used up.
inline Vec sum_each(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
    for (int step = 1; step < int(kLanes); step *= 2) {
        const Mask upper = (lane_numbers() & step) != 0;
#pragma GCC unroll 16
        for (int i = 0; i < int(kLanes); i += 2 * step) {
            const Vec a = v[i], b = v[i + step];
            v[i] = (upper ? b : a) + shuffle(upper ? a : b, lane_numbers() ^ step);
        }
    }
    return v[0];
}

// out[r * stride + k] = |x_r - c_k|^2 of two rows and kFewCodes codes.
inline void pair_distances(const float* const* x, const float* const* c, int64_t dim,
                           Prefetch prefetch, float* out, int64_t stride) {
    Vec acc[2][kFewCodes] = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
        // Into L2, far ahead. Every line twice, as half a line is read at a time (AVX2): where
        // the queue is full a prefetch is dropped, and asking once was a third slower.
        __builtin_prefetch(reinterpret_cast<const void*>(prefetch.at), 0, 2);
        __builtin_prefetch(reinterpret_cast<const void*>(prefetch.at + prefetch.row), 0, 2);
        prefetch.at += prefetch.step;
#pragma GCC unroll 4
        for (int k = 0; k < kFewCodes; ++k) {
            Vec code = load_vec(c[k] + d);
            keep_in_register(code);
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
                const Vec e = load_vec(x[r] + d) - code;
                acc[r][k] = acc[r][k] + e * e;
            }
        }
    }
    constexpr int kSums = 2 * kFewCodes;
    float sums[std::max<int>(kSums, kLanes)];
#pragma GCC unroll 2
    for (int first = 0; first < kSums; first += int(kLanes)) {
        Vec v[kLanes] = {};
#pragma GCC unroll 16
        for (int i = 0; i < std::min<int>(kLanes, kSums - first); ++i) {
            v[i] = acc[(first + i) / kFewCodes][(first + i) % kFewCodes];
        }
        store_vec(sums + first, sum_each(v));
    }
    for (int64_t t = d; t < dim; ++t) {
        for (int i = 0; i < kSums; ++i) {
            const float e = x[i / kFewCodes][t] - c[i % kFewCodes][t];
            sums[i] += e * e;
        }
    }
    for (int r = 0; r < 2; ++r) std::copy_n(sums + r * kFewCodes, kFewCodes, out + r * stride);
}

// Distances [rows, width of the one panel].
inline void few_distances(const Block& b) {
    const Problem& p = b.p;
    const float* c[kFewCodes];
    for (int64_t k = 0; k < kFewCodes; ++k) {
        c[k] = b.book.codewords + std::min(k, b.book.size - 1) * p.dim;
    }
    const int64_t vec = sizeof(Vec), width = b.book.width, row = p.stride_row * sizeof(float);
    for (int64_t r = 0; r < b.rows; r += 2) {
        const float* x[2] = {b.whole_row(r), b.whole_row(std::min(r + 1, b.rows - 1), 1)};
        Prefetch prefetch{reinterpret_cast<uintptr_t>(x[0]), 0, 0};  // of a copy: nothing new
        if (p.plain() && p.stride_row == p.dim) {                    // in the order of memory
            prefetch = {reinterpret_cast<uintptr_t>(x[0] + kRunAhead) + 2 * row, vec, 2 * vec};
        } else if (p.plain()) {  // the next two rows
            prefetch = {reinterpret_cast<uintptr_t>(x[0]) + 2 * row, row, vec};
        }
        pair_distances(x, c, p.dim, prefetch, b.scratch.scores.data() + r * width, width);
    }
}

// One panel: every distance is formed directly and none needs a second look.
template <int kVecs>
inline void assign_direct(const Block& b) {
    const int64_t width = kVecs * kLanes;
    b.book.size <= kFewCodes ? few_distances(b) : score<true, kVecs>(b, 0, 1);
    const int64_t out = b.j * b.p.rows + b.first;
    for (int64_t r0 = 0; r0 < b.rows; r0 += kLanes) {
        const int64_t rows = std::min(kLanes, b.rows - r0);
        Mask id;
        Vec near, far;
        nearest<kVecs>(b.scratch.scores.data() + r0 * width, rows, b.book.penalty, id, near, far);
        for (int64_t r = 0; r < rows; ++r) finish(b.p, id[r], near[r], far[r], out + r0 + r);
    }
}

// Few panels: a row's scores are all there at once.
inline void assign_few(const Block& b) {
    score<false, 2>(b, 0, b.book.num_panels);
    const int64_t step = (b.rows + kGroup - 1) / kGroup * kGroup * kPanel;
    for (int64_t r = 0; r < b.rows; ++r) {
        const float* scores = b.scratch.scores.data() + r * kPanel;
        const float* x = b.whole_row(r);
        const int64_t out = b.j * b.p.rows + b.first + r;
        if (b.p.second_sq_distance == nullptr && decide_clear(b.p, b.book, scores, step, x, out)) {
            continue;
        }
        Top2 top;
        for (int64_t q = 0; q < b.book.num_panels; ++q) {
            offer_panel(top, scores + q * step, b.book.penalty + q * kPanel, q * kPanel);
        }
        decide(b.p, b.book, top, x, out);
    }
}

inline void assign_many(const Block& b) {
    const int64_t most = kBlockCodes / kPanel, padded = (b.rows + kGroup - 1) / kGroup * kGroup;
    Top2 top[kBlockRows];
    for (int64_t p0 = 0; p0 < b.book.num_panels; p0 += most) {
        const int64_t panels = std::min(most, b.book.num_panels - p0);
        score<false, 2>(b, p0, panels);
        for (int64_t q = 0; q < panels; ++q) {
            const int64_t k = (p0 + q) * kPanel;
            const float* scores = b.scratch.scores.data() + q * padded * kPanel;
            for (int64_t r = 0; r < b.rows; ++r) {
                offer_panel(top[r], scores + r * kPanel, b.book.penalty + k, k);
            }
        }
    }
    for (int64_t r = 0; r < b.rows; ++r) {
        decide(b.p, b.book, top[r], b.whole_row(r), b.j * b.p.rows + b.first + r);
    }
}

void assign(const Problem& p, int64_t j, int64_t begin, int64_t end, Scratch& scratch,
            float* sums) {
    const Book& book = p.books[j];
    const bool few = book.num_panels <= kFewPanels;
    // Of few panels that much stays in L2: the deeper a piece, the fewer begin and end.
    const int64_t few_depth = kStreamBytes /
                              (book.num_panels * book.width * int64_t(sizeof(float))) /
                              kBlockDepth * kBlockDepth;
    const bool stream = few && p.dim <= few_depth;
    const int64_t block_rows = few ? kFewRows : kBlockRows;
    scratch.scores.resize(block_rows * std::min(book.num_panels * book.width, kBlockCodes));
    scratch.piece.resize(block_rows * kBlockDepth);
    scratch.row.resize(p.plain() ? 0 : 2 * p.dim);
    Block b{p, book, scratch, j, begin, 0, stream, false, 0, {}};
    for (; b.first < end; b.first += b.rows) {
        b.rows = std::min(block_rows, end - b.first);
        if (b.rows > kGroup) b.rows -= b.rows % kGroup;  // the last few are a block of their own
        b.in_place = p.plain() && few && b.rows % kGroup == 0;
        b.depth = b.in_place ? few_depth : kBlockDepth;
        for (int64_t r = 0; r < b.rows; ++r) {
            b.scale[r] = 1.0f;
            if (p.normalize) b.scale[r] = inverse_norm(b.whole_row(r), p.dim);
        }
        if (book.direct) {
            book.width == kLanes ? assign_direct<1>(b) : assign_direct<2>(b);
        } else {
            few ? assign_few(b) : assign_many(b);
        }
        if (sums == nullptr) continue;
        for (int64_t r = 0; r < b.rows; ++r) {
            const int64_t id = p.code_ids[j * p.rows + b.first + r];
            if (id < 0) continue;
            const float* __restrict x = b.whole_row(r);
            float* __restrict sum = sums + id * p.dim;
            for (int64_t d = 0; d < p.dim; ++d) sum[d] += x[d];
        }
    }
}
