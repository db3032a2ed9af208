// What the driver of assign_codes (assign_codes.cpp) and its inner loops (assign_codes_isa.h, one
// copy per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace userip_fast::assign_codes {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One codebook, laid out for the inner loops. A panel is `panel` consecutive codes, transposed:
// panels[p][d][lane], so that one row's x[d] meets `panel` codes in full vectors. Codes past the
// end are zero vectors; they and retired codes have half_norm = +Inf and never win.
struct Book {
    const float* codewords = nullptr;  // [size, dim]
    int64_t size = 0;
    int64_t num_panels = 0;
    float* panels = nullptr;     // [num_panels, dim, panel]
    float* half_norm = nullptr;  // [num_panels * panel], |c|^2 / 2
    float max_norm = 0;          // of the codes in use
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
};

// Work space of one thread, kept from block to block.
struct Scratch {
    std::vector<float> x;       // [block_rows, dim], rows converted to fp32 where they are not
    std::vector<float> piece;   // [block_rows, depth of a block], so that rows share no cache set
    std::vector<float> scores;  // [block_rows, codes of a block]
};

struct Isa {
    const char* name;
    int64_t panel;       // codes of a panel
    int64_t block_rows;  // rows that share one visit of the codebook
    // panels and half_norm of `book` from its codewords; `active` may be null.
    void (*pack)(Book& book, const uint8_t* active, int64_t dim);
    // Outputs of rows [begin, end) of book j. `sums` [size, dim] gets the rows added to their
    // code's, unless null.
    void (*assign)(const Problem& problem, int64_t j, int64_t begin, int64_t end, Scratch& scratch,
                   float* sums);
    // Copies row n of book j, columns [begin, end), to `out` as fp32; not scaled.
    void (*load)(const Problem& problem, int64_t j, int64_t n, int64_t begin, int64_t end,
                 float* out);
};

}  // namespace userip_fast::assign_codes
