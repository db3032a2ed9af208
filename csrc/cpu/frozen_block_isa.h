// The rows of frozen_block.cpp, once per instruction set.
inline float norm_row(const float* x, const float* residual, const float* weight, float* y,
                      float* total, int64_t dim, float eps, float offset) {
    Vec squares[kVecs];
    for (Vec& s : squares) s = splat(0.0f);
    each(dim, [&](int64_t i, int64_t k) {
        Vec v = load(x + k, dim - k, 0.0f);
        if (residual != nullptr) {
            v = add(v, load(residual + k, dim - k, 0.0f));
            store(total + k, dim - k, v);
        }
        squares[i] = fma(v, v, squares[i]);
    });
    const float rstd = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(dim) + eps);
    const Vec scale = splat(rstd), shift = splat(offset);
    const float* source = residual == nullptr ? x : total;
    each(dim, [&](int64_t, int64_t k) {
        const Vec w = add(load(weight + k, dim - k, 0.0f), shift);
        const Vec v = mul(load(source + k, dim - k, 0.0f), scale);
        store(y + k, dim - k, mul(v, w));
    });
    return rstd;
}

inline void norm_row_backward(const float* dy, const float* d_total, const float* x, float rstd,
                              const float* weight, float* dx, int64_t dim, float offset) {
    const Vec scale = splat(rstd), shift = splat(offset);
    const auto gradient = [&](int64_t k) {
        const Vec w = add(load(weight + k, dim - k, 0.0f), shift);
        return mul(load(dy + k, dim - k, 0.0f), w);
    };
    Vec dot[kVecs];
    for (Vec& d : dot) d = splat(0.0f);
    each(dim, [&](int64_t i, int64_t k) {
        dot[i] = fma(gradient(k), mul(load(x + k, dim - k, 0.0f), scale), dot[i]);
    });
    const Vec mean = splat(sum_lanes(dot) / static_cast<float>(dim));
    each(dim, [&](int64_t, int64_t k) {
        const Vec unit = mul(load(x + k, dim - k, 0.0f), scale);
        Vec d = mul(scale, fnma(unit, mean, gradient(k)));
        if (d_total != nullptr) d = add(d, load(d_total + k, dim - k, 0.0f));
        store(dx + k, dim - k, d);
    });
}

// Value and slope of the activation at g.
struct Silu {
    static void at(Vec g, Vec& value, Vec& slope) {
        const Vec one = splat(1.0f);
        const Vec sigmoid = div(one, add(one, exp(sub(splat(0.0f), g))));
        value = mul(g, sigmoid);
        slope = mul(sigmoid, fma(g, sub(one, sigmoid), one));
    }
};

struct GeluTanh {
    static void at(Vec g, Vec& value, Vec& slope) {
        const Vec one = splat(1.0f), half = splat(0.5f);
        const Vec c = splat(0.7978845608f), cubic = splat(0.044715f);
        const Vec g2 = mul(g, g);
        const Vec inner = mul(mul(c, g), fma(cubic, g2, one));
        const Vec t = tanh(inner);
        const Vec rise = mul(half, add(one, t));
        value = mul(g, rise);
        const Vec inner_slope = mul(c, fma(mul(splat(3.0f), cubic), g2, one));
        const Vec fall = mul(mul(half, g), fnma(t, t, one));
        slope = fma(fall, inner_slope, rise);
    }
};

template <class Act>
void gate_chunk(const float* gate, const float* up, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        Vec value, slope;
        Act::at(load(gate + i, n - i, 0.0f), value, slope);
        store(y + i, n - i, mul(value, load(up + i, n - i, 0.0f)));
    }
}

template <class Act>
void gate_chunk_backward(const float* dy, const float* gate, const float* up, float* d_gate,
                         float* d_up, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        Vec value, slope;
        Act::at(load(gate + i, n - i, 0.0f), value, slope);
        const Vec d = load(dy + i, n - i, 0.0f);
        const Vec du = mul(d, value);
        const Vec dg = mul(mul(d, load(up + i, n - i, 0.0f)), slope);
        store(d_up + i, n - i, du);
        store(d_gate + i, n - i, dg);
    }
}

inline void rotate(const float* x, const float* cosine, const float* sine, float* y, int64_t half,
                   float sign) {
    const Vec turn = splat(sign);
    for (int64_t k = 0; k < half; k += kLanes) {
        const int64_t left = half - k;
        const Vec a = load(x + k, left, 0.0f), b = load(x + half + k, left, 0.0f);
        Vec sa = load(sine + k, left, 0.0f), sb = load(sine + half + k, left, 0.0f);
        const Vec ca = load(cosine + k, left, 0.0f), cb = load(cosine + half + k, left, 0.0f);
        if (sign < 0) std::swap(sa, sb);  // the transpose of the rotation
        sa = mul(sa, turn);
        sb = mul(sb, turn);
        store(y + k, left, fnma(b, sa, mul(a, ca)));
        store(y + half + k, left, fma(a, sb, mul(b, cb)));
    }
}

inline Rows rows() {
    return {norm_row,
            norm_row_backward,
            {gate_chunk<Silu>, gate_chunk<GeluTanh>},
            {gate_chunk_backward<Silu>, gate_chunk_backward<GeluTanh>},
            rotate};
}
