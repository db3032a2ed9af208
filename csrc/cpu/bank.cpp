// Look-ups in the feature bank's integer keys; the index is described in userip_fast/bank/index.py.
// A look-up is three dependent cache misses (directory, keys, codes) and next to no arithmetic, so
// queries go in groups whose misses overlap: each pass fetches what the next pass reads.
// What is read is checked first, a region of neighbouring buckets at a time: its directory entries,
// keys and codes lie next to each other in hash order, so one look into a small map per query says
// that all of it was checked, and none is needed once all regions were.
#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "check.h"

namespace userip_fast {
namespace {

constexpr int64_t kGroup = 64;    // queries in flight: their lines fit the first-level cache
constexpr int64_t kLineKeys = 8;  // int64 keys per cache line
constexpr int64_t kPage = 4096;   // bytes that have one sum
constexpr int kRegionBits = 6;    // 64 buckets, about two pages of keys

// splitmix64, as in userip_fast/core/keys.py
uint64_t mix64(uint64_t x) {
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// CRC-32 as of zlib, eight bytes a step: tables[k][b] is byte b's sum followed by k zero bytes.
constexpr auto kCrcTables = [] {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t sum = b;
        for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xEDB88320u : 0);
        tables[0][b] = sum;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t b = 0; b < 256; ++b)
            tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFF];
    return tables;
}();

uint32_t crc32(const uint8_t* data, int64_t size) {
    uint32_t sum = ~0u;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint32_t next = 0;
        for (size_t k = 0; k < 8; ++k) {
            const uint8_t byte = data[i + k] ^ (k < 4 ? sum >> (8 * k) : 0);
            next ^= kCrcTables[7 - k][byte];
        }
        sum = next;
    }
    for (; i < size; ++i) sum = (sum >> 8) ^ kCrcTables[0][(sum ^ data[i]) & 0xFF];
    return ~sum;
}

// Threads may check and mark the same thing at once.
bool marked(const uint8_t* map, int64_t at) {
    return __atomic_load_n(map + at, __ATOMIC_RELAXED);
}
void mark(uint8_t* map, int64_t at) {
    __atomic_store_n(map + at, uint8_t{1}, __ATOMIC_RELAXED);
}

// An array of the bank's files; see userip_fast/bank/pages.py.
struct Paged {
    const uint8_t* values;
    int64_t bytes;
    const uint32_t* sums;  // of its pages; null in old banks, where every page counts as seen
    uint8_t* seen;         // 1 where a page was found to be as it was written

    // Whether the pages of bytes `first` to `stop` are as they were written.
    bool whole(int64_t first, int64_t stop) const {
        for (int64_t page = first / kPage; page * kPage < stop; ++page) {
            if (marked(seen, page)) continue;
            const int64_t at = page * kPage;
            if (crc32(values + at, std::min(kPage, bytes - at)) != sums[page]) return false;
            mark(seen, page);
        }
        return true;
    }
};

struct Bank {
    Paged keys;  // [users] int64, sorted by hash
    int64_t users;
    Paged directory;  // [2**bits + 1]
    int row_bytes;    // of its entries: 4 or 8
    int bits;         // of the hash that choose the bucket
    Paged codes;      // [users, fields]
    int code_bytes;   // 1, 2 or 4
    int64_t fields;
    const int64_t* unknown;        // [fields], the codes of a key that is not there
    std::vector<uint8_t> checked;  // 1 for each region that may be read
    int64_t left;                  // regions that may not yet
};

// Checks what a region's look-ups read: that its pages are whole, its buckets lie within the keys,
// and its codes are below those of an unknown key.
template <typename Row, typename Code>
bool check_region(Bank& bank, int64_t region) {
    const int64_t buckets = int64_t{1} << bank.bits;
    const int64_t first = region << kRegionBits,
                  last = std::min(first + (1 << kRegionBits), buckets);
    const int64_t entry = sizeof(Row), code_row = bank.fields * static_cast<int64_t>(sizeof(Code));
    const Row* directory = reinterpret_cast<const Row*>(bank.directory.values);
    const Code* codes = reinterpret_cast<const Code*>(bank.codes.values);
    if (!bank.directory.whole(first * entry, (last + 1) * entry)) return false;
    const int64_t start = static_cast<int64_t>(directory[first]);
    int64_t end = start;
    for (int64_t b = first + 1; b <= last; ++b) {
        const int64_t next = static_cast<int64_t>(directory[b]);
        if (next < end || next > bank.users) return false;
        end = next;
    }
    if (start < 0 || !bank.keys.whole(8 * start, 8 * end) ||
        !bank.codes.whole(start * code_row, end * code_row))
        return false;
    for (int64_t i = start; i < end; ++i)
        for (int64_t j = 0; j < bank.fields; ++j)
            if (static_cast<int64_t>(codes[i * bank.fields + j]) >= bank.unknown[j]) return false;
    if (!__atomic_exchange_n(bank.checked.data() + region, uint8_t{1}, __ATOMIC_RELAXED))
        __atomic_fetch_sub(&bank.left, 1, __ATOMIC_RELAXED);
    return true;
}

// Number of queries that are not there; -1 where what would have to be read is damaged.
template <typename Row, typename Code>
int64_t lookup(Bank& bank, const int64_t* queries, int64_t num_queries, int64_t* out) {
    const int64_t* keys = reinterpret_cast<const int64_t*>(bank.keys.values);
    const Row* directory = reinterpret_cast<const Row*>(bank.directory.values);
    const Code* codes = reinterpret_cast<const Code*>(bank.codes.values);
    const uint8_t* checked = bank.checked.data();
    int64_t missing = 0;
    int64_t bucket[kGroup], start[kGroup], end[kGroup], rows[kGroup];
    for (int64_t base = 0; base < num_queries; base += kGroup) {
        const int64_t n = std::min(kGroup, num_queries - base);
        for (int64_t i = 0; i < n; ++i) {
            bucket[i] = static_cast<int64_t>(mix64(static_cast<uint64_t>(queries[base + i])) >>
                                             (64 - bank.bits));
            __builtin_prefetch(directory + bucket[i]);
        }
        if (__atomic_load_n(&bank.left, __ATOMIC_RELAXED)) {
            for (int64_t i = 0; i < n; ++i) {
                const int64_t region = bucket[i] >> kRegionBits;
                if (!marked(checked, region) && !check_region<Row, Code>(bank, region)) return -1;
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            start[i] = static_cast<int64_t>(directory[bucket[i]]);
            end[i] = static_cast<int64_t>(directory[bucket[i] + 1]);
            for (int64_t k = start[i]; k < std::min(end[i], start[i] + 3 * kLineKeys);
                 k += kLineKeys) {
                __builtin_prefetch(keys + k);
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            int64_t row = -1;
            for (int64_t k = start[i]; k < end[i]; ++k) {
                if (keys[k] == queries[base + i]) {
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
int64_t lookup_codes(Bank& bank, const int64_t* queries, int64_t n, int64_t* out) {
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
using Addresses = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t>;

Paged make_paged(const Addresses& addresses) {
    const auto [values, bytes, sums, seen] = addresses;
    return {reinterpret_cast<const uint8_t*>(values), bytes,
            reinterpret_cast<const uint32_t*>(sums), reinterpret_cast<uint8_t*>(seen)};
}

Bank make_bank(const Addresses& keys, int64_t users, const Addresses& directory, int row_bytes,
               int bits, const Addresses& codes, int code_bytes, int64_t fields,
               uintptr_t unknown) {
    USERIP_CHECK(bits >= 1 && bits <= 63, "bits", "1 .. 63", bits);
    USERIP_CHECK(row_bytes == 4 || row_bytes == 8, "row_bytes", "4 or 8", row_bytes);
    USERIP_CHECK(code_bytes == 1 || code_bytes == 2 || code_bytes == 4, "code_bytes", "1, 2 or 4",
                 code_bytes);
    const int64_t regions = std::max<int64_t>((int64_t{1} << bits) >> kRegionBits, 1);
    return {make_paged(keys),
            users,
            make_paged(directory),
            row_bytes,
            bits,
            make_paged(codes),
            code_bytes,
            fields,
            reinterpret_cast<const int64_t*>(unknown),
            std::vector<uint8_t>(static_cast<size_t>(regions)),
            regions};
}

using Array = py::array_t<int64_t, py::array::c_style>;

// out [num_queries, fields] gets the codes of each key, or `unknown`.
int64_t bank_lookup(Bank& bank, const Array& queries, Array& out) {
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
    // Arrays as (address, bytes, address of page sums or 0, address of the map of pages seen).
    py::class_<Bank>(m, "CheckedBankIndex", "The arrays of a feature bank, which must outlive it.")
        .def(py::init(&make_bank), py::arg("keys"), py::arg("users"), py::arg("directory"),
             py::arg("row_bytes"), py::arg("bits"), py::arg("codes"), py::arg("code_bytes"),
             py::arg("fields"), py::arg("unknown"))
        .def("lookup", &bank_lookup, py::arg("queries").noconvert(), py::arg("out").noconvert(),
             "Codes of integer keys; how many are not there, -1 where the bank is damaged.");
}

}  // namespace userip_fast
