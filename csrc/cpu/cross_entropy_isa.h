// The row of cross_entropy.cpp, once per instruction set. Source and formula are there.
inline float row(float* l, int64_t vocab, const float* bias, float softcap, int64_t target,
                 float weight, bool need_grad) {
    constexpr float kLow = -std::numeric_limits<float>::infinity();
    const bool changed = bias != nullptr || softcap > 0;
    const Vec cap = splat(softcap);
    Vec top[kVecs];
    for (Vec& t : top) t = splat(kLow);
    each(vocab, [&](int64_t v, int64_t k) {
        const int64_t left = vocab - k;
        Vec x = load(l + k, left, kLow);
        if (changed) {
            if (bias != nullptr) x = add(x, load(bias + k, left, 0.0f));
            if (softcap > 0) x = mul(cap, tanh(div(x, cap)));
            store(l + k, left, x);
            if (left < kLanes) x = load(l + k, left, kLow);
        }
        top[v] = greatest(x, top[v]);
    });
    const Vec high = splat(greatest_lane(top));
    Vec sum[kVecs];
    for (Vec& s : sum) s = splat(0.0f);
    each(vocab, [&](int64_t v, int64_t k) {
        sum[v] = add(sum[v], exp(sub(load(l + k, vocab - k, kLow), high)));
    });
    const float total = sum_lanes(sum);
    const float lse = greatest_lane(top) + std::log(total);
    const float nll = weight * (lse - l[target]);
    if (!need_grad) return nll;
    const float at_target = l[target];
    const float slope = softcap > 0 ? 1 - (at_target / softcap) * (at_target / softcap) : 1.0f;
    // exp(l - high) / total, not exp(l - lse): the division does not lose what lse rounds away.
    const Vec scale = splat(weight / total), one = splat(1.0f);
    each(vocab, [&](int64_t, int64_t k) {
        const Vec x = load(l + k, vocab - k, kLow);
        Vec g = mul(exp(sub(x, high)), scale);
        if (softcap > 0) {
            const Vec t = div(x, cap);
            g = mul(g, fnma(t, t, one));
        }
        store(l + k, vocab - k, g);
    });
    l[target] -= weight * slope;
    return nll;
}
