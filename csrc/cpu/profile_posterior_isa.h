// The inner loops of profile_posterior.cpp, once per instruction set. Which events are added in
// which order depends on the column alone, so all sets give the same bits.

// sum[0 : kWidth kLanes] = prior + rows of events [begin, end), the columns from `column` on; but
// for kWhole only `left` are there, of one vector. Events take turns in kChains sums, so that one
// addition need not wait for another.
template <int kWidth, int kChains, bool kWhole, bool kWeighted>
inline void add_columns(const Table& t, int64_t begin, int64_t end, int64_t column, int64_t left,
                        const double* prior, double* sum) {
    const float* base = t.rows + column;
    do {
        const int64_t stop = std::min(end, begin + kRun);
        Vec acc[kChains][kWidth];
        for (auto& chain : acc) {
            for (Vec& x : chain) x = splat(0.0f);
        }
        const auto add_event = [&](int64_t n, Vec* chain) {
            const float* row = base + t.kinds[n] * t.codes;
            const Vec weight = splat(kWeighted ? t.weights[n] : 0.0f);
            for (int i = 0; i < kWidth; ++i) {
                const Vec x = kWhole ? load(row + i * kLanes) : load(row, left, 0.0f);
                chain[i] = kWeighted ? fma(x, weight, chain[i]) : add(x, chain[i]);
            }
        };
        int64_t n = begin;
        for (; n + kChains <= stop; n += kChains) {
            for (int c = 0; c < kChains; ++c) add_event(n + c, acc[c]);
        }
        for (; n < stop; ++n) add_event(n, acc[0]);
        for (int i = 0; i < kWidth; ++i) {
            for (int half = kChains / 2; half > 0; half /= 2) {
                for (int c = 0; c < half; ++c) acc[c][i] = add(acc[c][i], acc[c + half][i]);
            }
            add_wide(sum + i * kLanes, prior + i * kLanes, acc[0][i]);
        }
        begin = stop, prior = sum;
    } while (begin < end);
}

// sum = prior + the rows of one user's events; all three are padded with -inf.
template <bool kWeighted>
inline void add_events(const Table& t, int64_t begin, int64_t end, const double* prior,
                       double* sum) {
    const int64_t codes = t.codes;
    if (t.num_kinds * codes > kNear) {
        // The rows of the user after this one, or so: past its events lie the next one's.
        for (int64_t n = begin + kAhead; n < std::min(end + kAhead, t.num_events); ++n) {
            const float* row = t.rows + t.kinds[n] * codes;
            for (int64_t i = 0; i < codes; i += kLine) {
                _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
            }
        }
    }
    int64_t c = 0;
    // Eight vectors, then 64 columns, at a time: one chain each.
    for (; c + 8 * kLanes <= codes; c += 8 * kLanes)
        add_columns<8, 1, true, kWeighted>(t, begin, end, c, codes - c, prior + c, sum + c);
    for (; c + 64 <= codes; c += 64)
        add_columns<64 / kLanes, 1, true, kWeighted>(t, begin, end, c, 64, prior + c, sum + c);
    for (; c + 16 <= codes; c += 16)
        add_columns<16 / kLanes, 4, true, kWeighted>(t, begin, end, c, 16, prior + c, sum + c);
    for (; c < codes; c += kLanes)
        add_columns<1, 4, false, kWeighted>(t, begin, end, c, codes - c, prior + c, sum + c);
}

// Of the sums of `users` <= kTogether: log_resp = sum - evidence, step by step for all of them, so
// that what one user waits for overlaps with the others.
inline void normalise(const double* sums, int64_t padded, int64_t users, int64_t codes,
                      float* log_resp, double* evidence) {
    float log_total[kTogether] = {};
    for (int64_t u = 0; u < users; ++u) {
        const double* sum = sums + u * padded;
        const double high = greatest_of(sum, padded);
        Vec totals[kVecs];
        for (Vec& x : totals) x = splat(0.0f);
        each(codes, [&](int64_t v, int64_t k) {
            const Vec below = narrow_difference(sum + k, high);
            store(log_resp + u * codes + k, codes - k, below);
            totals[v] = add(totals[v], exp(below));
        });
        const __m256 eight = fold(totals, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
        __m128 total = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        total = _mm_add_ps(total, _mm_movehl_ps(total, total));
        log_total[u] = _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total)));
        evidence[u] = high;
    }
    for (int64_t u = 0; u < kTogether; u += kLanes) {
        const Vec total = load(log_total + u);
        store(log_total + u, kLanes, add(log(total), sub(total, total)));  // NaN stays NaN
    }
    for (int64_t u = 0; u < users; ++u) {
        evidence[u] += log_total[u];
        const Vec shift = splat(log_total[u]);
        float* out = log_resp + u * codes;
        for (int64_t k = 0; k < codes; k += kLanes) {
            store(out + k, codes - k, sub(load(out + k, codes - k, 0.0f), shift));
        }
    }
}

// First of events [begin, end) whose kind is no row of the table; `end` where there is none.
inline int64_t first_bad(const Table& t, int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + kNumbers <= end; n += kNumbers) {
        if (!all_within(t.kinds + n, t.num_kinds - 1)) break;
    }
    while (n < end && t.kinds[n] >= 0 && t.kinds[n] < t.num_kinds) ++n;
    return n;
}

// Users [begin, end), whose offsets are good. Returns as `first_bad`.
inline int64_t judge(const Table& t, const int64_t* first, int64_t begin, int64_t end,
                     const double* prior, double* sums, float* log_resp, double* evidence) {
    const auto add = t.weights == nullptr ? add_events<false> : add_events<true>;
    for (int64_t from = begin; from < end; from += kTogether) {
        const int64_t to = std::min(end, from + kTogether);
        const int64_t wrong = first_bad(t, first[from], first[to]);
        if (wrong < first[to]) return wrong;
        for (int64_t u = from; u < to; ++u) {
            // The kinds of those after the next: at a page's end the processor stops reading ahead,
            // and asked for all at once they wait for each other. A hint may point past what is
            // ours.
            for (int64_t n = first[u]; n < first[u + 1]; n += 8) {
                _mm_prefetch(reinterpret_cast<const char*>(t.kinds + n) + 8192, _MM_HINT_T0);
            }
            add(t, first[u], first[u + 1], prior, sums + (u - from) * t.padded);
        }
        normalise(sums, t.padded, to - from, t.codes, log_resp + from * t.codes, evidence + from);
    }
    return first[end];
}
