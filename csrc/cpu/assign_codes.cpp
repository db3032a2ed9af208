// Nearest codewords on the CPU: packing, threads and statistics. The arithmetic is in
// assign_codes_isa.h, compiled here for each instruction set and chosen at run time.
#include "cpu/assign_codes.h"

#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace userip_fast::assign_codes {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float to_float(float x) {
    return x;
}

inline float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Exponent and mantissa are moved into place and the bias is corrected by an exact multiplication,
// which also makes subnormals right; Inf and NaN (exponent 31) get fp32's exponent instead.
inline float to_float(Float16 x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    float out;
    std::memcpy(&out, &magnitude, sizeof out);
    out *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &out, sizeof bits);
    if (magnitude >= 0x0f800000) bits |= 0x7f800000;
    bits |= uint32_t(x.bits & 0x8000) << 16;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// 1 / |x| as torch.nn.functional.normalize has it: a zero vector stays zero.
inline float inverse_norm(const float* x, int64_t dim) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += double(x[d]) * x[d];
    return float(1.0 / std::max(std::sqrt(sum), 1e-12));
}

// Lane i of the result is v[index[i]].
#if defined(__clang__)
template <typename Vec, typename Mask>
inline Vec shuffle(Vec v, Mask index) {
    Vec out = v;
    for (unsigned i = 0; i < sizeof(Vec) / sizeof(float); ++i) out[i] = v[index[i]];
    return out;
}
#else
#define shuffle(v, index) __builtin_shuffle(v, index)
#endif

namespace baseline {
#define USERIP_LANES 4
#define USERIP_GROUP 6
#if defined(__x86_64__)
#define USERIP_BITS(mask) unsigned(__builtin_ia32_movmskps(reinterpret_cast<Vec>(mask)))
#else
#define USERIP_BITS(mask) unsigned((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8))
#endif
#include "cpu/assign_codes_isa.h"
#undef USERIP_LANES
#undef USERIP_GROUP
#undef USERIP_BITS
}  // namespace baseline

#if defined(__x86_64__)
USERIP_ISA_BEGIN(USERIP_AVX2_FEATURES)
namespace avx2 {
#define USERIP_LANES 8
#define USERIP_GROUP 6
#define USERIP_BITS(mask) unsigned(__builtin_ia32_movmskps256(reinterpret_cast<Vec>(mask)))
#include "cpu/assign_codes_isa.h"
#undef USERIP_LANES
#undef USERIP_GROUP
#undef USERIP_BITS
}  // namespace avx2
USERIP_ISA_END

USERIP_ISA_BEGIN(USERIP_AVX512_FEATURES)
namespace avx512vl {
#define USERIP_LANES 8
#define USERIP_GROUP 12
#define USERIP_BITS(mask) unsigned(__builtin_ia32_movmskps256(reinterpret_cast<Vec>(mask)))
#include "cpu/assign_codes_isa.h"
#undef USERIP_LANES
#undef USERIP_GROUP
#undef USERIP_BITS
}  // namespace avx512vl
namespace avx512 {
#define USERIP_LANES 16
#define USERIP_GROUP 12
#define USERIP_BITS(mask) unsigned(__builtin_ia32_cvtd2mask512(mask))
#include "cpu/assign_codes_isa.h"
#undef USERIP_LANES
#undef USERIP_GROUP
#undef USERIP_BITS
}  // namespace avx512
USERIP_ISA_END
#endif

#define USERIP_ISA_ENTRY(ns)                                                           \
    Isa {                                                                              \
        #ns, ns::kLanes, ns::kBlockRows, std::min<int64_t>(ns::kPanel, 16), &ns::pack, \
            &ns::assign, &ns::load                                                     \
    }

// Those this processor can run, by isa::Set.
std::vector<Isa> usable_isas() {
    std::vector<Isa> out{USERIP_ISA_ENTRY(baseline)};
#if defined(__x86_64__)
    if (isa::usable(isa::kAvx2)) out.push_back(USERIP_ISA_ENTRY(avx2));
    if (isa::usable(isa::kAvx512)) {
        out.push_back(USERIP_ISA_ENTRY(avx512vl));
        out.push_back(USERIP_ISA_ENTRY(avx512));
    }
#endif
    return out;
}

struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, FreeDeleter>;

// Not initialised. Large ones ask for 2 MiB pages: faulting them in by 4 KiB costs as much as
// packing.
Buffer allocate(int64_t count) {
    constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
    size_t bytes = std::max<int64_t>(count, 1) * sizeof(float);
    const size_t alignment = bytes < 2 * kHugePage ? kLine : kHugePage;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    auto* p = static_cast<float*>(std::aligned_alloc(alignment, bytes));
    if (p == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return Buffer(p);
}

// Sums beyond this many codes do not stay in cache beside x: they get a pass of their own.
constexpr int64_t kFusedCodes = 64;
// Floats that all partial sums together may take beside the codebook's own size.
constexpr int64_t kPartialFloats = int64_t{8} << 20;

// Partial sums per book of the fused form. It depends on shapes only, never on threads, so that the
// sums do not either.
int64_t num_partials(int64_t rows, int64_t size, int64_t dim) {
    const int64_t affordable = std::clamp<int64_t>(kPartialFloats / (size * dim), 4, 64);
    return std::clamp<int64_t>(rows / (8 * size), 1, affordable);
}

// sums[k][d] of book j, rows in their order: sorted by code (stable), an item being a slab of
// columns of one code. No atomics, and the same bits for any number of threads. Every 1024 rows the
// fp32 sum moves to fp64.
void sum_by_code(const Isa& isa, const Problem& p, int64_t j, const float* scale,
                 const int64_t* code_ids, const int64_t* counts, float* sums) {
    const int64_t size = p.books[j].size;
    std::vector<int64_t> end(size), order(p.rows);
    std::partial_sum(counts, counts + size, end.begin());
    for (int64_t n = p.rows; n-- > 0;) {
        if (code_ids[n] >= 0) order[--end[code_ids[n]]] = n;  // then `end` is where each begins
    }
    constexpr int64_t kSlab = 1024;
    const int64_t slabs = (p.dim + kSlab - 1) / kSlab;
    threads::parallel_for(size * slabs, [&](int64_t item, int) {
        const int64_t k = item / slabs, begin = item % slabs * kSlab;
        const int64_t width = std::min(kSlab, p.dim - begin);
        float x[kSlab], part[kSlab] = {};
        double total[kSlab] = {};
        for (int64_t i = 0; i < counts[k]; ++i) {
            const int64_t n = order[end[k] + i];
            isa.load(p, j, n, begin, begin + width, scale == nullptr ? 1.0f : scale[n], x);
            for (int64_t d = 0; d < width; ++d) part[d] += x[d];
            if (i % 1024 == 1023 || i == counts[k] - 1) {
                for (int64_t d = 0; d < width; ++d) total[d] += part[d], part[d] = 0;
            }
        }
        for (int64_t d = 0; d < width; ++d) sums[k * p.dim + begin + d] = float(total[d]);
    });
}

void run(const Isa& isa, Problem& p, const uint8_t* active, int64_t* counts, float* sums) {
    const int64_t books = int64_t(p.books.size());
    std::vector<Buffer> buffers;
    struct Panel {
        int64_t book, index;
    };
    std::vector<Panel> panels;
    std::vector<int64_t> first(books + 1, 0);  // position of a book's first code among all
    for (int64_t j = 0; j < books; ++j) {
        Book& book = p.books[j];
        book.direct = book.size <= isa.direct_codes;
        book.width = book.size <= isa.lanes ? isa.lanes : 2 * isa.lanes;
        book.num_panels = (book.size + book.width - 1) / book.width;
        buffers.push_back(allocate(book.num_panels * book.width * p.dim));
        book.panels = buffers.back().get();
        buffers.push_back(allocate(book.num_panels * book.width));
        book.penalty = buffers.back().get();
        first[j + 1] = first[j] + book.size;
        for (int64_t i = 0; i < book.num_panels; ++i) panels.push_back({j, i});
    }
    threads::parallel_for(int64_t(panels.size()), [&](int64_t i, int) {
        const auto [j, index] = panels[i];
        Book part = p.books[j];  // one panel of it, as a book of its own
        const int64_t code = index * part.width;
        part.codewords += code * p.dim;
        part.size -= code;
        part.num_panels = 1;
        part.panels += code * p.dim;
        part.penalty += code;
        isa.pack(part, active == nullptr ? nullptr : active + first[j] + code, p.dim);
    });

    for (Book& book : p.books) {
        for (int64_t k = 0; k < book.size; ++k) {
            if (book.penalty[k] != kInfinity) {
                book.max_norm = std::max(book.max_norm, std::sqrt(2 * book.penalty[k]));
            }
        }
    }

    // An item is a run of rows of one book. With fused sums it is what one partial sum covers.
    struct Item {
        int64_t book, begin, end;
        float* sums;
    };
    // Each begins with rows that nobody has asked for: long runs, while there are enough for all.
    const int64_t blocks = (p.rows + isa.block_rows - 1) / isa.block_rows;
    const int64_t run_rows = isa.block_rows * std::clamp<int64_t>(blocks / 64, 1, 8);
    std::vector<Item> items;
    std::vector<int64_t> partials(books, 0);
    for (int64_t j = 0; j < books; ++j) {
        const int64_t size = p.books[j].size;
        const bool fused = sums != nullptr && size <= kFusedCodes;
        partials[j] = fused ? num_partials(p.rows, size, p.dim) : 0;
        float* partial = nullptr;
        if (fused) {
            buffers.push_back(allocate(partials[j] * size * p.dim));
            partial = buffers.back().get();
        }
        const int64_t runs = fused ? partials[j] : (p.rows + run_rows - 1) / run_rows;
        for (int64_t i = 0; i < runs; ++i) {
            if (fused) {
                items.push_back(
                    {j, p.rows * i / runs, p.rows * (i + 1) / runs, partial + i * size * p.dim});
            } else {
                items.push_back({j, i * run_rows, std::min(p.rows, (i + 1) * run_rows), nullptr});
            }
        }
    }
    std::vector<Scratch> scratch(threads::count());
    threads::parallel_for(int64_t(items.size()), [&](int64_t i, int thread) {
        const Item& item = items[i];
        if (item.sums != nullptr) {
            std::fill_n(item.sums, p.books[item.book].size * p.dim, 0.0f);
        }
        isa.assign(p, item.book, item.begin, item.end, scratch[thread], item.sums);
    });

    if (counts == nullptr) return;
    std::fill_n(counts, first[books], 0);
    auto item = items.begin();
    for (int64_t j = 0; j < books; ++j) {
        const int64_t* ids = p.code_ids + j * p.rows;
        for (int64_t n = 0; n < p.rows; ++n) {
            if (ids[n] >= 0) ++counts[first[j] + ids[n]];
        }
        float* out = sums + first[j] * p.dim;
        if (partials[j] == 0) {
            std::vector<float> scale;
            if (p.normalize) {
                scale.resize(p.rows);
                threads::parallel_for((p.rows + 255) / 256, [&](int64_t i, int) {
                    std::vector<float> x(p.dim);
                    for (int64_t n = i * 256; n < std::min(p.rows, i * 256 + 256); ++n) {
                        isa.load(p, j, n, 0, p.dim, 1.0f, x.data());
                        scale[n] = inverse_norm(x.data(), p.dim);
                    }
                });
            }
            sum_by_code(isa, p, j, p.normalize ? scale.data() : nullptr, ids, counts + first[j],
                        out);
        } else {
            const int64_t count = p.books[j].size * p.dim;
            const float* partial = item->sums;
            constexpr int64_t kSlab = 1024;
            threads::parallel_for((count + kSlab - 1) / kSlab, [&](int64_t i, int) {
                const int64_t begin = i * kSlab, width = std::min(kSlab, count - begin);
                double total[kSlab] = {};
                for (int64_t s = 0; s < partials[j]; ++s) {
                    const float* part = partial + s * count + begin;
                    for (int64_t c = 0; c < width; ++c) total[c] += part[c];
                }
                for (int64_t c = 0; c < width; ++c) out[begin + c] = float(total[c]);
            });
        }
        while (item != items.end() && item->book == j) ++item;
    }
}

}  // namespace
}  // namespace userip_fast::assign_codes

namespace userip_fast {

void bind_assign_codes(py::module_& m) {
    using namespace assign_codes;
    m.def(
        "assign_codes_cpu",
        [](const std::string& isa_name, uintptr_t x, int type, int64_t rows, int64_t dim,
           int64_t stride_book, int64_t stride_row, int64_t stride_dim, uintptr_t codewords,
           const std::vector<int64_t>& sizes, uintptr_t active, bool normalize, uintptr_t code_ids,
           uintptr_t sq_distance, uintptr_t second_sq_distance, uintptr_t counts, uintptr_t sums) {
            USERIP_CHECK(0 <= type && type <= 2, "type", "0 (fp32), 1 (bf16) or 2 (fp16)", type);
            USERIP_CHECK(rows >= 0, "rows", "a count", rows);
            USERIP_CHECK(dim > 0, "dim", "a positive count", dim);
            USERIP_CHECK((counts == 0) == (sums == 0), "counts", "given with sums or not at all",
                         counts);
            const std::vector<Isa> isas = usable_isas();
            auto isa = isas.begin() + isa::chosen(isa::kAssignCodes);
            // Of so few codes distances are summed in as many lanes as a vector has, and 512 bits
            // are no faster: all sets give the bits of 256.
            if (isa == isas.begin() + isa::kAvx512 && !sizes.empty() &&
                *std::min_element(sizes.begin(), sizes.end()) <= baseline::kFewCodes) {
                --isa;
            }
            if (!isa_name.empty()) {
                isa = std::find_if(isas.begin(), isas.end(),
                                   [&](const Isa& i) { return isa_name == i.name; });
            }
            USERIP_CHECK(isa != isas.end(), "isa", "one of instruction_sets()", isa_name);
            Problem p;
            p.x = reinterpret_cast<const void*>(x);
            p.type = static_cast<Type>(type);
            p.rows = rows, p.dim = dim;
            p.stride_book = stride_book, p.stride_row = stride_row, p.stride_dim = stride_dim;
            p.normalize = normalize;
            p.code_ids = reinterpret_cast<int64_t*>(code_ids);
            p.sq_distance = reinterpret_cast<float*>(sq_distance);
            p.second_sq_distance = reinterpret_cast<float*>(second_sq_distance);
            const auto* next = reinterpret_cast<const float*>(codewords);
            for (const int64_t size : sizes) {
                USERIP_CHECK(size > 0, "sizes", "positive counts", size);
                Book book;
                book.codewords = next;
                book.size = size;
                p.books.push_back(book);
                next += size * dim;
            }
            const py::gil_scoped_release release;
            run(*isa, p, reinterpret_cast<const uint8_t*>(active),
                reinterpret_cast<int64_t*>(counts), reinterpret_cast<float*>(sums));
        },
        "Nearest codewords; see userip_fast.ops.assign_codes. isa: a set, or empty for the one in "
        "use. x: [J, rows, dim] by strides in "
        "elements; codewords: fp32 [sum sizes, dim]; active: bool [sum sizes] or 0; code_ids "
        "(int64, -1 where the distance is not finite), sq_distance, second_sq_distance (fp32): "
        "[J, rows]; counts (int64 [sum sizes]) and sums (fp32 [sum sizes, dim]): both or 0.",
        py::arg("isa"), py::arg("x"), py::arg("type"), py::arg("rows"), py::arg("dim"),
        py::arg("stride_book"), py::arg("stride_row"), py::arg("stride_dim"), py::arg("codewords"),
        py::arg("sizes"), py::arg("active"), py::arg("normalize"), py::arg("code_ids"),
        py::arg("sq_distance"), py::arg("second_sq_distance"), py::arg("counts"), py::arg("sums"));
}

}  // namespace userip_fast
