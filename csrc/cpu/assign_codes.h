// What the driver of assign_codes (assign_codes.cpp) and its inner loops (assign_codes_isa.h, one
// copy per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace userip_fast::assign_codes {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One codebook, laid out for the inner loops. A panel is `width` consecutive codes, transposed:
// panels[p][d][lane], so that one row's x[d] meets `width` codes in full vectors. Codes past the
// end are zero vectors; they and retired codes have penalty = +Inf and never win.
//
// direct: the squared distances are formed as such; else codes are ranked by x.c - |c|^2 / 2.
struct Book {
    const float* codewords = nullptr;  // [size, dim]
    int64_t size = 0;
    bool direct = false;
    int64_t width = 0;
    int64_t num_panels = 0;
    float* panels = nullptr;   // [num_panels, dim, width]
    float* penalty = nullptr;  // [num_panels * width]; of codes in use 0 (direct) or |c|^2 / 2
    float max_norm = 0;        // of the codes in use, where not direct
};

struct Problem {
    const void* x = nullptr;  // [books, rows, dim], strides in elements
    Type type = Type::kFloat32;
    int64_t rows = 0;
    int64_t dim = 0;
    int64_t stride_book = 0;
    int64_t stride_row = 0;
    int64_t stride_dim = 0;
    bool normalize = false;  // rows of x are scaled to length 1
    std::vector<Book> books;
    int64_t* code_ids = nullptr;  // [books, rows]; the three outputs
    float* sq_distance = nullptr;
    float* second_sq_distance = nullptr;  // null where nobody wants it

    bool plain() const { return type == Type::kFloat32 && stride_dim == 1 && !normalize; }
};

// Work space of one thread, kept from block to block.
struct Scratch {
    std::vector<float> piece;   // [block_rows, depth of a block], so that rows share no cache set
    std::vector<float> scores;  // [block_rows, codes of a block]
    std::vector<float> row;     // [2, dim], whole rows as fp32 where they are not in place
};

struct Isa {
    const char* name;
    int64_t lanes;         // a panel is that wide, or twice
    int64_t block_rows;    // rows that share one visit of the codebook
    int64_t direct_codes;  // most codes whose distances are formed directly
    // panels and penalty of `book` from its codewords; `active` may be null.
    void (*pack)(Book& book, const uint8_t* active, int64_t dim);
    // Outputs of rows [begin, end) of book j. `sums` [size, dim] gets the rows added to their
    // code's, unless null.
    void (*assign)(const Problem& problem, int64_t j, int64_t begin, int64_t end, Scratch& scratch,
                   float* sums);
    // Copies row n of book j, columns [begin, end), times `scale` to `out` as fp32.
    void (*load)(const Problem& problem, int64_t j, int64_t n, int64_t begin, int64_t end,
                 float scale, float* out);
};

}  // namespace userip_fast::assign_codes
