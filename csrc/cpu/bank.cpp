// Look-ups in the feature bank's integer keys; the index is described in userip_fast/bank/index.py.
// A look-up is three dependent cache misses (directory, keys, codes) and next to no arithmetic, so
// queries go in groups whose misses overlap: each pass fetches what the next pass reads.
#include <pybind11/numpy.h>

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
    const void* directory;  // [2**bits + 1]
    int row_bytes;          // of its entries: 4 or 8
    int bits;               // of the hash that choose the bucket
    const void* codes;      // [users, fields]
    int code_bytes;         // 1, 2 or 4
    int64_t fields;
    const int64_t* unknown;  // [fields], the codes of a key that is not there
};

// Number of queries that are not there; -1 where the directory points outside the keys.
template <typename Row, typename Code>
int64_t lookup(const Bank& bank, const int64_t* queries, int64_t num_queries, int64_t* out) {
    const Row* directory = static_cast<const Row*>(bank.directory);
    const Code* codes = static_cast<const Code*>(bank.codes);
    int64_t missing = 0;
    int64_t bucket[kGroup], start[kGroup], end[kGroup], rows[kGroup];
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
            if (start[i] < 0 || start[i] > end[i] || end[i] > bank.users) return -1;
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
            rows[i] = row;
            if (row < 0)
                ++missing;
            else
                __builtin_prefetch(codes + row * bank.fields);
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = rows[i];
            int64_t* to = out + (base + i) * bank.fields;
            for (int64_t j = 0; j < bank.fields; ++j) {
                to[j] =
                    row < 0 ? bank.unknown[j] : static_cast<int64_t>(codes[row * bank.fields + j]);
            }
        }
    }
    return missing;
}

template <typename Row>
int64_t lookup_codes(const Bank& bank, const int64_t* queries, int64_t n, int64_t* out) {
    switch (bank.code_bytes) {
        case 1:
            return lookup<Row, uint8_t>(bank, queries, n, out);
        case 2:
            return lookup<Row, uint16_t>(bank, queries, n, out);
        default:
            return lookup<Row, uint32_t>(bank, queries, n, out);
    }
}

// What does not change between look-ups is checked and kept once: of a single one, the call is
// most.
Bank make_bank(uintptr_t keys, int64_t users, uintptr_t directory, int row_bytes, int bits,
               uintptr_t codes, int code_bytes, int64_t fields, uintptr_t unknown) {
    USERIP_CHECK(bits >= 1 && bits <= 63, "bits", "1 .. 63", bits);
    USERIP_CHECK(row_bytes == 4 || row_bytes == 8, "row_bytes", "4 or 8", row_bytes);
    USERIP_CHECK(code_bytes == 1 || code_bytes == 2 || code_bytes == 4, "code_bytes", "1, 2 or 4",
                 code_bytes);
    return {reinterpret_cast<const int64_t*>(keys),
            users,
            reinterpret_cast<const void*>(directory),
            row_bytes,
            bits,
            reinterpret_cast<const void*>(codes),
            code_bytes,
            fields,
            reinterpret_cast<const int64_t*>(unknown)};
}

using Array = py::array_t<int64_t, py::array::c_style>;

// out [num_queries, fields] gets the codes of each key, or `unknown`.
int64_t bank_lookup(const Bank& bank, const Array& queries, Array& out) {
    const int64_t n = queries.size();
    USERIP_CHECK(out.size() == n * bank.fields, "out", "[queries, fields] values", out.size());
    const int64_t* from = queries.data();
    int64_t* to = out.mutable_data();
    const py::gil_scoped_release released;
    return bank.row_bytes == 4 ? lookup_codes<uint32_t>(bank, from, n, to)
                               : lookup_codes<uint64_t>(bank, from, n, to);
}

}  // namespace

void bind_bank(py::module_& m) {
    py::class_<Bank>(m, "BankIndex", "The arrays of a feature bank, which must outlive it.")
        .def(py::init(&make_bank), py::arg("keys"), py::arg("users"), py::arg("directory"),
             py::arg("row_bytes"), py::arg("bits"), py::arg("codes"), py::arg("code_bytes"),
             py::arg("fields"), py::arg("unknown"))
        .def("lookup", &bank_lookup, py::arg("queries").noconvert(), py::arg("out").noconvert(),
             "Codes of integer keys; how many are not there, -1 for a damaged directory.");
}

}  // namespace userip_fast
