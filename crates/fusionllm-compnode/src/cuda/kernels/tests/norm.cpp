#include "check.h"
#include "../norm.cu"

// Mean and rstd of a row, in double.
template <class T> void statistics(const Tensor<T>& x, size_t at, u32 dim, float eps, double& mean, double& rstd) {
    double m = 0, v = 0;
    for (u32 c = 0; c < dim; c++) m += x.at(at + c);
    m /= dim;
    for (u32 c = 0; c < dim; c++) v += (x.at(at + c) - m) * (x.at(at + c) - m);
    mean = m;
    rstd = 1 / sqrt(v / dim + eps);
}
template <class T> void forward(u32 rows, u32 dim, float offset) {
    size_t n = (size_t)rows * dim;
    Tensor<T> x(n, 2.f), residual(n, 2.f);
    for (size_t i = 0; i < n; i++) x.set(i, x.at(i) + offset);
    Tensor<float> weight(dim, 1.f), bias(dim, 1.f);
    float eps = 1e-5f;
    // Alone; with a residual; its sum over x; its sum not wanted, nor mean and rstd.
    for (int kind = 0; kind < 4; kind++) {
        Tensor<T> v(n), sum(n), out(n), in = x.copy();
        for (size_t i = 0; i < n; i++)
            v.set(i, kind == 0 ? x.at(i) : round_to<T>((float)x.at(i) + (float)residual.at(i)));
        Tensor<float> mean(rows), rstd(rows);
        RUN(layer_norm, T, blocks(rows, 8), 1, in.data(), kind ? residual.data() : nullptr,
            kind == 1   ? sum.data()
            : kind == 2 ? in.data()
                        : nullptr,
            weight.data(), bias.data(), out.data(), kind == 3 ? nullptr : mean.data(),
            kind == 3 ? nullptr : rstd.data(), rows, dim, eps);
        std::vector<double> m(rows), s(rows);
        for (u32 r = 0; r < rows; r++) statistics(v, (size_t)r * dim, dim, eps, m[r], s[r]);
        compare(
            named<T>("layer_norm"), out,
            [&](size_t i) {
                size_t r = i / dim, c = i % dim;
                return (v.at(i) - m[r]) * s[r] * weight.at(c) + bias.at(c);
            },
            bound<T>(2e-5));
        if (kind == 1 || kind == 2)
            compare(named<T>("layer_norm") + " sum", kind == 1 ? sum : in, [&](size_t i) { return v.at(i); }, 0.);
        if (kind == 3) continue;
        compare(named<T>("layer_norm") + " mean", mean, [&](size_t r) { return m[r]; }, 1e-6);
        compare(named<T>("layer_norm") + " rstd", rstd, [&](size_t r) { return s[r]; }, 1e-5);
    }
}
template <class T> void backward(u32 rows, u32 dim, u32 rows_per_block) {
    size_t n = (size_t)rows * dim;
    u32 parts = blocks(rows, rows_per_block);
    Tensor<T> x(n, 2.f), dy(n, 2.f), addend(n, 2.f);
    Tensor<float> weight(dim, 1.f), mean(rows), rstd(rows);
    for (u32 r = 0; r < rows; r++) {
        double m, s;
        statistics(x, (size_t)r * dim, dim, 1e-5f, m, s);
        mean.set(r, m);
        rstd.set(r, s);
    }
    std::vector<double> dx(n), dw((size_t)parts * dim), db((size_t)parts * dim);
    for (u32 r = 0; r < rows; r++) {
        double g = 0, gx = 0;
        auto xhat = [&](u32 c) { return (x.at((size_t)r * dim + c) - mean.at(r)) * rstd.at(r); };
        for (u32 c = 0; c < dim; c++) {
            double d = dy.at((size_t)r * dim + c);
            g += d * weight.at(c);
            gx += d * weight.at(c) * xhat(c);
            dw[(size_t)(r / rows_per_block) * dim + c] += d * xhat(c);
            db[(size_t)(r / rows_per_block) * dim + c] += d;
        }
        for (u32 c = 0; c < dim; c++)
            dx[(size_t)r * dim + c] =
                rstd.at(r) * (dy.at((size_t)r * dim + c) * weight.at(c) - g / dim - xhat(c) * gx / dim);
    }
    for (bool with : {false, true}) {
        Tensor<T> source = dy.copy(), apart(n), &out = with ? source : apart;
        Tensor<float> partial((size_t)parts * 2 * dim);
        RUN(layer_norm_grad, T, parts, 1, source.data(), x.data(), weight.data(), mean.data(), rstd.data(),
            with ? addend.data() : nullptr, out.data(), partial.data(), rows, dim, rows_per_block);
        compare(
            named<T>("layer_norm_grad"), out, [&](size_t i) { return dx[i] + (with ? addend.at(i) : 0); },
            bound<T>(1e-5));
        compare(
            named<T>("layer_norm_grad") + " partial", partial,
            [&](size_t i) {
                size_t part = i / (2 * dim), c = i % dim;
                return (i / dim % 2 ? db : dw)[part * dim + c];
            },
            1e-5);
    }
}
int main() {
    for (u32 dim : {1u, 5u, 8u, 64u, 100u, 513u, 768u, 1000u, 1600u, 2048u, 4096u, 5000u}) {
        forward<float>(9, dim, 0.f);
        forward<u16>(9, dim, 0.f);
        backward<float>(19, dim, 8);
        backward<u16>(19, dim, 8);
    }
    forward<float>(3, 768, 30.f);
    forward<u16>(1, 16384, 3.f);
    for (u32 rows : {1u, 7u, 40u}) {
        backward<float>(rows, 768, 11);
        backward<u16>(rows, 768, 11);
        backward<u16>(rows, 1536, 40);
        backward<float>(rows, 24, 3);
    }
    backward<float>(3, 16384, 2);
    backward<u16>(3, 16384, 2);
    backward<u16>(5, 6144, 2);
    return report();
}
