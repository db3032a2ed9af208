// Look-ups in the feature bank's integer keys; the index is described in userip_fast/bank/index.py.
// A look-up is three dependent cache misses (directory, keys, codes) and next to no arithmetic, so
// queries go in groups whose misses overlap: each pass fetches what the next pass reads.
#include <algorithm>
#include <cstdint>

#include "bindings.h"
#include "check.h"

namespace userip_fast {
namespace {

constexpr int64_t kGroup = 64;    // queries in flight: their lines fit the first-level cache
constexpr int64_t kLineKeys = 8;  // int64 keys per cache line

// splitmix64, as in userip_fast/keys.py
uint64_t mix64(uint64_t x) {
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

struct Bank {
    const int64_t* keys;  // [users], sorted by hash
    int64_t users;
    int bits;           // of the hash that choose the bucket
    const void* codes;  // [users, fields]
    int64_t fields;
};

// Returns false where the directory points outside the keys.
template <typename Row, typename Code>
bool lookup(const Bank& bank, const Row* directory, const int64_t* queries, int64_t num_queries,
            const int64_t* unknown, int64_t* rows, int64_t* out) {
    const Code* codes = static_cast<const Code*>(bank.codes);
    int64_t bucket[kGroup], start[kGroup], end[kGroup];
    for (int64_t base = 0; base < num_queries; base += kGroup) {
        const int64_t n = std::min(kGroup, num_queries - base);
        for (int64_t i = 0; i < n; ++i) {
            bucket[i] = static_cast<int64_t>(mix64(static_cast<uint64_t>(queries[base + i])) >>
                                             (64 - bank.bits));
            __builtin_prefetch(directory + bucket[i]);
        }
        for (int64_t i = 0; i < n; ++i) {
            start[i] = static_cast<int64_t>(directory[bucket[i]]);
            end[i] = static_cast<int64_t>(directory[bucket[i] + 1]);
            if (start[i] < 0 || start[i] > end[i] || end[i] > bank.users) return false;
            for (int64_t k = start[i]; k < std::min(end[i], start[i] + 3 * kLineKeys);
                 k += kLineKeys) {
                __builtin_prefetch(bank.keys + k);
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            int64_t row = -1;
            for (int64_t k = start[i]; k < end[i]; ++k) {
                if (bank.keys[k] == queries[base + i]) {
                    row = k;
                    break;
                }
            }
            rows[base + i] = row;
            if (codes != nullptr && row >= 0) __builtin_prefetch(codes + row * bank.fields);
        }
        if (codes == nullptr) continue;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = rows[base + i];
            int64_t* to = out + (base + i) * bank.fields;
            for (int64_t j = 0; j < bank.fields; ++j) {
                to[j] = row < 0 ? unknown[j] : static_cast<int64_t>(codes[row * bank.fields + j]);
            }
        }
    }
    return true;
}

template <typename Row>
bool lookup_codes(const Bank& bank, const Row* directory, int code_bytes, const int64_t* queries,
                  int64_t num_queries, const int64_t* unknown, int64_t* rows, int64_t* out) {
    switch (code_bytes) {
        case 1:
            return lookup<Row, uint8_t>(bank, directory, queries, num_queries, unknown, rows, out);
        case 2:
            return lookup<Row, uint16_t>(bank, directory, queries, num_queries, unknown, rows, out);
        default:
            return lookup<Row, uint32_t>(bank, directory, queries, num_queries, unknown, rows, out);
    }
}

// rows [num_queries] gets the row of each key, -1 for none; out [num_queries, fields] its codes, or
// `unknown` [fields]; with codes 0 only rows is written. False: the directory is damaged.
bool bank_lookup(uintptr_t keys, int64_t users, uintptr_t directory, int row_bytes, int bits,
                 uintptr_t codes, int code_bytes, int64_t fields, uintptr_t queries,
                 int64_t num_queries, uintptr_t unknown, uintptr_t rows, uintptr_t out) {
    USERIP_CHECK(bits >= 1 && bits <= 63, "bits", "1 .. 63", bits);
    USERIP_CHECK(row_bytes == 4 || row_bytes == 8, "row_bytes", "4 or 8", row_bytes);
    USERIP_CHECK(code_bytes == 1 || code_bytes == 2 || code_bytes == 4, "code_bytes", "1, 2 or 4",
                 code_bytes);
    const Bank bank{reinterpret_cast<const int64_t*>(keys), users, bits,
                    reinterpret_cast<const void*>(codes), fields};
    const auto* q = reinterpret_cast<const int64_t*>(queries);
    const auto* u = reinterpret_cast<const int64_t*>(unknown);
    auto* r = reinterpret_cast<int64_t*>(rows);
    auto* o = reinterpret_cast<int64_t*>(out);
    if (row_bytes == 4) {
        return lookup_codes(bank, reinterpret_cast<const uint32_t*>(directory), code_bytes, q,
                            num_queries, u, r, o);
    }
    return lookup_codes(bank, reinterpret_cast<const uint64_t*>(directory), code_bytes, q,
                        num_queries, u, r, o);
}

}  // namespace

void bind_bank(py::module_& m) {
    m.def("bank_lookup", &bank_lookup, py::call_guard<py::gil_scoped_release>(), py::arg("keys"),
          py::arg("users"), py::arg("directory"), py::arg("row_bytes"), py::arg("bits"),
          py::arg("codes"), py::arg("code_bytes"), py::arg("fields"), py::arg("queries"),
          py::arg("num_queries"), py::arg("unknown"), py::arg("rows"), py::arg("out"),
          "Rows and codes of integer keys in a feature bank.");
}

}  // namespace userip_fast
